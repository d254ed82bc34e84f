"""The options that say how a table of runs is read, shared by every command that reads one (`fit`, `plan`, `suggest`).

@reads_table
def command(file: ..., *, table: TableOptions, ...) -> None:
    runs, notes = table.read(file)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from isofusion.laws.table import Runs

FILE_HELP = (
    "Table with one row per finished run (CSV, TSV, JSONL, parquet, .gz; - for standard input), a study's folder, "
    "a folder of TensorBoard logs, or a Weights & Biases export."
)


def _option(flag: str, text: str, panel: str, *more: str) -> Any:
    return typer.Option(flag, *more, help=text, rich_help_panel=panel, show_default=False)


TABLE, STUDY, CURVES = "Columns of the table", "Of a study", "Training curves"


@dataclass(frozen=True)
class TableOptions:
    """One field per option; names of columns may carry a unit (`params:M`)."""

    n: Annotated[str | None, _option("--n", "Column with parameters (1.3B, 275M are read).", TABLE)] = None
    d: Annotated[str | None, _option("--d", "Column with training tokens.", TABLE)] = None
    loss: Annotated[str | None, _option("--loss", "Column (or tag) with the loss, nats per token.", TABLE)] = None
    c: Annotated[str | None, _option("--c", "Column with training FLOPs; else C = 6 N D.", TABLE, "--flops")] = None
    se: Annotated[str | None, _option("--se", "Column with standard errors of the loss.", TABLE)] = None
    oracle: Annotated[str | None, _option("--oracle", "Column with the known entropy of the data.", TABLE)] = None
    run: Annotated[str | None, _option("--run", "Column with the run's name.", TABLE)] = None
    group: Annotated[str | None, _option("--group", "Column naming the trunk a run branched from.", TABLE)] = None
    size: Annotated[str | None, _option("--size", "Column naming the model size.", TABLE)] = None
    seed: Annotated[str | None, _option("--seed", "Column with the seed.", TABLE)] = None
    n_from_name: Annotated[
        str | None, _option("--n-from-name", "Expression that finds N in a run's name: 'n([0-9.]+[MB])'.", TABLE)
    ] = None
    d_from_name: Annotated[str | None, _option("--d-from-name", "Expression that finds D in a run's name.", TABLE)] = (
        None
    )
    meta: Annotated[
        Path | None, _option("--meta", "Side table with n, d, ... per run, keyed by a column run.", TABLE)
    ] = None
    drop_bad: Annotated[bool, _option("--drop-bad", "Leave bad rows out, and list them.", TABLE)] = False
    where: Annotated[
        list[str] | None, _option("--where", "Only rows with COLUMN=VALUE (dataset=c4); may be repeated.", TABLE)
    ] = None
    arm: Annotated[
        str | None, _option("--arm", "Arm to fit; needed if a study has several; of a table, in its arm column.", STUDY)
    ] = None
    domain: Annotated[str | None, _option("--domain", "caption, interleaved, text or mean (default).", STUDY)] = None
    compute_axis: Annotated[
        str | None, _option("--compute-axis", "FLOPs counted 'exact' (default) or as '6nd'.", STUDY)
    ] = None
    final: Annotated[str | None, _option("--final", "A run's loss: last, mean:K or ema:W of its curve.", CURVES)] = None
    step: Annotated[str | None, _option("--step", "Column that orders the rows of a run.", CURVES)] = None
    tokens_per_step: Annotated[str | None, _option("--tokens-per-step", "D = last step x this, e.g. 0.5M.", CURVES)] = (
        None
    )

    @property
    def given(self) -> list[str]:
        """The options that were given, as they are written: --n-from-name."""
        named = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        return [f"--{name.replace('_', '-')}" for name in named]

    def read(self, source: Any) -> tuple[Runs, list[str]]:
        """(Runs, notes for the reader); raises InputError as `laws.readers.read_runs`."""
        from isofusion.laws.tables.readers import ROLES, read_runs

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        columns = {role: given.pop(role) for role in ROLES}
        return read_runs(source, columns=columns, **given)


def reads_table(command: Callable[..., None], *, without: Sequence[str] = ()) -> Callable[..., None]:
    """The command with its parameter `table` spelt out as the options of TableOptions, as typer wants them.

    without: fields that the command has other options of the same name for; they keep their defaults.
    """
    signature = inspect.signature(command, eval_str=True)
    hints = get_type_hints(TableOptions, include_extras=True)
    spelt_out = [f for f in fields(TableOptions) if f.name not in without]
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in spelt_out
    ]
    own = [p.replace(kind=p.KEYWORD_ONLY) for name, p in signature.parameters.items() if name != "table"]

    @functools.wraps(command)
    def spelt(**given: Any) -> None:
        table = TableOptions(**{f.name: given.pop(f.name) for f in spelt_out})
        command(table=table, **given)

    shown = [p for p in own if p.default is p.empty] + options + [p for p in own if p.default is not p.empty]
    spelt.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    spelt.__annotations__ = {p.name: p.annotation for p in shown}
    return spelt
