"""`isofusion suggest` as a user meets it: an ordered list, JSON, a study to train, one clear message for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from isofusion.cli.main import main
from isofusion.study.spec import StudySpec

GRID = ["--n-grid", "20M:2B:4", "--d-grid", "400M:40B:3"]
GOAL = ["--target", "7B,140B"]
MINI = Path(__file__).parents[2] / "studies/world-mini.toml"


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["suggest", *(str(argument) for argument in arguments)])
    return int(ended.value.code or 0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Nine finished runs of a known law."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(2e7, 4e8, 3), np.geomspace(4e8, 8e9, 3)))
    loss = 1.8 + 480 / n**0.35 + 2100 / d**0.37
    rows = "\n".join(f"{a:.6g},{b:.6g},{c:.6g}" for a, b, c in zip(n, d, loss, strict=True))
    path = tmp_path / "runs.csv"
    path.write_text(f"params,tokens,loss\n{rows}\n")
    return path


def test_from_nothing_prints_an_ordered_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*GRID, *GOAL, "--budget", "1e20", "--trunk", "--most", 4, "--compare") == 0
    out = capsys.readouterr().out
    assert "0 runs done, 12 candidates" in out
    assert "a first run" in out
    assert "4 runs for" in out
    for baseline in ("random:", "cheapest:", "d-optimal:", "v-optimal:"):
        assert baseline in out


def test_a_wild_run_is_named(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(2e7, 4e8, 6), np.geomspace(4e8, 8e9, 5)))
    loss = (1.8 + 480 / n**0.35 + 2100 / d**0.37) * np.exp(0.003 * rng.standard_normal(30))
    loss[11] *= 1.5
    lines = [f"{a:.6g},{b:.6g},{c:.6g}" for a, b, c in zip(n, d, loss, strict=True)]
    table.write_text("\n".join(["params,tokens,loss", *lines]) + "\n")
    assert call(table, *GRID, *GOAL, "--budget", "1e20") == 0
    out = capsys.readouterr().out
    assert "30 runs done" in out
    assert f"note: the run N = {n[11]:.4g}, D = {d[11]:.4g}, loss {loss[11]:.4g} is many times the usual spread" in out


def test_many_runs_to_leave_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line had named every one of them."""
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log([2e7, 4e8]), np.log([2e9, 4e10]), (600, 2))).T
    loss = 1.7 + ((400 * n**-0.34) ** 1.5 + (900 * d**-0.31) ** 1.5) ** (1 / 1.5)
    path = tmp_path / "many.csv"
    lines = [f"{a:.6g},{b:.6g},{c:.6g}" for a, b, c in zip(n, d, loss, strict=True)]
    path.write_text("\n".join(["params,tokens,loss", *lines]) + "\n")
    asked = (path, *GRID, "--target-compute", "1e22", "--budget", "1e20", "--most", 1)
    assert call(*asked, "--json") == 0
    every = len(json.loads(capsys.readouterr().out)["leave_out"])
    assert every > 100
    assert call(*asked) == 0
    (line,) = (text for text in capsys.readouterr().out.splitlines() if text.startswith("leave out of the fit"))
    assert f"{every} of the 600 runs, among them N " in line
    assert len(line) < 600


def test_json_of_a_table_of_runs(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(table, *GRID, *GOAL, "--budget", "1e20", "--noise", 0.003, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["done"] == 9
    assert result["candidates"] == 10  # 20M at 400M tokens is done, and 93M is within 5 % of 89M
    assert "already" in result["notes"][-1] or any("already" in note for note in result["notes"])
    assert result["after"] < result["before"]
    spent = np.cumsum([run["cost"] for run in result["runs"]])
    assert [run["spent"] for run in result["runs"]] == pytest.approx(spent)
    assert spent[-1] <= 1e20
    assert result["runs"][-1]["error"] == result["after"]


def test_candidates_from_a_file_with_costs_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pool.csv"
    path.write_text("name,params,tokens,cost\na,20M,400M,1e10\nb,100M,2B,2e10\nc,1B,20B,9e99\n")
    assert call("--candidates", path, *GOAL, "--budget", "4e10", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {run["name"]: run["cost"] for run in result["runs"]} == {"a": 1e10, "b": 2e10}


def test_best_size_at_a_compute_and_a_far_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*GRID, "--target-compute", "1e24", "--want", "n", "--budget", "1e20", "--most", 3) == 0
    out = capsys.readouterr().out
    assert "the best size N*" in out
    assert "decades above every run" in out


def test_emits_a_study_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes near the wanted N, each with budgets near the D wanted of it: points need be no grid."""
    out = tmp_path / "next.toml"
    grid = ["--n-grid", "75K,120K,250K", "--d-grid", "300K:3M:3"]
    goal = ["--target", "1M,10M", "--budget", "2e13", "--trunk"]
    assert call(*grid, *goal, "--arm", "late", "--emit", out, "--template", MINI, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    wanted = sorted((run["n"], run["d"]) for run in result["runs"])
    assert len(wanted) > 3
    assert result["written"] == str(out)
    spec = StudySpec.from_toml(out)
    assert [arm.name for arm in spec.arms] == ["late"]
    assert spec.data == StudySpec.from_toml(MINI).data
    from isofusion.study.emit import parameters

    sizes = spec.arms[0].sizes
    assert len({size.budgets for size in sizes}) > 1  # or a grid was asked for
    assert len({size.train.warmup_steps for size in sizes}) == 1
    got = [(parameters(size.model), budget) for size in sizes for budget in size.budgets]
    assert len(got) == len(wanted)
    for (n, d), (n_got, d_got) in zip(wanted, sorted(got), strict=True):
        assert n_got == pytest.approx(n, rel=0.15)
        assert d_got == pytest.approx(d, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GOAL, "--budget", "1e20"], "no candidates"),
        ([*GOAL, "--budget", "1e20", "--n-grid", "20M:2B:4"], "belong together"),
        ([*GRID, *GOAL], "give --budget"),
        ([*GRID, *GOAL, "--budget", "much"], "--budget much"),
        ([*GRID, *GOAL, "--budget", "1e10"], "pays for none of 12 candidates"),
        ([*GRID, "--budget", "1e20"], "give what the law is wanted for"),
        ([*GRID, *GOAL, "--target-compute", "1e22", "--budget", "1e20"], "not both"),
        ([*GRID, *GOAL, "--want", "n", "--budget", "1e20"], "goes with --target-compute"),
        ([*GRID, "--target-compute", "1e22", "--want", "d", "--budget", "1e20"], "choose 'loss' or 'n'"),
        ([*GRID, "--target", "7B", "--budget", "1e20"], "--target 7B"),
        ([*GRID, "--target", "7B,-1", "--budget", "1e20"], "--target -1"),
        (["--n-grid", "2B:20M:4", "--d-grid", "1B", *GOAL, "--budget", "1e20"], "LOW is above HIGH"),
        (["--n-grid", "2B:20M", "--d-grid", "1B", *GOAL, "--budget", "1e20"], "LOW:HIGH:COUNT"),
        (["--n-grid", "1M:9B:99", "--d-grid", "1M:9B:99", *GOAL, "--budget", "1e20"], "use coarser grids"),
        ([*GRID, *GOAL, "--budget", "1e20", "--strategy", "luck"], "--strategy luck"),
        ([*GRID, *GOAL, "--budget", "1e20", "--error", "5"], "between 0 and 1"),
        ([*GRID, *GOAL, "--budget", "1e20", "--emit", "x.toml"], "--emit needs --template"),
        ([*GRID, *GOAL, "--budget", "1e20", "--loss", "x"], "name the table first"),
        (["--candidates", "nowhere.csv", *GOAL, "--budget", "1e20"], "nowhere.csv: no such file"),
        (["nowhere.csv", *GRID, *GOAL, "--budget", "1e20"], "nowhere.csv"),
    ],
)
def test_bad_input_is_one_message_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("params,tokens\n", "no candidates"),
        ("params,loss\n1,2\n", "no column for d"),
        ("params,tokens,cost\n20M,400M,-5\n", "line 2, column 'cost': -5 is not positive"),
        ("params,tokens\n20M,many\n", "line 2, column 'tokens'"),
        ("params,tokens\n20M\n", "line 2, column 'tokens': empty"),
    ],
)
def test_bad_candidate_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pool.csv"
    path.write_text(text)
    assert call("--candidates", path, *GOAL, "--budget", "1e20") == 2
    assert message in capsys.readouterr().err


def test_everything_done_already(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(table, "--n-grid", "20M", "--d-grid", "400M", *GOAL, "--budget", "1e20") == 2
    assert "all 1 are done already" in capsys.readouterr().err


def test_a_template_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emit = ["--emit", tmp_path / "next.toml", "--template", MINI]
    assert call(*GRID, *GOAL, "--budget", "1e20", "--most", 1, *emit) == 2
    assert "choose with --arm" in capsys.readouterr().err
    tiny = ["--n-grid", "1K", "--d-grid", "1M", *GOAL, "--budget", "1e20", "--arm", "early"]
    assert call(*tiny, *emit) == 2
    assert "no width gives N = 1000" in capsys.readouterr().err
    short = ["--n-grid", "100K", "--d-grid", "1K", *GOAL, "--budget", "1e20", "--arm", "early"]
    assert call(*short, *emit) == 2
    assert "make no study with this template" in capsys.readouterr().err
    assert not (tmp_path / "next.toml").exists()


def test_needs_no_torch() -> None:
    code = (
        "import sys\nfrom isofusion.cli.main import main\n"
        "try: main(['suggest', '--n-grid', '50K,100K', '--d-grid', '1M,2M', '--target', '1M,9M', '--budget', '1e13',"
        f" '--arm', 'early', '--emit', sys.argv[1], '--template', {str(MINI)!r}])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "next.toml"
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert path.is_file()


def test_seeds_of_a_candidate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    grid = ["--n-grid", "20M,200M", "--d-grid", "400M,4B"]
    assert call(*grid, *GOAL, "--budget", "1e19", "--seeds", 3, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["candidates"] == 12
    assert any("seed" in run["name"] for run in result["runs"])
    places = [(run["n"], run["d"]) for run in result["runs"]]
    assert len(set(places)) < len(places)
    assert call(*grid, *GOAL, "--budget", "1e19", "--seeds", 2, "--emit", tmp_path / "x.toml", "--template", MINI) == 2
    assert "--seeds goes without --emit" in capsys.readouterr().err
