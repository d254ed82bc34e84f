"""The JSON file of benchmarks/gpu.py: every model is added as it ends, by the process of its section."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_models import Peak, Row, Setting, card, peaks, release, usable

DENSE, LATE, EXPERTS = "early-932m", "late-1b", "moe-932m"
PAIRS = (
    *(("early-275m", "late-289m"), ("early-468m", "late-494m"), (DENSE, LATE)),
    *(("early-1.63b", "late-1.75b"), ("early-2.28b", "late-2.43b"), ("early-3.35b", "late-3.7b")),
)  # early and late fusion of like size, from the smallest up
EXPERTS_TARGET, TEXT_TARGET = 0.75, 1.1
UNUSABLE = 4  # exit status of a section that an error left without a device


def say(*words: object) -> None:
    print(*words, flush=True)


def nothing_yet() -> dict[str, Any]:
    return {"rows": [], "left_out": [], "failed": {}}


def load(path: Path) -> dict[str, Any]:
    """What the file holds, if there is one; SystemExit where it is no result of this benchmark."""
    content = nothing_yet()
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text()
        try:
            content = json.loads(text)
        except ValueError:
            content = {}
    if isinstance(content, dict) and content.keys() >= nothing_yet().keys():
        return content
    raise SystemExit(f"{path}: holds no results of benchmarks/gpu.py; give another --out")


def write(path: Path, content: dict[str, Any]) -> None:
    """The ratios are those of the rows so far. Whoever reads meanwhile, or stops this process, finds whole JSON."""
    content["ratios"] = ratios(content["rows"])
    content["late_over_early"] = late_over_early(content["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


class Section:
    """A part of the benchmark, which adds to the file; it may begin no model after `seconds`.

    Where its process ends in the middle of a model the file says so (`running`); the next one, `again`, goes on behind
    it. A model that takes more than `limit` seconds ends the process.
    """

    def __init__(
        self, name: str, path: Path, s: Setting, seconds: float, again: bool = False, limit: float | None = None
    ) -> None:
        self.name, self.path, self.s, self.seconds, self.limit = name, path, s, seconds, limit
        self.began = time.monotonic()
        self.content = load(path)
        here = {"device": card(s), "torch": torch.__version__, "smoke": s.smoke}
        for key, value in here.items():
            if self.content.setdefault(key, value) != value:
                raise SystemExit(f"{path}: its {key} is {self.content[key]}, here it is {value}; give another --out")
        if not again:
            self.forget()
        self.save()

    def forget(self) -> None:
        """What an earlier run of this section left."""
        mine = lambda what: what.split(": ")[0] == self.name  # noqa: E731
        self.content["rows"] = [row for row in self.content["rows"] if row["section"] != self.name]
        for key in ("left_out", "done"):
            self.content[key] = [what for what in self.content.get(key, []) if not mine(what)]
        for key in ("failed", "tracebacks"):
            self.content[key] = {what: why for what, why in self.content.get(key, {}).items() if not mine(what)}
        self.content.pop(self.name, None)

    def save(self) -> None:
        self.content.setdefault("seconds", {})[self.name] = round(time.monotonic() - self.began, 1)
        write(self.path, self.content)

    def peak(self) -> Peak:
        """Measured once for the section."""
        found = peaks(self.s)
        assert found["measured"] is not None
        say(f"{card(self.s)}, torch {torch.__version__}: GEMM {found['measured'] / 1e12:.1f} TFLOP/s")
        self.content.setdefault("peak_flops", {})[self.name] = found
        return found

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """`work()`; None where time is up (listed as left out), it fails (listed with its error), or the process
        before this one did it.
        """
        label = f"{self.name}: {what}"
        if label in self.content["done"] or label in self.content["failed"]:
            return None
        if time.monotonic() - self.began > self.seconds:
            self.content["left_out"].append(label)
            self.save()
            return None
        self.content["running"] = label
        self.save()
        result = None
        try:
            with ended_after(self.limit):
                result = work()
            self.content["done"].append(label)
        except Exception as error:  # one model that does not run must not cost the others
            self.fail(label, f"{type(error).__name__}: {error}"[:2000])
            self.content["tracebacks"][label] = traceback.format_exc()[-4000:]
        release()  # not above, where the error still holds the model
        if not usable(self.s):
            self.save()
            os._exit(UNUSABLE)  # whatever is left of the models would wait for the device
        del self.content["running"]
        self.save()
        return result

    def fail(self, label: str, why: str) -> None:
        self.content["failed"][label] = why
        say(f"{label}: failed: {' '.join(why.split())[:240]}")

    def row(self, what: str, work: Callable[[], Row]) -> Row | None:
        """`attempt`, and its row goes into the table."""
        before = (row for row in self.content["rows"] if (row["section"], row.get("what")) == (self.name, what))
        found: Row | None = next(before, None) or self.attempt(what, work)
        if found is not None and "section" not in found:
            self.content["rows"].append({"section": self.name, "what": what, **found})
            if not math.isfinite(found.get("loss", 0.0)):
                self.fail(f"{self.name}: {what}", f"its loss is {found['loss']}; the row is kept")
            self.save()
            say(line(found))
        return found


@contextlib.contextmanager
def ended_after(seconds: float | None) -> Iterator[None]:
    """This process ends where the work inside takes longer, and says on stderr where it was; also inside a kernel."""
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def find(table: list[Row], name: str, **wanted: Any) -> Row | None:
    """The first row of the model with these values; text alone and micro-batches only where asked for."""
    wanted = {"text": False, "micro_rows": None} | wanted
    return next((r for r in table if r["name"] == name and all(r.get(k) == v for k, v in wanted.items())), None)


def ratios(rows: list[Row]) -> list[dict[str, Any]]:
    """What the targets ask for, of the rows that were measured: {"what", "value", "target" (None: there is none)}."""
    out: list[dict[str, Any]] = []

    def add(what: str, above: Row | None, below: Row | None, key: str, target: float | None = None) -> None:
        if above is not None and below is not None:
            out.append({"what": what, "value": above[key] / below[key], "target": target})

    dense, experts = find(rows, DENSE), find(rows, EXPERTS)
    if dense is not None and experts is not None:
        n, m = experts["rows"], dense["rows"]
        what, equal = "experts over dense, tokens/s, ", find(rows, DENSE, rows=n)
        add(what + f"{n} rows in one batch each", experts, equal, "tokens_per_s", EXPERTS_TARGET)
        parts = next((r for r in rows if r["name"] == EXPERTS and r["rows"] == m and r["micro_rows"]), None)
        if parts is not None:
            how = f"{m} rows each, the experts' in micro-batches of {parts['micro_rows']}"
            add(what + how, parts, dense, "tokens_per_s")
        if n != m:
            add(what + f"{n} rows of experts, {m} of dense", experts, dense, "tokens_per_s")
    plain = [row for row in rows if row["text"] and row["name"].startswith("plain")]
    best = max(plain, key=lambda row: row["flops_per_s"], default=None)
    others = [row for row in rows if row["text"] and row["name"] != DENSE and row not in plain]
    for other in [*([best] if best is not None else []), *others]:
        own = find(rows, DENSE, text=True, rows=other["rows"])
        what = f"early fusion over {other['name']}, FLOP/s, {other['rows']} rows of text each"
        add(what, own, other, "flops_per_s", TEXT_TARGET)
    return out


def late_over_early(rows: list[Row]) -> list[dict[str, Any]]:
    """Seconds per FLOP, and bytes of a step of as many rows, of the pairs that were measured (the paper's Fig 4)."""
    out = []
    for early, late in PAIRS:
        a, b = find(rows, early), find(rows, late)
        if a is not None and b is not None:
            memory = None
            if a["memory_measured"] and b["memory_measured"] and a["rows"] == b["rows"]:
                memory = b["memory_measured"] / a["memory_measured"]
            out.append({"early": early, "late": late, "time": a["flops_per_s"] / b["flops_per_s"], "memory": memory})
    return out


def waits_text(waits: dict[str, Any] | None) -> str:
    if waits is None:
        return "waits for the device inside a step: not counted on a CPU"
    over = f" over {waits['steps']} steps, at" if waits["count"] else ""
    where = "".join(f"\n    {place}" for place in waits["where"])
    return f"waits for the device inside a step: {waits['count']}{over}{where}"


def line(row: Row) -> str:
    """A row of the printed table."""
    name = row["name"] + (", text" if row["text"] else "")
    rows = f"{row['rows']} rows" + (f" in {row['micro_rows']}s" if row.get("micro_rows") else "")
    percent = lambda value: f"{value:6.1%}" if value is not None else "     –"  # noqa: E731
    out = (
        f"{name:28s} {rows:>13s} {1e3 * row['seconds']:9.1f} ms {row['tokens_per_s']:11,.0f} tok/s  "
        f"MFU {percent(row['mfu'])} measured {percent(row['mfu_datasheet'])} datasheet"
    )
    if row.get("memory_measured"):
        out += f"  {row['memory_measured'] / 1e9:6.1f} GB, predicted / measured {row['memory_ratio']:.3f}"
    if row.get("out_of_memory_at"):
        out += f"  (out of memory at {', '.join(map(str, row['out_of_memory_at']))} rows)"
    return out + (f"\n  {waits_text(row['waits'])}" if row.get("waits") and row["waits"]["count"] else "")


def graphs_line(found: dict[str, Any]) -> str:
    """What the section `graphs` prints of a small step."""
    as_graph = f"no CUDA graph: {' '.join(found.get('reason', '').split())[:200]}"
    if found["replayed"]:
        as_graph = f"as a CUDA graph {1e3 * found['replayed']:.2f} ms ({found['graph_at_most']:.2f} x the tokens/s)"
    return (
        f"{found['arm']} {found['size']}, {found['rows']} rows: {1e3 * found['launched']:.2f} ms; {as_graph}; "
        f"{found['stacked']} x the rows {1e3 * found['stacked_seconds']:.2f} ms ({found['stacked_at_most']:.2f} x)"
    )


def summary(content: dict[str, Any]) -> None:
    """Print what the file says in the end."""
    for ratio in content["ratios"]:
        target = f" (target {ratio['target']})" if ratio["target"] else ""
        say(f"{ratio['what']}: {ratio['value']:.3f}{target}")
    for pair in content["late_over_early"]:
        memory = f"{pair['memory']:.3f}" if pair["memory"] else "not at equal rows"
        say(f"{pair['late']} / {pair['early']} at equal FLOPs: time {pair['time']:.3f}, memory {memory}")
    steps = [*content["rows"], *content.get("check", {}).values()]
    counted = [one["waits"]["count"] for one in steps if one.get("waits")]
    if counted:
        say(f"waits for the device inside a step: {sum(counted)} in {len(counted)} models")
    for what in content["left_out"]:
        say(f"left out, no time: {what}")
    for what, why in content["failed"].items():
        say(f"failed: {what}: {(why.strip().splitlines() or [''])[-1]}")
