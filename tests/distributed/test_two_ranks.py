"""Two gloo ranks are one process: the same data, the same losses, checkpoints that either can go on from."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.config import RunConfig  # noqa: E402
from isofusion.data.stream import Stream  # noqa: E402
from isofusion.train import checkpoint  # noqa: E402
from isofusion.train.loop import build_decoder, train_run  # noqa: E402
from isofusion.train.metrics import read_metrics  # noqa: E402

_spec = importlib.util.spec_from_file_location("dist_conftest", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
job, run_config = _shared.job, _shared.run_config

EARLY, LATE, MOE = run_config("early", 10), run_config("late", 5), run_config("moe", 5)
BRANCH = run_config("late", 7, kind="branch", parent=LATE.name, start_step=5, forks=[])
LONG = run_config("moe", 9, variant="long", forks=[4], train={"checkpoint_every": 4})
"""One rank until step 3, two until step 7, one to the end; the asynchronous twin writes beside training."""
MICRO = run_config("moe", 3, variant="micro", train={"rows_per_step": 4})
ODD = run_config("early", 3, variant="odd", train={"rows_per_step": 3})
pytestmark = pytest.mark.timeout(400)  # seconds of a busy machine; some 20 of CPU
SAME = ("step", "tokens", "text_tokens", "image_tokens", "lr", "targets", "targets_caption", "keys_digest")
CLOSE = ("loss", "grad_norm", "loss_caption", "loss_text", "balance_loss")


class Seen:
    """The folders of all runs of this file, and what the ranks said of them."""

    def __init__(self, folder: Path, cache: Path, on_ranks: Any) -> None:
        self.one, self.two, self.copies, self.late = (folder / x for x in ("one", "two", "copies", "asynchronous"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ISOFUSION_CACHE", str(cache))
            for run in (EARLY, LATE, BRANCH, MOE, LONG, MICRO):
                assert self.alone(run, self.one) == "done"
            other = run_config("moe", 5, train={"lr": 0.02})
            calls = iter(range(1, 100))
            assert self.alone(LONG, self.two, stop=lambda: next(calls) == 3) == "interrupted"
            jobs = [
                *(job(run, self.two) for run in (EARLY, LATE, BRANCH, MOE)),
                job(other, self.two),
                job(MOE, self.copies, replicas=2),
                job(LONG, self.two, stop=[1, 4]),
                job(LONG, self.late, asynchronous=True),
                job(MICRO, self.two, env={"ISOFUSION_MICRO_ROWS": "1"}),
                job(ODD, self.two, env={"ISOFUSION_MICRO_ROWS": "1"}),
            ]
            self.said = on_ranks(2, jobs)
            self.written = checkpoint.steps(self.two / LONG.name / "checkpoints")
            assert self.alone(LONG, self.two) == "done"

    @staticmethod
    def alone(run: RunConfig, root: Path, **kw: Any) -> str:
        return train_run(run, root / run.name, root, threads=1, **kw)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, cache: Path, on_ranks: Any) -> Seen:
    return Seen(tmp_path_factory.mktemp("runs"), cache, on_ranks)


def assert_equal(left: Path, right: Path, run: RunConfig, tolerance: float = 1e-5) -> None:
    """The same data, and losses equal within `tolerance`, update by update; and weights at the end."""
    a, b = (read_metrics(root / run.name / "metrics.jsonl") for root in (left, right))
    assert [line["step"] for line in a] == list(range(run.start_step + 1, run.end_step + 1))
    for x, y in zip(a, b, strict=True):
        assert {k: x[k] for k in SAME} == {k: y[k] for k in SAME}
        for key in CLOSE:
            assert y[key] == pytest.approx(x[key], rel=tolerance, abs=tolerance), (x["step"], key)
    one, two = (
        checkpoint.load_tensors(root / run.name / "checkpoints" / f"step_{run.end_step}") for root in (left, right)
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name].shape == value.shape
        torch.testing.assert_close(two[name], value, rtol=0, atol=20 * tolerance, msg=name)


@pytest.mark.parametrize("run", [EARLY, LATE, BRANCH, MOE], ids=lambda run: run.name)
def test_two_ranks_are_one_process(seen: Seen, run: RunConfig) -> None:
    assert seen.said[:4] == [["done", "done"]] * 4
    assert_equal(seen.one, seen.two, run)
    one, two = (json.loads((root / run.name / "flops.json").read_text()) for root in (seen.one, seen.two))
    for key in ("step", "tokens", "flops", "flops_6nd", "shape", "own_tokens"):
        assert two[key] == one[key]


def test_a_rank_without_images_does_not_hang(seen: Seen, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFUSION_CACHE", str(cache))
    stream = Stream(LATE.data, LATE.seed, "train", LATE.train.rows_per_step)
    images = [[stream.batch(s, (rank, 2)).patches.shape[0] for rank in (0, 1)] for s in range(LATE.end_step)]
    assert all(min(pair) == 0 < max(pair) for pair in images)  # in every update of the late run one rank saw none
    assert {pair.index(0) for pair in images} == {0, 1}  # and not always the same


def test_evaluation_of_a_sharded_model(
    seen: Seen, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks' own weights, evaluated by one process: those of two trainings differ by rounding, losses too."""
    monkeypatch.setenv("ISOFUSION_CACHE", str(cache))
    again = tmp_path / BRANCH.name
    shutil.copytree(seen.two / BRANCH.name, again)
    for name in ("DONE", "eval.json", "eval_docs.npz"):
        (again / name).unlink()
    assert seen.alone(BRANCH, tmp_path) == "done"
    one, two = (json.loads((folder / "eval.json").read_text()) for folder in (again, seen.two / BRANCH.name))
    assert two["mean"] == pytest.approx(one["mean"], abs=1e-6)
    for kind in ("loss", "blind"):
        assert two["domains"]["caption"][kind] == pytest.approx(one["domains"]["caption"][kind], abs=1e-6)
    with np.load(again / "eval_docs.npz") as a, np.load(seen.two / BRANCH.name / "eval_docs.npz") as b:
        assert a.files == b.files
        assert all(np.allclose(a[name], b[name], atol=1e-4) for name in a.files)
    trained = json.loads((seen.one / BRANCH.name / "eval.json").read_text())
    assert two["mean"] == pytest.approx(trained["mean"], abs=1e-5)


def test_hybrid_sharding(seen: Seen) -> None:
    assert seen.said[5] == ["done", "done"]
    assert_equal(seen.one, seen.copies, MOE)
    assert json.loads((seen.copies / MOE.name / "env.json").read_text())["replicas"] == 2


def test_an_error_of_rank_0_is_that_of_all(seen: Seen) -> None:
    for said in seen.said[4]:
        assert said.startswith("InputError")
        assert "config.train.lr: 0.01, now 0.02" in said


def test_one_rank_then_two_then_one(seen: Seen) -> None:
    assert seen.said[6] == ["interrupted", "interrupted"]  # rank 1 alone was asked to stop
    assert seen.written == [7, 4, 3]
    assert_equal(seen.one, seen.two, LONG)


def test_an_asynchronous_checkpoint_is_the_same(seen: Seen) -> None:
    assert seen.said[7] == ["done", "done"]
    assert_equal(seen.one, seen.late, LONG)
    folder = seen.late / LONG.name / "checkpoints"
    assert checkpoint.steps(folder) == [9, 4]
    assert sorted(path.name for path in (folder / "step_4").iterdir()) == [
        "manifest.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
        "state.json",
    ]
    assert json.loads((folder / "step_4" / "state.json").read_text())["ranks"] == 2
    weights, rest = checkpoint.tensors_of(checkpoint.read(folder / "step_4"))
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in build_decoder(LONG).state_dict().items()
    }
    moments = {f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in weights}
    assert rest.keys() == moments | {"rng/torch"}
    assert all(float(value) == 4 for name, value in rest.items() if name.startswith("step/"))


def test_micro_batches_on_every_rank(seen: Seen) -> None:
    assert seen.said[8] == ["done", "done"]
    assert_equal(seen.one, seen.two, MICRO)
    for said in seen.said[9]:  # two micro-batches on rank 0, one on rank 1 would hang
        assert said.startswith("InputError")
        assert "3 rows a step (train.rows_per_step) on 2 ranks are uneven" in said


def test_a_damaged_shard_is_found(seen: Seen, tmp_path: Path) -> None:
    path = seen.late / LONG.name / "checkpoints" / "step_9"
    shard = path / "shard-00002-model-00001-of-00001.safetensors"
    data = shard.read_bytes()
    try:
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(checkpoint.DamagedCheckpoint, match=r"shard-00002.*sha256"):
            checkpoint.read(path)
    finally:
        shard.write_bytes(data)
