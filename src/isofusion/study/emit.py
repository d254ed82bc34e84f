"""A study TOML for wanted (N, D): sizes whose widths give the wanted parameters, budgets that give the wanted tokens.

Everything else (data, model, training) comes from a template study. The text is checked by the loader of studies before
it is handed out. Units: N parameters (active ones for experts), D token slots.
"""

from __future__ import annotations

import json
import math
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from isofusion.config import ModelConfig
from isofusion.errors import InputError
from isofusion.model.count import count_parameters
from isofusion.study.checks import make
from isofusion.study.spec import WARMUP_SHARE, ArmSpec, SizeSpec, StudySpec

SAME = 1.05  # sizes closer than this factor are one
NEAR = 1.15  # a width must give N within this factor
Points = Sequence[tuple[float, float]]


def parameters(model: ModelConfig) -> int:
    """N as the laws count it: active parameters, of a dense model all."""
    return count_parameters(model).n_active


def fit_size(arm: ArmSpec, n: float) -> tuple[dict[str, Any], int]:
    """(the size's table for TOML, its N): the width nearest to n, other settings from the arm's nearest size.

    The learning rate is interpolated between the arm's sizes (logarithms, held constant outside). Raises InputError
    where no width comes within 15 % of n.
    """
    known = sorted(((parameters(size.model), size) for size in arm.sizes), key=lambda pair: pair[0])
    base = min(known, key=lambda pair: abs(math.log(n / pair[0])))[1].model
    heads = {
        size.model.head_dim: (size.model.encoder_width, size.model.encoder_head, size.model.width) for _, size in known
    }
    best: tuple[float, int, dict[str, Any]] | None = None
    for head, (encoder, encoder_head, width) in heads.items():
        k = 1
        while True:
            change: dict[str, Any] = {"width": k * head, "head_dim": head}
            if encoder is not None:
                wide = encoder * k * head / width
                change["encoder_width"] = max(1, round(wide / encoder_head)) * encoder_head
                change["encoder_head_dim"] = encoder_head
            got = parameters(make(ModelConfig, {**base.model_dump(), **change}, "size"))
            off = abs(math.log(got / n))
            if best is None or off < best[0]:
                best = (off, got, change)
            if got > 2 * n:
                break
            k += 1
    assert best is not None
    if best[0] > math.log(NEAR):
        raise InputError(
            f'arm "{arm.name}": no width gives N = {n:.4g}; the nearest has {best[1]:.4g}. '
            f"ask for other sizes, or give a template with smaller heads"
        )
    return {**best[2], "lr": float(f"{_between(known, n):.3g}")}, best[1]


def _between(known: Sequence[tuple[int, SizeSpec]], n: float) -> float:
    """Learning rate at n by interpolation in logarithms."""
    for (low, a), (high, b) in pairwise(known):
        if low <= n <= high:
            share = math.log(n / low) / math.log(high / low) if high > low else 0.0
            return math.exp((1 - share) * math.log(a.train.lr) + share * math.log(b.train.lr))
    return known[0][1].train.lr if n < known[0][0] else known[-1][1].train.lr


def emit(template: Path, points: Points, *, arm: str | None = None, name: str | None = None) -> str:
    """TOML text of a study that trains these (N, D) and loads without error.

    arm: of the template (needed if it has several). Raises InputError naming what does not fit.
    """
    spec = StudySpec.from_toml(template)
    tree = tomllib.loads(template.read_text(encoding="utf-8-sig"))
    if arm is None and len(spec.arms) > 1:
        raise InputError(
            f"{template}: {len(spec.arms)} arms ({', '.join(a.name for a in spec.arms)}); choose with --arm"
        )
    chosen = spec.arm(arm) if arm is not None else spec.arms[0]
    entry = next(a for a in tree["arms"] if a["name"] == chosen.name)
    by_size: dict[float, set[int]] = {}
    for n, d in sorted(points):
        size = next((s for s in by_size if max(s, n) / min(s, n) < SAME), n)
        slots = spec.slots_per_step(chosen.sizes[0].train)
        by_size.setdefault(size, set()).add(max(1, round(d / slots)) * slots)
    text = _text(spec, tree, entry, chosen, name or f"{spec.name}-next", by_size, template.name)
    _check(text, template)
    return text


def _text(
    spec: StudySpec,
    tree: Mapping[str, Any],
    entry: Mapping[str, Any],
    arm: ArmSpec,
    name: str,
    by_size: Mapping[float, set[int]],
    source: str,
) -> str:
    shortest = round(min(map(min, by_size.values())) / spec.slots_per_step(arm.sizes[0].train))
    warmup = min(max(size.train.warmup_steps for size in arm.sizes), int(WARMUP_SHARE * shortest))
    made: dict[str, dict[str, Any]] = {}
    for n, budgets in by_size.items():
        table, got = fit_size(arm, n)
        key = f"n{got:.3g}".replace("+", "")
        budgets = budgets.union(made[key]["budgets"] if key in made else ())  # where the nearest width is the same
        made[key] = {**table, "warmup_steps": warmup, "budgets": sorted(budgets)}
    study = {"name": name, "title": f"Runs suggested from {source}", "seeds": list(spec.seeds[:1])}
    study |= {"holdout": "none", "compute": spec.compute}
    lines = [
        "# Sizes and budgets chosen by `isofusion suggest`; data, model and training as in the template.",
        "",
        "[study]",
    ]
    lines += [f"{k} = {toml(v)}" for k, v in study.items()]
    for section in ("data", "model", "train"):
        if section in tree:
            lines += ["", f"[{section}]", *(f"{k} = {toml(v)}" for k, v in tree[section].items())]
    lines += ["", "[[arms]]", *(f"{k} = {toml(v)}" for k, v in entry.items() if k != "sizes"), "[arms.sizes]"]
    lines += [f"{toml(k)} = {toml(v)}" for k, v in made.items()]
    return "\n".join(lines) + "\n"


def _check(text: str, template: Path) -> None:
    """Load the text where relative files of the template are found. Raises InputError as the loader does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "suggested.toml"
        path.write_text(text, encoding="utf-8")
        try:
            StudySpec.from_toml(path)
        except InputError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise InputError(f"{template}: the suggested runs make no study with this template: {reason}") from None


def toml(value: Any) -> str:
    """A value as TOML; tables inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml(str(k))} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
