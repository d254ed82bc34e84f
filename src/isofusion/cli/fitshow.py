"""How `isofusion fit` prints: the answer, warnings, the law, its tests, what the answer rests on, how it was found."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isofusion.laws.analysis import Analysis, Refused
from isofusion.laws.fit import FREEDOM
from isofusion.laws.formanalysis import FormAnalysis
from isofusion.laws.holdout import Beside, HoldOut
from isofusion.laws.interval import known
from isofusion.laws.rollout import BASELINES
from isofusion.laws.sensitivity import Sensitivity, times

LOW_HITS = 0.6  # share of held-out runs inside a 95 % interval below which it is surely too narrow
WIDTH = 110  # of output whose width nothing sets
WIDE = 100  # a cell's remark stands on one line from this width on
Show = Callable[[float], str]


def show(a: Analysis) -> None:
    """Print the whole result."""
    out = _console()
    result = a.to_dict()
    law = result["law"]
    _head(
        out,
        law["label"],
        a.notes,
        f"{law['runs']} runs, {_count(law['sizes'], 'size')} ({_span(law['n_range'], si)} "
        f"parameters), {_count(law['budgets'], 'token budget')} ({_span(law['d_range'], si)}); C is {law['compute']}",
    )
    _answers(out, list(a.answers), a.sensitivity, a.fit.freedom)
    _warnings(out, result["warnings"])
    _law(out, result)
    _tests(out, a)
    _choices(out, a.sensitivity)
    _found(out, result)


def show_form(a: FormAnalysis) -> None:
    """Print another law's result."""
    out = _console()
    fit, result = a.fit, a.to_dict()
    _head(out, fit.label, a.notes, f"{len(fit.target)} rows; law {fit.law.name}, objective {fit.criterion.kind}")
    _answers(out, list(a.answers))
    if a.no_answer:
        out.print(escape(a.no_answer))
    found = result["law"]["warnings"] + [w for row in a.answers for w in row["warnings"]]
    _warnings(out, found)
    _section(out, f"The law: {fit.law.target} = {fit.law.formula}")
    table = _table("parameter", "value", "95 % interval", "unit")
    for p in fit.law.parameters:
        span = "fixed" if p.name in fit.fixed else _span(a.intervals.get(p.name), "{:.4g}".format)
        table.add_row(p.name, f"{fit.params[p.name]:.6g}", span, p.unit)
    out.print(table)
    out.print(f"[dim]{escape(fit.law.source)}[/]")
    out.print(f"[dim]intervals: {escape(a.resampled)}; residual spread {100 * fit.residual_spread:.3g} %[/]")
    if isinstance(a.sensitivity, Sensitivity):
        out.print("\n[dim]The default law beside it, on the same runs:[/]")
    _choices(out, a.sensitivity)
    end = result["law"]["convergence"]
    told = f"objective {fit.objective:.10g} (sum of {fit.criterion.kind}); {_ends(end)}"
    _section(out, "How it was found")
    out.print(escape(f"{told}\ndigest {a.digest[:16]}"))


def _console() -> Console:
    """As wide as the terminal, or as COLUMNS says, or WIDTH."""
    plain = Console(highlight=False)
    given = plain.is_terminal or os.environ.get("COLUMNS", "").isdigit()
    return plain if given else Console(highlight=False, width=WIDTH)


def _section(out: Console, title: str) -> None:
    out.print(f"\n[bold]{escape(title)}[/]")


def _table(*names: str, words: Sequence[int] = (0,), wraps: bool = False) -> Table:
    """Columns of `words` are set left, and wrap where the terminal is narrow; numbers do only if `wraps`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim", collapse_padding=True)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i in words else "right", no_wrap=not wraps and i not in words)
    return table


def _head(out: Console, label: str, notes: Sequence[str], text: str) -> None:
    out.print(f"[bold]{escape(label or 'runs')}[/]: {escape(text)}")
    for note in notes:
        out.print(f"[yellow]note[/] {escape(note)}")


def _answers(
    out: Console,
    answers: list[dict[str, Any]],
    choices: Sensitivity | Refused | None = None,
    freedom: int = FREEDOM,
) -> None:
    """`choices` and `freedom`: of the law whose answers these are."""
    _section(out, "The answer")
    if not answers:
        out.print("the law has no compute-optimal size at the runs' compute or ten times that")
        return
    table = _table("compute", "N*, parameters", "D*, tokens", "tokens per parameter", "loss", wraps=True)
    table.columns[0].no_wrap = True
    short: Show = "{:.3g}".format
    for row in answers:
        cells = [f"{row['compute']:.3g}"]
        for key, how in (("n", si), ("d", si), ("tokens_per_parameter", short), ("loss", nats)):
            span = f" [dim]({known(row[f'{key}_interval'], how)})[/]" if f"{key}_interval" in row else ""
            cells.append(how(row[key]) + span)
        table.add_row(*cells)
    out.print(table)
    if isinstance(choices, Sensitivity):
        low, high = (pick(r.n for r in choices.counted) for pick in (min, max))
        if choices.undetermined:
            out.print(
                f"[bold red]undetermined[/] at {choices.compute:.3g} FLOPs: N* runs from {si(low)} to {si(high)} "
                f"({times(choices.spread)}x) over choices these runs do not decide; see the table of choices"
            )
        elif freedom < FREEDOM:
            out.print(
                f"[yellow]hardly tested[/] at {choices.compute:.3g} FLOPs: N* stays between {si(low)} and {si(high)} "
                f"({times(choices.spread)}x), but {_count(freedom, 'degree')} of freedom can rule out little"
            )
        else:
            out.print(
                f"[green]stable[/] at {choices.compute:.3g} FLOPs: N* stays between {si(low)} and {si(high)} "
                f"({times(choices.spread)}x) over every choice the runs do not rule out"
            )


def _warnings(out: Console, found: list[dict[str, str]]) -> None:
    if found:
        _section(out, "Warnings")
    for w in found[:8]:
        out.print(f"[yellow]warning {w['code']}[/]: {escape(w['message'])}")
    if len(found) > 8:
        out.print(f"[dim]and {len(found) - 8} more (--json lists them)[/]")


def _law(out: Console, result: dict[str, Any]) -> None:
    law, boot, split = result["law"], result["bootstrap"], result["allocation"]
    _section(out, f"The law: L = {law['law']}")
    table = _table("parameter", "value", "95 % interval", "", words=(0, 3))
    units = {"E": "nats/token, irreducible", "A": "", "alpha": "", "B": "", "beta": ""}
    for name, unit in units.items():
        span = boot["intervals"].get(name) if boot else None
        fixed = "fixed" if name == "E" and law["fixed_e"] is not None else unit
        reason = "no interval, see below" if boot and name in boot["refused"] else fixed
        table.add_row(name, f"{law[name]:.6g}", _span(span, "{:.4g}".format), reason)
    spans = split["closed_form_interval"] or {}
    for name, meaning in (("a", "N* ~ C^a"), ("b", "D* ~ C^b"), ("d", "D* ~ N*^d")):
        regression = split["regression"]
        beside = f"{meaning}; {regression[name]:.4f} by the paper's regression" if regression else meaning
        table.add_row(name, f"{split['closed_form'][name]:.4f}", _span(spans.get(name), "{:.4g}".format), beside)
    out.print(table)
    if split["cost"]["kind"] != "6nd":
        out.print("[dim]a, b, d: closed form for C ~ N D; the regression and N*, D* above use the FLOPs of the runs[/]")
    for reason in (boot or {}).get("refused", {}).values():
        out.print(f"[yellow]no interval for E[/]: {escape(reason)}")


def _tests(out: Console, a: Analysis) -> None:
    _section(out, "Does it predict runs it has not seen?")
    table = _table("held out", "runs", "law", "carry\nover", "k C^c", "nearest\nrun", "in\ninterval")
    narrow = out.width < WIDE
    floor, silent = "", []
    for name, test in a.tests.items():
        if isinstance(test, Refused):
            silent.append(f"[yellow]no hold-out[/] ({name}): {escape(test.reason)}")
            continue
        found = test.to_dict()
        floor = floor or found["reducible_floor"]
        runs = found["runs"] if isinstance(test, HoldOut) else sum(s["runs"] for s in found["steps"])
        hits = found["hit_rate"]
        if isinstance(test, HoldOut):
            name = f"held out: {found['held_out']}"
        else:
            name += f" ({_count(len(test.steps), 'step')})"
        others = [_beside(test.beside(k), runs, narrow) for k in BASELINES]
        own = f"[bold]{percent(found['mae_reducible'])}[/]"
        table.add_row(escape(name), str(runs), own, *others, percent(hits, 0))
        if isinstance(test, HoldOut) and test.no_interval:
            silent.append(f"[dim]{escape(test.no_interval)}[/]")
    if floor:
        out.print(table)
        out.print(
            f"[dim]mean absolute error of the loss above {escape(floor)}; carry over: the next smaller size's loss at "
            "equal tokens; in interval: of 95 % prediction intervals; (law ...): a baseline that predicts some of the "
            "runs only, and the law on these[/]"
        )
    hits = [t.hit_rate for t in (a.held, a.rollouts["n"]) if not isinstance(t, Refused) and t.hit_rate is not None]
    if hits and min(hits) < LOW_HITS and len(set(a.runs.group)) == len(a.runs):
        out.print(
            "[yellow]few held-out runs are inside their interval[/]: it takes every run for independent; name the "
            "column of the trunk that runs branched from with --group, or give second seeds"
        )
    for line in silent:
        out.print(line)


def _beside(found: Beside, runs: int, narrow: bool) -> str:
    error, law = found.cell(runs, percent)
    law = law.replace(", ", ",\n") if narrow else law
    return f"{error}\n[dim]({law})[/]" if law else error


def _choices(out: Console, choices: Sensitivity | Refused) -> None:
    _section(out, "How far the answer moves with choices nobody can justify")
    if isinstance(choices, Refused):
        out.print(f"[yellow]no table of choices[/]: {escape(choices.reason)}")
        return
    table = _table(f"at {choices.compute:.3g} FLOPs", "a", "N*", "D*", "D*/N*", "loss", "misfit")
    n = [r.n for r in choices.counted]
    silent = {name for names in choices.without.values() for name in names}
    for row in choices.shown():
        if f"{row.group}: {row.change}" in silent:
            continue
        style = "bold" if row.group == "default" else "" if row.counts else "dim"
        if row.counts and row.n in (min(n), max(n)):
            style = "red" if choices.undetermined else "green"
        cells = [_number(row.a, "{:.3f}".format), _number(row.n, si), _number(row.d, si)]
        cells += [_number(row.tokens_per_parameter, "{:.3g}".format), _number(row.loss, nats)]
        cells += [percent(row.misfit, 2)]
        name = "as fitted" if row.group == "default" else f"{row.group}: {row.change}"
        table.add_row(escape(f"{name}\n({row.note})" if row.note else name), *cells, style=style)
    out.print(table)
    for reason, names in choices.without.items():
        out.print(f"[dim]no number from {escape(', '.join(names))}: {escape(reason)}[/]")
    verdict, _, rest = choices.sentence.partition(":")
    if choices.undetermined:
        out.print(f"[bold red]{verdict}[/]:{escape(rest)}")
    else:
        out.print(escape(choices.sentence))


def _found(out: Console, result: dict[str, Any]) -> None:
    law, boot = result["law"], result["bootstrap"]
    _section(out, "How it was found")
    out.print(
        f"objective {law['objective']:.10g} (sum of Huber, delta {law['delta']:g}); {_ends(law['convergence'])}; "
        f"residual spread {100 * law['residual_spread']:.3g} %"
    )
    if boot:
        edge = f"; {100 * boot['share_at_bound']:.1f} % of draws with an exponent at a bound"
        out.print(escape(f"intervals: {boot['draws']} draws, {boot['note']}{edge if boot['share_at_bound'] else ''}"))
    out.print(f"[dim]digest of runs and options {result['digest'][:16]}[/]")


def _ends(end: dict[str, Any]) -> str:
    second = end["next_best_objective"]
    other = f", the next best end found is {second:.10g}" if second is not None else ", no other end found"
    worst = f"; condition number {end['condition']:.1e}" if end["condition"] is not None else ""
    share = f"{100 * end['share_in_best_basin']:.0f} % of {end['starts']} starts end there{other}"
    return f"{share}; gradient norm {end['gradient_norm']:.1e}{worst}"


def si(value: float) -> str:
    """Three significant digits with K, M, B or T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 0.9995 * size and abs(value) < 1e15:
            return f"{value / size:.3g}{unit}" if abs(value) < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.3g}"


def nats(loss: float) -> str:
    """A loss to four decimals, or four digits where these would show none or too many."""
    return f"{loss:.4f}" if loss == 0 or 0.01 <= abs(loss) < 1e5 else f"{loss:.4g}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage, to one or two digits where decimals would show none or too many; a dash for none."""
    if share is None or not math.isfinite(share):
        return "-"
    value = 100 * share
    if abs(value) >= 1e4:
        return f"{value:.2g} %"
    if value == 0 or abs(value) >= 0.5 * 10**-digits:
        return f"{value:.{digits}f} %"
    return f"{value:.1g} %" if abs(value) >= 1e-4 else "< 0.0001 %"


def _number(value: float, how: Show) -> str:
    return how(value) if math.isfinite(value) else "-"


def _span(span: Sequence[float | None] | None, how: Show) -> str:
    return known(span, how) if span else ""


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
