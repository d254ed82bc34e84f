from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from isofusion.errors import InputError, RunFailure
from isofusion.report.analysis import analyse
from isofusion.study import ledger
from isofusion.study.holder import only_one
from isofusion.study.lock import locked_spec, refused_since, write_lock
from isofusion.study.progress import make_progress
from isofusion.study.run import Interrupted, pin_data, prepare, run_study
from isofusion.study.spec import StudySpec
from isofusion.study.split import thread_budget

COUNTS = dict.fromkeys(ledger.COUNTS, 1000)


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_parameters", lambda model: COUNTS)


def run(spec: StudySpec, out: Path, train: str, *, resume: bool = False, jobs: int = 1) -> str:
    """Run a study; returns what the plain display printed."""
    screen = io.StringIO()
    console = Console(file=screen, width=200)
    run_study(
        spec,
        out,
        jobs=jobs,
        threads=1,
        resume=resume,
        make_progress=lambda configs, done: make_progress(configs, done, console),
        command="isofusion study run tiny.toml --resume",
        train=train,
        get_ready=lambda spec, out: None,
    )
    return screen.getvalue()


def steps(out: Path, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def test_runs_everything_on_two_lasting_workers(toml: Path, tmp_path: Path, fake: str) -> None:
    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    text = run(spec, out, fake, jobs=2)
    assert all((out / "runs" / r.name / "DONE").exists() for r in spec.runs())
    assert "[9/9]" in text
    assert text.count(" done") == 9
    pids = {json.loads(p.read_text().splitlines()[0])["pid"] for p in out.glob("runs/*/metrics.jsonl")}
    assert len(pids) <= 2  # nine runs, two processes
    rows = ledger.results(out)
    assert len(rows) == 6
    assert (out / "results.csv").read_text().splitlines()[0].split(",") == list(ledger.COLUMNS)
    assert rows[0]["wall_s"] == 0.5 * rows[0]["steps"]  # the trunk up to the fork is paid for
    run(spec, out, "fake_train:gone")  # nothing left to do: no worker starts


def test_the_line_of_a_finished_run_shows_the_loss_of_its_last_step(toml: Path, tmp_path: Path, fake: str) -> None:
    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    lines = run(spec, out, fake).splitlines()  # the fake steps are far faster than events are told
    for config in spec.runs():
        last = json.loads((out / "runs" / config.name / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == config.end_step
        [line] = [line for line in lines if f"{config.name} done" in line]
        assert line.endswith(f"training loss {last['loss']:.4f}")
    done = [line.split(" done")[0].split()[-1] for line in lines if " done" in line]
    heaviest_first = ("early-s32", "late-s16", "early-s16")  # an encoder is work as well
    assert done == [f"{model}-s0-{part}" for part in ("trunk", "d20", "d10") for model in heaviest_first]


def test_a_setting_of_the_allocator_by_the_user_wins(toml: Path, tmp_path: Path, fake: str, monkeypatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "4096")
    monkeypatch.setenv("FAKE_TOP_PAD", "4096")
    run(StudySpec.from_toml(toml), tmp_path / "out", fake)


@pytest.mark.parametrize("failing", [True, False])
def test_a_full_disk_under_the_index_hides_no_reason(
    toml: Path, tmp_path: Path, fake: str, monkeypatch, failing
) -> None:
    def full(self: ledger.Ledger, path: Path) -> None:
        path.touch()
        raise sqlite3.OperationalError("database or disk is full")

    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    if failing:
        monkeypatch.setenv("FAKE_FAIL", "early-s16-s0-trunk")
    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "_connect", full)
        reason = "loss is not finite" if failing else r"disk is full.*run folders are untouched"
        with pytest.raises(RunFailure, match=reason):
            run(spec, out, fake)
    assert not list(out.glob("*.tmp"))
    monkeypatch.delenv("FAKE_FAIL", raising=False)
    run(spec, out, fake, resume=True)
    assert len(ledger.results(out)) == 6


def test_a_failed_run_does_not_stop_the_others(toml: Path, tmp_path: Path, fake: str, monkeypatch) -> None:
    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    monkeypatch.setenv("FAKE_FAIL", "early-s16-s0-trunk")
    with pytest.raises(RunFailure) as caught:
        run(spec, out, fake)
    assert "loss is not finite" in str(caught.value)
    assert "--resume" in str(caught.value)
    done = {path.parent.name for path in out.glob("runs/*/DONE")}
    assert done == {r.name for r in spec.runs() if not r.name.startswith("early-s16")}
    assert ledger.state_of(out / "runs" / "early-s16-s0-trunk") == "failed"
    monkeypatch.delenv("FAKE_FAIL")
    with pytest.raises(InputError, match="6 of 9 runs finished; add --resume"):
        run(spec, out, fake)
    run(spec, out, fake, resume=True)
    assert len(ledger.results(out)) == 6
    assert ledger.state_of(out / "runs" / "early-s16-s0-trunk") == "done"


@pytest.mark.parametrize("victim", ["early-s32-s0-trunk", "early-s32-s0-d20"])
def test_a_killed_worker_costs_one_run(toml: Path, tmp_path: Path, fake: str, monkeypatch, victim: str) -> None:
    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    monkeypatch.setenv("FAKE_DIE", victim)
    if victim.endswith("d20"):
        spec = StudySpec.from_toml(toml, overrides=["study.budgets=[5120, 10240]"])
        monkeypatch.setenv("FAKE_DIE", "early-s32-s0-d40")
    with pytest.raises(RunFailure, match="killed by signal 9"):
        run(spec, out, fake)
    assert len(list(out.glob("runs/*/DONE"))) == (8 if victim.endswith("d20") else 6)
    run(spec, out, fake, resume=True)
    for config in spec.runs():
        assert steps(out, config.name) == list(range(config.start_step + 1, config.end_step + 1))


def test_a_worker_told_to_stop_takes_no_other_run_with_it(toml: Path, tmp_path: Path, fake: str, monkeypatch) -> None:
    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    monkeypatch.setenv("FAKE_TERM", "early-s32-s0-trunk")
    monkeypatch.setenv("FAKE_STEP", "0.01")
    with pytest.raises(RunFailure, match="its worker was told to stop; the checkpoints are kept"):
        run(spec, out, fake)
    done = {path.parent.name for path in out.glob("runs/*/DONE")}
    assert done == {r.name for r in spec.runs() if not r.name.startswith("early-s32")}
    monkeypatch.delenv("FAKE_TERM")
    run(spec, out, fake, resume=True)
    assert len(ledger.results(out)) == 6


def test_bad_input_found_by_a_run_is_bad_input(toml: Path, tmp_path: Path, fake: str, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_BAD", "late-s16-s0-trunk")
    with pytest.raises(InputError, match="12 of 20 samples are bad"):
        run(StudySpec.from_toml(toml), tmp_path / "out", fake)


def test_workers_that_cannot_start_are_explained(toml: Path, tmp_path: Path, fake: str) -> None:
    with pytest.raises(RunFailure, match=r"workers do not start: .*no_such_module"):
        run(StudySpec.from_toml(toml), tmp_path / "out", "no_such_module:train")


def test_ctrl_c_checkpoints_and_says_how_to_go_on(toml: Path, tmp_path: Path, fake: str, monkeypatch) -> None:
    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    monkeypatch.setenv("FAKE_STEP", "0.05")

    def interrupt() -> None:
        while not list(out.glob("runs/*/metrics.jsonl")):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match=r"go on with: isofusion study run tiny\.toml --resume") as caught:
        run(spec, out, fake)
    thread.join()
    assert caught.value.code == 130
    monkeypatch.setenv("FAKE_STEP", "0")
    run(spec, out, fake, resume=True)
    trunk = spec.runs()[3]  # the longest chain ran first
    assert steps(out, trunk.name) == list(range(1, trunk.end_step + 1))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} is running this study"):  # noqa: SIM117
        with only_one(tmp_path):
            pass
    with only_one(tmp_path):
        pass


def test_a_dead_holder_does_not_block_but_its_workers_do(tmp_path: Path) -> None:
    with only_one(tmp_path) as fd:
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(fd,))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "study.pid").write_text(str(dead.pid))
    with pytest.raises(InputError, match="workers of an earlier run"), only_one(tmp_path, wait=0.3):
        pass
    orphan.kill()
    orphan.wait()
    with only_one(tmp_path, wait=5):
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell when a process started")
def test_a_reused_process_number_is_not_the_holder(tmp_path: Path) -> None:
    with only_one(tmp_path) as fd:
        assert len((tmp_path / "study.pid").read_text().split()) == 2
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(fd,))
    for written, message in (
        (f"{os.getpid()} 1", "workers of an earlier run"),  # this process lives, but did not start at tick 1
        (f"{os.getpid()}", f"process {os.getpid()} is running"),  # an older isofusion: the number alone
        ("", "workers of an earlier run"),
    ):
        (tmp_path / "study.pid").write_text(written)
        with pytest.raises(InputError, match=message), only_one(tmp_path, wait=0.1):
            pass
    orphan.kill()
    orphan.wait()


def unfinish(out: Path, *branches: str) -> None:
    for name in branches:
        shutil.rmtree(out / "runs" / name)


@pytest.mark.parametrize("how", ["damaged", "missing"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_lost_fork_of_a_finished_trunk_is_trained_again(
    toml: Path, tmp_path: Path, fake: str, how: str, jobs: int
) -> None:
    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    run(spec, out, fake)
    trunk, short = spec.runs()[:2]
    files = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.jsonl")}
    rows = ledger.results(out)
    fork = out / "runs" / trunk.name / "checkpoints" / f"step_{short.start_step}"
    if how == "damaged":
        (fork / "damaged").touch()
    else:
        fork.rmdir()
    unfinish(out, short.name)
    text = run(spec, out, fake, resume=True, jobs=jobs)
    said = [line for line in text.splitlines() if "training it again" in line]
    assert len(said) == 1
    assert said[0].startswith(f"{trunk.name}: its checkpoint step_{short.start_step}, which an unfinished branch")
    assert "failed" not in text
    assert all((out / "runs" / r.name / "DONE").exists() for r in spec.runs())
    assert ledger.results(out) == rows
    for config in spec.runs():
        assert steps(out, config.name) == list(range(config.start_step + 1, config.end_step + 1))
    touched = {path.parent.name for path, then in files.items() if path.stat().st_mtime_ns != then}
    assert touched == {trunk.name, short.name}  # finished branches, the longer one of this trunk too, were left alone


def test_both_forks_lost(toml: Path, tmp_path: Path, fake: str) -> None:
    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    run(spec, out, fake)
    trunk, *branches = spec.runs()[:3]
    shutil.rmtree(out / "runs" / trunk.name / "checkpoints")
    unfinish(out, *(branch.name for branch in branches))
    assert run(spec, out, fake, resume=True).count("training it again") == 1
    assert len(ledger.results(out)) == 6


def test_a_fork_that_rots_again_and_again_fails_its_branches(
    toml: Path, tmp_path: Path, fake: str, monkeypatch
) -> None:
    spec, out = StudySpec.from_toml(toml), tmp_path / "out"
    trunk = spec.runs()[0].name
    monkeypatch.setenv("FAKE_ROT", trunk)
    with pytest.raises(RunFailure, match=r"2 of 9 runs did not finish(.|\n)*is damaged"):
        run(spec, out, fake)
    monkeypatch.delenv("FAKE_ROT")
    run(spec, out, fake, resume=True)
    assert len(ledger.results(out)) == 6


def test_a_worker_stops_when_its_pool_is_gone(toml: Path, tmp_path: Path, fake: str, monkeypatch) -> None:
    """kill -9 of the pool: the orphan checkpoints, leaves, and the study goes on with no step twice."""
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_STEP", "0.05")
    script = tmp_path / "pool.py"
    script.write_text(
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from isofusion.study.run import run_study; from isofusion.study.spec import StudySpec\n"
        "from isofusion.study.progress import make_progress\n"
        "spec = StudySpec.from_toml(sys.argv[1])\n"
        "run_study(spec, Path(sys.argv[2]), jobs=1, threads=1, resume=False, train='fake_train:train_run',\n"
        "    make_progress=lambda c, d: make_progress(c, d, Console()), get_ready=lambda spec, out: None)\n"
    )
    pool = subprocess.Popen([sys.executable, str(script), str(toml), str(out)], stdout=subprocess.DEVNULL)
    while not list(out.glob("runs/*/metrics.jsonl")):
        time.sleep(0.01)
    time.sleep(0.2)
    pool.kill()
    pool.wait()
    monkeypatch.setenv("FAKE_STEP", "0")
    spec = StudySpec.from_toml(toml)
    run(spec, out, fake, resume=True)
    for config in spec.runs():
        assert steps(out, config.name) == list(range(config.start_step + 1, config.end_step + 1))


def test_thread_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isofusion.study.split.cores", lambda: 8)
    assert thread_budget(None, None) == (8, 1)
    assert thread_budget(None, 3) == (2, 3)
    with pytest.raises(InputError, match="4 jobs x 3 threads is more than the 8 cores"):
        thread_budget(4, 3)
    with pytest.raises(InputError, match="at least 1"):
        thread_budget(0, 1)


def test_ledger_rebuilds_to_the_same_rows(toml: Path, tmp_path: Path, fake: str) -> None:
    out = tmp_path / "out"
    spec = StudySpec.from_toml(toml)
    run(spec, out, fake)
    book = ledger.Ledger(out)
    incremental = tmp_path / "other"
    incremental.mkdir()
    (incremental / "runs").symlink_to(out / "runs")
    other = ledger.Ledger(incremental)
    for config in spec.runs():
        other.update(config.name)
    before = book.rows()
    assert before == other.rows()
    assert before[0]["loss_interleaved"] is None
    assert before[0]["shuffled_caption"] == before[0]["loss_caption"] + 2
    csv_before = (out / "results.csv").read_bytes()
    (out / ledger.INDEX).write_bytes(b"not a database")
    book.update(spec.runs()[1].name)  # a broken index is rebuilt, not an error
    assert book.rows() == before
    (out / ledger.INDEX).unlink()
    assert ledger.results(out) == before
    assert (out / "results.csv").read_bytes() == csv_before


def test_a_study_of_a_version_that_allowed_more_can_be_read(toml: Path, tmp_path: Path, fake: str) -> None:
    out = tmp_path / "out"
    write_lock(out, StudySpec.from_toml(toml), toml=toml, jobs=1, threads=1)
    run(StudySpec.from_toml(toml), out, fake)
    before = ledger.results(out)
    assert refused_since(out) == ""
    for path in (out / "study.lock", *out.glob("runs/*/run.json")):
        text = path.read_text()
        assert '"weight_decay": 0.0001' in text
        path.write_text(text.replace('"weight_decay": 0.0001', '"weight_decay": 1.5'))
    assert ledger.unread(out) == []
    assert [row["loss_mean"] for row in ledger.results(out)] == [row["loss_mean"] for row in before]
    tree = json.loads((out / "study.lock").read_text())
    tree["spec"]["seeds"] = [-1]
    (out / "study.lock").write_text(json.dumps(tree))
    assert {config.seed for config in locked_spec(out).runs()} == {-1}
    said = refused_since(out)
    assert "allowed what this one refuses (seeds.0: input should be greater than or equal to 0, got -1" in said
    assert f"isofusion study report {out}" in said
    tree["spec"]["seeds"] = ["many"]
    (out / "study.lock").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"study.lock: seeds.0: input should be a valid integer.*another version"):
        locked_spec(out)


def test_a_finished_run_that_cannot_be_read_is_named(toml: Path, tmp_path: Path, fake: str) -> None:
    out = tmp_path / "out"
    run(StudySpec.from_toml(toml), out, fake)
    (out / "runs" / "early-s16-s0-d10" / "run.json").write_text('{"config": {')
    (out / "runs" / "early-s32-s0-d20" / "eval.json").unlink()
    lost = ["early-s16-s0-d10", "early-s32-s0-d20"]
    assert ledger.unread(out) == lost
    found = analyse(out)
    assert found["unread"] == lost
    [warning] = [entry for entry in found["warnings"] if entry["code"] == "unread"]
    assert warning["items"][0]["where"] == lost
    for path in out.glob("runs/*/run.json"):
        path.write_text("")
    with pytest.raises(InputError, match=r"no finished run can be reported: early-s16-s0-d10 \(and those of 8 more\)"):
        analyse(out)


def test_tuning_and_excluded_runs_stay_out_of_the_table(read, tmp_path: Path, fake: str) -> None:
    from isofusion.study.lock import write_lock

    spec = read(
        ("seeds = [0]", 'seeds = [0]\nexclude = ["late-s16-s0-d10"]'),
        ("\n[train]\n", '\n[tuning]\narms = ["late"]\nlr_multipliers = [2]\n\n[train]\n'),
    )
    out = tmp_path / "out"
    write_lock(out, spec, toml=None, jobs=1, threads=1)
    run(spec, out, fake)
    assert len(ledger.results(out)) == 5
    everything = ledger.results(out, all_runs=True)
    assert [row["run"] for row in everything if row["excluded"]] == ["late-s16-s0-d10"]
    assert {row["lr"] for row in everything if row["variant"] == "lr2x"} == {2e-3}


def test_data_that_changed_between_sessions_is_refused(tmp_path: Path) -> None:
    """Runs that have not begun, and validation, would see other data than the runs that are done."""
    first = {"train": {"captions": "a", "prose": "b"}, "val": {"captions": "c"}, "text": {"the tokenizer": "t"}}
    pin_data(tmp_path, first)
    pin_data(tmp_path, first)
    for changed, named in (
        (first | {"val": {"captions": "x"}}, r"files of captions \(val\) are not those"),
        (first | {"val": {"captions": "c", "prose": "new"}}, r"prose \(val\)"),
        (first | {"train": {"captions": "x", "prose": "y"}}, r"captions \(train\), prose \(train\)"),
        (first | {"text": {"the tokenizer": "u"}}, r"the tokenizer \(text\)"),
    ):
        with pytest.raises(InputError, match=named):
            pin_data(tmp_path, changed)
    assert json.loads((tmp_path / "data.lock").read_text()) == first


@pytest.mark.parametrize("text", ["", '{"train": {"capt', "[]x", '{"train": 3}'])
def test_a_damaged_pin_of_the_data_is_bad_input(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.lock").write_text(text)
    with pytest.raises(InputError, match=r"data.lock: is damaged.*Restore it; or, if you are sure .* delete it"):
        pin_data(tmp_path, {"train": {"captions": "a"}})
    assert (tmp_path / "data.lock").read_text() == text


def test_a_vocabulary_too_small_is_found_before_the_lock(toml: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("torch", reason="training needs the [train] extra")
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    spec = StudySpec.from_toml(toml, overrides=["arms.late.sizes.s16.vocab_size=511"])
    with pytest.raises(
        InputError, match=r'arm "late", size "s16": vocab_size 511 is less than the 512 tokens of world'
    ):
        prepare(spec)


def test_the_data_is_pinned_when_a_study_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="training needs the [train] extra")
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    spec = StudySpec.from_toml(Path(__file__).parents[2] / "studies" / "world-mini.toml")
    prepare(spec, tmp_path)
    found = json.loads((tmp_path / "data.lock").read_text())
    assert found.keys() == {"train", "val", "text"}
    assert set(found["train"]) == {source.name for source in spec.data.sources}
