"""`isofusion suggest`: which runs to train next for a law that is right where it matters, under a budget of FLOPs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isofusion.cli.columns import FILE_HELP, TableOptions, reads_table

if TYPE_CHECKING:
    from isofusion.laws.candidates import Candidates, Target
    from isofusion.laws.suggest import Suggestion
    from isofusion.laws.table import Runs

LISTED = 12  # runs to leave out that are named one by one


@reads_table
def command(
    table: TableOptions,
    file: Annotated[Path | None, typer.Argument(help=f"{FILE_HELP} Left out: nothing is trained yet.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="FLOPs to spend on the next runs, e.g. 1e20.")] = None,
    candidates: Annotated[
        Path | None, typer.Option("--candidates", help="CSV of runs to choose from: n, d and maybe cost and name.")
    ] = None,
    n_grid: Annotated[
        str | None,
        typer.Option("--n-grid", help="Sizes to choose from: LOW:HIGH:COUNT (geometric), or a list 20M,50M."),
    ] = None,
    d_grid: Annotated[str | None, typer.Option("--d-grid", help="Token budgets to choose from, as --n-grid.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Point N,D whose loss is wanted, e.g. 7B,140B; repeat for more."),
    ] = None,
    target_compute: Annotated[
        list[str] | None, typer.Option("--target-compute", help="FLOPs whose compute-optimal loss (or N) is wanted.")
    ] = None,
    want: Annotated[str, typer.Option("--want", help="With --target-compute: loss, or n (the best size).")] = "loss",
    most: Annotated[int | None, typer.Option("--most", help="At most so many runs.")] = None,
    error: Annotated[
        float, typer.Option("--error", help="Stop once the expected relative error is this low, e.g. 0.005.")
    ] = 0.0,
    min_gain: Annotated[
        float,
        typer.Option("--min-gain", help="Stop when 1 % of the budget would cut the error by less than this share."),
    ] = 0.0,
    trunk: Annotated[
        bool, typer.Option("--trunk", help="Equal sizes branch from one trunk, so that budgets share 0.8 of the cost.")
    ] = False,
    seeds: Annotated[
        int, typer.Option("--seeds", help="How often each candidate can be trained, with another seed each time.")
    ] = 1,
    noise: Annotated[
        float | None, typer.Option("--noise", help="Relative spread of equal runs, if known; else estimated.")
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", help="suggest, or a baseline: random, cheapest, d-optimal, v-optimal.")
    ] = "suggest",
    compare: Annotated[bool, typer.Option("--compare", help="Also show what each baseline would reach.")] = False,
    random_seed: Annotated[int, typer.Option("--random-seed", help="Of the plausible laws averaged over.")] = 0,
    emit: Annotated[
        Path | None, typer.Option("--emit", help="Write the runs as a study TOML; needs --template.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option("--template", help="Study TOML that the data, model and training come from.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Choose the next runs by expected reduction of the law's error in a target region, per FLOP."""
    from isofusion.errors import InputError
    from isofusion.laws.suggest import STRATEGIES, suggest

    if budget is None:
        raise InputError("give --budget, the FLOPs to spend on the next runs, e.g. --budget 1e20")
    if (emit is None) != (template is None):
        raise InputError("--emit needs --template STUDY.toml (data, model, training) and --template needs --emit")
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy {strategy}: choose {', '.join(STRATEGIES)}")
    runs, notes = table.read(file) if file is not None else (None, [])
    if file is None:
        _no_table(table, needs_arm=emit is not None)
    if seeds > 1 and emit is not None:
        raise InputError("--seeds goes without --emit: a study has its seeds for every size; set [study] seeds in it")
    pool, more = _pool(candidates, n_grid, d_grid, {"shared": trunk, "seeds": seeds}, runs)
    goal = _target(target, target_compute, want)
    notes = [*notes, *more, *_reach(goal, pool, runs)]
    options: dict[str, Any] = {"most": most, "wanted": error, "least": min_gain, "noise": noise, "seed": random_seed}
    flops = _number("--budget", budget)
    chosen = suggest(runs, pool, goal, flops, strategy=strategy, **options)
    others = (
        [suggest(runs, pool, goal, flops, strategy=s, **options) for s in STRATEGIES if s != strategy]
        if compare
        else []
    )
    if emit is not None and trunk and runs is not None:
        notes.append("a study trains its own trunks: it costs more than shown where a size has a trunk already")
    if emit is not None and template is not None:
        _write(emit, template, table.arm, chosen)
    result = chosen.to_dict() | {"target": want if target_compute else "loss"}
    result["notes"] = [*notes, *chosen.notes]
    result["leave_out"] = (
        [] if runs is None else [{"n": float(runs.n[i]), "d": float(runs.d[i])} for i in chosen.leave_out]
    )
    if compare:
        result["compared"] = [
            {"strategy": s.strategy, "after": s.after, "spent": s.spent, "runs": len(s.picks)} for s in others
        ]
    if emit is not None:
        result["written"] = str(emit)
    typer.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else "\n".join(_lines(result)))


def _no_table(table: TableOptions, needs_arm: bool) -> None:
    from isofusion.errors import InputError

    named = [flag for flag in table.given if not (flag == "--arm" and needs_arm)]
    if named:
        raise InputError(f"{', '.join(named)}: options of a table of runs, and none is given; name the table first")


def _number(flag: str, text: str) -> float:
    from isofusion.errors import InputError
    from isofusion.laws.tables.cells import parse

    value, reason = parse(text.strip(), "n")
    if reason:
        raise InputError(f"{flag} {text}: {reason}; write e.g. 1.3e9, 1.3B or 1e22")
    return value


def _grid(flag: str, text: str) -> list[float]:
    """LOW:HIGH:COUNT, evenly in logarithm, or a list with commas."""
    import numpy as np

    from isofusion.errors import InputError

    if ":" not in text:
        return [_number(flag, part) for part in text.split(",")]
    parts = text.split(":")
    if len(parts) != 3 or not parts[2].strip().isdecimal() or int(parts[2]) < 1:
        raise InputError(f"{flag} {text}: write LOW:HIGH:COUNT, e.g. 20M:2B:9, or a list such as 20M,50M,100M")
    low, high = (_number(flag, part) for part in parts[:2])
    if low > high:
        raise InputError(f"{flag} {text}: LOW is above HIGH")
    return [float(v) for v in np.geomspace(low, high, int(parts[2]))]


def _pool(
    file: Path | None, n_grid: str | None, d_grid: str | None, options: dict[str, Any], runs: Runs | None
) -> tuple[Candidates, list[str]]:
    """The candidates that are not done yet, and notes."""
    from isofusion.errors import InputError
    from isofusion.laws.candidates import Candidates
    from isofusion.laws.cost import Cost

    if (file is None) == (n_grid is None and d_grid is None):
        raise InputError(
            "no candidates: give --candidates FILE.csv, or --n-grid and --d-grid" + " (not both)" * (file is not None)
        )
    options = options | {"per_token": Cost.of(runs) if runs is not None else None}
    if file is not None:
        pool = Candidates.from_csv(file, **options)
    elif n_grid is None or d_grid is None:
        raise InputError("no candidates: --n-grid and --d-grid belong together")
    else:
        pool = Candidates.grid(_grid("--n-grid", n_grid), _grid("--d-grid", d_grid), **options)
    left = pool if runs is None else pool.not_in(runs)
    if not len(left):
        raise InputError(f"no candidates: all {len(pool)} are done already; give larger, longer or finer ones")
    gone = len(pool) - len(left)
    return left, [f"{gone} of {len(pool)} candidates are done already and left out"] if gone else []


def _target(points: list[str] | None, compute: list[str] | None, want: str) -> Target:
    from isofusion.errors import InputError
    from isofusion.laws.candidates import Target

    if bool(points) == bool(compute):
        raise InputError(
            "give what the law is wanted for: --target N,D (e.g. 7B,140B) or --target-compute FLOPs"
            + (", not both" if points else "")
        )
    if points:
        if want != "loss":
            raise InputError(f"--want {want} goes with --target-compute; at points only the loss is asked for")
        pairs = [point.split(",") for point in points]
        if bad := next((point for point, pair in zip(points, pairs, strict=True) if len(pair) != 2), None):
            raise InputError(f"--target {bad}: write N,D with one comma, e.g. 7B,140B")
        return Target.points(*([_number("--target", pair[i]) for pair in pairs] for i in (0, 1)))
    return Target.at_compute([_number("--target-compute", c) for c in compute or []], want)  # type: ignore[arg-type]


def _reach(goal: Target, pool: Candidates, runs: Runs | None) -> list[str]:
    """A note where the target lies more than a decade outside all runs, done and possible."""
    import numpy as np

    from isofusion.laws.warn import beyond, extrapolates

    out = []
    for name, wanted in (("n", goal.n), ("d", goal.d), ("cost", goal.compute)):
        if not len(wanted):
            continue
        seen = getattr(pool, name)
        if runs is not None:
            seen = np.concatenate([seen, getattr(runs, "c" if name == "cost" else name)])
        far, side = beyond(wanted, seen)
        word = {"n": "N", "d": "D", "cost": "compute"}[name]
        if extrapolates(far):
            out.append(
                f"the target's {word} is {far:.1f} decades {side} every run, done or possible: the misfit of the law "
                "there is a guess"
            )
    return out


def _write(emit: Path, template: Path, arm: str | None, chosen: Suggestion) -> None:
    from isofusion.errors import InputError
    from isofusion.study.emit import emit as study_text

    if not chosen.picks:
        raise InputError(f"--emit {emit}: no run is suggested ({chosen.stopped}), so there is no study to write")
    text = study_text(template, [(p.n, p.d) for p in chosen.picks], arm=arm, name=emit.stem)
    emit.write_text(text, encoding="utf-8")


def _lines(result: dict[str, Any]) -> list[str]:
    """The result for people: plain text, columns aligned."""
    what = "the best size N*" if result["target"] == "n" else "the loss"
    noise, picks = result["noise"], result["runs"]
    spread = (noise["trunk"] ** 2 + noise["branch"] ** 2) ** 0.5
    out = [
        f"{result['done']} runs done, {result['candidates']} candidates, budget {result['budget']:.3g} FLOPs; "
        f"strategy {result['strategy']}",
        f"expected error of {what} in the target region now: {_percent(result['before'])} (assumes runs spread by "
        f"{_percent(spread)} and the law off by {_percent(noise['misfit'])})",
    ]
    rows = [("", "N", "D", "FLOPs", "spent", "error after", "why")]
    for i, p in enumerate(picks, start=1):
        share = f"{100 * p['spent'] / result['budget']:.1f} %"
        rows.append(
            (f"{i}", f"{p['n']:.4g}", f"{p['d']:.4g}", f"{p['cost']:.3g}", share, _percent(p["error"]), p["why"])
        )
    wide = [max(len(row[k]) for row in rows) for k in range(6)]
    if picks:
        out += ["  ".join([*(row[k].rjust(wide[k]) for k in range(6)), row[6]]).rstrip() for row in rows]
    out.append(
        f"{len(picks)} runs for {result['spent']:.3g} FLOPs: expected error {_percent(result['before'])} -> "
        f"{_percent(result['after'])}; stopped: {result['stopped']}"
    )
    if len(picks) > 3:
        out.append("Run the first few, add their losses and ask again: later choices depend on what they show.")
    if result["leave_out"]:
        where = ", ".join(f"N {r['n']:.4g} D {r['d']:.4g}" for r in result["leave_out"][:LISTED])
        if (count := len(result["leave_out"])) > LISTED:
            where = f"{count} of the {result['done']} runs, among them {where} (--json lists all)"
        out.append(
            f"leave out of the fit: {where}: expected error now {_percent(result['before'])} -> "
            f"{_percent(result['without'])}, since the law is not quite true there and that bends it at the target"
        )
    for other in result.get("compared", []):
        out.append(
            f"{other['strategy']}: {other['runs']} runs for {other['spent']:.3g} FLOPs, expected error "
            f"{_percent(other['after'])}"
        )
    out += [f"note: {note}" for note in result["notes"]]
    out += [f"written: {result['written']}"] if "written" in result else []
    return out


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
