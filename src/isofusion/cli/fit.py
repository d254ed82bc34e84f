"""`isofusion fit FILE.csv`, or a study's folder: the law, how sure, what it says at a budget, how well it predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    file: Annotated[
        Path,
        typer.Argument(help="CSV with one row per finished run (parameters, tokens, loss), or a study's folder."),
    ],
    arm: Annotated[str | None, typer.Option("--arm", help="Arm of a study to fit; needed if it has several.")] = None,
    domain: Annotated[
        str | None, typer.Option("--domain", help="Of a study: caption, interleaved, text or mean (default).")
    ] = None,
    compute_axis: Annotated[
        str | None, typer.Option("--compute-axis", help="Of a study: FLOPs counted 'exact' (default) or as '6nd'.")
    ] = None,
    n: Annotated[str | None, typer.Option("--n", help="Column with parameters (units like 1.3B are read).")] = None,
    d: Annotated[str | None, typer.Option("--d", help="Column with training tokens.")] = None,
    loss: Annotated[str | None, typer.Option("--loss", help="Column with the final loss, nats per token.")] = None,
    flops: Annotated[str | None, typer.Option("--flops", help="Column with training FLOPs; else C = 6 N D.")] = None,
    group: Annotated[str | None, typer.Option("--group", help="Column naming the trunk a run branched from.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="Column naming the model size.")] = None,
    seed: Annotated[str | None, typer.Option("--seed", help="Column with the seed.")] = None,
    compute: Annotated[
        list[float] | None, typer.Option("--compute", help="FLOPs to plan for, e.g. 1e20; may be repeated.")
    ] = None,
    draws: Annotated[int, typer.Option("--bootstrap", help="Bootstrap draws for the intervals; 0 for none.")] = 1000,
    delta: Annotated[float, typer.Option("--delta", help="Huber threshold on log residuals.")] = 1e-3,
    fixed_e: Annotated[float | None, typer.Option("--fixed-e", help="Fix the irreducible loss at this value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fit L = E + A/N^alpha + B/D^beta to a table of runs."""
    columns = {"n": n, "d": d, "loss": loss, "c": flops, "group": group, "size": size, "seed": seed}
    runs, note = read(file, arm, domain, compute_axis, columns)
    result: dict[str, Any] = {"input": {"file": str(file), "note": note}}
    result |= analyse(runs, compute or [], draws=draws, delta=delta, fixed_e=fixed_e)
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        _print(result)


def read(
    file: Path, arm: str | None, domain: str | None, compute_axis: str | None, columns: dict[str, str | None]
) -> tuple[Any, str | None]:
    """(Runs, what was chosen for the reader or None) from a study folder, its results.csv, or any table of losses."""
    from isofusion.errors import InputError
    from isofusion.laws.table import DOMAINS, Runs, ledger_rows

    if file.is_dir():
        folder, file = file, file / "results.csv"
        if not file.is_file():
            raise InputError(f"{folder}: no results.csv; give a study folder with finished runs, or a CSV")
    rows = ledger_rows(file)
    asked = [
        flag
        for flag, value in (("--arm", arm), ("--domain", domain), ("--compute-axis", compute_axis))
        if value is not None
    ]
    named = any(columns.values())
    if rows is None or (named and not asked):
        if rows is None and asked:
            raise InputError(
                f"{file}: {', '.join(asked)} choose from a study's results.csv (columns arm, run, parent, n, tokens, "
                "flops, loss_caption, ...), and this is another table; name its columns with --n, --d, --loss"
            )
        arms = sorted({row["arm"] for row in rows or []})
        if len(arms) > 1:
            raise InputError(
                f"{file}: the rows of {len(arms)} arms ({', '.join(arms)}) are no one law; "
                "choose with --arm and --domain instead of naming columns"
            )
        return Runs.from_csv(file, **columns), None
    if named:
        raise InputError(f"{file}: {', '.join(asked)} fix the columns already; drop --n, --d, --loss and the like")
    if domain is not None and domain not in DOMAINS:
        raise InputError(f"--domain {domain}: choose {', '.join(DOMAINS)}")
    if compute_axis not in (None, "exact", "6nd"):
        raise InputError(f"--compute-axis {compute_axis}: choose exact or 6nd")
    arms = sorted({row["arm"] for row in rows})
    if arm is None and len(arms) > 1:
        raise InputError(f"{file}: {len(arms)} arms; choose one with --arm: {', '.join(arms)}")
    if arm is None and arms:
        arm = arms[0]
    note = None if domain else "no --domain given: fitted to the mean loss over domains (loss_mean)"
    return Runs.from_results(rows, arm, domain or "mean", compute_axis or "exact"), note


def analyse(runs: Any, compute: list[float], *, draws: int, delta: float, fixed_e: float | None) -> dict[str, Any]:
    """Everything `isofusion fit` prints, as plain data."""
    import numpy as np

    from isofusion.errors import InputError
    from isofusion.laws.bootstrap import bootstrap
    from isofusion.laws.fit import fit_law
    from isofusion.laws.frontier import Cost, compute_optimal, exponents, regress_allocation
    from isofusion.laws.holdout import hold_out, largest_size

    if any(not (np.isfinite(c) and c > 0) for c in compute):
        raise InputError(f"--compute {compute}: give positive FLOPs, e.g. --compute 1e20")
    fit = fit_law(runs, delta=delta, fixed_e=fixed_e)
    intervals = bootstrap(fit, draws) if draws else None
    cost = Cost.of(runs)
    regression = regress_allocation(fit, cost=cost)
    ends = exponents(fit.params)
    result: dict[str, Any] = {
        "law": fit.to_dict(),
        "bootstrap": intervals.to_dict() if intervals else None,
        "allocation": {
            "closed_form": {k: float(v) for k, v in ends.items()},
            "closed_form_interval": {k: list(intervals.quantiles(v)) for k, v in exponents(intervals.draws).items()}
            if intervals
            else None,
            "regression": regression.to_dict() if regression else None,
            "cost": {"kind": cost.kind, "spread": cost.spread},
        },
        "optimal": [],
    }
    for c in compute:
        best = compute_optimal(fit, c, cost=cost)
        if bool(best.edge[0]):
            raise InputError(f"--compute {c:g}: no interior optimum in N; the law's exponents do not bracket one")
        row: dict[str, Any] = {
            "compute": c,
            "n": float(best.n[0]),
            "d": float(best.d[0]),
            "tokens_per_parameter": float(best.d[0] / best.n[0]),
            "loss": float(best.loss[0]),
        }
        if intervals:
            drawn = compute_optimal(fit, c, cost=cost, params=intervals.draws)
            for key, values in (
                ("n", drawn.n),
                ("d", drawn.d),
                ("tokens_per_parameter", drawn.d / drawn.n),
                ("loss", drawn.loss),
            ):
                row[f"{key}_interval"] = list(intervals.quantiles(values[:, 0]))
        warning = fit.extrapolation(best.n, best.d)
        row["warnings"] = [{"code": warning.code, "message": warning.message}] if warning else []
        result["optimal"].append(row)
    try:
        result["hold_out"] = hold_out(
            runs, largest_size(runs), what="largest size", draws=min(draws, 400), delta=delta, fixed_e=fixed_e
        ).to_dict()
    except InputError as error:
        result["hold_out"] = {"refused": str(error)}
    return result


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    law, boot = result["law"], result["bootstrap"]
    console.print(
        f"[bold]{law['label']}[/]: {law['runs']} runs, {law['sizes']} sizes, {law['budgets']} token budgets; "
        f"C is {law['compute']}"
    )
    if result["input"]["note"]:
        console.print(result["input"]["note"])
    table = Table(title=f"L = {law['law']}", title_justify="left")
    table.add_column("parameter")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    rows = [(k, law[k], boot["intervals"].get(k) if boot else None) for k in ("E", "A", "alpha", "B", "beta")]
    allocation = result["allocation"]
    spans = allocation["closed_form_interval"] or {}
    rows += [
        (f"{k} ({name})", allocation["closed_form"][k], spans.get(k))
        for k, name in (("a", "N* ~ C^a"), ("b", "D* ~ C^b"), ("d", "D* ~ N*^d"))
    ]
    for name, value, span in rows:
        table.add_row(name, f"{value:.6g}", f"{span[0]:.4g} to {span[1]:.4g}" if span else "")
    console.print(table)
    end = law["convergence"]
    console.print(
        f"objective {law['objective']:.10g} (sum of Huber, delta {law['delta']:g}); "
        f"{100 * end['share_in_best_basin']:.0f} % of {end['starts']} starts "
        f"end there; gradient norm {end['gradient_norm']:.1e}; "
        f"residual spread {100 * law['residual_spread']:.3g} %"
    )
    if boot:
        console.print(
            f"intervals: {boot['draws']} draws, {boot['note']}; "
            f"{100 * boot['share_at_bound']:.1f} % of draws with an exponent at a bound"
        )
    regression = allocation["regression"]
    if regression:
        console.print(
            f"regression as in the paper: a {regression['a']:.4f}, b {regression['b']:.4f}, d {regression['d']:.4f}"
        )
    for row in result["optimal"]:
        span = row.get("n_interval"), row.get("d_interval")
        console.print(
            f"[bold]at {row['compute']:.3g} FLOPs[/]: N = {row['n']:.4g}{_span(span[0])} parameters, "
            f"D = {row['d']:.4g}{_span(span[1])} tokens, "
            f"{row['tokens_per_parameter']:.3g}{_span(row.get('tokens_per_parameter_interval'))} "
            f"tokens per parameter, "
            f"loss {row['loss']:.4f}{_span(row.get('loss_interval'))}"
        )
    for warning in law["warnings"] + [w for row in result["optimal"] for w in row["warnings"]]:
        console.print(f"[yellow]warning[/] {warning['code']}: {warning['message']}")
    held = result["hold_out"]
    if "refused" in held:
        console.print(f"[yellow]no hold-out[/]: {held['refused']}")
        return
    table = Table(title=f"held out: {held['held_out']}", title_justify="left")
    for name in ("N", "D", "observed", "predicted", "interval"):
        table.add_column(name, justify="right")
    for row in held["table"]:
        span = f"{row['low']:.4f} to {row['high']:.4f}" if row["low"] is not None else ""
        table.add_row(f"{row['n']:.4g}", f"{row['d']:.4g}", f"{row['observed']:.4f}", f"{row['predicted']:.4f}", span)
    console.print(table)
    if held["no_interval"]:
        console.print(held["no_interval"])
    parts = [
        f"{name.replace('_', ' ')} {100 * value:.2f} %"
        for name, value in held["baselines_reducible"].items()
        if value is not None
    ]
    console.print(
        f"mean absolute error {100 * held['mae_loss']:.3f} % of the loss, "
        f"{100 * held['mae_reducible']:.2f} % of the loss above {held['reducible_floor']}; "
        f"baselines: {', '.join(parts)}"
    )


def _span(span: list[float] | None) -> str:
    return f" ({span[0]:.3g} to {span[1]:.3g})" if span else ""
