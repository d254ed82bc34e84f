"""How fast each arm trains: tokens/s, FLOP/s, share of the machine's peak, memory, waiting for data.

After arXiv 2504.07951 Fig. 4, which sets early fusion's training time and memory at equal FLOPs beside late fusion's.
Read from each run's own flops.json, so a trunk counts once; a trunk and its branches are one model at one speed.
Equal FLOPs: seconds per FLOP of one arm over those of the other, at matched size. Runs that shared their machine with
others are what a user waits for, not what the machine could do for one run alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from isofusion.report.evidence import number
from isofusion.report.methods import read_json

Row = dict[str, Any]


def own_part(summary: Row) -> Row | None:
    """What one run folder's flops.json says of its own steps: tokens, flops, seconds and what else it measured.

    Without "own_flops" (older runs) the whole path's FLOPs are shared out by tokens. None where no time is known.
    """
    own, total = number(summary.get("own_tokens")), number(summary.get("tokens"))
    spent = summary.get("flops")
    whole = number(spent.get("total")) if isinstance(spent, dict) else number(spent)
    seconds = number(summary.get("wall_s"))
    if not own or not total or whole is None or not seconds:
        return None
    flops = number(summary.get("own_flops"))
    extra = {
        key: number(summary.get(key))
        for key in ("input_wait_s", "peak_memory", "peak_flops_measured", "peak_flops_datasheet")
    }
    return {"tokens": own, "flops": whole * own / total if flops is None else flops, "seconds": seconds, **extra}


def speeds(out: Path, rows: list[Row], tiers: dict[float, str]) -> list[Row]:
    """One row per arm and size: n, tokens_per_s, flops_per_s, mfu_measured, mfu_datasheet, input_wait (share of the
    time), peak_memory (bytes); None where the runs did not measure it. Sums over seeds, trunks and branches.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    sizes: dict[tuple[str, str], float] = {}
    for name, arm, n in {
        (run, r["arm"], float(r["n"])) for r in rows for run in (r["run"], r.get("parent")) if run is not None
    }:
        part = own_part(read_json(out / "runs" / name / "flops.json") or {})
        if part:
            found.setdefault((arm, tiers[n]), []).append(part)
            sizes[arm, tiers[n]] = n
    result = []
    for (arm, size), parts in found.items():
        tokens, flops, seconds = (sum(p[key] for p in parts) for key in ("tokens", "flops", "seconds"))
        rate = flops / seconds
        waits = [p["input_wait_s"] for p in parts]
        result.append(
            {
                "arm": arm,
                "size": size,
                "n": sizes[arm, size],
                "tokens_per_s": tokens / seconds,
                "flops_per_s": rate,
                "mfu_measured": _share(rate, [p["peak_flops_measured"] for p in parts]),
                "mfu_datasheet": _share(rate, [p["peak_flops_datasheet"] for p in parts]),
                "input_wait": sum(waits) / seconds if None not in waits else None,
                "peak_memory": max((p["peak_memory"] for p in parts if p["peak_memory"] is not None), default=None),
            }
        )
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    return sorted(result, key=lambda r: (arms.index(r["arm"]), r["n"]))


def _share(rate: float, peaks: list[float | None]) -> float | None:
    known = [peak for peak in peaks if peak]
    return rate / float(np.median(known)) if known else None


def at_equal_flops(found: list[Row], pairs: list[tuple[str, str]]) -> list[Row]:
    """Per pair of arms and size both have: time of the first over the second at equal FLOPs, and memory in bytes."""
    by = {(r["arm"], r["size"]): r for r in found}
    result = []
    for first, second in pairs:
        for (arm, size), one in by.items():
            other = by.get((second, size))
            if arm != first or other is None:
                continue
            memory = (one["peak_memory"], other["peak_memory"])
            result.append(
                {
                    "first": first,
                    "second": second,
                    "label": f"{first} / {second}",
                    "size": size,
                    "n": one["n"],
                    "time_ratio": other["flops_per_s"] / one["flops_per_s"],
                    "memory_difference": memory[0] - memory[1] if None not in memory else None,
                }
            )
    return result
