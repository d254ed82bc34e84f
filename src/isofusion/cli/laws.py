"""`isofusion laws`: the published scaling laws, and all there is to know about one of them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def command(
    name: Annotated[
        str | None, typer.Argument(help="A law, e.g. shukor2025/early; without it, all are listed.")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="Predict there: n=1e9,d=2e10 (c, u, s, x where the law needs them).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the published laws, or show one: coefficients, source, what it rests on, its range, its caveats."""
    from isofusion.cli.plan import number
    from isofusion.errors import InputError
    from isofusion.laws.published import laws, published

    if name is None:
        if at is not None:
            raise InputError(
                "--at predicts with one law: name it, e.g. isofusion laws chinchilla/refit --at n=7e9,d=1T"
            )
        every = list(laws().values())
        typer.echo(json.dumps([law.to_dict() for law in every], indent=2) if as_json else "\n".join(table(every)))
        return
    law = published(name)
    result = law.to_dict()
    if at is not None:
        point = {}
        for pair in at.split(","):
            key, _, value = pair.partition("=")
            sparsity = key.strip() == "s" and value.strip() in ("0", "0.0")
            point[key.strip()] = 0.0 if sparsity else number(f"--at {key.strip()}", value)
        result |= {"at": point, "loss_at": law.predict(**point)}
    typer.echo(json.dumps(result, indent=2) if as_json else "\n".join(show(result)))


def table(every: list[Any]) -> list[str]:
    """One line per law."""
    rows = [("law", "plan", "what")]
    rows += [(law.name, "yes" if law.plannable else "-", law.what + mark(law)) for law in every]
    wide = max(len(row[0]) for row in rows)
    lines = [f"{a:<{wide}}  {b:<4}  {c}" for a, b, c in rows]
    return [
        *lines,
        "",
        f"{len(every)} laws. plan: isofusion plan --law NAME --compute 1e22. [derived]: values that the paper does not "
        "print and that were back-solved.",
        "`isofusion laws NAME` shows coefficients, source, range and caveats.",
    ]


def mark(law: Any) -> str:
    return f" [derived: {', '.join(sorted(law.derived))}]" if law.derived else ""


def show(law: dict[str, Any]) -> list[str]:
    """One law as lines of text."""
    lines = [f"{law['name']}: {law['what']}", f"  {law['formula']}", ""]
    for key, value in law["params"].items():
        error = f" +- {law['errors'][key]:g}" if key in law["errors"] else ""
        how = "   derived" if key in law["derived"] else ""
        lines.append(f"  {key:<8} {value:.7g}{error}{how}")
    others = {k: v for k, v in law["errors"].items() if k not in law["params"]}
    if others:
        lines.append("  standard errors of " + ", ".join(f"{k}: {v:g}" for k, v in others.items()))
    if law["errors_note"]:
        lines.append(f"  standard errors: {law['errors_note']}")
    for how in dict.fromkeys(law["derived"].values()):
        lines.append(f"  derived: {how}")
    if law["printed"]:
        lines.append("  printed beside them: " + ", ".join(f"{k} {v:g}" for k, v in law["printed"].items()))
    lines += [
        "",
        f"predicts {law['loss']}",
        law["counts"],
        f"source: {law['source']}",
        f"where: {law['where']}",
        f"rests on {law['rests_on']}",
    ]
    ranges = [f"{k} {v[0]:.3g} to {v[1]:.3g}" for k, v in _ranges(law) if v]
    lines.append("valid for " + "; ".join(ranges) if ranges else "range of the runs: not in what could be read")
    lines += [f"checked: {law['checked']}", *(f"caveat: {text}" for text in law["caveats"])]
    if "loss_at" in law:
        point = ", ".join(f"{k} = {v:.4g}" for k, v in law["at"].items())
        lines += ["", f"loss at {point}: {law['loss_at']:.4f} nats/token"]
    return lines


def _ranges(law: dict[str, Any]) -> list[tuple[str, list[float] | None]]:
    return [("N", law["n_range"]), ("D", law["d_range"]), ("C", law["c_range"])]
