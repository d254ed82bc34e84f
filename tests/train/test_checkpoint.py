"""A kill, a full disk or a flipped bit during or after a save never costs more than that one checkpoint."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from isofusion.config import ModelConfig, TrainConfig  # noqa: E402
from isofusion.errors import InputError, RunFailure  # noqa: E402
from isofusion.train import checkpoint  # noqa: E402
from isofusion.train.optimizer import GroupRules, build_optimizer  # noqa: E402

RULES = GroupRules(lambda name, cfg: 1.0, lambda name: True, lambda name: False)


def pair(value: float = 1.0):
    model = torch.nn.Linear(3, 2, bias=False)
    torch.nn.init.constant_(model.weight, value)
    optimizer = build_optimizer(model, ModelConfig(width=16, head_dim=8, patch_size=8), TrainConfig(), RULES)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, value: float = 1.0, keep: tuple[int, ...] = ()) -> Path:
    return checkpoint.save(folder, step, *pair(value), {"note": step}, keep=keep)


def test_round_trip(tmp_path: Path) -> None:
    model, optimizer = pair(3.0)
    checkpoint.save(tmp_path, 7, model, optimizer, {"tally": {"n": 5}})
    path, files = checkpoint.newest_whole(tmp_path)
    fresh, fresh_optimizer = pair(0.0)
    assert checkpoint.restore(files, fresh, fresh_optimizer) == {"step": 7, "tally": {"n": 5}}
    assert torch.equal(fresh.weight, model.weight)
    for key, value in optimizer.state[model.weight].items():
        assert torch.equal(fresh_optimizer.state[fresh.weight][key], value), key
    assert path.name == "step_7"
    assert (tmp_path / "latest").read_text() == "step_7\n"
    assert torch.equal(checkpoint.load_tensors(path)["weight"], model.weight)


def test_torch_generator_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    save(tmp_path, 1)
    expected = torch.rand(3)
    checkpoint.restore(checkpoint.newest_whole(tmp_path)[1], *pair())
    assert torch.equal(torch.rand(3), expected)


def test_old_ones_go_and_forks_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, keep=(20,))
    assert checkpoint.steps(tmp_path) == [50, 40, 20]
    checkpoint.prune(tmp_path, {20, 50})
    assert checkpoint.steps(tmp_path) == [50, 20]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda p: flip(p / "model.safetensors"), "sha256"),
        (lambda p: (p / "optimizer.safetensors").unlink(), "FileNotFoundError"),
        (lambda p: os.truncate(p / "model.safetensors", 10), "10 bytes"),
        (lambda p: (p / "manifest.json").write_text("{"), "JSONDecodeError"),
        (lambda p: (p / "manifest.json").write_text("[]"), "TypeError"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_message(tmp_path: Path, harm, why: str) -> None:
    save(tmp_path, 1)
    harm(save(tmp_path, 2))
    said: list[str] = []
    path, _ = checkpoint.newest_whole(tmp_path, said.append)
    assert path.name == "step_1"
    assert len(said) == 1
    assert "step_2 is damaged" in said[0]
    assert why in said[0]
    save(tmp_path, 2, value=4.0)  # the run reaches step 2 again and replaces it
    assert checkpoint.newest_whole(tmp_path)[0].name == "step_2"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import checkpoint, pair, save
pair()  # the first AdamW step imports for seconds: once, before the forks
write, sync = checkpoint.write_file, checkpoint.sync_folder
for call in {calls}:
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        continue
    folder, done = Path({root!r}) / str(call), 0
    save(folder, 1)
    def dying(real):
        def call_or_die(*args):
            global done
            done += 1
            if done == call:
                if real is write:  # die with half of the bytes on the disk
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        return call_or_die
    checkpoint.write_file, checkpoint.sync_folder = dying(write), dying(sync)
    save(folder, 2, value=9.0)
    os._exit(0)
"""


def test_kill_9_during_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    calls = range(1, 9)  # 4 files, their folder; rename; the parent; the pointer and its folder
    code = KILLED.format(tests=str(Path(__file__).parent), root=str(tmp_path), calls=list(calls))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["-9"] * len(calls), done.stdout + done.stderr
    for call in calls:
        folder = tmp_path / str(call)
        renamed = (folder / "step_2").exists()
        assert renamed == (call > 5)
        checkpoint.clean(folder)
        assert not list(folder.glob("step_*.tmp"))
        path, files = checkpoint.newest_whole(folder, lambda text: pytest.fail(text))
        assert path.name == ("step_2" if renamed else "step_1")
        model, optimizer = pair()
        checkpoint.restore(files, model, optimizer)
        assert model.weight.mean().item() == pytest.approx(9.0 if renamed else 1.0, abs=0.01)
        save(folder, 3)
        assert checkpoint.steps(folder)[0] == 3


def test_kill_9_while_an_old_one_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    class Killed(BaseException):
        pass

    def half(path: Path, *args: object, **kw: object) -> None:
        (path / "manifest.json").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", half)
        with pytest.raises(Killed):
            save(tmp_path, 3)
    said: list[str] = []
    assert checkpoint.newest_whole(tmp_path, said.append)[0].name == "step_3"
    assert checkpoint.steps(tmp_path) == [3, 2]
    checkpoint.clean(tmp_path)
    assert not list(tmp_path.glob("*.old"))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    real = checkpoint.write_file

    def full(path: Path, data: bytes) -> None:
        real(path, data[: len(data) // 2])
        if path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(RunFailure, match=r"step_2.*No space left on device.*\(step_1\).*untouched; free at least"):
        save(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*.tmp"))
    assert checkpoint.newest_whole(tmp_path)[0].name == "step_1"


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = torch.nn.Linear(5, 2, bias=False)
    with pytest.raises(InputError, match=r"does not fit this model.*size mismatch"):
        checkpoint.load_model(tmp_path / "step_1", other)


def test_differences_name_each_setting() -> None:
    then, now = {"a": {"b": 1, "c": 2}, "d": "x"}, {"a": {"b": 1, "c": 3}, "d": "y"}
    assert checkpoint.differences(then, now) == ["a.c: 2, now 3", 'd: "x", now "y"']
    with pytest.raises(InputError, match=r"run 1: made with other settings.*a\.c: 2, now 3"):
        checkpoint.check_same("run 1", then, now)
    checkpoint.check_same("run 1", then, json.loads(json.dumps(then)))


def test_nothing_yet(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path / "none") is None
    assert checkpoint.newest_checkpoint(tmp_path) is None
    checkpoint.clean(tmp_path / "none")
