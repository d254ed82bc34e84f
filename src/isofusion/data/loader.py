"""Batches that are ready before they are asked for: worker processes read, decode, resize and pack ahead of the step.

A batch is a pure function of (settings, seed, step), so workers change nothing but the waiting: worker w of W makes the
steps with step % W == w, and the order in which they finish does not matter. An error in a worker is raised where the
step would have raised it, with the same class and words. Nothing here imports torch: workers do without it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from isofusion.config import DataConfig
from isofusion.data.batch import PackedBatch
from isofusion.errors import InputError, RunFailure

AHEAD = 2
"""Batches that each worker may be in front of the step: memory is that of workers * AHEAD batches, whatever the run."""

Opener = Callable[[], Any]


@dataclass(frozen=True)
class Item:
    """One step's data: as packed (NumPy), and as torch tensors on the device, in micro-batches."""

    host: PackedBatch
    parts: list[PackedBatch]


def open_stream(data: DataConfig, seed: int, split: str, rows_per_step: int) -> Any:
    """A stream of its own for a worker, from the caches that the first one has filled."""
    from isofusion.data.stream import Stream

    return Stream(data, seed, split, rows_per_step)


class Loader:
    """Items of steps start .. stop-1, in order; use it in a `with` block. `wait_s`: seconds that `next` waited."""

    def __init__(
        self,
        stream: Any,
        start: int,
        stop: int,
        *,
        workers: int = 0,
        opener: Opener | None = None,
        device: str = "cpu",
        micro_rows: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """`workers` = 0 asks `stream` itself; else each worker opens its own by `opener` (picklable).

        `part` = (rank, ranks): the rows of each step that this rank takes.
        """
        self.stream, self.device, self.micro_rows, self.part = stream, device, micro_rows, part
        self.start, self.step, self.stop = start, start, stop
        self.workers: list[_Worker] = []
        self.wait_s = 0.0
        self._ready: deque[Future[tuple[PackedBatch, list[PackedBatch]]]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self._asked = start
        if workers:
            if opener is None:
                raise ValueError("workers need an opener: a picklable function that makes their stream")
            self.workers = [_Worker(w, opener, part) for w in range(min(workers, max(1, stop - start)))]
            for _ in range(AHEAD * len(self.workers)):
                self._ask()
        if device != "cpu":  # pinning and unpickling go on beside the step
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="input")
            for step in range(start, min(start + AHEAD, stop)):
                self._ready.append(self._thread.submit(self._make, step))

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def next(self) -> Item:
        """The next step's item. Raises StopIteration after the last, and whatever reading it raised."""
        if self.step >= self.stop:
            raise StopIteration
        began = time.perf_counter()
        if self._thread is None:
            host, parts = self._make(self.step)
        else:
            host, parts = self._ready.popleft().result()
            if self.step + AHEAD < self.stop:
                self._ready.append(self._thread.submit(self._make, self.step + AHEAD))
        self.wait_s += time.perf_counter() - began
        self.step += 1
        return Item(host, parts if self.device == "cpu" else [part.to(self.device) for part in parts])

    def _make(self, step: int) -> tuple[PackedBatch, list[PackedBatch]]:
        if self.workers:
            host = self.workers[(step - self.start) % len(self.workers)].receive()
            self._ask()
        elif self.part == (0, 1):
            host = self.stream.batch(step)
        else:
            host = self.stream.batch(step, part=self.part)
        pieces = host.split(self.micro_rows) if self.micro_rows else [host]
        return host, [piece.torch(pin=self.device != "cpu") for piece in pieces]

    def _ask(self) -> None:
        if self._asked < self.stop:
            self.workers[(self._asked - self.start) % len(self.workers)].ask(self._asked)
            self._asked += 1

    def close(self) -> None:
        """End the workers; safe to call twice."""
        for worker in self.workers:
            worker.close()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self.workers, self._ready = [], deque()


class _Worker:
    """One process and the pipe to it. Spawned, not forked: the trainer has threads, and perhaps a GPU."""

    def __init__(self, number: int, opener: Opener, part: tuple[int, int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, opener, part), name=f"isofusion-input-{number}", daemon=True
        )
        self.process.start()
        theirs.close()

    def ask(self, step: int) -> None:
        with contextlib.suppress(OSError):  # a dead worker is told of where its batch is missed
            self.pipe.send(step)

    def receive(self) -> PackedBatch:
        """Its oldest batch, or the error that stood in for it."""
        wait([self.pipe, self.process.sentinel])
        try:
            if not self.pipe.poll():
                raise EOFError
            fine, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1.0)
            code = self.process.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            raise RunFailure(
                f"an input worker {how} (out of memory?); the checkpoints are kept, resume the run. With "
                f"ISOFUSION_INPUT_WORKERS=0 the trainer reads the data itself, in the least memory"
            ) from None
        if not fine:
            raise value
        return value

    def close(self) -> None:
        self.pipe.close()
        self.process.join(0.2)
        if self.process.is_alive():  # in the middle of a batch that nobody wants
            self.process.kill()
            self.process.join()
        self.process.close()


def _serve(pipe: Connection, opener: Opener, part: tuple[int, int]) -> None:
    """A worker's life: a step number in, a batch or an error out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # both reach the whole group; the trainer decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stream: Any = None
    try:
        while True:
            step = pipe.recv()
            try:
                if stream is None:
                    stream = opener()
                batch = stream.batch(step) if part == (0, 1) else stream.batch(step, part=part)
                answer: tuple[bool, Any] = (True, batch)
            except (InputError, RunFailure, OSError) as error:
                answer = (False, error)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                answer = (False, RunFailure(f"an input worker failed at step {step}: {type(error).__name__}: {error}"))
            pipe.send(answer)
    except (EOFError, OSError, KeyboardInterrupt):
        return
