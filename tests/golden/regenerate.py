"""The ready studies as text: every run with its steps and digest, and the first run of each arm in full.

    python tests/golden/regenerate.py

writes tests/golden/STUDY.txt for each studies/STUDY.toml; the difference is what a review looks at. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isofusion.config import RunConfig
from isofusion.study.lock import analysis
from isofusion.study.spec import StudySpec

HERE = Path(__file__).parent
STUDIES = HERE.parents[1] / "studies"


def flat(tree: Any, prefix: str = "") -> list[str]:
    """`a.b = value` for each leaf, in the order of the settings."""
    if isinstance(tree, dict):
        return [line for key, value in tree.items() for line in flat(value, f"{prefix}.{key}" if prefix else key)]
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return [line for i, item in enumerate(tree) for line in flat(item, f"{prefix}.{item.get('name', i)}")]
    return [f"{prefix} = {json.dumps(tree)}"]


def run_line(run: RunConfig) -> str:
    steps = f"{run.start_step:>7} .. {run.end_step:<7}"
    return f"{run.name:<44} {steps} lr {run.train.lr:<8.4g} {run.digest()[:16]}"


def describe(toml: Path, overrides: Iterable[str] = ()) -> str:
    """The golden text of one study."""
    spec = StudySpec.from_toml(toml, overrides=overrides)
    runs = spec.runs()
    branches = sum(run.kind == "branch" for run in runs)
    lines = [f"{spec.name}: {len(runs) - branches} trunks, {branches} branches", "", "# analysis"]
    lines += flat(analysis(spec))
    lines += ["", "# runs: name, updates from .. to, peak learning rate, digest of the whole configuration"]
    lines += [run_line(run) for run in runs]
    shown: list[str] = []
    for arm in spec.arms:
        run = next(run for run in runs if run.arm == arm.name)
        settings = flat(run.model_dump(mode="json"))
        new = [line for line in settings if line not in shown]
        lines += ["", f"# {run.name}" + (", where it differs from the first run" if shown else ", in full"), *new]
        shown = shown or settings
    return "\n".join(lines) + "\n"


def main() -> None:
    wanted = {toml.stem: describe(toml) for toml in sorted(STUDIES.glob("*.toml"))}
    for stale in {path.stem for path in HERE.glob("*.txt")} - set(wanted):
        (HERE / f"{stale}.txt").unlink()
    for name, text in wanted.items():
        (HERE / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"tests/golden/{name}.txt: {text.count(chr(10))} lines")


if __name__ == "__main__":
    main()
