"""A run killed anywhere and resumed is the uninterrupted run, to the last bit; a wrong resume is refused with reasons.

The data are a small source of random documents with the layout of real batches; models are real ones.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.config import RunConfig  # noqa: E402
from isofusion.data.batch import PackedBatch  # noqa: E402
from isofusion.data.pack import Piece, build  # noqa: E402
from isofusion.errors import InputError, RunFailure  # noqa: E402
from isofusion.train import checkpoint  # noqa: E402
from isofusion.train.loop import LostFork, build_decoder, train_run  # noqa: E402
from isofusion.train.metrics import read_metrics  # noqa: E402
from isofusion.train.schedule import lr_factor  # noqa: E402

N, L, VOCAB = 4, 32, 40
CLOCKS = {"wall_s": 0, "input_wait_s": 0}


class Words:
    vocab_size, pad_id, bos_id, eos_id, image_id, digest = VOCAB, 0, 1, 2, 3, "words"

    def n_bytes(self, ids: np.ndarray) -> int:
        return 2 * len(ids)


class FakeStream:
    """Captions whose words repeat their image's brightness: batch(step) is a function of (seed, split, step)."""

    def __init__(self, config: RunConfig, split: str, fingerprint: str = "data-1") -> None:
        self.config, self.split, self.fingerprint = config, split, fingerprint
        self.tokenizer, self.domains, self.sources = Words(), ("caption",), []

    def _piece(self, key: tuple[int, ...]) -> Piece:
        rng = np.random.default_rng(key)
        word = int(rng.integers(4, VOCAB))
        ids = np.array([1, *[3] * N, *[word] * 6, 2], np.int32)
        image = np.where(ids == 3, 0, -1).astype(np.int32)
        name = "caption:0:" + "-".join(map(str, key))
        return Piece(name, ids, image, np.full((N, 48), word * 5, np.uint8))

    def _rows(self, key: tuple[int, ...], rows: int) -> PackedBatch:
        pieces = [[self._piece((*key, r, 0)), self._piece((*key, r, 1))] for r in range(rows)]
        return build(pieces, L, N, 48, 0, 0).batch

    def batch(self, step: int) -> PackedBatch:
        return self._rows((self.config.seed, 0, step), self.config.train.rows_per_step)

    def val_batches(self, domain: str) -> list[PackedBatch]:
        return [self._rows((1, 1, i), 2) for i in range(2)]

    def report(self, steps: int) -> dict[str, Any]:
        return {"rows": steps * self.config.train.rows_per_step}


def config(kind: str = "trunk", **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "study": "t", "arm": "early", "size": "s", "seed": 3, "kind": "trunk", "end_step": 12, "forks": [8, 12],
        "model": {"width": 16, "depth": 2, "head_dim": 8, "ffn_multiple": 16, "vocab_size": VOCAB, "patch_size": 4,
                  "n_experts": 2},
        "data": {"sources": [{"name": "c", "domain": "caption", "format": "world", "weight": 1}], "row_len": L,
                 "image_size": 8, "patch_size": 4},
        "train": {"lr": 0.01, "warmup_steps": 2, "rows_per_step": 2, "checkpoint_every": 5, "log_every": 4},
    }  # fmt: skip
    if kind == "branch":
        tree |= {"kind": "branch", "parent": "early-s-s3-trunk", "start_step": 8, "end_step": 14, "forks": []}
    for key, value in changes.items():
        part, _, leaf = key.partition("__")
        if leaf:
            tree[part] = {**tree[part], leaf: value}
        else:
            tree[part] = value
    return RunConfig.model_validate(tree)


def train(root: Path, run: RunConfig, **kw: Any) -> str:
    kw = {"stream_factory": FakeStream, "threads": 1, **kw}
    return train_run(run, root / run.name, root, **kw)


def after(n: int):
    """stop() that says so at its n-th call."""
    calls = iter(range(1, 10**9))
    return lambda: next(calls) >= n


def lines(root: Path, run: RunConfig) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "wall"} for r in read_metrics(root / run.name / "metrics.jsonl")]


def weights(root: Path, run: RunConfig) -> dict[str, Any]:
    found = checkpoint.newest_checkpoint(root / run.name)
    assert found is not None
    assert found.name == f"step_{run.end_step}"
    return checkpoint.load_tensors(found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted trunk and its branch."""
    root = tmp_path_factory.mktemp("whole")
    assert train(root, config()) == "done"
    assert train(root, config("branch")) == "done"
    return root


def assert_same(a: Path, b: Path, run: RunConfig) -> None:
    assert lines(a, run) == lines(b, run)
    left, right = weights(a, run), weights(b, run)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)
    if run.kind == "branch":
        one, two = (json.loads((root / run.name / "eval.json").read_text()) for root in (a, b))
        assert {**one, **CLOCKS} == {**two, **CLOCKS}


def test_metrics_of_a_whole_run(whole: Path) -> None:
    trunk, branch = lines(whole, config()), lines(whole, config("branch"))
    assert [r["step"] for r in trunk] == list(range(1, 13))
    assert [r["step"] for r in branch] == list(range(9, 15))
    assert [r["lr"] for r in branch] == pytest.approx([0.01 * lr_factor(s, config("branch")) for s in range(8, 14)])
    assert branch[0]["keys_digest"] == trunk[8]["keys_digest"]
    assert branch[0]["loss"] == trunk[8]["loss"]  # the same weights on the same batch
    keys = FakeStream(config(), "train").batch(0).keys
    assert trunk[0]["keys_digest"] == hashlib.sha256("\n".join(keys).encode()).hexdigest()
    per_step = 2 * 2 * 12
    assert [r["tokens"] for r in trunk] == [per_step * (i + 1) for i in range(12)]
    assert branch[-1]["tokens"] == per_step * 14  # the parent's tokens count
    assert branch[-1]["image_tokens"] == 2 * 2 * N * 14
    assert trunk[0]["targets"] == trunk[0]["targets_caption"] == 2 * 2 * 7
    assert trunk[0]["loss_text"] is None
    assert trunk[-1]["loss"] < trunk[0]["loss"]
    assert trunk[0]["balance_loss"] > 0


def test_folder_of_a_finished_branch(whole: Path) -> None:
    run = config("branch")
    folder = whole / run.name
    record = json.loads((folder / "eval.json").read_text())
    entry = record["domains"]["caption"]
    assert record["mean"] == entry["loss"]
    assert entry["targets"] == 2 * 2 * 2 * 7
    assert 0 < entry["loss"] < entry["chance"] + 1
    assert entry["chance"] == pytest.approx(math.log(VOCAB))
    assert entry["bits_per_byte"] == pytest.approx(entry["loss"] / math.log(2) / 2)
    assert entry["oracle"] is entry["bound"] is None  # these data have no known truth
    assert record["tokens"] == 2 * 2 * 12 * 14
    assert record["step"] == 14
    flops = json.loads((folder / "flops.json").read_text())
    assert record["flops"] == flops["flops"]["total"] > 0
    assert record["flops_6nd"] == flops["flops_6nd"] > 0
    routed = record["routing"]["caption"]
    assert np.array(routed["text"]).shape == (2, 2)
    assert np.array(routed["image"]).sum() == 2 * 2 * 2 * 2 * N  # depth, batches, rows, documents
    with np.load(folder / "eval_docs.npz") as docs:
        assert docs["caption/doc_true"].sum() / docs["caption/doc_targets"].sum() == pytest.approx(entry["loss"])
        assert docs["caption/doc_shuffled"].shape == (8,)
    assert json.loads((folder / "DONE").read_text()) == {"step": 14, "digest": run.digest()}
    assert json.loads((folder / "run.json").read_text())["config"] == run.model_dump(mode="json")
    assert json.loads((folder / "env.json").read_text())["threads"] == 1
    assert checkpoint.steps(folder / "checkpoints") == [14]
    assert checkpoint.steps(whole / config().name / "checkpoints") == [12, 8]  # a trunk keeps its forks


def test_stop_and_resume_is_bit_equal(whole: Path, tmp_path: Path) -> None:
    for run in (config(), config("branch")):
        assert train(tmp_path, run, stop=after(3)) == "interrupted"
        assert not (tmp_path / run.name / "DONE").exists()
        assert train(tmp_path, run, stop=after(2)) == "interrupted"
        assert train(tmp_path, run) == "done"
        assert_same(whole, tmp_path, run)
        assert train(tmp_path, run, stream_factory=None) == "done"  # nothing is opened for a finished run


class Killed(BaseException):
    """Stands for kill -9: nothing in the loop may catch it."""


@pytest.mark.parametrize(("kind", "at"), [("trunk", 2), ("trunk", 4), ("trunk", 7), ("branch", 2), ("branch", 4)])
def test_kill_between_checkpoints_repeats_only_what_came_after(whole: Path, tmp_path: Path, kind: str, at: int) -> None:
    if kind == "branch":
        train(tmp_path, config())
    run = config(kind)
    counts: list[int] = []

    class Dying(FakeStream):
        def batch(self, step: int) -> PackedBatch:
            counts.append(step)
            if len(counts) == at and self.split == "train":
                raise Killed
            return super().batch(step)

    with pytest.raises(Killed):
        train(tmp_path, run, stream_factory=Dying)
    metrics = tmp_path / run.name / "metrics.jsonl"
    if metrics.exists():
        metrics.write_bytes(metrics.read_bytes() + b'{"step": 99, "lo')  # a line cut off by the kill
    last = max([run.start_step, *checkpoint.steps(tmp_path / run.name / "checkpoints")])
    counts.clear()
    counts.extend([-1] * 100)
    assert train(tmp_path, run, stream_factory=Dying) == "done"
    assert counts[100:] == list(range(last, run.end_step))
    assert_same(whole, tmp_path, run)


def test_kill_during_a_checkpoint_write(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, run = checkpoint.write_file, config()

    def die(path: Path, data: bytes) -> None:
        if path.parent.name == "step_8.tmp" and path.name == "optimizer.safetensors":
            real(path, data[:100])
            raise Killed
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", die)
        with pytest.raises(Killed):
            train(tmp_path, run)
    assert (tmp_path / run.name / "checkpoints" / "step_8.tmp").exists()
    assert checkpoint.steps(tmp_path / run.name / "checkpoints") == [5]
    assert train(tmp_path, run) == "done"
    assert_same(whole, tmp_path, run)


def test_kill_during_evaluation_does_not_train_again(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, config())
    run = config("branch")

    class Dying(FakeStream):
        def val_batches(self, domain: str) -> list[PackedBatch]:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path, run, stream_factory=Dying)
    before = (tmp_path / run.name / "metrics.jsonl").read_bytes()
    assert train(tmp_path, run) == "done"
    assert (tmp_path / run.name / "metrics.jsonl").read_bytes() == before
    assert_same(whole, tmp_path, run)


def test_a_rotten_checkpoint_falls_back_with_a_message(whole: Path, tmp_path: Path) -> None:
    run = config()
    train(tmp_path, run, stop=after(9))
    newest = tmp_path / run.name / "checkpoints" / "step_9" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    events: list[dict[str, Any]] = []
    assert train(tmp_path, run, on_event=events.append) == "done"
    assert any("step_9 is damaged" in e.get("message", "") for e in events)
    assert_same(whole, tmp_path, run)


def test_sigterm_checkpoints_and_returns(tmp_path: Path) -> None:
    class Ordered(FakeStream):
        def batch(self, step: int) -> PackedBatch:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step)

    before = signal.getsignal(signal.SIGTERM)
    assert train(tmp_path, config(), stream_factory=Ordered) == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.steps(tmp_path / config().name / "checkpoints")[0] == 4


def test_events(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    train(tmp_path, config(), on_event=events.append)
    steps = [e for e in events if e["phase"] == "train"]
    assert [e["step"] for e in steps if e["step"] % 4 == 0] == [4, 8, 12]
    assert all(e["run"] == config().name and e["end_step"] == 12 and e["tokens_per_s"] > 0 for e in steps)
    assert events[-1]["phase"] == "done"


def test_full_disk_stops_with_the_last_checkpoint_whole(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, run = checkpoint.write_file, config()

    def full(path: Path, data: bytes) -> None:
        if path.parent.name == "step_8.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", full)
        with pytest.raises(RunFailure, match=r"No space left.*step_5.*untouched.*resume"):
            train(tmp_path, run)
    assert train(tmp_path, run) == "done"
    assert_same(whole, tmp_path, run)


def test_non_finite_loss_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Breaks(torch.nn.Module):
        def __init__(self, run: RunConfig) -> None:
            super().__init__()
            self.inner, self.calls = build_decoder(run), 0

        def named_parameters(self, *a: Any, **kw: Any):
            return self.inner.named_parameters(*a, **kw)

        def state_dict(self, *a: Any, **kw: Any):
            return self.inner.state_dict(*a, **kw)

        def token_losses(self, batch: PackedBatch):
            nll, output = self.inner.token_losses(batch)
            self.calls += 1
            return (nll * math.nan if self.calls == 7 else nll), output

    with pytest.raises(RunFailure, match=r"s3-trunk, update 7 of 12: the loss is not finite.*step_5.*train\.lr"):
        train(tmp_path, config(), model_factory=Breaks)
    folder = tmp_path / config().name
    assert checkpoint.newest_checkpoint(folder).name == "step_5"
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")] == list(range(1, 7))


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    train(tmp_path, config(), stop=after(6))
    other = config(train__lr=0.02)
    assert other.name == config().name
    with pytest.raises(InputError, match=r"other settings.*config\.train\.lr: 0\.01, now 0\.02"):
        train(tmp_path, other)
    (tmp_path / config().name / "run.json").unlink()  # the checkpoint alone refuses too
    with pytest.raises(InputError, match=r"step_6.*config\.train\.lr: 0\.01, now 0\.02"):
        train(tmp_path, other)


@pytest.mark.parametrize("text", ["", '{"config": {', "null", "[]"])
def test_a_damaged_description_of_a_run_is_written_anew(whole: Path, tmp_path: Path, text: str) -> None:
    """Unfinished: the run goes on from its checkpoint, which refuses another one. Finished: it is bad input."""
    run = config()
    assert train(tmp_path, run, stop=after(7)) == "interrupted"
    place = tmp_path / run.name / "run.json"
    place.write_text(text)
    with pytest.raises(InputError, match=r"step_7.*config\.train\.lr: 0\.01, now 0\.02"):
        train(tmp_path, config(train__lr=0.02))
    assert place.read_text() == text
    assert train(tmp_path, run) == "done"
    assert_same(whole, tmp_path, run)
    assert json.loads(place.read_text())["digest"] == run.digest()
    place.write_text(text)
    with pytest.raises(InputError, match=r"run\.json: is damaged; restore it, or delete the folder"):
        train(tmp_path, run)


def test_other_data_are_refused(tmp_path: Path) -> None:
    train(tmp_path, config(), stop=after(6))
    with pytest.raises(InputError, match='data_fingerprint: "data-1", now "data-2"'):
        train(tmp_path, config(), stream_factory=lambda c, split: FakeStream(c, split, "data-2"))


def test_branch_needs_its_parent_and_the_same_model(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(LostFork, match=r"needs the fork checkpoint step_8 of its trunk early-s-s3-trunk"):
        train(tmp_path, config("branch"))
    train(tmp_path, config())
    with pytest.raises(InputError, match=r"model\.ffn_multiple: 16, now 32"):
        train(tmp_path, config("branch", model__ffn_multiple=32))
    with pytest.raises(InputError, match=r"train\.rows_per_step: 2, now 4"):
        train(tmp_path, config("branch", train__rows_per_step=4))
    linear = config("branch", train__cooldown_shape="linear")  # the one thing branches may differ in
    assert train(tmp_path, linear) == "done"
    assert lines(tmp_path, linear)[-1]["loss"] != lines(whole, config("branch"))[-1]["loss"]


def test_vocabulary_must_hold_the_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer has 40 tokens and the model 30.*at least 40"):
        train(tmp_path, config(model__vocab_size=30))


def test_two_processes_cannot_train_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / config().name
    folder.mkdir()
    monkeypatch.setattr("isofusion.train.process.LOCK_WAIT_S", 0.2)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunFailure, match="another process trains this run"):
            train(tmp_path, config())
    assert train(tmp_path, config(), stop=after(1)) == "interrupted"
