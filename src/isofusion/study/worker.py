"""One worker of the pool: a process that trains one run after another, so that torch is imported once.

Protocol: requests are JSON lines on stdin, `{"run": <RunConfig>, "runs_root": path}`; events are JSON lines on stdout:
`ready`, `step`, whatever else the training loop reports, and `finished` with status done | interrupted | failed.
Anything that libraries print goes to stderr (a log file of the pool). SIGTERM, or the death of the pool, makes the run
checkpoint and stop. The pool sets the thread variables before this process starts, since torch reads them at import.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isofusion.config import RunConfig
from isofusion.errors import InputError, RunFailure

EVENT_INTERVAL = 0.2  # seconds between step events of one run; the pool draws at most this often


def load(target: str) -> Callable[..., str]:
    """`package.module:function` -> the function."""
    module, _, function = target.partition(":")
    loaded: Callable[..., str] = getattr(importlib.import_module(module), function)
    return loaded


class Worker:
    def __init__(self, target: str, threads: int) -> None:
        self.threads = threads
        self.stopping = False
        self.pool = os.getppid()
        # Keep stdout for the protocol alone: a library that prints must not break it.
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the pool decides
        self.train = load(target)
        self.emit({"event": "ready"})

    def _stop(self, signum: int, frame: Any) -> None:
        self.stopping = True
        print(f"told to stop by signal {signum}", file=sys.stderr)

    def stop(self) -> bool:
        """True when the run should checkpoint and end: asked to, or the pool is gone."""
        return self.stopping or os.getppid() != self.pool

    def emit(self, event: dict[str, Any]) -> None:
        try:
            self.out.write(json.dumps(event, default=str) + "\n")
        except (BrokenPipeError, ValueError):
            self.stopping = True

    def execute(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train one run; returns the `finished` event. Never raises."""
        name, last = "?", 0.0
        held: dict[str, Any] | None = None  # the latest step that was not told

        def on_event(event: dict[str, Any]) -> None:
            nonlocal last, held
            now = time.monotonic()
            event = {"event": "step", **event, "run": name}
            if event["event"] == "step" and now - last < EVENT_INTERVAL:
                held = event
                return
            if held is not None and event["event"] != "step":
                self.emit(held)
            last, held = now, None
            self.emit(event)

        try:
            config = RunConfig.model_validate(request["run"])
            name, root = config.name, Path(request["runs_root"])
            status = self.train(config, root / name, root, threads=self.threads, on_event=on_event, stop=self.stop)
            return {"event": "finished", "run": name, "status": status}
        except InputError as error:
            kind, message = "input", str(error)
        except RunFailure as error:
            kind, message = getattr(error, "kind", "failure"), str(error)  # "fork": see train.loop.LostFork
        except Exception as error:
            traceback.print_exc()
            kind, message = "crash", f"{type(error).__name__}: {error}"
        finally:
            if held is not None:  # what a person reads as the run's loss is that of its last step
                self.emit(held)
        return {"event": "finished", "run": name, "status": "failed", "kind": kind, "message": message}

    def serve(self) -> None:
        for line in sys.stdin:
            self.emit(self.execute(json.loads(line)))
            if self.stop():
                return


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m isofusion.study.worker", description=__doc__)
    parser.add_argument("--train", default="isofusion.train.loop:train_run")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    Worker(args.train, args.threads).serve()


if __name__ == "__main__":
    main()
