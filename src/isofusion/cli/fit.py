"""`isofusion fit FILE`: what to train, how sure, what it rests on, how well it predicts; `--report` draws it."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isofusion.cli.columns import FILE_HELP, TableOptions, reads_table
from isofusion.cli.plan import quantity
from isofusion.cli.second import second_process

if TYPE_CHECKING:
    from isofusion.laws.table import Runs

OBJECTIVES = {"l2": "squares", "log-l2": "log-squares"}  # other names of the same measures


@reads_table
def command(
    file: Annotated[Path, typer.Argument(help=FILE_HELP)],
    table: TableOptions,
    compute: Annotated[
        list[float] | None,
        typer.Option(
            "--compute", parser=quantity, metavar="<number>", help="FLOPs to plan for, e.g. 1e20; may be repeated."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Also write one HTML page with every figure, e.g. fit.html.")
    ] = None,
    draws: Annotated[int, typer.Option("--bootstrap", help="Bootstrap draws for the intervals; 0 for none.")] = 1000,
    resample: Annotated[
        str, typer.Option("--resample", help="How intervals are drawn: hierarchical, trunk, row or residual.")
    ] = "hierarchical",
    delta: Annotated[float, typer.Option("--delta", help="Huber threshold on log residuals.")] = 1e-3,
    fixed_e: Annotated[float | None, typer.Option("--fixed-e", help="Fix the irreducible loss at this value.")] = None,
    starts: Annotated[
        str, typer.Option("--starts", help="projection, or paper: the paper's own grid and L-BFGS (a minute).")
    ] = "projection",
    objective: Annotated[
        str,
        typer.Option("--objective", help="huber, l1, log-l2, l2 or asymmetric; all but huber get a shorter answer."),
    ] = "huber",
    form: Annotated[
        str | None, typer.Option("--form", help="Another law, by name (an unknown name lists them).")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="With --form: a law's own column, sparsity=S; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fit L = E + A/N^alpha + B/D^beta to a table of runs: the answer, how sure, and what it rests on."""
    from isofusion.errors import InputError
    from isofusion.laws.bootstrap import METHODS

    kind = OBJECTIVES.get(objective, objective)
    if starts not in ("projection", "paper"):
        raise InputError(f"--starts {starts}: choose projection or paper")
    if resample not in METHODS:
        raise InputError(f"--resample {resample}: choose {', '.join(METHODS)}")
    if form is None and kind == "huber":
        if column:
            raise InputError(f"--column {column[0]}: the default law rests on N and D alone; it goes with --form")
        runs, notes = table.read(file)
        if runs.se is not None:
            notes = [*notes, "standard errors do not weigh the default law's runs; they do with --form chinchilla"]
        result = _default(runs, notes, compute or [], draws, resample, delta, fixed_e, starts, report)
        if as_json:
            _json(file, result)
        else:
            from isofusion.cli.fitshow import show

            show(result)
        if report is not None:
            _page(result, report)
            if not as_json:
                typer.echo(f"\nreport: {report}")
        return
    if report is not None or starts != "projection" or resample != "hierarchical":
        flag = "--report" if report is not None else "--starts" if starts != "projection" else "--resample"
        raise InputError(f"{flag}: for the default law and objective; drop {'--form' if form else '--objective'}")
    from isofusion.laws.formanalysis import analyse_form

    runs, extra, notes = _with_columns(table, file, column or [])
    other = analyse_form(
        runs,
        form or "chinchilla",
        compute or [],
        extra=extra,
        objective=kind,  # type: ignore[arg-type]
        delta=delta,
        weights=None if runs.se is None else "se",
        fixed={} if fixed_e is None else {"E": fixed_e},
        draws=draws,
        notes=notes,
    )
    if as_json:
        _json(file, other)
    else:
        from isofusion.cli.fitshow import show_form

        show_form(other)


def _default(
    runs: Runs,
    notes: list[str],
    compute: list[float],
    draws: int,
    resample: str,
    delta: float,
    fixed_e: float | None,
    starts: str,
    report: Path | None,
) -> Any:
    """The analysis of the default law, with what its page needs where one is asked for."""
    from isofusion.errors import InputError
    from isofusion.laws.analysis import analyse

    if report is not None:
        if report.is_dir() or not report.parent.is_dir():
            raise InputError(f"--report {report}: give the name of a file in a folder that exists, e.g. fit.html")
        if draws == 0:
            raise InputError("--report draws intervals: leave --bootstrap at its default, or give 200 or more")
        from isofusion.report.render import warm

        warm()
        # millions of small objects that live to the end: Python's default goes through them again and again, for a
        # tenth of the command's time
        gc.set_threshold(100_000, 50, 100)
    options: dict[str, Any] = {"draws": draws, "method": resample, "delta": delta, "fixed_e": fixed_e}
    options |= {"starts": starts, "notes": notes}
    if report is None:
        return analyse(runs, compute, **options)
    with second_process("isofusion.laws.analysis") as pool:
        import isofusion.report.fitpage  # noqa: F401  altair, while the other process imports its part

        return analyse(runs, compute, profiles=True, pool=pool, **options)


def _page(result: Any, report: Path) -> None:
    """Write the page, after the answer has left: what fails here loses nothing."""
    from isofusion.errors import RunFailure
    from isofusion.report.fitpage import write_page

    sys.stdout.flush()
    try:
        write_page(result, report)
    except OSError as error:
        raise RunFailure(f"--report {report}: {error.strerror or error}; the answer above is whole") from error


def _with_columns(table: TableOptions, file: Path, pairs: list[str]) -> tuple[Runs, dict[str, Any], list[str]]:
    """The runs, and a law's own columns from the same rows."""
    from isofusion.errors import InputError
    from isofusion.laws.tables.readers import ROLES, read_columns

    extra: dict[str, str] = {}
    for pair in pairs:
        role, _, name = pair.partition("=")
        if not role.strip() or not name.strip():
            raise InputError(f"--column {pair}: write the law's name for it = the table's, e.g. --column sparsity=S")
        extra[role.strip()] = name.strip()
    given = {f.name: getattr(table, f.name) for f in fields(table)}
    columns = {role: given.pop(role) for role in ROLES}
    return read_columns(file, extra, columns=columns, **given)


def _json(file: Path, result: Any) -> None:
    from isofusion import __version__

    head = {"input": {"file": str(file), "note": "; ".join(result.notes) or None}, "isofusion": __version__}
    typer.echo(json.dumps(head | result.to_dict(), indent=2, allow_nan=False))
