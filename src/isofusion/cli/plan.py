"""`isofusion plan`: N, D and loss for a budget, a loss target, a size, tokens or inference; from a paper or own runs.

With `--mixtures` instead: the best data mixture at given N and D. Printed without rich, so that an answer from a
published law comes in a fraction of a second.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from isofusion.cli.columns import TableOptions, reads_table

DEFAULT_MFU = 0.4
NEVER = "out of reach"  # of a loss, at any number of tokens
ASKED = ("n", "d", "loss")  # roles whose own options are questions here; --columns names their columns
ROLES = (*ASKED, "c", "group", "size", "seed")


@partial(reads_table, without=ASKED)
def command(
    table: TableOptions,
    law: Annotated[str | None, typer.Option("--law", help="A published law, e.g. shukor2025/early; no data.")] = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", help="Your own losses: a table, or a study's folder; fitted first.")
    ] = None,
    compute: Annotated[str | None, typer.Option("--compute", help="Budget in FLOPs, e.g. 1e22.")] = None,
    loss: Annotated[str | None, typer.Option("--loss", help="Loss to reach, nats per token.")] = None,
    gpu_hours: Annotated[str | None, typer.Option("--gpu-hours", help="Budget in device-hours; with --gpu.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="a100, h100, h200, b200, mi300x, tpu-v5p, ...")] = None,
    mfu: Annotated[
        float | None, typer.Option("--mfu", help="Share of the bf16 peak reached (0.4 if left out).")
    ] = None,
    n: Annotated[
        str | None, typer.Option("--n", help="Parameters, e.g. 1.3B: the tokens they are optimal for.")
    ] = None,
    d: Annotated[str | None, typer.Option("--d", help="Tokens, e.g. 100B: the size they are optimal for.")] = None,
    inference_tokens: Annotated[
        str | None, typer.Option("--inference-tokens", help="Tokens served in a lifetime; with a budget or --loss.")
    ] = None,
    unique_tokens: Annotated[
        str | None, typer.Option("--unique-tokens", help="Unique tokens there are (data-constrained laws).")
    ] = None,
    image_share: Annotated[
        float | None, typer.Option("--image-share", help="Late fusion: share of image tokens (0.544 if left out).")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="With --runs TABLE: n=params,d=tokens,loss=val_loss.")
    ] = None,
    draws: Annotated[int, typer.Option("--bootstrap", help="With --runs: draws for the intervals; 0 for none.")] = 1000,
    resample: Annotated[
        str | None,
        typer.Option(
            "--resample",
            help="With --runs: intervals from hierarchical (default), residual, row or trunk resampling.",
            show_default=False,
        ),
    ] = None,
    mixtures: Annotated[
        Path | None, typer.Option("--mixtures", help="Table of runs on several mixtures: best shares at --n and --d.")
    ] = None,
    form: Annotated[str, typer.Option("--form", help="With --mixtures: additive or joint.")] = "additive",
    target: Annotated[
        str | None, typer.Option("--target", help="With --mixtures: weights of the losses, caption=1,text=0.5.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """What to train: exactly one of --compute, --loss, --gpu-hours, --n, --d, from --law NAME or --runs TABLE."""
    from isofusion.errors import InputError

    given = {"--compute": compute, "--loss": loss, "--gpu-hours": gpu_hours, "--n": n, "--d": d}
    named = [k for k, v in given.items() if v is not None]
    if mixtures is not None:
        others = [k for k, v in (("--law", law), ("--runs", runs), ("--columns", columns)) if v is not None]
        others += table.given
        if named != ["--n", "--d"] or others:
            extra = f"; drop {', '.join(others)}" if others else ""
            raise InputError(
                f"--mixtures: the best mixture is found at a size and a token count; give --n and --d{extra}"
            )
        result = mixture_plan(mixtures, number("--n", n), number("--d", d), form, target, min(draws, 100))
        typer.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else "\n".join(show_mixture(result)))
        return
    if (law is None) == (runs is None):
        both = "not both" if law else "e.g. --law shukor2025/early (`isofusion laws` lists them)"
        raise InputError(f"give --law NAME or --runs TABLE, {both}")
    if len(named) != 1:
        got = f"got {' and '.join(named)}" if named else "got none"
        raise InputError(f"give exactly one of {', '.join(given)}; {got}")
    if gpu_hours is None and (gpu is not None or mfu is not None):
        raise InputError("--gpu and --mfu go with --gpu-hours")
    asked: dict[str, Any] = {}
    values = {k: None if v is None else number(f"--{k}", v) for k, v in (("loss", loss), ("n", n), ("d", d))}
    flops = None if compute is None else number("--compute", compute)
    if gpu_hours is not None:
        from isofusion.laws.hardware import accelerator, training_flops

        if gpu is None:
            raise InputError("--gpu-hours: name the device with --gpu, e.g. --gpu h100")
        device, hours = accelerator(gpu), number("--gpu-hours", gpu_hours)
        used = DEFAULT_MFU if mfu is None else mfu
        flops = training_flops(hours, device, used)
        asked = {"gpu_hours": hours, "gpu": device.to_dict(), "mfu": used, "mfu_assumed": mfu is None}
    served = 0.0 if inference_tokens is None else number("--inference-tokens", inference_tokens)
    asked |= {k: v for k, v in {"compute": flops, **values}.items() if v is not None}
    if served:
        asked["inference_tokens"] = served
    if law is not None:
        stray = {"--columns": columns, "--resample": resample}
        if wrong := [*table.given, *(k for k, v in stray.items() if v is not None)]:
            raise InputError(
                f"{', '.join(wrong)}: for --runs; a published law names its loss itself (`isofusion laws`)"
            )
        from isofusion.laws.basis import of_published

        unique = None if unique_tokens is None else number("--unique-tokens", unique_tokens)
        basis = of_published(law, unique=unique, image_share=image_share)
        note = None
    else:
        assert runs is not None
        if unique_tokens is not None or image_share is not None:
            raise InputError("--unique-tokens and --image-share are for --law; --runs measures its own cost")
        basis, note = fitted(runs, table, columns, draws, resample or "hierarchical")
    from isofusion.laws.plan import make_plan

    plan = make_plan(basis, compute=flops, **values, inference_tokens=served, asked=asked)
    result = plan.to_dict() | ({"note": note} if note else {})
    typer.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else "\n".join(show(result)))


UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def number(flag: str, text: str | None) -> float:
    """A positive number with an optional unit (1.3B, 100M, 1e22). Raises InputError naming the flag."""
    from isofusion.errors import InputError

    raw = (text or "").strip().replace("_", "")
    try:
        value = float(raw)
    except ValueError:
        try:
            value = float(raw[:-1]) * UNITS[raw[-1:].lower()]
        except (KeyError, ValueError):
            raise InputError(f"{flag} {text}: not a number; write e.g. 1.3e9, 1.3B or 1e22") from None
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{flag} {text}: give a positive number")
    return value


def quantity(text: str) -> float:
    """1e11, 100B: the `parser` of an option that counts tokens or FLOPs; its sign is the command's matter."""
    from isofusion.errors import InputError

    try:
        value = float(text)
    except ValueError:
        try:
            value = number("", text)
        except InputError:
            value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(f"{text!r} is not a number; write e.g. 1.3e9, 1.3B or 1e22")
    return value


def fitted(
    runs: Path, table: TableOptions, columns: str | None, draws: int, resample: str = "hierarchical"
) -> tuple[Any, str | None]:
    """(basis, note) of a fit of the user's own runs; columns: `role=column,...`, the only way to name N, D and loss."""
    from isofusion.errors import InputError
    from isofusion.laws.basis import of_fit
    from isofusion.laws.bootstrap import METHODS, bootstrap
    from isofusion.laws.fit import fit_law

    if resample not in METHODS:
        raise InputError(f"--resample {resample}: choose {', '.join(METHODS)}")
    named: dict[str, Any] = {}
    for pair in (columns or "").split(",") if columns else []:
        role, _, column = pair.partition("=")
        role = {"flops": "c"}.get(role.strip(), role.strip())
        if role not in ROLES or not column.strip():
            raise InputError(f"--columns {columns}: write role=column pairs; roles are {', '.join(ROLES)}")
        if getattr(table, role) is not None:
            raise InputError(f"--columns {columns}: --{role} names that column already; give one of the two")
        named[role] = column.strip()
    try:
        found, notes = replace(table, **named).read(runs)
    except InputError as error:
        raise InputError(spelt(str(error))) from None
    fit = fit_law(found.canonical()[0])
    drawn = bootstrap(fit, draws, method=resample) if draws else None
    return of_fit(fit, drawn), spelt("; ".join(notes)) or None


def spelt(text: str) -> str:
    """A message about a table's columns in the words of this command, whose --n, --d and --loss are questions."""
    text = re.sub(
        r"--(n|d|loss)(?![\w-])(?: (COLUMN(?::\w)?))?", lambda m: f"--columns {m[1]}={m[2] or 'COLUMN'}", text
    )
    joined = re.compile(r"(--columns \S+?=[^\s,]+),? --columns (?=\S+=)")
    while joined.search(text):
        text = joined.sub(r"\1,", text)
    return text


def show(plan: dict[str, Any]) -> list[str]:
    """The plan as lines of text."""
    from isofusion.laws.interval import known

    law, best, spans = plan["law"], plan["answer"], plan["intervals"]
    lines = [f"{law['name']}: {law['formula']}", f"predicts {law['loss_of']}"]
    lines += [f"rests on {law['rests_on']}"] if "rests_on" in law else []
    lines += [f"source: {law['source']}" + (f"; {law['where']}" if law.get("where") else "")]
    values = ", ".join(f"{k} {v:.5g}{' (derived)' if k in law['derived'] else ''}" for k, v in law["params"].items())
    lines += [values, f"{law['cost']}; {law['counts']}"]
    if plan.get("note"):
        lines.append(plan["note"])
    asked = plan["asked"]
    if "gpu" in asked:
        device = asked["gpu"]
        guess = " (assumed; set --mfu)" if asked["mfu_assumed"] else ""
        lines.append(
            f"{asked['gpu_hours']:g} h x {device['peak']:.4g} FLOP/s ({device['what']}, dense bf16) "
            f"x MFU {asked['mfu']:g}{guess} = {asked['compute']:.4g} FLOPs"
        )
    lines.append("")
    rows = [
        ("parameters N", "n", ".4g"),
        ("tokens D", "d", ".4g"),
        ("tokens per parameter", "tokens_per_parameter", ".3g"),
        ("loss", "loss", ".4f"),
        ("training FLOPs", "compute", ".4g"),
    ]
    rows += [("with inference, FLOPs", "total", ".4g")] if plan["inference"] else []
    for label, key, form in rows:
        span = f"   ({known(spans[key], f'{{:{form}}}'.format)})" if key in spans else ""
        lines.append(f"  {label:<22} {best[key]:>10{form}}{span}")
    if seen := plan["readings"]:
        read = ", ".join(f"{k} {seen[key][0]:.3g} to {seen[key][1]:.3g}" for k, key in (("N", "n"), ("D", "d")))
        lines.append(f"  if the figures are read 40 to 63 tokens per parameter at 1e21 FLOPs: {read} (no interval)")
    lines.append(f"  interval: {law['interval']}")
    if unique := law.get("unique_tokens"):
        lines.append(f"  {best['d'] / unique:.3g} epochs of {unique:.4g} unique tokens")
    if extra := plan["inference"]:
        lines += [
            f"  serving {extra['tokens']:.3g} tokens takes {100 * extra['share_of_total']:.0f} % of the total; "
            "the model cheapest to train to this loss",
            f"  (N {extra['training_optimal_n']:.3g}, D {extra['training_optimal_d']:.3g}) would take "
            f"{extra['training_optimal_total']:.3g} FLOPs in all: {100 * extra['saved']:.1f} % saved",
        ]
    lines += ["", _shape(plan["shape"]), "", *_curve(plan["curve"])]
    told = [f"warning {w['code']}: {w['message']}" for w in law.get("fit_warnings", []) + plan["warnings"]]
    if told or law["notes"]:
        lines += ["", *told, *(f"note: {text}" for text in law["notes"])]
    return lines


def _shape(shape: dict[str, Any] | None) -> str:
    if shape is None:
        return "no model of the paper's family (24 blocks, 50,432 tokens of vocabulary) comes within 10 % of N"
    encoder = f", encoder width {shape['encoder_width']}" if shape["encoder_width"] else ""
    total = f", {shape['total']:.4g} in all with 8 experts" if shape["total"] != shape["parameters"] else ""
    own = "; one of the paper's own sizes" if shape["trained"] else ""
    return (
        f"nearest of the paper's family: depth {shape['depth']}, width {shape['width']}{encoder}: "
        f"{shape['parameters']:.4g} parameters{total} ({100 * shape['off']:+.1f} %{own})"
    )


def _curve(curve: list[dict[str, Any]]) -> list[str]:
    """Loss against D/N at equal compute, and what the same loss costs with another N."""
    from isofusion.laws.interval import known

    head = ("N", "", "D", "D/N", "loss", "above", "FLOPs for equal loss")
    rows: list[tuple[str, ...]] = [head]
    for row in curve:
        extra, name = row["extra"], f"{row['factor']:g} x"
        cost = NEVER if extra is None else "+0 %" if row["factor"] == 1 else _percent(extra)
        cells = (
            f"{row['n']:.3g}",
            name,
            *((f"{row[k]:.3g}" if row[k] else "-") for k in ("d", "tokens_per_parameter")),
        )
        lost = ("-", "-") if row["loss"] is None else (f"{row['loss']:.4f}", f"+{row['above']:.4f}")
        above, more = row.get("above_interval"), row.get("extra_interval")
        if "above_interval" in row and row["factor"] != 1 and row["loss"] is not None:
            lost = (lost[0], f"{lost[1]} ({known(above, '{:.4f}'.format)})")
        low, high = more or (None, None)
        if low is not None and high is None and row["factor"] != 1:  # draws that never reach the loss
            cost += f" ({_percent(low)} to {NEVER})"
        elif "extra_interval" in row and row["factor"] != 1 and (extra is not None or high is not None):
            cost += f" ({known(more, _percent)})"
        rows.append((*cells, *lost, cost))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    out = ["off the optimum: other sizes at the same budget, and the budget they need for the same loss"]
    return out + ["  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def _percent(share: float) -> str:
    return f"+{100 * share:.0f} %" if share < 10 else f"x {1 + share:.3g}"


def mixture_plan(file: Path, n: float, d: float, form: str, target: str | None, draws: int) -> dict[str, Any]:
    """Fit the mixture law of every loss in the table and find the best shares at n parameters and d tokens."""
    from isofusion.errors import InputError
    from isofusion.laws.interval import interval
    from isofusion.laws.mixture import optimal_mixture
    from isofusion.laws.mixture_fit import read_mixtures

    weights: dict[str, float] | None = None
    if target:
        weights = {}
        for pair in target.split(","):
            name, _, value = pair.partition("=")
            weights[name.strip()] = number("--target", value or "1")
    table = read_mixtures(file)
    if weights and (unknown := [k for k in weights if k not in table.losses]):
        raise InputError(f"--target {', '.join(unknown)}: {file} has losses of {', '.join(table.losses)}")
    if form not in ("additive", "joint"):
        raise InputError(f"--form {form}: choose additive or joint")
    chosen = list(weights or table.losses)
    kind = cast(Literal["additive", "joint"], form)
    fits = {name: table.fit(name, kind) for name in chosen}
    scale = [(weights or {}).get(k, 1.0) for k in chosen]
    best = optimal_mixture([fits[k].law for k in chosen], n, d, weights=scale)
    result: dict[str, Any] = {
        "file": str(file),
        "form": form,
        "n": n,
        "d": d,
        "runs": table.rows,
        "mixtures": table.mixtures,
        "shares": dict(zip(table.domains, (float(v) for v in best.shares), strict=True)),
        "losses": {k: float(v) for k, v in zip(chosen, best.losses, strict=True)},
        "weights": dict(zip(chosen, scale, strict=True)),
        "objective": best.objective,
        "uniform": best.uniform,
        "best_seen": best.compare(table.shares),
        "residual": best.residual,
        "fits": {k: fit.to_dict() for k, fit in fits.items()},
        "warnings": table.warnings(best.shares, n, d),
    }
    if draws:
        drawn = table.share_draws([fits[k] for k in chosen], best, draws)
        low, high = interval(drawn, 0.95)
        result["intervals"] = {k: [float(low[i]), float(high[i])] for i, k in enumerate(table.domains)}
        result["draws"] = draws
    return result


def show_mixture(result: dict[str, Any]) -> list[str]:
    """The best mixture as lines of text."""
    spans = result.get("intervals", {})
    lines = [
        f"{result['file']}: {result['runs']} runs on {result['mixtures']} mixtures; {result['form']} law per loss",
        f"best mixture at N = {result['n']:.4g}, D = {result['d']:.4g}:",
    ]
    for name, share in result["shares"].items():
        span = f"   ({100 * spans[name][0]:.1f} to {100 * spans[name][1]:.1f} %)" if name in spans else ""
        lines.append(f"  {name:<22} {100 * share:>6.1f} %{span}")
    if spans:
        lines.append(f"  interval: 95 %, {result['draws']} draws, whole mixtures resampled")
    lines += [
        "predicted losses: " + ", ".join(f"{k} {v:.4f}" for k, v in result["losses"].items()),
        f"weighted loss {result['objective']:.4f}; uniform mixture {result['uniform']:.4f}, best mixture in the table "
        f"{result['best_seen']:.4f}",
    ]
    for name, fit in result["fits"].items():
        share = fit["convergence"]["share_in_best_basin"]
        lines.append(
            f"  {name}: mean relative error {100 * fit['mre']:.2f} % on the runs; {100 * share:.0f} % of "
            f"{fit['convergence']['starts']} starts end in the best minimum"
        )
    told = [f"{k}: {w['code']}: {w['message']}" for k, fit in result["fits"].items() for w in fit["warnings"]]
    return lines + [f"warning {text}" for text in result["warnings"] + told]
