"""Each benchmark in small: it runs, its numbers mean what they say, and its verdict can fail. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = "--width 16 --depth 1 --head-dim 8 --context 128 --rows 2 --vocabulary 512 --rounds 2 --threads 1"


@pytest.fixture
def benchmark(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """benchmarks/NAME.py as a module; the process's torch settings come back."""
    before = set(sys.modules), list(sys.path), torch.get_num_threads()
    spec = importlib.util.spec_from_file_location(f"benchmark_{request.param}", FOLDER / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before[0]:
        if name in ("common", "adapters", spec.name):
            del sys.modules[name]
    sys.path[:] = before[1]
    torch.set_num_threads(before[2])


def run(module: ModuleType, tmp_path: Path, text: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "result.json"
    code = module.main([*text.split(), "--out", str(out)])
    return code, json.loads(out.read_text())


@pytest.mark.parametrize("benchmark", ["peers"], indirect=True)
def test_peers_compares_with_the_peer_it_is_given(
    benchmark: ModuleType, tmp_path: Path, stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(benchmark, tmp_path, f"--nanogpt {stand_in} --modes eager {TINY}")
    assert "nanochat: left out, no --nanochat DIR was given" in capsys.readouterr().out
    mine, peer = result["rows"]
    assert (mine["model"], peer["model"]) == ("isofusion", "nanogpt")
    # 2 x 12 d^2 of layers, the head, and the causal scores: 3 passes of 2 FLOPs per weight and token
    weights = 2 * 12 * 16 * 16 + 512 * 16
    assert peer["flops_per_token"] == pytest.approx(6 * weights + 12 * 16 * 1 * 129 / 2)
    assert peer["isofusion_over_this"]["median"] > 0
    assert result["verdict"]["met"] is (code == 0)
    assert sys.modules["model"].ASKED == ["cuda"]  # its own optimizer, the fused one


@pytest.mark.parametrize("benchmark", ["peers"], indirect=True)
def test_peers_verdict_needs_both_targets_in_every_mode(benchmark: ModuleType) -> None:
    def row(model: str, mode: str, rate: float, share: float, over: float | None = None) -> dict[str, Any]:
        out: dict[str, Any] = {"model": model, "mode": mode, "flops_per_s": rate, "share_of_gemm": {"median": share}}
        return out if over is None else {**out, "isofusion_over_this": {"median": over}}

    good = [row("isofusion", "eager", 1.4, 0.6), row("a", "eager", 1.0, 0.4, 1.4), row("b", "eager", 0.5, 0.4, 2.8)]
    judged = benchmark.verdict({"rows": good})
    assert judged["met"]
    assert judged["by_mode"]["eager"] == {"best_peer": "a", "ratio": 1.4, "share_needed": pytest.approx(0.52)}
    slow = [*good, row("isofusion", "compiled", 1.5, 0.6), row("a", "compiled", 1.4, 0.5, 1.07)]
    assert not benchmark.verdict({"rows": slow})["met"]
    assert not benchmark.verdict({"rows": [row("isofusion", "eager", 1.4, 0.4), *good[1:]]})["met"]


@pytest.mark.parametrize("benchmark", ["adapters"], indirect=True)
def test_one_flop_rule_for_peers_and_the_exact_ledger(benchmark: ModuleType) -> None:
    """The peers' rule, given isofusion's own weights, is isofusion's ledger of the same batch."""
    from common import products, text_batch

    from isofusion.config import ModelConfig
    from isofusion.model.count import batch_shape, flops

    shape = benchmark.Shape(width=32, depth=3, head_dim=16, context=64, rows=2, vocabulary=512)
    config = ModelConfig(width=32, depth=3, head_dim=16, ffn_multiple=16, vocab_size=512, patch_size=8)
    batch = text_batch(shape.rows, shape.context, shape.vocabulary)
    targets = batch_shape(batch).targets
    assert targets == shape.rows * (shape.context - 1)
    weights = sum(inputs * outputs * count for _, inputs, outputs, count in products(config, shape.tokens, targets))
    assert shape.flops(weights, targets) == pytest.approx(flops(config, batch_shape(batch))["total"])


@pytest.mark.parametrize("benchmark", ["adapters"], indirect=True)
def test_packages_that_are_not_there_are_replaced_with_their_modules(benchmark: ModuleType, tmp_path: Path) -> None:
    code = "import absent\nfrom absent.inner import Thing\nERRORS = (absent.errors.Lost, absent.Other, Thing)\n"
    (tmp_path / "asks_for_absent.py").write_text(code)
    with benchmark._stand_ins("absent", "absent.errors", "absent.inner"):
        module = benchmark._import("asks_for_absent", tmp_path)
    assert [one.__name__ for one in module.ERRORS] == ["Lost", "Other", "Thing"]
    assert not {"absent", "absent.errors", "absent.inner"} & set(sys.modules)
    del sys.modules["asks_for_absent"]


@pytest.mark.parametrize("benchmark", ["experts"], indirect=True)
def test_experts_at_equal_active_parameters(benchmark: ModuleType, tmp_path: Path) -> None:
    code, result = run(benchmark, tmp_path, f"{TINY} --batches 2")
    text, dense, experts = result["rows"]
    assert (text["image_share"], dense["image_share"] > 0.2) == (0, True)
    assert experts["n_active"] - dense["n_active"] == 8 * 16  # the router
    assert experts["n_total"] > experts["n_active"]
    assert result["met"] is (code == 0)


@pytest.mark.parametrize("benchmark", ["trunks"], indirect=True)
def test_trunks_counts_what_both_ways_cost(benchmark: ModuleType, tmp_path: Path) -> None:
    assert benchmark.Ladder(smallest=1000).floor() == pytest.approx(0.477, abs=5e-4)  # the published saving
    _, result = run(
        benchmark, tmp_path, "--widths 16 --budgets 2 --smallest 10 --seeds 1 --depth 1 --val-rows 1 --jobs 1"
    )
    (cell,) = result["cells"]
    assert cell["loss_shared"][0] == cell["loss_alone"][0]  # same schedule, same data: the same run, to the bit
    assert cell["loss_shared"][1] != cell["loss_alone"][1] or result["bias"]["nats"] == 0
    assert result["flops_share"] == pytest.approx(result["floor"], rel=0.1)
    assert cell["seconds_alone"] > 0 < cell["seconds_shared"]


@pytest.mark.parametrize("benchmark", ["input"], indirect=True)
def test_input_reads_files_cold_and_warm(benchmark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"A line of text, number {i}, that says little. " * 6}) for i in range(60)]
    (tmp_path / "data/a.jsonl").write_text("\n".join(lines))
    (tmp_path / "study.toml").write_text(
        '[study]\nname = "small"\nbudgets = [8192]\n'
        '[data]\nrow_len = 128\nimage_size = 16\npatch_size = 8\ntokenizer = "train:300"\n'
        'sources = [{ name = "t", domain = "text", format = "text", weight = 1, '
        'train = ["a.jsonl"], val = ["a.jsonl"] }]\n'
        "[model]\ndepth = 1\nhead_dim = 16\nffn_multiple = 16\npatch_size = 8\n"
        "[train]\nwarmup_steps = 1\nrows_per_step = 2\n"
        '[[arms]]\nname = "early"\n[arms.sizes]\ns64 = { width = 64 }\n'
    )
    text = f"--data {tmp_path / 'data'} --study {tmp_path / 'study.toml'} --epochs 3 --rounds 2 --repeats 2"
    _, result = run(benchmark, tmp_path, text)
    cold, warm = result["throughput"]["cold"], result["throughput"]["warm"]
    assert cold["tokens"] == warm["tokens"] > 1000
    assert cold["open_s"] > 0
    assert len(result["memory"]["resident_mib"]) == 3
    least = min(
        cold["tokens_per_s"] / result["steady"]["model_tokens_per_s"],
        warm["tokens_per_s"] / result["steady"]["model_tokens_per_s"],
        result["steady"]["steady_over_model"]["median"],
    )
    assert result["least"] == pytest.approx(least)
