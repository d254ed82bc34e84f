"""One run of a locked study on its own, on one process or on many ranks: `python -m isofusion.train OUT NAME`.

Under torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) the processes share the
run. Exit codes: 0 done, 75 stopped by SIGTERM with a checkpoint, 2 bad input, 1 failed; why is in failure.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isofusion.config import RunConfig
from isofusion.errors import InputError, RunFailure
from isofusion.study.lock import locked_spec
from isofusion.study.pool import FAILURE
from isofusion.train.checkpoint import write_atomic
from isofusion.train.loop import Event, train_run
from isofusion.train.parallel import TIMEOUT_S, LostRank, connected

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
"""Exit codes; 75 is EX_TEMPFAIL of sysexits.h: try again."""


def train_on_ranks(
    config: RunConfig,
    folder: Path,
    runs_root: Path,
    *,
    threads: int,
    on_event: Event | None = None,
    stop: Callable[[], bool] | None = None,
    device: str = "auto",
    replicas: int = 1,
    asynchronous: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """`loop.train_run` on the ranks that the environment names; every rank calls this. Events come on rank 0 only."""
    with connected(device, replicas, timeout_s) as parallel:
        return train_run(
            config,
            folder,
            runs_root,
            threads=threads,
            on_event=on_event,
            stop=stop,
            parallel=parallel,
            asynchronous=asynchronous,
        )


def run_of(out: Path, name: str) -> RunConfig:
    """A run of a locked study by its name; raises InputError."""
    runs = {run.name: run for run in locked_spec(out).runs()}
    if name not in runs:
        raise InputError(f"{out}: no run {name!r} in this study; there are: {', '.join(runs)}")
    return runs[name]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    root, folder = args.out / "runs", None
    try:
        config = run_of(args.out, args.name)
        folder = root / config.name
        if os.environ.get("RANK", "0") == "0":
            (folder / FAILURE).unlink(missing_ok=True)
        status = train_on_ranks(
            config,
            folder,
            root,
            threads=args.threads,
            on_event=_print,
            device=args.device,
            replicas=args.replicas,
            asynchronous=args.async_checkpoints,
            timeout_s=args.timeout,
        )
    except InputError as error:
        return _failed(folder, "input", str(error), BAD_INPUT)
    except RunFailure as error:
        return _failed(folder, getattr(error, "kind", "failure"), str(error), FAILED)
    except Exception as error:
        traceback.print_exc()
        return _failed(folder, "crash", f"{type(error).__name__}: {error}", FAILED)
    return DONE if status == "done" else STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m isofusion.train", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the locked study; the run is in OUT/runs/NAME")
    parser.add_argument("name", metavar="NAME", help="name of the run, as `study status OUT` lists it")
    parser.add_argument("--threads", type=_at_least_one, default=1, help="CPU threads of each rank (default 1)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--replicas",
        type=_at_least_one,
        default=1,
        help="copies of the sharded model, e.g. one a node (default 1: shard over all)",
    )
    parser.add_argument("--async-checkpoints", action="store_true", help="write checkpoints while training goes on")
    parser.add_argument(
        "--timeout",
        type=_at_least_one,
        default=TIMEOUT_S,
        help=f"seconds to wait for a lost rank (default {TIMEOUT_S:.0f})",
    )
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


def _print(event: dict[str, Any]) -> None:
    what = {"train": "step {step}/{end_step}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s", "message": "{message}"}
    text = what.get(event["phase"], "{phase} at step {step}").format(**event)
    print(f"{event['run']}: {text}", flush=True)


def _failed(folder: Path | None, kind: str, message: str, code: int) -> int:
    """Say why, and write it down, whichever rank it is that knows; a lost rank is less of a reason than any other."""
    print(message, file=sys.stderr, flush=True)
    if folder is not None and not (kind == LostRank.kind and (folder / FAILURE).exists()):
        with contextlib.suppress(OSError):  # a full disk, or two ranks at once
            write_atomic(folder / FAILURE, json.dumps({"kind": kind, "message": message}) + "\n")
    return code
