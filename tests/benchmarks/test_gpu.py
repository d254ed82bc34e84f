"""benchmarks/gpu.py and memory.py without a GPU: what fails costs only itself, and like is set beside like."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("gpu", "gpu_graphs", "gpu_jobs", "gpu_models", "gpu_plain", "gpu_results", "adapters", "memory")
NAMES = ["early-932m", "late-1b", "moe-932m"]


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    """benchmarks/gpu.py under the name by which a new process finds it too."""
    path, threads = list(sys.path), torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("gpu")
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.path[:] = path
    torch.set_num_threads(threads)


def models() -> ModuleType:
    return sys.modules["gpu_models"]


def content(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def row(name: str, rows: int = 4, rate: float = 1.0, **more: Any) -> dict[str, Any]:
    """As `measure` returns it."""
    out = {"name": name, "text": False, "rows": rows, "micro_rows": None, "seconds": 1.0, "tokens_per_s": rate}
    out |= {"flops_per_s": rate, "mfu": 0.5, "mfu_datasheet": None, "memory_measured": None, "waits": None}
    return out | more


def test_a_smoke_run_of_three_sections_merges_into_one_file(tmp_path: Path, stand_in: Path) -> None:
    out = tmp_path / "deep" / "gpu.json"
    arguments = ["--smoke", "--sections", "text,main,check", "--out", str(out), "--peer", f"nanogpt={stand_in}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FOLDER / "gpu.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = content(out)
    assert (found["failed"], found["left_out"]) == ({}, [])
    assert list(found["check"]) == ["early", "late", "moe"]
    for kind in found["check"].values():
        assert kind["largest_difference"] == 0  # the same device twice
        assert kind["images"][0] != kind["images"][1]
        assert kind["waits"] is None
    assert [r["name"] for r in found["rows"]] == [*NAMES, "early-932m", "nanogpt", "plain Llama eager"]
    assert [r["section"] for r in found["rows"]] == ["main"] * 3 + ["text"] * 3
    assert [r["text"] for r in found["rows"]] == [False] * 3 + [True] * 3
    assert all(0 < r["mfu"] < 1 and r["steps"] == 3 for r in found["rows"])
    assert len(found["done"]) == 3 + 3 + 3
    assert "running" not in found
    assert [ratio["target"] for ratio in found["ratios"]] == [0.75, 1.1, 1.1]
    assert "early fusion over nanogpt, FLOP/s, 4 rows of text each" in done.stdout
    assert os.listdir(out.parent) == ["gpu.json"]


# ---- sections in processes of their own -----------------------------------------------------------------------------

DIES = "import os, sys; print('illegal memory access', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
ADDS = """
import json, sys
found = json.load(open(sys.argv[1]))
found["failed"]["jobs: 4 at once"] = "RuntimeError: no"
json.dump({**found, "jobs": [{"jobs": 1}]}, open(sys.argv[1], "w"))
sys.exit(3)
"""


def scripts(monkeypatch: pytest.MonkeyPatch, gpu: ModuleType, out: Path, **code: str) -> list[tuple[str, float]]:
    """Sections are these scripts; returns the list of (name, seconds left) that is filled as they are asked for."""
    asked: list[tuple[str, float]] = []

    def command(_: Any, name: str, seconds: float) -> list[str]:
        asked.append((name, seconds))
        return [sys.executable, "-c", code[name], str(out)]

    monkeypatch.setattr(gpu, "section_command", command)
    return asked


def test_a_section_that_dies_leaves_the_others(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    asked = scripts(monkeypatch, gpu, out, main=DIES, jobs=ADDS, sizes="raise ValueError('no such size')")
    status = gpu.main(["--smoke", "--sections", "sizes,jobs,main", "--seconds", "60", "--out", str(out)])
    assert status == 3
    assert [name for name, _ in asked] == ["main", "sizes", "jobs"]
    assert 60 > asked[0][1] > asked[1][1] > asked[2][1]  # each has what the others left
    found = content(out)
    assert found["jobs"] == [{"jobs": 1}]
    assert list(found["failed"]) == ["main", "sizes", "jobs: 4 at once"]
    assert found["failed"]["main"] == "ended by SIGKILL\nillegal memory access"
    printed = capsys.readouterr().out
    assert "main: ended by SIGKILL" in printed
    assert "failed: sizes: ValueError: no such size" in printed


def test_a_section_that_does_not_end_is_ended(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    scripts(monkeypatch, gpu, out, main="import time; time.sleep(60)", sizes="")
    began = time.monotonic()
    assert gpu.main(["--smoke", "--sections", "main,sizes", "--seconds", "0.5", "--out", str(out)]) == 3
    assert time.monotonic() - began < 20
    assert content(out)["failed"]["main"].startswith("did not end within")
    assert content(out)["left_out"] == ["sizes"]  # no time was left for it


DIES_AT_A_MODEL = """
import json, os, sys
found = json.load(open(sys.argv[1]))
if sys.argv[2:] == ["--again"]:
    assert list(found["failed"]) == ["main: late-1b"]
    found["rows"].append({"section": "main", "what": "moe-932m", "name": "moe-932m", "rows": 4, "text": False})
    json.dump(found, open(sys.argv[1], "w"))
else:
    json.dump({**found, "running": "main: late-1b"}, open(sys.argv[1], "w"))
    print("stack of the kernel", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_section_goes_on_behind_the_model_it_died_at(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    asked = scripts(monkeypatch, gpu, out, main=DIES_AT_A_MODEL, jobs=ADDS)
    assert gpu.main(["--smoke", "--sections", "main,jobs", "--seconds", "60", "--out", str(out)]) == 3
    assert [name for name, _ in asked] == ["main", "main", "jobs"]
    found = content(out)
    assert found["failed"]["main: late-1b"] == "ended by SIGKILL\nstack of the kernel"
    assert [r["name"] for r in found["rows"]] == ["moe-932m"]
    assert "running" not in found


def test_a_new_process_of_a_section_measures_nothing_twice(gpu: ModuleType, tmp_path: Path) -> None:
    s, out = gpu.setting(smoke=True), tmp_path / "gpu.json"
    first = gpu.Section("main", out, s, 60.0)
    asked: list[str] = []

    def work(name: str, error: Exception | None = None) -> dict[str, Any]:
        asked.append(name)
        if error is not None:
            raise error
        return row(name)

    first.row("dense", lambda: work("dense"))
    assert first.row("late", lambda: work("late", ValueError("no"))) is None
    assert "in work" in content(out)["tracebacks"]["main: late"]
    first.attempt("a check", lambda: work("a check"))
    again = gpu.Section("main", out, s, 60.0, again=True)
    assert again.row("dense", lambda: work("dense"))["name"] == "dense"
    assert again.row("late", lambda: work("late")) is None
    assert again.attempt("a check", lambda: work("a check")) is None
    assert asked == ["dense", "late", "a check"]
    assert again.row("experts", lambda: work("experts"))["name"] == "experts"
    found = content(out)
    assert [r["what"] for r in found["rows"]] == ["dense", "experts"]
    assert found["done"] == ["main: dense", "main: a check", "main: experts"]
    gpu.Section("main", out, s, 60.0)  # and a new run of the section begins anew
    assert (content(out)["rows"], content(out)["done"], content(out)["tracebacks"]) == ([], [], {})


def test_a_device_that_answers_no_more_ends_the_process(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    section = gpu.Section("main", out, gpu.setting(smoke=True), 60.0)
    section.s = replace(section.s, device="cuda")

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status))
    with pytest.raises(SystemExit) as ended:
        section.row("late", broken)
    assert ended.value.code == sys.modules["gpu_results"].UNUSABLE
    found = content(out)
    assert found["running"] == "main: late"  # its parent starts another
    assert "illegal memory access" in found["failed"]["main: late"]


def test_a_model_that_takes_too_long_ends_its_process_and_says_where() -> None:
    code = """
import sys, time
sys.path.insert(0, sys.argv[1])
from gpu_results import ended_after
with ended_after(60):
    pass
def kernel():
    time.sleep(60)
with ended_after(0.2):
    kernel()
"""
    began = time.monotonic()
    command = [sys.executable, "-c", code, str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "in kernel" in done.stderr
    assert time.monotonic() - began < 50


def test_a_row_whose_loss_is_not_finite_is_kept_and_listed(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    section = gpu.Section("main", out, gpu.setting(smoke=True), 60.0)
    section.row("late", lambda: row("late-1b", loss=float("nan")))
    assert content(out)["failed"] == {"main: late": "its loss is nan; the row is kept"}
    assert [r["name"] for r in content(out)["rows"]] == ["late-1b"]


def test_a_check_that_is_not_finite_says_so(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([([6.0, 5.0, 4.0], None), ([6.1, float("nan"), 4.0], None)])
    monkeypatch.setattr(models(), "small_run", lambda *_: next(losses))
    found = models().check(gpu.setting(smoke=True), "early")
    assert found["largest_difference"] != found["largest_difference"]  # nan, not 0.1


def test_a_section_adds_and_replaces_what_it_wrote_before(gpu: ModuleType, tmp_path: Path) -> None:
    s, out = gpu.setting(smoke=True), tmp_path / "gpu.json"
    head = {"device": models().card(s), "torch": torch.__version__, "smoke": True}
    rows = [{"section": "main", **row("early-932m")}, {"section": "sizes", **row("late-1b")}]
    failed = {"sizes: late-3.7b": "no", "sizes": "ended", "main: late-1b": "no"}
    before = {**head, "rows": rows, "left_out": ["sizes: early-3.35b", "jobs"], "failed": failed}
    out.write_text(json.dumps(before))
    section = gpu.Section("sizes", out, s, 60.0)
    assert [r["name"] for r in content(out)["rows"]] == ["early-932m"]
    assert (content(out)["failed"], content(out)["left_out"]) == ({"main: late-1b": "no"}, ["jobs"])
    measured: list[str] = []
    section.peak = lambda: {"measured": 1.0, "datasheet": None}
    section.row = lambda name, work: measured.append(name)
    gpu.run_sizes(section, s)
    assert measured[:3] == ["early-275m", "late-289m", "early-468m"]  # from the smallest up
    assert "early-932m" not in measured  # the file has it
    assert len(measured) == 11
    out.write_text(json.dumps({**before, "device": "another card"}))
    with pytest.raises(SystemExit, match="its device is another card"):
        gpu.Section("sizes", out, s, 60.0)
    out.write_text("[1]")
    with pytest.raises(SystemExit, match="holds no results of"):
        gpu.main(["--smoke", "--sections", "main", "--add", "--out", str(out)])


def test_what_cannot_be_measured_is_said_first(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here; --smoke"):
        gpu.main(["--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="no GPU here"):
        importlib.import_module("memory").main(["--device", "cuda"])
    for text in ("megatron=.", "nanogpt", f"nanogpt={tmp_path}/none"):
        with pytest.raises(SystemExit):
            gpu.main(["--smoke", "--peer", text, "--seconds", "0", "--out", str(tmp_path / "gpu.json")])
        assert "give NAME=FOLDER, a check-out of one of nanogpt" in capsys.readouterr().err


# ---- out of memory --------------------------------------------------------------------------------------------------


class Held:
    """Stands for a model: is it still there?"""


def test_out_of_memory_goes_to_fewer_rows_with_the_model_gone(gpu: ModuleType) -> None:
    held: list[weakref.ref[Held]] = []

    def work(rows: int) -> dict[str, Any]:
        assert all(ref() is None for ref in held)  # nothing of the larger steps is left
        model = Held()
        model.itself = model  # type: ignore[attr-defined]
        held.append(weakref.ref(model))
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return row("early-932m", rows)

    found = models().first_that_runs([8, 4, 2, 1], work)
    assert (found["rows"], found["out_of_memory_at"]) == (2, [8, 4])
    held.clear()
    assert "out_of_memory_at" not in models().first_that_runs([2, 1], work)
    held.clear()
    with pytest.raises(RuntimeError, match="out of memory at 8, 4 rows"):
        models().first_that_runs([8, 4], work)


def test_a_model_that_fails_leaves_nothing_to_the_next(gpu: ModuleType, tmp_path: Path) -> None:
    section = gpu.Section("main", tmp_path / "gpu.json", gpu.setting(smoke=True), 60.0)
    held: list[weakref.ref[Held]] = []

    def fails() -> None:
        model = Held()
        model.itself = model  # type: ignore[attr-defined]
        held.append(weakref.ref(model))
        raise ValueError("no")

    assert section.attempt("late-1b", fails) is None
    assert held[0]() is None
    assert content(tmp_path / "gpu.json")["failed"] == {"main: late-1b": "ValueError: no"}
    section.seconds = 0.0
    assert section.attempt("moe-932m", fails) is None
    assert content(tmp_path / "gpu.json")["left_out"] == ["main: moe-932m"]


# ---- equal rows -----------------------------------------------------------------------------------------------------


def test_experts_are_set_beside_dense_at_equal_rows(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for 4 rows of the dense models and 2 of the experts'."""
    s = gpu.setting(smoke=True)
    dense, late, experts = (s.model(name) for name in NAMES)
    budget = models().predicted_bytes(s, experts, 4) - 1
    assert budget > models().predicted_bytes(s, experts, 2, accumulates=True)
    assert budget > max(models().predicted_bytes(s, cfg, 4) for cfg in (dense, late))
    monkeypatch.setattr(models(), "free_bytes", lambda _: budget)
    section = gpu.Section("main", tmp_path / "gpu.json", s, 60.0)
    gpu.run_main(section, s)
    assert not section.content["failed"]
    rate = {
        (r["name"], r["rows"], r["micro_rows"]): r["tokens_per_s"] for r in section.content["rows"] if not r["text"]
    }
    single = [("early-932m", 4, None), ("late-1b", 4, None), ("moe-932m", 2, None)]
    assert list(rate) == [*single, ("early-932m", 2, None), ("moe-932m", 4, 2)]
    headline, parts, own = section.content["ratios"]
    assert headline["what"] == "experts over dense, tokens/s, 2 rows in one batch each"
    assert headline["value"] == pytest.approx(rate["moe-932m", 2, None] / rate["early-932m", 2, None])
    assert parts["what"].endswith("4 rows each, the experts' in micro-batches of 2")
    assert parts["value"] == pytest.approx(rate["moe-932m", 4, 2] / rate["early-932m", 4, None])
    assert own["what"].endswith("2 rows of experts, 4 of dense")
    assert [r["target"] for r in (headline, parts, own)] == [0.75, None, None]


def test_text_is_set_beside_others_at_equal_rows(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain step has memory for 2 rows only: our own is measured at 2 as well."""
    asked: list[tuple[int, bool]] = []

    def measure(s: Any, name: str, peak: Any, rows: int, micro_rows: Any = None, mixture: Any = None) -> dict[str, Any]:
        asked.append((rows, mixture is gpu.TEXT))
        return row(name, rows, rate=10.0 * rows, text=mixture is gpu.TEXT)

    def plain(s: Any, name: str, peak: Any, compiled: bool, rows: int) -> dict[str, Any]:
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return row("plain Llama eager", rows, rate=16.0, text=True)

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "plain", plain)
    s = replace(gpu.setting(smoke=True), rows=(64, 48, 4, 2))
    section = gpu.Section("main", tmp_path / "gpu.json", s, 60.0)
    gpu.run_text(section, s, {}, 32, {})
    assert asked == [(4, True), (2, True)]  # at most 32, though 64 fit
    (ratio,) = section.content["ratios"]
    assert (ratio["value"], ratio["target"]) == (20.0 / 16.0, 1.1)
    assert "2 rows of text each" in ratio["what"]


def test_micro_batches_make_the_step_of_the_whole_batch(gpu: ModuleType) -> None:
    s = gpu.setting(smoke=True)
    whole, parts = (models().Trainer(s, s.model("moe-932m"), 4, micro) for micro in (None, 2))
    assert [len(batch) for batch in parts.batches] == [2, 2]
    a, b = whole.step(0), parts.step(0)
    assert b.loss == pytest.approx(a.loss, rel=1e-5)
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)


# ---- time and waits -------------------------------------------------------------------------------------------------


def test_a_slow_step_is_timed_fewer_times(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [models().stretch(seconds, 10) for seconds in (0.01, 0.2, 0.31, 1.3)] == [10, 8, 5, 3]
    s, calls = replace(gpu.setting(smoke=True), steps=10), []
    asked: list[float] = []
    monkeypatch.setattr(models(), "stretch", lambda seconds, most: asked.append(seconds) or 4)
    timing = models().time_steps(s, lambda i: (calls.append(i), time.sleep(0.02)))
    assert len(calls) == s.warmup + 1 + 3 * 4
    assert 0.02 <= asked[0] < 1.0  # of one step
    assert (timing.steps, timing.seconds >= 0.02) == (4, True)


def test_waits_are_counted_with_their_places(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    s = replace(gpu.setting(smoke=True), device="cuda")

    def asks() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)

    def step(i: int) -> None:
        asks()
        if i == 5:
            raise ValueError("no")

    found = models().count_waits(s, step, 2)
    assert (found["count"], found["steps"], len(found["where"])) == (2, 2, 1)
    assert found["where"][0].startswith("test_gpu.py:")
    assert " asks < test_gpu.py:" in found["where"][0]
    assert modes == ["warn", "default"]
    with pytest.raises(ValueError, match="no"):
        models().count_waits(s, step, 1, first=5)
    assert modes[2:] == ["warn", "default"]  # later sections are not disturbed
    assert models().count_waits(s, lambda i: None, 1)["count"] == 0
    with pytest.warns(UserWarning, match="something else"):
        models().count_waits(s, lambda i: warnings.warn("something else", UserWarning, stacklevel=1), 1)
    text = sys.modules["gpu_results"].waits_text
    assert text({"count": 0, "steps": 4, "where": []}) == "waits for the device inside a step: 0"


# ---- several runs at once -------------------------------------------------------------------------------------------

RUNS = """
import os, time
def fails(ready):
    if first():
        raise ValueError("no memory for this run")
    ready()
    return 1.0
def dies(ready):
    if first():
        os._exit(9)
    ready()
    return 1.0
def first():
    try:
        os.close(os.open(os.environ["FIRST_FILE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
"""


@pytest.mark.parametrize(("name", "message"), [("fails", "no memory for this run"), ("dies", "ended with status 9")])
def test_a_run_that_fails_ends_the_others(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "some_runs.py").write_text(RUNS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FIRST_FILE", str(tmp_path / "first"))
    run = getattr(importlib.import_module("some_runs"), name)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        sys.modules["gpu_jobs"].together(run, 2)
    assert time.monotonic() - began < 60  # not the 120 seconds that the other would wait
    sys.modules.pop("some_runs")


def test_the_jobs_that_ran_are_kept_when_more_fail(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jobs(s: Any, count: int) -> dict[str, Any]:
        if count == 2:
            raise RuntimeError("run 1 of 2: no memory")
        return {"jobs": count, "tokens_per_s": 5.0, "of_each": [5.0]}

    monkeypatch.setattr(gpu, "jobs", jobs)
    section = gpu.Section("jobs", tmp_path / "gpu.json", gpu.setting(smoke=True), 60.0)
    gpu.run_jobs(section, section.s)
    found = content(tmp_path / "gpu.json")
    assert [r["jobs"] for r in found["jobs"]] == [1]
    assert list(found["failed"]) == ["jobs: 2 at once"]


# ---- one small step as a graph --------------------------------------------------------------------------------------


class FakeGraph:
    """Stands for a captured step; counts its replays."""

    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1
        time.sleep(1e-4)


class Captures:
    """Stands for `torch.cuda.graph`, whose end fails too when something inside has failed."""

    inside = False

    def __init__(self, graph: FakeGraph, stream: Any) -> None:
        pass

    def __enter__(self) -> None:
        Captures.inside = True

    def __exit__(self, kind: type | None, *error: object) -> None:
        Captures.inside = False
        if kind is not None:
            raise RuntimeError("the capture was invalidated")


class FakeStream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: FakeStream) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def fake_graphs(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fakes = {"Stream": FakeStream, "stream": FakeStream, "current_stream": FakeStream}
    for name, fake in (fakes | {"CUDAGraph": FakeGraph, "graph": Captures}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(FakeGraph, "replays", 0)
    return sys.modules["gpu_graphs"]


def test_a_captured_step_is_set_beside_the_launched_one(gpu: ModuleType, fake_graphs: ModuleType) -> None:
    found = fake_graphs.graphs(gpu.setting(smoke=True), "early", "s192")
    assert (found["arm"], found["size"], found["rows"], found["stacked"]) == ("early", "s192", 2, 8)
    assert FakeGraph.replays >= 5
    assert found["graph_at_most"] == pytest.approx(found["launched"] / found["replayed"])
    assert found["stacked_at_most"] == pytest.approx(8 * found["launched"] / found["stacked_seconds"])
    assert 0 < found["loss"] < 20
    assert "reason" not in found
    line = sys.modules["gpu_results"].graphs_line(found)
    assert "as a CUDA graph" in line
    assert importlib.import_module("isofusion.train.step").StepResult is not fake_graphs.OnDevice


def test_why_a_step_cannot_be_captured_is_a_result(
    gpu: ModuleType, fake_graphs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = models().Trainer.step

    def asks(trainer: Any, i: int) -> Any:
        if Captures.inside:
            raise RuntimeError("operation not permitted when stream is capturing")
        return own(trainer, i)

    monkeypatch.setattr(models().Trainer, "step", asks)
    section = gpu.Section("graphs", tmp_path / "gpu.json", gpu.setting(smoke=True), 60.0)
    gpu.run_graphs(section, section.s)
    found = content(tmp_path / "gpu.json")
    (step,) = found["graphs"]
    assert (step["replayed"], step["graph_at_most"]) == (None, None)
    first, then = step["reason"].split("; then ")
    assert first == "RuntimeError: operation not permitted when stream is capturing"
    assert then == "RuntimeError: the capture was invalidated"
    assert step["stacked_at_most"] > 0
    assert (found["failed"], found["done"]) == ({}, ["graphs: early s192"])


def test_the_steps_of_the_graphs_are_those_of_the_study(gpu: ModuleType) -> None:
    module = sys.modules["gpu_graphs"]
    spec = module.StudySpec.from_toml(module.STUDY)
    assert {spec.arm(arm).size(size).name for arm, size in module.SMALL} == {"s96", "s192", "s384"}
    assert {arm for arm, _ in module.SMALL} == {arm.name for arm in spec.arms}


def test_a_captured_result_is_read_after_the_replay(gpu: ModuleType) -> None:
    numbers = torch.zeros(9, dtype=torch.float64)
    result = sys.modules["gpu_graphs"].OnDevice(numbers)
    numbers[0] = 2.5  # as a replay writes it
    assert result.loss == 2.5


# ---- memory.py ------------------------------------------------------------------------------------------------------


def test_memory_goes_on_after_a_model_that_fails(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = importlib.import_module("memory")
    out = tmp_path / "memory.json"
    monkeypatch.setattr(memory, "choose_precision", lambda *_: "fp32")
    cases = (("early", 2, {"width": 64}), ("broken", 2, {"width": 65}), ("late", 2, {"width": 64}))
    monkeypatch.setattr(memory, "CASES", cases)
    measure, kept = memory.measure, []

    def watched(name: str, *rest: Any) -> Any:
        kept.append(len(content(out)["rows"]) if out.exists() else 0)
        return measure(name, *rest)

    monkeypatch.setattr(memory, "measure", watched)
    monkeypatch.setattr(memory, "peak_bytes", lambda step, device: 10**6)
    assert memory.main(["--out", str(out)]) == 1
    found = content(out)
    assert kept == [0, 1, 1, 2]  # written after every model
    assert [r["model"] for r in found["rows"]] == ["early", "late"]
    assert len(found["failed"]) == 2
    assert all("broken" in what for what in found["failed"])
    assert "head_dim" in capsys.readouterr().out


def test_memory_counts_the_batch_as_the_prediction_does(gpu: ModuleType) -> None:
    memory, s = importlib.import_module("memory"), gpu.setting(smoke=True)
    cfg = s.model("early-932m")
    batch = models().synthetic(s, cfg, 4, 0)
    shape = importlib.import_module("isofusion.model.count").batch_shape(batch)
    predicted = importlib.import_module("isofusion.model.memory").memory_bytes(cfg, 256, "bf16", shape, "cuda")
    assert memory.batch_bytes(batch.torch("cpu")) == pytest.approx(predicted["batch"], rel=0.15)
