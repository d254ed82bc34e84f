"""The input pipeline against the model that eats it: tokens/s of one process, and memory over many epochs.

    python benchmarks/input.py --data FOLDER [--study studies/openstax-mini.toml] [--epochs 10] [--out FILE]

FOLDER holds the files of the study. One process and one thread read, decode, resize, tokenise and pack:
  cold    nothing cached: an empty cache, the files dropped from the system's page cache where it lets us; indexing,
          training the tokenizer and building the stores count, then one epoch of packed batches
  warm    the cache is there: opening it and one epoch
  steady  batches alone, in turns with training steps of the width-64 early model on the same batches (A B A B)
An epoch is as many rows as all sources hold together. Bound: the tokens/s that the width-64 early model of the study
consumes on one thread; target: 10 times that, cold start and all, so that an input worker is never what a study waits
for. Memory is the resident set at the end of each epoch, and the part of it that is this process's alone (the stores
are files mapped into memory, which the system takes back when it needs them). Flat: from the second epoch to the last
the private part grows by at most 2 % of the resident set. Exit status 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, as_worker, interleaved, median, ratio, save

from isofusion.config import DataConfig
from isofusion.data.batch import PackedBatch
from isofusion.data.finite import FiniteSource
from isofusion.data.stream import Stream
from isofusion.errors import InputError
from isofusion.model.decoder import Decoder
from isofusion.model.init import init_weights
from isofusion.study.spec import StudySpec
from isofusion.train.optimizer import build_optimizer
from isofusion.train.process import reproducible
from isofusion.train.step import choose_precision, train_step

STUDY = Path(__file__).parents[1] / "studies" / "openstax-mini.toml"
TARGET_RATIO, FLAT = 10.0, 0.02
ARM, WIDTH = "early", 64


def tokens_of(batch: PackedBatch) -> int:
    return int((batch.doc_id >= 0).sum())


def forget(data: DataConfig) -> int:
    """Ask the system to drop the study's files from its page cache; how many it was asked for."""
    paths = {p for s in data.sources for glob in s.train for p in Path(data.folder or ".").glob(glob)}
    if not hasattr(os, "posix_fadvise"):
        return 0
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return len(paths)


def open_stream(data: DataConfig, rows: int) -> tuple[Stream, float]:
    begin = time.perf_counter()
    stream = Stream(data, seed=0, split="train", rows_per_step=rows)
    return stream, time.perf_counter() - begin


def steps_of_epoch(stream: Stream) -> int:
    held = sum(s.rows_of(0) for s in stream.sources if isinstance(s, FiniteSource))
    if not held:
        raise InputError("the study has no source of files; give one that reads data, such as openstax-mini")
    return max(1, -(-held // stream.rows_per_step))


def read(stream: Stream, first: int, count: int) -> tuple[int, float]:
    """Tokens of `count` batches from step `first` on, and the seconds they took."""
    begin, tokens = time.perf_counter(), 0
    for step in range(first, first + count):
        tokens += tokens_of(stream.batch(step))
    return tokens, time.perf_counter() - begin


def throughput(data: DataConfig, rows: int, limit: int | None) -> dict[str, Any]:
    """Cold and warm: seconds to open, tokens and seconds of an epoch, tokens/s of both together."""
    out: dict[str, Any] = {"files_dropped": forget(data)}
    for name in ("cold", "warm"):
        stream, opening = open_stream(data, rows)
        steps = min(steps_of_epoch(stream), limit or sys.maxsize)
        tokens, seconds = read(stream, 0, steps)
        out[name] = {
            "open_s": opening,
            "tokens": tokens,
            "steps": steps,
            "epoch_s": seconds,
            "tokens_per_s": tokens / (opening + seconds),
        }
    return out


def against_model(spec: StudySpec, rows: int, rounds: int, repeats: int) -> dict[str, Any]:
    """Steady batches and training steps in turns."""
    size = next((s for s in spec.arm(ARM).sizes if s.model.width == WIDTH), None)
    if size is None:
        raise InputError(f"arm {ARM!r} of the study has no size of width {WIDTH}")
    stream, _ = open_stream(spec.data, rows)
    batches = [stream.batch(step) for step in range(repeats)]
    model = Decoder(size.model)
    init_weights(model, size.model, seed=0)
    optimizer = build_optimizer(model, size.model, size.train)
    precision = choose_precision(size.train.precision)
    packed = [batch.torch("cpu") for batch in batches]
    turn = {"input": 0}

    def take() -> None:
        turn["input"] += 1
        for i in range(repeats):  # new rows in each turn: nothing is read twice in an epoch
            stream.batch(turn["input"] * repeats + i).torch("cpu")

    def learn() -> None:
        with reproducible(1):
            for batch in packed:
                train_step(model, optimizer, batch, precision=precision, clip=size.train.clip)

    calls: dict[str, Callable[[], object]] = {"input": take, "train": learn}
    seconds = {name: values[1:] for name, values in interleaved(calls, rounds + 1).items()}
    tokens = sum(tokens_of(batch) for batch in batches)
    return {
        "model": f"{ARM}, width {WIDTH}, {precision}",
        "model_tokens_per_s": median(tokens / s for s in seconds["train"]),
        "steady_tokens_per_s": median(tokens / s for s in seconds["input"]),
        "steady_over_model": ratio(seconds["train"], seconds["input"]),
    }


def memory(data: DataConfig, rows: int, epochs: int, limit: int | None) -> dict[str, Any]:
    """Resident and private MiB at the end of each epoch, and their slopes (MiB an epoch) from the second on."""
    stream, _ = open_stream(data, rows)
    steps = min(steps_of_epoch(stream), limit or sys.maxsize)
    process = psutil.Process()
    resident, private = [], []
    for epoch in range(epochs):
        read(stream, epoch * steps, steps)
        info = process.memory_full_info()
        resident.append(info.rss / 2**20)
        private.append(getattr(info, "uss", info.rss) / 2**20)
    later = np.arange(1, epochs)

    def slope(values: list[float]) -> float:
        return float(np.polyfit(later, values[1:], 1)[0]) if epochs > 2 else 0.0

    return {
        "resident_mib": resident,
        "private_mib": private,
        "resident_slope": slope(resident),
        "private_slope": slope(private),
        "flat": slope(private) * (epochs - 2) <= FLAT * resident[-1],
    }


def show(result: dict[str, Any]) -> None:
    model = result["steady"]["model_tokens_per_s"]
    print(f"bound: {model:,.0f} tokens/s, what {result['steady']['model']} consumes on one thread")
    print(f"{'input':8s} {'tokens/s':>12s} {'over the model':>15s}")
    for name in ("cold", "warm"):
        r = result["throughput"][name]
        print(
            f"{name:8s} {r['tokens_per_s']:12,.0f} {r['tokens_per_s'] / model:15.1f}   (opened in {r['open_s']:.2f} s)"
        )
    over = result["steady"]["steady_over_model"]
    rate = result["steady"]["steady_tokens_per_s"]
    print(f"{'steady':8s} {rate:12,.0f} {over['median']:15.1f}   ({over['q25']:.1f} to {over['q75']:.1f})")
    print(f"target: {TARGET_RATIO:g}, the least of the three is {result['least']:.1f}")
    m = result["memory"]
    for name in ("resident", "private"):
        mib, slope = m[f"{name}_mib"], m[f"{name}_slope"]
        print(f"memory, {name}: {mib[0]:.0f} MiB after epoch 1, {mib[-1]:.0f} after {len(mib)}; {slope:+.2f} an epoch")
    print("memory is flat" if m["flat"] else "memory is NOT flat")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--study", type=Path, default=STUDY)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9, help="turns of the steady part; medians over them")
    parser.add_argument("--repeats", type=int, default=8, help="batches in a turn")
    parser.add_argument("--limit", type=int, help="steps of an epoch at most, for a quick look")
    parser.add_argument("--out", type=Path, default=RESULTS / "input.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    spec = StudySpec.from_toml(args.study, data=args.data)
    rows = spec.arm(ARM).sizes[0].train.rows_per_step
    before = os.environ.get("ISOFUSION_CACHE")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ISOFUSION_CACHE"] = cache
        try:
            speed = throughput(spec.data, rows, args.limit)
            steady = against_model(spec, rows, args.rounds, args.repeats)
            held = memory(spec.data, rows, args.epochs, args.limit)
        finally:
            if before is None:
                del os.environ["ISOFUSION_CACHE"]
            else:
                os.environ["ISOFUSION_CACHE"] = before
    result: dict[str, Any] = {"throughput": speed, "steady": steady, "memory": held}
    shares = [speed[name]["tokens_per_s"] / steady["model_tokens_per_s"] for name in ("cold", "warm")]
    result["least"] = min(*shares, steady["steady_over_model"]["median"])
    result["met"] = result["least"] >= TARGET_RATIO and held["flat"]
    show(result)
    settings = {"study": args.study.name, "epochs": args.epochs, "rows_per_step": rows, "limit": args.limit}
    save(args.out, 1, settings, **result)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    as_worker()
    sys.exit(main())
