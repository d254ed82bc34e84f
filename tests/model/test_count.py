"""Counts against real modules, the paper's sizes, and torch's own FLOP counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from isofusion.data.batch import PackedBatch
from isofusion.model import native
from isofusion.model.count import (
    PAPER_MODELS,
    PAPER_SIZES,
    batch_shape,
    count_parameters,
    flops,
    modules_on_meta,
    six_nd,
)
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights


@pytest.mark.parametrize("name", list(PAPER_MODELS))
def test_the_papers_models_have_the_papers_sizes(name: str) -> None:
    real = modules_on_meta(PAPER_MODELS[name])
    size = PAPER_SIZES[name]
    assert real == count_parameters(PAPER_MODELS[name])
    assert real.n_active == pytest.approx(size.formula_total, rel=0.003)
    assert real.n_active == pytest.approx(size.label, rel=0.0075)
    if size.formula_encoder is not None:
        assert real.n_encoder == pytest.approx(size.formula_encoder, rel=0.003)
        assert real.n_decoder == pytest.approx(size.formula_decoder, rel=0.003)


def test_nineteen_models_are_known_and_experts_have_the_derived_totals() -> None:
    assert len(PAPER_MODELS) == 19
    totals = [1.20e9, 2.15e9, 4.51e9, 8.18e9, 11.76e9, 17.53e9]
    experts = [count_parameters(c).n_total for n, c in PAPER_MODELS.items() if n.startswith("moe")]
    assert experts == pytest.approx(totals, rel=0.004)


@pytest.mark.parametrize("kind", ["early", "late", "moe", "routed"])
def test_closed_form_equals_modules_for_tiny_models(kind: str, make_config: Callable[..., Any]) -> None:
    for changes in ({}, {"top_k": 2} if kind == "moe" else {"depth": 3}, {"width": 24, "ffn_multiple": 5}):
        cfg = make_config(kind, **changes)
        assert modules_on_meta(cfg) == count_parameters(cfg)


def test_active_parameters_leave_out_idle_experts(make_config: Callable[..., Any]) -> None:
    dense, moe = count_parameters(make_config()), count_parameters(make_config("moe"))
    router = moe.by_role["router"]
    assert moe.n_active == dense.n_active + router
    assert moe.n_total == dense.n_total + router + 3 * dense.by_role["ffn"]


def test_batch_shape_counts_what_the_mask_allows(batch: PackedBatch) -> None:
    from isofusion.model.attention import may_attend

    slot = np.arange(batch.n_slots)
    side = {"doc": batch.doc_id, "image": batch.image_id, "slot": slot}
    allowed = may_attend({n: v[:, None] for n, v in side.items()}, {n: v[None, :] for n, v in side.items()})
    shape = batch_shape(batch)
    assert shape.attention_pairs == allowed[batch.doc_id >= 0].sum()
    assert (shape.images, shape.image_tokens) == (4, 16)
    assert shape.text_tokens + shape.image_tokens == (batch.doc_id >= 0).sum()
    assert shape.targets == (batch.targets >= 0).sum()
    assert batch_shape(batch.torch()) == shape


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("early", {}), ("late", {}), ("moe", {}), ("moe", {"top_k": 3}), ("routed", {})],
    ids=["early", "late", "moe", "moe top 3", "routed"],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_ledger_equals_torchs_counter(
    kind: str,
    changes: dict[str, int],
    training: bool,
    build_batch: Callable[..., PackedBatch],
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)  # the counter sees PyTorch's operations alone
    # no padding (the ledger leaves it out); width 18 sends experts through plain products, which the counter sees
    batch = build_batch(["tiiiittttt|ttiiiitt", "tttttttttttttttttt"])
    cfg = make_config(kind, width=18, head_dim=2, ffn_multiple=1, **changes)
    model = Decoder(cfg, "sdpa")
    init_weights(model, cfg, 0)
    with FlopCounterMode(display=False) as counter:
        nll, _ = model.token_losses(batch.torch())
        if training:
            nll.sum().backward()
    counted = sum(
        n
        for operation, n in counter.get_flop_counts()["Global"].items()
        if str(operation).rpartition(".")[2] in ("mm", "addmm", "bmm", "_grouped_mm")
    )
    ledger = flops(cfg, batch_shape(batch), training)
    scores = sum(n for role, n in ledger.items() if "scores" in role)
    assert scores > 0
    assert counted == ledger["total"] - scores
    assert sum(n for role, n in ledger.items() if role != "total") == ledger["total"]


def test_attention_scores_are_four_widths_per_pair_and_layer(
    batch: PackedBatch, make_config: Callable[..., Any]
) -> None:
    cfg = make_config("late")
    shape = batch_shape(batch)
    ledger = flops(cfg, shape, training=False)
    decoder = ledger["scores/text"] + ledger["scores/image"]
    assert decoder == pytest.approx(4 * 16 * 2 * shape.attention_pairs)
    assert ledger["encoder-scores/image"] == 4 * 8 * 2 * (4 * 4 * 4)


def test_six_nd_by_fusion(make_config: Callable[..., Any]) -> None:
    early, late, moe = (make_config(k) for k in ("early", "late", "moe"))
    n = count_parameters(late)
    assert six_nd(early, 100, 0.5) == 600 * count_parameters(early).n_total
    assert six_nd(late, 100, 0.25) == 600 * (0.25 * n.n_encoder + n.n_decoder)
    assert six_nd(moe, 100, 0.5) == 600 * count_parameters(moe).n_active


def test_the_command_prints_numbers_without_torch_and_refuses_nonsense() -> None:
    import json
    import subprocess
    import sys

    code = (
        "import sys, typer; from isofusion.cli.count import command\n"
        "app = typer.Typer(); app.command()(command); app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "early-275m", "--json"], capture_output=True, text=True, check=True
    )
    (row,) = json.loads(done.stdout)
    assert row["n_total"] == count_parameters(PAPER_MODELS["early-275m"]).n_total
    assert abs(row["paper"]["formula_deviation"]) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["early-9b"], 'no model "early-9b"'),
        (["--width", "50", "--head-dim", "32"], "width 50 is not a multiple"),
        (["--tokens", "-1"], "must be positive"),
        (["--image-share", "2"], "between 0 and 1"),
        (["--device", "tpu"], "choose cpu or cuda"),
    ],
)
def test_bad_arguments_get_one_clear_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from isofusion.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["count", *arguments])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_meta_modules_need_no_memory() -> None:
    with torch.device("meta"):
        model = Decoder(PAPER_MODELS["moe-3.35b"])
    assert all(p.is_meta for p in model.parameters())
