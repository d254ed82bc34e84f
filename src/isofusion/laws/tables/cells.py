"""Cells and column names of users' tables: what `1.3B`, `1,300,000` or `Params (M)` mean, and which column is which.

Roles: n parameters, d tokens, loss nats/token, c FLOPs, se and oracle nats/token; run, group, size, seed are labels;
step orders a training curve.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from isofusion.errors import InputError

ACTIVE = (
    *("active params", "active parameters", "n active", "n active params", "n active parameters", "active n"),
    *("num active params", "num active parameters", "params active", "parameters active", "active param count"),
    *("activated params", "activated parameters", "n activated params", "n activated parameters"),
)
"""Parameters that one token passes through: N of the law where experts are routed."""
ALIASES: dict[str, tuple[str, ...]] = {
    "n": (
        *("n", *ACTIVE),
        *("params", "parameters", "n params", "n parameters", "num params", "num parameters", "param count"),
        *("parameter count", "nparams", "n total", "total params", "total parameters", "model size", "model params"),
        *("model parameters", "size"),
    ),
    "d": (
        *("d", "tokens", "n tokens", "num tokens", "train tokens", "training tokens", "total tokens", "tokens seen"),
        *("num train tokens", "n train tokens", "dataset size"),
    ),
    "loss": (
        *("loss", "val loss", "validation loss", "valid loss", "final loss", "final val loss", "eval loss"),
        *("test loss",),
    ),
    "c": ("c", "flops", "flop", "compute", "training flop", "training flops", "train flops", "total flops"),
    "run": ("run", "run name", "run id", "name"),
    "group": ("group", "trunk"),
    "size": ("size",),
    "seed": ("seed",),
    "step": ("_step", "step", "global step", "trainer/global_step", "iteration"),
    "se": (),  # standard errors and oracle losses change the fit, so they are read only where the user names them
    "oracle": (),
}
"""Usual names of each role, the likeliest first; compared without case, `_`, `-` and a unit in brackets."""

FLAGS = {role: f"--{role}" for role in ALIASES}
WORDS = {"n": "parameters", "d": "tokens", "loss": "loss", "c": "FLOPs"}
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
UNITS |= {"thousand": 1e3, "million": 1e6, "mn": 1e6, "mio": 1e6, "billion": 1e9, "bn": 1e9, "trillion": 1e12}
UNITS |= {"thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}
FLOP_UNITS = UNITS | {"p": 1e15, "e": 1e18, "z": 1e21}  # only before "FLOPs": a bare `6.1e` is a cut-off exponent
COUNTS = ("n", "d", "c")  # roles whose numbers may carry a unit or thousands separators; a loss never does
MISSING = ("", "null", "none", "na", "n/a", "<na>", "-")
NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*?)\s*(?:flops?|tokens?|params?|parameters)?")
GROUPED = re.compile(r"[+-]?\d{1,3}(?:([,_ '\u00a0\u202f\u2009])\d{3})(?:\1\d{3})*(?:\.\d+)?(?![\d,])")
WORD = re.compile(r"\s*(?:flops?|tokens?|params?|parameters)?")
BRACKET = re.compile(r"\s*[(\[]\s*([^()\[\]]*?)\s*[)\]]\s*$")
PREFIXED = re.compile(r"\b([kmgtpez])flops?\b")

UNLIKE = {
    "loss": (
        (
            r"\b(bpb|bpc|bits)\b",
            "is in bits: N* and D* are those of a loss in nats per token, losses and E are in bits",
        ),
        (r"\b(ppl|perplexity|perplexities)\b", "holds perplexities: a loss is their natural logarithm"),
        (r"\b(acc|accuracy|accuracies|score|f1|em)\b", "holds scores, which rise: the law is of a loss, which falls"),
    ),
    "d": (
        (r"\b(steps?|iterations?|iters?|updates?)\b", "counts steps: tokens are these times the tokens of a step"),
        (r"\btpp\b|\btokens? ?(per|/) ?param|^d ?/ ?n$", "is tokens per parameter: tokens are these times N"),
    ),
}
"""What a column's name says it is, where that is not yet the role."""


def unlike(role: str, column: str) -> str:
    """What must be done to a column so named before it is the role's, or ""."""
    name = re.sub(r"[\s_\-]+", " ", column.strip().lower())
    return next((f"column '{column}' {text}" for like, text in UNLIKE.get(role, ()) if re.search(like, name)), "")


def parse(value: Any, role: str = "n", scale: float = 1.0) -> tuple[float, str]:
    """(number, "") or (the number or NaN, reason). Counts may be `1.3B`, `2.1e22`, `1,300,000`, `1.5 ZFLOPs`.

    scale: the unit of the column (`Params (M)`: 1e6); a unit in the cell itself wins over it. A loss takes neither
    unit nor comma, since `3,25` and `3,250` would be guesses. All must be finite; those of a known role positive
    (oracle: >= 0).
    """
    number, reason = _number(value, role, scale)
    if reason:
        return number, reason
    if not math.isfinite(number):
        return number, f"{number} is not finite"
    if role in ALIASES and (number < 0 or (number == 0 and role != "oracle")):
        return number, f"{number:g} is not positive"
    return number, ""


def _number(value: Any, role: str, scale: float) -> tuple[float, str]:
    if isinstance(value, bool):
        return math.nan, f"'{value}' is not a number"
    if not isinstance(value, str):
        if value is None or type(value).__name__ in ("NAType", "NaTType"):
            return math.nan, "empty"
        try:
            return float(value) * scale, ""
        except (TypeError, ValueError):
            return math.nan, f"'{_short(value)}' is not a number"
    text = value.strip()
    try:
        return float(text.replace("_", "x")) * scale, ""  # float() itself would take 1_3 for 13
    except ValueError:
        pass
    lower = text.lower()
    if lower in MISSING:
        return math.nan, "empty"
    wrong = math.nan, f"'{_short(text)}' is not a number"
    if text.endswith("%"):
        return math.nan, f"'{_short(text)}' is a percentage" + (", no loss in nats per token" * (role == "loss"))
    if role not in COUNTS:
        return (math.nan, f"'{_short(text)}' is not a number (write 3.25, not 3,25)") if "," in text else wrong
    grouped = GROUPED.match(lower)
    if grouped and grouped[1]:
        first, _, rest = grouped[0].lstrip("+-").partition(grouped[1])
        unit = text[grouped.end() :]
        if first == "0" or (grouped[1] == "," and len(rest) == 3 and not WORD.fullmatch(unit.lower())):
            # a decimal comma, or thousands of a unit? 0,125B and 1,300B cannot tell
            return math.nan, f"'{_short(text)}' is not clear: write {first}.{rest}{unit} or {int(first + rest)}{unit}"
        lower = lower.replace(grouped[1], "", grouped[0].count(grouped[1]))
    found = NUMBER.fullmatch(lower)
    units = FLOP_UNITS if "flop" in lower else UNITS
    if not found or (found[2] and found[2] not in units):
        return wrong
    return float(found[1]) * (units[found[2]] if found[2] else scale), ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def plain(name: str) -> str:
    """A column's name without case, `_`, `-` and a unit, for comparing: `Params (M)` and `params` are the same."""
    lower = BRACKET.sub("", name.strip().lower()) or name.strip().lower()
    return PREFIXED.sub("flops", re.sub(r"[\s_\-]+", " ", lower).strip())


def unit_of(name: str) -> float:
    """The unit a column's name carries: `Params (M)` 1e6, `tokens [billions]` 1e9, `total_gflops` 1e9; else 1."""
    bracket = BRACKET.search(name)
    inside = bracket[1].lower() if bracket else ""
    if inside in UNITS:
        return UNITS[inside]
    if re.fullmatch(r"1e\d\d?", inside):
        return float(inside)
    found = PREFIXED.search(re.sub(r"[\s_\-/]+", " ", inside or name.lower()))
    return FLOP_UNITS[found[1]] if found else 1.0


def resolve(
    where: str, header: Sequence[str], role: str, name: str | None, notes: list[str]
) -> tuple[str | None, float]:
    """(column of a role or None, its unit). name: as the user gave it (`params` or `params:M`), None to look for it.

    Appends to notes what the user should know: a unit taken from the column's name, other columns that look alike.
    Raises InputError where a named column is missing, is there twice, or two columns fit equally well.
    """
    if name is None:
        column = _find(where, header, role, notes)
        unit = ""
    else:
        column, colon, unit = (name, "", "") if name in header else name.rpartition(":")
        if (not colon and column != name) or (colon and unit.lower() not in UNITS) or column not in header:
            raise InputError(f"{where}: no column '{name}' (for {role}). Columns: {_listed(header)}")
    if column is None:
        return None, 1.0
    if header.count(column) > 1:
        raise InputError(
            f"{where}: {header.count(column)} columns are named '{column}' (for {role}); rename all but one"
        )
    if unit:
        return column, UNITS[unit.lower()]
    if told := unlike(role, column):
        notes.append(told)
    scale = unit_of(column) if role in COUNTS else 1.0
    if scale != 1.0:
        notes.append(f"column '{column}': numbers multiplied by {scale:.0e}, the unit in its name")
    return column, scale


def has(header: Sequence[str], name: str | None) -> bool:
    """Whether a column as the user named it (`params` or `params:M`) is there."""
    return name is not None and (name in header or name.rpartition(":")[0] in header)


def _find(where: str, header: Sequence[str], role: str, notes: list[str]) -> str | None:
    """The likeliest column: by its whole name, else by the last part of names like `eval/loss` or `summary.loss`."""
    for part in (plain, lambda name: re.split(r"[/.]", plain(name))[-1]):
        names = [part(name) for name in header]
        ranked = [header[i] for alias in ALIASES[role] for i, name in enumerate(names) if name == alias]
        if role == "n" and len(ranked) > 1:  # `size` may be a label; it is N only where nothing else is
            ranked = [name for name in ranked if plain(name) != "size"] or ranked
        if not ranked:
            continue
        active = [name for name in ranked if part(name) in ACTIVE]
        if len(active) == 1 and ranked[0] == active[0] and len(ranked) > 1:
            others = ", ".join(f"'{name}'" for name in ranked[1:])
            notes.append(
                f"parameters read from column '{ranked[0]}': of experts the law counts the active ones; "
                f"{FLAGS[role]} chooses another (there is {others})"
            )
            return ranked[0]
        if part is not plain and len(ranked) > 1:
            listed = ", ".join(repr(name) for name in ranked)
            word = WORDS.get(role, role)
            raise InputError(f"{where}: columns {listed} could each be the {word}; choose with {FLAGS[role]}")
        if len(ranked) > 1 and role in WORDS:
            others = ", ".join(f"'{name}'" for name in ranked[1:])
            notes.append(
                f"{WORDS[role]} read from column '{ranked[0]}'; {FLAGS[role]} chooses another (there is {others})"
            )
        return ranked[0]
    return None


def _listed(header: Sequence[str], most: int = 30) -> str:
    more = f" and {len(header) - most} more" if len(header) > most else ""
    return ", ".join(header[:most]) + more


def need(where: str, header: Sequence[str], role: str, extra: str = "") -> InputError:
    """The error for a role no column was found for."""
    word = WORDS.get(role, role)
    word = role if role in ("n", "loss") else word
    told = "".join([f"; {text}" for column in header if (text := unlike(role, column))][:3])
    return InputError(
        f"{where}: no column for {word}; name it with {FLAGS[role]}{extra}. Columns: {_listed(header)}{told}"
    )
