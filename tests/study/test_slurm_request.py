"""What `study run --on slurm` asks of SLURM and what it refuses; the scripts of a dry run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from isofusion.cli.main import main
from isofusion.errors import InputError
from isofusion.study import jobs, slurm
from isofusion.study.slurm import Request, minutes

pytest.importorskip("submitit", reason="--on slurm needs the [slurm] extra")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_times_and_sizes_as_sbatch_reads_them() -> None:
    for text, expected in (("90", 90), ("90:30", 91), ("1:30:00", 90), ("1-12", 2160), ("1-12:30", 2190), ("0:1:1", 2)):
        assert minutes(text) == expected
    assert minutes("2-00:00:01") == 2881
    assert [slurm.bytes_of(text) for text in ("500", "500M", "1.5G", "2gb")] == [500 * 2**20] * 2 + [1.5 * 2**30, 2**31]
    for bad in ("", "soon", "1:2:3:4", "-5", "0", "0:59"):
        with pytest.raises(InputError, match="--time"):
            minutes(bad)
    with pytest.raises(InputError, match="--mem 16X"):
        slurm.bytes_of("16X")


def test_requests_that_make_no_sense_are_refused() -> None:
    for request, message in (
        (Request("p", nodes=0), "--nodes 0: must be at least 1"),
        (Request("p", array_limit=0), "--array-limit 0"),
        (Request("p", cpus_per_task=2, time="1", grace=60), "--grace 60 s leaves nothing of --time 1"),
        (Request("p", cpus_per_task=1), "--cpus-per-task 1 is less than the 2 threads"),
        (Request("p", cpus_per_task=2, sbatch=("array=0-3",)), "isofusion sets array itself"),
        (Request("p", cpus_per_task=2, sbatch=("--exclude=n7",)), "write a long option of sbatch as KEY=VALUE"),
    ):
        with pytest.raises(InputError, match=message):
            request.check(2)
    Request("p", cpus_per_task=2, sbatch=("exclude=n[7-9]", "exclusive")).check(2)


def test_dry_run_prints_the_scripts_without_slurm(tmp_path: Path, toml: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    before = set(tmp_path.rglob("*"))
    options = ["--time", "1-0", "--gpus", 4, "--nodes", 2, "--cpus-per-task", 8, "--mem", "64G"]
    options += ["--account", "ours", "--setup", "module load cuda", "--sbatch", "exclude=n7", "--sbatch", "exclusive"]
    assert call("study", "run", toml, "--on", "slurm", "--partition", "gpu", "--dry-run", *options) == 0
    assert set(tmp_path.rglob("*")) == before
    found = capsys.readouterr().out
    titles = [line for line in found.splitlines() if line.startswith("# ----")]
    assert titles[0] == "# ---- 1 of 5: trunks: early-s32-s0-trunk, late-s16-s0-trunk, early-s16-s0-trunk"
    assert titles[1] == "# ---- 2 of 5: branches of early-s32-s0-trunk: early-s32-s0-d20, early-s32-s0-d10"
    assert titles[4] == "# ---- 5 of 5: the report"
    scripts = found.split("# ----")[1:]
    for script in scripts:
        text = "#!" + script.partition("#!")[2]
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
        for line in ("partition=gpu", "account=ours", "exclude=n7", "exclusive", "requeue", "kill-on-invalid-dep=yes"):
            assert f"\n#SBATCH --{line}\n" in text
        assert text.index("module load cuda") < text.index("srun")
    asked = ("time=1440", "nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=8", "mem=64G")
    for line in (*asked, "array=0-2%3", "signal=USR2@120"):
        assert f"\n#SBATCH --{line}\n" in scripts[0]
    assert "--dependency" not in scripts[0]
    for number in (1, 2, 3):
        assert f"\n#SBATCH --dependency=afterok:TRUNKS_{number - 1}\n" in scripts[number]
        assert "\n#SBATCH --array=0-1%2\n" in scripts[number]
        assert "srun --unbuffered" in scripts[number]
        assert "--cpus-per-task=8 --kill-on-bad-exit=1" in scripts[number]
        assert "export OMP_NUM_THREADS=8\n" in scripts[number]
    assert "\n#SBATCH --dependency=afterany:JOB1:JOB2:JOB3:JOB4\n" in scripts[4]
    assert "gpus" not in scripts[4]

    on = ("--on", "slurm", "--partition", "gpu", "--dry-run", "--array-limit", 2)
    assert call("study", "run", toml, *on) == 0
    scripts = capsys.readouterr().out.split("# ----")[1:]
    assert [script.partition(":")[0].strip() for script in scripts] == ["1 of 3", "2 of 3", "3 of 3"]
    assert "\n#SBATCH --array=0-2%2\n" in scripts[0]
    assert "--dependency" not in scripts[0]
    assert "\n#SBATCH --array=0-5%2\n" in scripts[1]
    assert "\n#SBATCH --dependency=afterany:JOB1\n" in scripts[1]
    assert "\n#SBATCH --dependency=afterany:JOB1:JOB2\n" in scripts[2]


def test_what_is_missing_is_one_message_and_exit_code_2(
    tmp_path: Path, toml: Path, cluster: Any, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    pinned: list[Path] = []
    monkeypatch.setattr("isofusion.study.run.prepare", lambda spec, *out: pinned.extend(out) or [])

    def says(message: str, *words: object) -> None:
        assert call("study", "run", toml, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error

    says("--mem is for --on slurm", "--mem", "4G")
    says("--on slurm needs --partition NAME", "--on", "slurm")
    on = ("--on", "slurm", "--partition")
    says("--jobs is for this machine", *on, "cpu", "--jobs", 2)
    says("a job gets 21 MB; raise --mem", *on, "cpu", "--mem", "20M")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/usr/bin:/bin")
        says("sbatch is not on the PATH: run this on a login node", *on, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        says("--on slurm needs the package submitit: pip install 'isofusion[slurm]'", *on, "cpu", "--dry-run")
    assert not Path("runs").exists()  # nothing so far has locked the study
    assert not pinned
    says("invalid partition specified: nope", *on, "nope")
    says("(asked for 'nope'; `sinfo -s` lists the partitions)", *on, "nope")
    assert not list(Path("runs/tiny/slurm").iterdir())
    assert cluster.states() == {}
    assert [out.name for out in pinned] == ["tiny"] * 2  # every submission holds the data to the first one's
    monkeypatch.setenv("FAKE_SLURM_MOST", "1")
    go_on = f"study run {toml} --out runs/tiny --on slurm --mem 4G --partition cpu --setup 'module load x' --resume\n"
    says(
        f"3 runs are submitted and stay so; mend this and go on with: isofusion {go_on}",
        *(*on, "cpu", "--mem", "4G", "--setup", "module load x"),
    )


def test_sacct_lines() -> None:
    assert jobs._each("12") == ["12"]
    assert jobs._each("12_3") == ["12_3"]
    assert jobs._each("12_[0-2,7%3]") == ["12_0", "12_1", "12_2", "12_7"]
