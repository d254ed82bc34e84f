"""`study run --on slurm`: what is asked of SLURM, and whole studies on a SLURM that `fake_slurm` plays."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isofusion.cli.main import main
from isofusion.cli.slurm import refuse_local
from isofusion.errors import InputError, RunFailure
from isofusion.study import jobs, ledger, slurm
from isofusion.study.lock import write_lock
from isofusion.study.slurm import Request
from isofusion.study.spec import StudySpec

pytest.importorskip("submitit", reason="--on slurm needs the [slurm] extra")
ASK = Request("cpu")
SMALL = ("s32 = { width = 32 }\n", "")  # leaves two trunks with two branches each
TRUNK, SHORT, LONG = "early-s16-s0-trunk", "early-s16-s0-d10", "early-s16-s0-d20"
TIMES = {"wall_s": 0, "input_wait_s": 0}  # what two equal runs need not share
OTHER = ("late-s16-s0-trunk", "late-s16-s0-d10", "late-s16-s0-d20")


@pytest.fixture
def spec(read: Callable[..., StudySpec], tmp_path: Path) -> StudySpec:
    """A locked study of six runs in tmp_path/out."""
    found = read(SMALL)
    write_lock(tmp_path / "out", found, toml=None, jobs=1, threads=1)
    return found


@pytest.fixture
def one(spec: StudySpec, tmp_path: Path) -> StudySpec:
    """The same with one trunk: three runs."""
    toml = tmp_path / "changed.toml"
    toml.write_text(toml.read_text().partition('[[arms]]\nname = "late"')[0])
    (tmp_path / "out" / "study.lock").unlink()
    found = StudySpec.from_toml(toml)
    write_lock(tmp_path / "out", found, toml=None, jobs=1, threads=1)
    return found


def submit(spec: StudySpec, out: Path, request: Request = ASK, *, resume: bool = False) -> slurm.Submission:
    train = "fake_train:train_run"
    return slurm.submit(spec, out, request, 1, resume=resume, report=False, train=train, command="isofusion again")


def status(out: Path, spec: StudySpec) -> dict[str, dict]:
    rows, trouble = jobs.states(out, spec)
    assert trouble is None
    return {row["run"]: row for row in rows}


def shown(out: Path, spec: StudySpec) -> dict[str, str]:
    return {run: row["state"] for run, row in status(out, spec).items()}


def steps(out: Path, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def log(out: Path, spec: StudySpec, run: str) -> str:
    return (out / status(out, spec)[run]["log"]).read_text()


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_a_study_runs_to_done_in_order_of_its_dependencies(spec: StudySpec, tmp_path: Path, cluster: Any) -> None:
    out = tmp_path / "out"
    printed = [text for _, _, text in slurm.scripts(spec, out, ASK, 1, report=False)]
    submission = submit(spec, out)
    sent = [(tmp_path / "slurm" / f"script-{base}.sh").read_text() for base in (101, 111, 121)]
    assert sent == [text.replace(slurm.TRUNKS, "101") for text in printed]  # a dry run prints what would be sent
    assert [(array.title, len(array.runs)) for array in submission.arrays] == [
        ("trunks", 2),
        (f"branches of {OTHER[0]}", 2),  # the longer chain goes first
        (f"branches of {TRUNK}", 2),
    ]
    assert set(shown(out, spec).values()) == {"pending"}
    assert status(out, spec)[LONG]["after"] == status(out, spec)[TRUNK]["job_id"] == "101_1"
    with pytest.raises(InputError, match=r"was begun \(0 of 6 runs finished\); add --resume"):
        submit(spec, out)
    assert submit(spec, out, resume=True).arrays == []  # all of them are queued

    def in_order() -> bool:
        for trunk, *branches in ((TRUNK, SHORT, LONG), OTHER):
            begun = any((out / "runs" / run).exists() for run in branches)
            assert not begun or (out / "runs" / trunk / "DONE").exists(), "a branch ran before its trunk was done"
        return len(list(out.glob("runs/*/DONE"))) == 6

    cluster.run(until=in_order)
    cluster.run()
    assert set(shown(out, spec).values()) == {"done"}
    assert len(ledger.results(out)) == 4
    for config in spec.runs():
        assert steps(out, config.name) == list(range(config.start_step + 1, config.end_step + 1))
    assert "done" in log(out, spec, LONG)
    assert submit(spec, out, resume=True).done == 6


def test_a_limit_holds_over_all_arrays(spec: StudySpec, tmp_path: Path, cluster: Any, monkeypatch) -> None:
    """Two runs at a time of six, on a cluster that has room for all; one loses its node on the way."""
    out, request = tmp_path / "out", Request("cpu", array_limit=2)
    monkeypatch.setenv("FAKE_STEP", "0.05")
    cluster.slots = 6
    printed = [text for _, _, text in slurm.scripts(spec, out, request, 1, report=False)]
    submission = submit(spec, out, request)
    sent = [(tmp_path / "slurm" / f"script-{base}.sh").read_text() for base in (101, 111)]
    assert sent == [text.replace("JOB1", "101") for text in printed]
    assert [(array.title, len(array.runs), array.after) for array in submission.arrays] == [
        ("trunks", 2, None),
        ("branches", 4, "afterany:101"),
    ]
    trunk = status(out, spec)[TRUNK]["job_id"]
    cluster.run(until=lambda: (out / "runs" / TRUNK / "metrics.jsonl").exists() and len(steps(out, TRUNK)) > 3)
    cluster.preempt(trunk, grace=True)
    cluster.run()
    assert set(shown(out, spec).values()) == {"done"}
    assert cluster.peak == 2
    assert status(out, spec)[TRUNK]["starts"] == 2


def test_a_limit_counts_what_is_queued_already(spec: StudySpec, tmp_path: Path, cluster: Any, monkeypatch) -> None:
    out, request = tmp_path / "out", Request("cpu", array_limit=1)
    monkeypatch.setenv("FAKE_FAIL", TRUNK)
    submit(spec, out, request)
    branch = status(out, spec)[LONG]["job_id"]
    cluster.run(until=lambda: cluster.states()[branch] == "RUNNING")
    cluster.slots = 0
    cluster.run(until=lambda: cluster.states()[branch] == "FAILED")
    now = shown(out, spec)
    assert [now[run] for run in (TRUNK, LONG, SHORT)] == ["failed", "blocked", "pending"]
    assert f"trunk {TRUNK} did not reach step 16" in log(out, spec, LONG)
    monkeypatch.delenv("FAKE_FAIL")
    again = submit(spec, out, request, resume=True)
    assert list(again.queued) == [OTHER[1]]
    assert [([run.name for run in array.runs], array.after) for array in again.arrays] == [
        ([TRUNK], "afterany:111"),
        ([LONG, SHORT], "afterany:121:111"),  # it could not have started: taken back, to wait for the new trunk
    ]
    cluster.slots = 6
    cluster.run()
    assert set(shown(out, spec).values()) == {"done"}
    assert cluster.peak == 1


def test_what_is_left_runs_beside_the_queue_where_the_limit_has_room(
    spec: StudySpec, tmp_path: Path, cluster: Any, monkeypatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_FAIL", TRUNK)
    submit(spec, out)
    cluster.run(until=lambda: cluster.states()["101_1"] == "FAILED" and (out / "runs" / OTHER[0] / "DONE").exists())
    monkeypatch.delenv("FAKE_FAIL")
    queued = slurm.in_queue(spec, out)[0]
    assert queued
    limit = len(queued) + 1
    again = submit(spec, out, Request("cpu", array_limit=limit), resume=True)
    assert [run.name for run in again.arrays[0].runs] == [TRUNK]
    assert again.arrays[0].after is None
    cluster.slots = 6
    cluster.run()
    assert set(shown(out, spec).values()) == {"done"}
    assert cluster.peak <= limit


@pytest.mark.parametrize("how", ["with grace", "without grace", "time limit", "cancelled"])
def test_a_run_that_is_stopped_goes_on(one: StudySpec, tmp_path: Path, cluster: Any, monkeypatch, how: str) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_STEP", "0.05")
    submit(one, out)
    trunk = status(out, one)[TRUNK]["job_id"]
    cluster.run(until=lambda: (out / "runs" / TRUNK / "metrics.jsonl").exists() and len(steps(out, TRUNK)) > 3)
    assert shown(out, one)[TRUNK] == "running"
    if how == "time limit":
        cluster.signal(trunk, signal.SIGUSR2)
    elif how == "cancelled":
        subprocess.run(["scancel", trunk], check=True)
    else:
        cluster.preempt(trunk, grace=how == "with grace")
    cluster.slots = 0  # so that it is seen waiting
    cluster.run(until=lambda: cluster.states()[trunk] in ("PENDING", "CANCELLED"))
    row, stopped = status(out, one)[TRUNK], len(steps(out, TRUNK))
    assert 3 < stopped < 16
    said, by_itself = log(out, one, TRUNK), how in ("with grace", "time limit")
    assert ("SIGUSR2: checkpointing" if how == "time limit" else "SIGTERM: checkpointing") in said
    assert (f"checkpointed at step {stopped}; requeued" in said) == by_itself
    assert ("not requeued by this job: Job is in transition state" in said) != by_itself
    cluster.slots = 2
    if how == "cancelled":  # a scancel is no preemption
        cluster.run()
        assert set(cluster.states().values()) == {"CANCELLED"}
        assert (row["state"], row["starts"]) == ("failed", 1)
        assert f"job {trunk} ended as CANCELLED" in row["message"]
        submit(one, out, resume=True)
        assert set(shown(out, one).values()) == {"pending"}
    else:
        assert (row["state"], row["starts"]) == ("requeued", 1)
        assert shown(out, one)[LONG] == "pending"  # a requeued trunk has not failed
        ledger.Ledger(out).write_jobs(status(out, one).values())
        connection = sqlite3.connect(out / ledger.INDEX)
        found = connection.execute("SELECT job_id, state, starts FROM jobs WHERE run = ?", (TRUNK,)).fetchone()
        connection.close()
        assert found == (trunk, "requeued", 1)
    if how in ("with grace", "cancelled"):  # from here on all four are one
        cluster.run(until=lambda: (out / "runs" / TRUNK / "DONE").exists())
        assert steps(out, TRUNK) == list(range(1, 17))


def test_a_failed_trunk_blocks_its_branches_and_resume_submits_what_is_left(
    spec: StudySpec, tmp_path: Path, cluster: Any, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_FAIL", TRUNK)
    submit(spec, out)
    victim = status(out, spec)[OTHER[2]]["job_id"]
    subprocess.run(["scancel", victim.partition("_")[0]], check=True)  # both branches of the other trunk
    cluster.run()
    now = status(out, spec)
    assert now[TRUNK]["message"] == "loss is not finite at step 3; lower train.lr"
    assert {run: row["state"] for run, row in now.items()} == {
        **{TRUNK: "failed", SHORT: "blocked", LONG: "blocked"},
        **{OTHER[0]: "done", OTHER[1]: "failed", OTHER[2]: "failed"},
    }
    assert now[SHORT]["message"] == f"its trunk {TRUNK} failed; `study run --resume` submits both again"
    assert f"job {victim} ended as CANCELLED" in now[OTHER[2]]["message"]

    assert call("study", "status", out) == 0
    page = capsys.readouterr().out
    assert "1 done, 3 failed, 2 blocked" in page
    assert f"{LONG}: its trunk {TRUNK} failed" in page
    assert call("study", "status", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"done": 1, "unfinished": 0, "failed": 3, "waiting": 0, "blocked": 2}
    assert {row["run"]: row["job"] for row in found["runs"]}[OTHER[2]] == victim
    monkeypatch.setenv("FAKE_SLURM_DOWN", "1")  # then the folders alone speak
    assert call("study", "status", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert "squeue failed: slurm_load_jobs error: Unable to contact" in found["note"]
    assert found["counts"]["done"] == 1
    with pytest.raises(InputError, match="squeue failed"):  # never a run twice because the queue did not answer
        submit(spec, out, resume=True)
    monkeypatch.delenv("FAKE_SLURM_DOWN")

    monkeypatch.delenv("FAKE_FAIL")
    again = submit(spec, out, resume=True)
    assert [([run.name for run in array.runs], array.after) for array in again.arrays] == [
        ([TRUNK], None),
        ([OTHER[2], OTHER[1]], None),  # their forks are there
        ([LONG, SHORT], f"afterok:{again.arrays[0].ids[0]}"),
    ]
    assert [run for run, state in shown(out, spec).items() if state == "pending"] == [TRUNK, SHORT, LONG, *OTHER[1:]]


def test_a_lost_fork_is_trained_again(one: StudySpec, tmp_path: Path, cluster: Any, monkeypatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_ROT", TRUNK)
    submit(one, out)
    subprocess.run(["scancel", status(out, one)[LONG]["job_id"]], check=True)
    cluster.run()
    now = status(out, one)
    assert [now[run]["state"] for run in (TRUNK, SHORT, LONG)] == ["done", "failed", "failed"]
    assert "step_8 is damaged" in now[SHORT]["message"]
    again = submit(one, out, resume=True)
    assert again.reopened == [TRUNK]
    assert [run.name for array in again.arrays for run in array.runs] == [TRUNK, LONG, SHORT]
    assert again.arrays[1].after == f"afterok:{again.arrays[0].ids[0]}"
    assert shown(out, one) == dict.fromkeys((TRUNK, LONG, SHORT), "pending")


def test_a_refusal_half_way_keeps_what_is_submitted(spec: StudySpec, tmp_path: Path, cluster: Any, monkeypatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_SLURM_MOST", "2")
    with pytest.raises(
        InputError, match=r"QOSMaxSubmit.*4 runs are submitted and stay so.*go on with: isofusion again"
    ):
        submit(spec, out)
    monkeypatch.delenv("FAKE_SLURM_MOST")
    trunk = status(out, spec)[TRUNK]["job_id"]
    again = submit(spec, out, resume=True)
    assert [([run.name for run in array.runs], array.after) for array in again.arrays] == [
        ([LONG, SHORT], f"afterok:{trunk}")
    ]
    with pytest.raises(InputError, match="6 runs of this study are jobs in SLURM's queue"):
        refuse_local(out, {})


def test_jobs_that_cannot_be_written_down_are_cancelled(
    spec: StudySpec, tmp_path: Path, cluster: Any, monkeypatch
) -> None:
    out, written = tmp_path / "out", []

    def full(path: Path, line: dict) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(line["job_id"])
        append(path, line)

    append = jobs.append
    with monkeypatch.context() as patch:
        patch.setattr("isofusion.study.slurm.jobs.append", full)
        patch.setattr("isofusion.study.slurm.record_session", lambda *_, **__: None)
        with pytest.raises(
            RunFailure, match=r"jobs.jsonl: No space left on device; the jobs 111_0 to 111_1 .* cancelled"
        ):
            submit(spec, out)
    assert cluster.states() == dict.fromkeys(("101_0", "101_1"), "PENDING") | dict.fromkeys(
        ("111_0", "111_1"), "CANCELLED"
    )
    again = submit(spec, out, resume=True)
    assert [[run.name for run in array.runs] for array in again.arrays] == [[OTHER[2], OTHER[1]], [LONG, SHORT]]
    assert set(again.queued) == {TRUNK, OTHER[0]}


def test_a_node_without_the_lock_says_so(spec: StudySpec, tmp_path: Path, cluster: Any) -> None:
    out = tmp_path / "out"
    submit(spec, out)
    (out / "study.lock").rename(out / "elsewhere")
    cluster.run(until=lambda: "FAILED" in cluster.states().values())
    cluster.run()
    (out / "elsewhere").rename(out / "study.lock")
    assert "study.lock is not there on" in log(out, spec, TRUNK)
    now = status(out, spec)[TRUNK]
    assert now["state"] == "failed"
    assert "ended as FAILED, exit code 2:0" in now["message"]
    assert not (out / "runs").exists()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: StudySpec, cluster: Any) -> Iterator[slurm.RunJob]:
    """A run's job in this process."""
    for name in slurm.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    for name, value in slurm.MALLOC.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (cluster.bin / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$FAKE_SLURM/asked"\n')
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield slurm.RunJob(tmp_path / "out", TRUNK, 1, "fake_train:train_run")
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_job_that_never_gets_to_train_gives_up(job: slurm.RunJob, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("isofusion.study.slurmjob.load", lambda target: lambda *a, **k: "interrupted")
    folder = tmp_path / "out" / "runs" / TRUNK
    for attempt in range(4):
        assert not (folder / "failure.json").exists(), attempt
        with pytest.raises(SystemExit) as ended:
            job()
        assert ended.value.code == 1
    assert (tmp_path / "slurm" / "asked").read_text() == "requeue 7\n" * 3
    assert "4 times in a row without training a step; give it more --time" in (folder / "failure.json").read_text()


def test_bad_input_ends_a_job_with_code_2(job: slurm.RunJob, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FAKE_BAD", TRUNK)
    with pytest.raises(SystemExit) as ended:
        job()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: data/figures: 12 of 20 samples are bad\n"
    lock = tmp_path / "out" / "study.lock"
    tree = json.loads(lock.read_text())
    tree["runs"][TRUNK] = "another"
    lock.write_text(json.dumps(tree))
    with pytest.raises(SystemExit) as ended:
        job()
    assert ended.value.code == 2
    assert "is not the one that was submitted" in capsys.readouterr().err
    lock.unlink()
    with pytest.raises(SystemExit) as ended:
        job()
    assert ended.value.code == 2
    assert "the study's folder must be on a file system that every node sees" in capsys.readouterr().err


def whole_lines(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "wall"} for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_study_is_preempted_and_ends_in_the_same_bits(
    one: StudySpec, tmp_path: Path, cluster: Any, monkeypatch
) -> None:
    """Trained by the local pool and on SLURM, where the trunk and a branch lose their nodes: equal; with a report."""
    torch = pytest.importorskip("torch", reason="training needs the [train] extra")
    cluster.timeout = 800
    from isofusion.train.checkpoint import load_tensors, newest_checkpoint

    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    toml = tmp_path / "changed.toml"
    toml.write_text(toml.read_text().replace("budgets = [2560, 5120]", "budgets = [2560, 81920]"))
    there, here = tmp_path / "there", tmp_path / "here"

    def study(*words: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "isofusion", "study", *(str(word) for word in words)]
        return subprocess.run(command, capture_output=True, text=True)

    assert study("run", toml, "--out", here, "--jobs", 1).returncode == 0
    on = ("--on", "slurm", "--partition", "cpu", "--array-limit", 1)
    sent = study("run", toml, "--out", there, *on)
    assert sent.returncode == 0, sent.stderr
    assert "3 runs submitted, 0 were queued already, 0 of 3 are done" in sent.stdout
    long = TRUNK.replace("trunk", "d320")

    def lines(run: str) -> int:
        path = there / "runs" / run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    rows = {row["run"]: row["job_id"] for row in jobs.states(there, StudySpec.from_toml(toml))[0]}
    for run, grace in ((TRUNK, True), (long, False)):
        cluster.run(until=lambda run=run: lines(run) > 5)
        cluster.preempt(rows[run], grace=grace)
    cluster.run()
    assert set(cluster.states().values()) == {"COMPLETED"}, (there / "slurm" / "101_0_log.out").read_text()
    for run in (TRUNK, long):
        assert [e["event"] for e in jobs.events(there / "runs" / run, rows[run])] == [
            "start",
            "requeue",
            "start",
            "end",
        ]
    for config in StudySpec.from_toml(toml).runs():
        a, b = (root / "runs" / config.name for root in (here, there))
        assert whole_lines(a / "metrics.jsonl") == whole_lines(b / "metrics.jsonl")
        first, second = (load_tensors(newest_checkpoint(folder)) for folder in (a, b))
        assert all(torch.equal(first[key], second[key]) for key in first)
        if config.kind == "branch":
            measured = [json.loads((folder / "eval.json").read_text()) | TIMES for folder in (a, b)]
            assert measured[0] == measured[1]
    assert (there / "report.html").exists()
    assert study("status", there).stdout.count("done") == 4
    again = study("run", toml, "--out", there, *on, "--resume")
    assert again.returncode == 0
    assert again.stdout.strip().endswith("report.html")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_of_two_processes(one: StudySpec, tmp_path: Path, cluster: Any, monkeypatch) -> None:
    """Two nodes of one process each: stopped, requeued, done; a process that is killed fails the job with a message."""
    pytest.importorskip("torch", reason="training needs the [train] extra")
    pytest.importorskip("isofusion.train.launch", reason="this version trains a run on one process only")
    cluster.timeout = 800
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    request = Request("cpu", nodes=2)
    slurm.submit(one, out, request, 1, resume=False, report=False)
    trunk = status(out, one)[TRUNK]["job_id"]
    metrics = out / "runs" / TRUNK / "metrics.jsonl"
    cluster.run(until=lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2)
    cluster.preempt(trunk, grace=True)
    cluster.run(until=lambda: cluster.states()[trunk] == "COMPLETED")
    assert steps(out, TRUNK) == list(range(1, 17))
    assert [event["event"] for event in jobs.events(metrics.parent, trunk)] == ["start", "requeue", "start", "end"]
    branch = status(out, one)[LONG]["job_id"]
    cluster.run(until=lambda: (cluster.folder / f"pids-{branch}").exists())
    os.kill(int((cluster.folder / f"pids-{branch}").read_text().split()[1]), signal.SIGKILL)
    cluster.run()
    now = status(out, one)
    assert (now[SHORT]["state"], now[LONG]["state"]) == ("done", "failed")
    assert now[LONG]["message"]
    slurm.submit(one, out, request, 1, resume=True, report=False)
    cluster.run()
    assert set(shown(out, one).values()) == {"done"}
