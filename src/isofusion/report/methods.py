"""What was run, on what data, at what cost: read from study.lock, run.json, data.json, env.json and metrics.jsonl.

A file that is missing or damaged leaves its field None; the page then says that it is not known.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from isofusion.report.evidence import champions, number


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def methods(
    out: Path,
    lock: dict[str, Any],
    rows: list[dict[str, Any]],
    sweep: list[dict[str, Any]],
    excluded: list[dict[str, Any]],
    a: dict[str, Any],
) -> dict[str, Any]:
    """The method section as plain values."""
    spec = lock.get("spec", {})
    longest = max(rows, key=lambda r: r["tokens"])
    folder = out / "runs" / longest["run"]
    about = read_json(folder / "run.json") or {}
    config = about.get("config", {})
    data = read_json(folder / "data.json") or {}
    seconds, trained, trained_flops = _cost(out, rows + sweep + excluded)
    changes, changed_why = _later_changes(out)
    train = config.get("train") or {}
    settings = config.get("data") or spec.get("data") or {}
    tokenizer = str(settings.get("tokenizer") or "")
    best = champions(rows)
    return {
        "locked_at": lock.get("locked_at"),
        "lock_digest": lock.get("digest"),
        "again": _command(lock),
        "holdout": (lock.get("analysis") or {}).get("holdout"),
        "metric": (lock.get("analysis") or {}).get("metric"),
        "later_changes": changes,
        "lock_unreadable": changed_why,
        "planned": len([name for name in lock.get("runs", {}) if not name.endswith("-trunk")]) or None,
        "finished": len(rows) + len(sweep) + len(excluded),
        "excluded": [r["run"] for r in excluded],
        "tuning_runs": len(sweep),
        "versions": lock.get("versions") or {},
        "environment": read_json(folder / "env.json") or {},
        "jobs": lock.get("jobs"),
        "threads": lock.get("threads"),
        "fingerprint": about.get("data_fingerprint"),
        "precision": about.get("precision"),
        "sources": data.get("sources") or settings.get("sources") or [],
        "data_warnings": data.get("warnings") or [],
        "row_len": settings.get("row_len"),
        "image_size": settings.get("image_size"),
        "patch_size": settings.get("patch_size"),
        "tokenizer": Path(tokenizer).name if os.path.isabs(tokenizer) else tokenizer or None,
        "val_rows": settings.get("val_rows"),
        "world": settings.get("world") if a["study"]["world"] else None,
        "train": train,
        "seeds": a["study"]["seeds"],
        "runs_with_seeds": sum(1 for r in rows if r["seed"] != a["study"]["seeds"][0]),
        "seconds": seconds,
        "tokens_trained": trained,
        "flops_trained": trained_flops,
        "largest": {arm: row["run"] for arm, row in best.items()},
    }


def _command(lock: dict[str, Any]) -> str | None:
    """What to type after `isofusion study run` for the same study; of absolute paths, which may tell of people and
    machines, only what is needed.
    """
    if not lock.get("toml"):
        return None
    toml, data = Path(lock["toml"]), lock.get("data")
    words = [toml.name if toml.is_absolute() else str(toml)]
    if data:
        words += ["--data", "FOLDER" if Path(data).is_absolute() else str(data)]
    return shlex.join(words + [word for change in lock.get("overrides") or () for word in ("--set", _unplaced(change))])


def _unplaced(change: str) -> str:
    """KEY=VALUE with FOLDER or FILE for each absolute path of the value, which may be quoted or in a list."""
    key, sign, value = change.partition("=")
    name = "FOLDER" if key.strip() == "data.folder" else "FILE"
    return key + sign + re.sub(r"""(^\s*|["'])[/~][^"']*""", rf"\g<1>{name}", value)


def _cost(out: Path, rows: list[dict[str, Any]]) -> tuple[float | None, float | None, float | None]:
    """(training seconds summed over jobs, tokens, FLOPs), each trunk counted once.

    A row's totals hold its whole history; its own part is what it adds to the trunk at the fork, read from its
    flops.json ("own_tokens", "wall_s") where there is one.
    """
    seconds, tokens, flops, known = 0.0, 0.0, 0.0, False
    names = {r["run"] for r in rows} | {r["parent"] for r in rows if r.get("parent")}
    for name in names:
        summary = read_json(out / "runs" / name / "flops.json") or {}
        own, total = number(summary.get("own_tokens")), number(summary.get("tokens"))
        spent = summary.get("flops")
        whole = number(spent.get("total")) if isinstance(spent, dict) else number(spent)
        if own is None or not total or whole is None:
            continue
        known = True
        tokens += own
        flops += whole * own / total
        seconds += number(summary.get("wall_s")) or 0.0
    return (seconds, tokens, flops) if known else (None, None, None)


def _later_changes(out: Path) -> tuple[list[str] | None, str | None]:
    """(changes since the lock, None), or (None, why they are not known)."""
    from isofusion.errors import InputError
    from isofusion.study.lock import later_changes

    try:
        return later_changes(out), None
    except (InputError, KeyError, TypeError) as error:
        return None, str(error)
