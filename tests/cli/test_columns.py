"""The shared options of commands that read a table of runs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from typer.testing import CliRunner

from isofusion.cli.columns import TableOptions, reads_table

seen: list[tuple[Path, TableOptions, int]] = []


@reads_table
def command(file: Path, table: TableOptions, draws: Annotated[int, typer.Option("--draws")] = 7) -> None:
    """A command of one's own."""
    seen.append((file, table, draws))


app = typer.Typer()
app.command()(command)


def test_every_option_reaches_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("id,M,T,L,F,e,h,g,s,k\na,70,2B,3.0,1e18,0.01,1.5,t,small,4\n")
    names = {"n": "M:M", "d": "T", "loss": "L", "c": "F", "se": "e", "oracle": "h", "run": "id", "group": "g"}
    names |= {"size": "s", "seed": "k"}
    flags = [part for role, column in names.items() for part in (f"--{role}", column)]
    done = CliRunner().invoke(app, [str(path), *flags, "--draws", "3"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    file, table, draws = seen.pop()
    assert (file, draws) == (path, 3)
    runs, _ = table.read(file)
    assert (runs.n[0], runs.d[0], runs.loss[0], runs.c[0]) == (70e6, 2e9, 3.0, 1e18)
    assert runs.se is not None
    assert runs.oracle is not None
    assert (runs.se[0], runs.oracle[0], runs.group[0], runs.size[0], runs.seed[0]) == (0.01, 1.5, "t", "small", "4")


def test_defaults_are_those_of_the_dataclass_and_help_lists_all() -> None:
    CliRunner().invoke(app, ["x.csv"], catch_exceptions=False)
    assert seen.pop() == (Path("x.csv"), TableOptions(), 7)
    CliRunner().invoke(app, ["x.csv", "--flops", "F"], catch_exceptions=False)
    assert seen.pop()[1].c == "F"
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    for field in fields(TableOptions):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "A command of one's own." in shown
