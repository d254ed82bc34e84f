"""Train one run from wherever it stands to its end: the run folder is the truth, and a kill costs no more than the
updates since the last checkpoint (docs/study-file.md, docs/run-folder.md).

Files: run.json (config, digests), env.json, metrics.jsonl, checkpoints/step_N; at the end flops.json, data.json and,
for a branch, eval.json and eval_docs.npz; DONE last. On many ranks (parallel.py) rank 0 writes all of them but its
share of the checkpoints. `step` is the number of updates done: checkpoint step_N holds the weights after N updates, and
the next batch is stream.batch(N). That integer is the whole state of the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from isofusion.config import RunConfig
from isofusion.data.batch import PackedBatch
from isofusion.data.loader import Loader, open_stream
from isofusion.errors import InputError, RunFailure
from isofusion.train import checkpoint
from isofusion.train.machine import Machine
from isofusion.train.metrics import MetricsLog, truncate_metrics
from isofusion.train.optimizer import build_optimizer, set_lr_factor
from isofusion.train.parallel import Parallel
from isofusion.train.process import environment, only_process, reproducible, sigterm
from isofusion.train.schedule import lr_factor
from isofusion.train.speed import Speed
from isofusion.train.step import StepResult, choose_precision, train_step
from isofusion.train.tally import Tally, shape_of

Event = Callable[[dict[str, Any]], None]
ModelFactory = Callable[[RunConfig], nn.Module]
StreamFactory = Callable[[RunConfig, str], Any]
EVENT_EVERY_S = 1.0


class LostFork(RunFailure):
    """The checkpoint of the trunk that a branch starts from is missing or damaged; the pool trains it again."""

    kind = "fork"


def build_decoder(config: RunConfig) -> nn.Module:
    """The model of a run at step 0: weights are a function of (config.model, config.seed)."""
    from isofusion.model.decoder import Decoder
    from isofusion.model.init import init_weights

    model = Decoder(config.model)
    init_weights(model, config.model, config.seed)
    return model


def build_stream(config: RunConfig, split: str) -> Any:
    """The data of a run, "train" or "val"."""
    from isofusion.data.stream import Stream

    return Stream(config.data, config.seed, split, config.train.rows_per_step)


def train_run(
    config: RunConfig,
    folder: Path,
    runs_root: Path,
    *,
    threads: int,
    on_event: Event | None = None,
    stop: Callable[[], bool] | None = None,
    model_factory: ModelFactory = build_decoder,
    stream_factory: StreamFactory = build_stream,
    parallel: Parallel | None = None,
    asynchronous: bool = False,
) -> str:
    """Train `config` in `folder`, resuming by itself: "done", or "interrupted" (SIGTERM, stop()) with a checkpoint.

    A branch without a checkpoint of its own starts from runs_root/<parent>/checkpoints/step_<start_step>.
    On many ranks every rank calls this with its own `parallel`; `model_factory` is then that of `Parallel.decoder`, and
    `asynchronous` writes checkpoints while training goes on. The stop of one rank stops all.
    Raises InputError when the folder or a checkpoint belongs to other settings or data, RunFailure when training cannot
    go on (non-finite loss, full disk, a second process in the same folder, a lost rank); the last whole checkpoint is
    kept.
    """
    machine = Machine.here()
    parallel = parallel or Parallel(device=machine.resolve())
    emit = _emitter(config, on_event if parallel.first else None)

    def kept() -> str:
        return next((f"step_{n}" for n in checkpoint.steps(folder / "checkpoints")), "none yet")

    with parallel.lost_ranks_told(kept), ExitStack() as stack:
        if parallel.from_first(lambda: is_done(config, folder)):
            return "done"
        try:
            parallel.from_first(lambda: _take(folder, stack))
            stack.enter_context(reproducible(threads, deterministic=parallel.device == "cpu"))
            terminated = stack.enter_context(sigterm())
            run = _Run(
                config, folder, runs_root, threads, emit, model_factory, stream_factory, parallel, asynchronous, machine
            )
            return run.finish(lambda: terminated.is_set() or bool(stop and stop()))
        except OSError as error:
            name = f" ({error.filename})" if error.filename else ""
            raise RunFailure(
                f"{folder}: {error.strerror or error}{name}; the last whole checkpoint is untouched, "
                f"mend this and resume"
            ) from error


def _take(folder: Path, stack: ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(only_process(folder))


def is_done(config: RunConfig, folder: Path) -> bool:
    """Whether the folder holds this very run, finished. Raises InputError when it holds another one."""
    about, done = folder / "run.json", (folder / "DONE").exists()
    if not about.exists():
        return done
    try:
        then = json.loads(about.read_bytes())
        digest, settings = then["digest"], then["config"]
    except (ValueError, KeyError, TypeError):
        if done:
            raise InputError(
                f"{about}: is damaged; restore it, or delete the folder {folder} to train the run again"
            ) from None
        return False  # it is written anew; a checkpoint of another run is refused all the same
    if digest != config.digest():
        checkpoint.check_same(str(folder), {"config": settings}, {"config": config.model_dump(mode="json")})
    return done


class _Run:
    """One run in progress: model, optimizer, data and where it stands."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        runs_root: Path,
        threads: int,
        emit: Callable[..., None],
        model_factory: ModelFactory,
        stream_factory: StreamFactory,
        parallel: Parallel,
        asynchronous: bool,
        machine: Machine,
    ) -> None:
        self.config, self.folder, self.threads, self.emit, self.parallel = config, folder, threads, emit, parallel
        self.store = _store(folder / "checkpoints", parallel, asynchronous)
        self.stream = stream_factory(config, "train")
        own = stream_factory is build_stream  # workers open the same data by themselves
        data = (config.data, config.seed, "train", config.train.rows_per_step)
        self.opener = partial(open_stream, *data) if own else None
        self.input_workers = machine.workers(parallel.device, threads) if own else 0
        # opened now, so that validation data which cannot be read stops a branch before it trains
        self.val_stream = stream_factory(config, "val") if config.kind == "branch" else None
        words = self.stream.tokenizer.vocab_size
        if words > config.model.vocab_size:
            raise InputError(
                f"{config.name}: the tokenizer has {words} tokens and the model {config.model.vocab_size}; "
                f"set model.vocab_size to at least {words}"
            )
        self.model = parallel.decoder(config) if parallel.sharded else model_factory(config).to(parallel.device)
        self.model.train()
        self.optimizer = build_optimizer(self.model, config.model, config.train)
        self.step = 0
        self.tally = Tally()
        self.precision = choose_precision(config.train.precision, parallel.device)
        self.micro_rows = self._micro_rows(machine)
        self.speed = Speed(parallel.device, self.precision, threads)
        self._start(runs_root)
        self._describe()

    def _micro_rows(self, machine: Machine) -> int | None:
        """Rows of a micro-batch, of which every rank must make the same number: a sharded model runs on all at once."""
        parallel, rows = self.parallel, self.config.train.rows_per_step
        own = machine.prepare(self.model, self.config, parallel.device, self.precision, parallel.ranks, parallel.shards)
        said = [n for n in parallel.exchange(own) if n is not None]  # free memory may differ
        micro = min(said, default=None)
        if micro is not None and rows % parallel.ranks and rows // parallel.ranks % micro == 0:
            raise InputError(
                f"{self.config.name}: {rows} rows a step (train.rows_per_step) on {parallel.ranks} ranks are uneven, "
                f"and so would be their micro-batches of {micro} rows; start a number of ranks that divides {rows}"
            )
        return micro

    def _start(self, runs_root: Path) -> None:
        """Take up the newest whole checkpoint of this run, or the parent's fork, or start at step 0."""
        config = self.config
        self.store.clean()
        found = self.store.newest(lambda text: self.emit("message", message=text))
        if found:
            path, state = found
            now = {"config": config.model_dump(mode="json"), "data_fingerprint": self.stream.fingerprint}
            checkpoint.check_same(str(path), {key: state[key] for key in now}, now)
            self._restore(path, state)
        elif config.kind == "branch":
            path = runs_root / str(config.parent) / "checkpoints" / f"step_{config.start_step}"
            try:
                state = self.store.open(path)
            except checkpoint.DamagedCheckpoint as damage:
                raise LostFork(
                    f"{config.name}: needs the fork checkpoint step_{config.start_step} of its trunk {config.parent}: "
                    f"{damage}. Train the trunk past that step (forks must list it), then resume"
                ) from damage
            then = _heritage(state["config"], state["data_fingerprint"])
            checkpoint.check_same(str(path), then, _heritage(config.model_dump(mode="json"), self.stream.fingerprint))
            self._restore(path, state)
            self.tally = self.tally.child()
        if self.step < config.start_step or self.step > config.end_step:
            raise InputError(f"{config.name}: its checkpoint is at step {self.step}, outside of the run")
        self.parallel.from_first(lambda: truncate_metrics(self.folder / "metrics.jsonl", self.step))

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        self.store.restore(path, self.model, self.optimizer)
        self.step, self.tally = int(state["step"]), Tally.from_json(state["tally"])
        now = {"precision": self.precision, "threads": self.threads, "ranks": self.parallel.ranks}
        for key, value in now.items():
            if state.get(key, value) != value:
                text = f"{path.name} was made with {key} {state[key]}, now {value}: bits may differ"
                self.emit("message", message=text)
        self.precision = state["precision"] if self.config.train.precision == "auto" else self.precision

    def _describe(self) -> None:
        config = self.config
        about = {
            "name": config.name,
            "digest": config.digest(),
            "config": config.model_dump(mode="json"),
            "data_fingerprint": self.stream.fingerprint,
            "tokenizer_digest": getattr(self.stream.tokenizer, "digest", None),
            "precision": self.precision,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        machine = {**environment(self.threads, self.parallel.device), **self.parallel.describe()}
        self._write({"run.json": json.dumps(about, indent=1), "env.json": json.dumps(machine, indent=1)})

    def _write(self, files: dict[str, str]) -> None:
        """Rank 0 writes files of the run folder, in order."""

        def write() -> None:
            for name, text in files.items():
                checkpoint.write_atomic(self.folder / name, text)

        self.parallel.from_first(write)

    def finish(self, stopping: Callable[[], bool]) -> str:
        """Train to the end, then evaluate a branch and write DONE."""
        try:
            if self.step < self.config.end_step and not self._train(stopping):
                return "interrupted"
        finally:
            self.store.close()
        config, folder = self.config, self.folder
        summary = {**self.tally.report(config, self.step), **self.speed.report()}
        files: dict[str, str] = {}
        if config.kind == "branch":
            from isofusion.evaluate.run import evaluate_run

            self.emit("evaluate", step=self.step)
            # every rank evaluates everything: a sharded model runs on all ranks or on none
            record, documents = evaluate_run(
                self.model, self.stream, self.val_stream, self.step, self.precision, self.parallel.device
            )
            record = {**summary, **record, "flops": summary["flops"]["total"]}
            self.parallel.from_first(lambda: _write_arrays(folder / "eval_docs.npz", documents))
            files["eval.json"] = json.dumps(record, indent=1, allow_nan=False)
        files["flops.json"] = json.dumps(summary, indent=1)
        files["data.json"] = json.dumps(self.stream.report(self.step), indent=1, default=str)
        self._write(files)
        self.parallel.from_first(lambda: checkpoint.prune(self.store.folder, {*config.forks, config.end_step}))
        self._write({"DONE": json.dumps({"step": self.step, "digest": config.digest()}) + "\n"})
        self.emit("done", step=self.step)
        return "done"

    def _train(self, stopping: Callable[[], bool]) -> bool:
        """Updates until end_step (True) or a stop (False), with a checkpoint at either."""
        config, train = self.config, self.config.train
        metrics = MetricsLog(self.folder / "metrics.jsonl") if self.parallel.first else None
        told, told_tokens = time.monotonic(), self.tally.own_tokens
        device = self.parallel.device
        waiting: list[Callable[[], float]] = []  # on a GPU a step is read after the next one was launched
        loader = Loader(
            self.stream,
            self.step,
            config.end_step,
            workers=self.input_workers,
            opener=self.opener,
            device=device,
            micro_rows=self.micro_rows,
            part=self.parallel.part,
        )
        loss = float("nan")
        try:
            while self.step < config.end_step:
                began, waited = time.monotonic(), loader.wait_s
                item = loader.next()
                shapes, keys = self._whole_step(item.host)
                factor = lr_factor(self.step, config)
                set_lr_factor(self.optimizer, factor)
                result = train_step(
                    self.model,
                    self.optimizer,
                    item.parts,
                    precision=self.precision,
                    clip=train.clip,
                    balance_weight=config.model.balance_weight if config.model.n_experts else 0.0,
                    device=device,
                    across=self.parallel.across,
                )
                self.step += 1
                for shape in shapes:
                    self.tally.add_shape(shape)
                waiting.append(self._settle(result, keys, train.lr * factor, began, metrics))
                due = self.step % train.checkpoint_every == 0 or self.step in config.forks
                due = due or self.step == config.end_step
                while len(waiting) > (0 if due or device == "cpu" else 1):
                    loss = waiting.pop(0)()
                now = time.monotonic()
                self.tally.wall_s += now - began
                self.tally.input_wait_s += loader.wait_s - waited
                if self.step % train.log_every == 0 or now - told > EVENT_EVERY_S or self.step == config.end_step:
                    rate = (self.tally.own_tokens - told_tokens) / max(now - told, 1e-9)
                    self.emit("train", step=self.step, loss=loss, tokens_per_s=rate)
                    told, told_tokens = now, self.tally.own_tokens
                stop = self.parallel.any(stopping())
                if due or stop:
                    while waiting:
                        loss = waiting.pop(0)()
                    if metrics:
                        metrics.sync()
                    self._save()
                if stop and self.step < config.end_step:
                    self.emit("interrupted", step=self.step)
                    return False
        finally:
            loader.close()
            if metrics:
                metrics.close()
        return True

    def _settle(
        self, result: StepResult, keys: tuple[str, ...], lr: float, began: float, metrics: MetricsLog | None
    ) -> Callable[[], float]:
        """What is left to do for a step once its numbers are there: check them, write them, return the loss."""
        step, tokens = self.step, (self.tally.tokens, self.tally.text_tokens, self.tally.image_tokens)
        launched = time.monotonic()

        def settle() -> float:
            if not result.finite:
                raise RunFailure(self._not_finite(result, step))
            wall = (time.monotonic() if self.parallel.device == "cpu" else launched) - began
            if metrics:
                metrics.append(self._record(result, step, tokens, keys, lr, wall))
            return result.loss

        return settle

    def _whole_step(self, batch: PackedBatch) -> tuple[list[dict[str, int]], tuple[str, ...]]:
        """Of the whole step, given this rank's rows (NumPy): the shapes that add up to it, and its keys."""
        if not self.parallel.sharded:
            return [shape_of(batch)], batch.keys
        told = self.parallel.exchange((shape_of(batch), batch.keys_by_row()))
        rows = sorted(row for _, part in told for row in part)
        return [shape for shape, _ in told], tuple(key for _, keys in rows for key in keys)

    def _record(
        self,
        result: StepResult,
        step: int,
        tokens: tuple[int, int, int],
        keys: tuple[str, ...],
        lr: float,
        wall: float,
    ) -> dict[str, Any]:
        """One line of metrics.jsonl: token counts are totals since step 0; losses and `wall` (s) are of this update."""
        losses = {f"loss_{d}": result.nll[d] / n if n else None for d, n in result.targets.items()}
        return {
            "step": step,
            "tokens": tokens[0],
            "text_tokens": tokens[1],
            "image_tokens": tokens[2],
            "lr": lr,
            "grad_norm": result.grad_norm,
            "loss": result.loss,
            **losses,
            "targets": sum(result.targets.values()),
            **{f"targets_{d}": n for d, n in result.targets.items()},
            "balance_loss": result.balance,
            "keys_digest": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
            "wall": round(wall, 5),
        }

    def _save(self) -> None:
        state = {
            "config": self.config.model_dump(mode="json"),
            "config_digest": self.config.digest(),
            "data_fingerprint": self.stream.fingerprint,
            "precision": self.precision,
            "threads": self.threads,
            "ranks": self.parallel.ranks,
            "tally": self.tally.to_json(),
        }
        self.store.save(self.step, self.model, self.optimizer, state, self.config.forks)

    def _not_finite(self, result: StepResult, step: int) -> str:
        named = {"loss": result.loss, "balance loss": result.balance, "gradient norm": result.grad_norm}
        what = next(name for name, value in named.items() if not np.isfinite(value))
        whole = next((f"step_{n}" for n in checkpoint.steps(self.store.folder)), "none yet")
        return (
            f"run {self.config.name}, update {step} of {self.config.end_step}: the {what} is not finite "
            f"(loss {result.loss}, gradient norm {result.grad_norm}). The weights were not updated and the last good "
            f"checkpoint is kept ({whole}). In a new study, lower train.lr (now {self.config.train.lr:g}), raise "
            f"train.warmup_steps (now {self.config.train.warmup_steps}) or set train.precision = 'fp32' (now "
            f"{self.precision})"
        )


def _store(folder: Path, parallel: Parallel, asynchronous: bool) -> Any:
    """checkpoint.Store, or sharded.Store on many ranks."""
    if not parallel.sharded:
        return checkpoint.Store(folder)
    from isofusion.train.sharded import Store

    return Store(folder, parallel, asynchronous)


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def _heritage(config: dict[str, Any], data_fingerprint: str) -> dict[str, Any]:
    """What a branch must share with its parent: everything that shaped the weights and the order of the data."""
    free = {"cooldown_share", "cooldown_shape", "checkpoint_every", "log_every"}
    return {
        "model": config["model"],
        "seed": config["seed"],
        "data_fingerprint": data_fingerprint,
        "train": {key: value for key, value in config["train"].items() if key not in free},
    }


def _emitter(config: RunConfig, on_event: Event | None) -> Callable[..., None]:
    def emit(phase: str, **fields: Any) -> None:
        if on_event:
            event = "step" if phase == "train" else phase  # steps may be thinned out on the way, the others not
            on_event({"event": event, "run": config.name, "phase": phase, "end_step": config.end_step, **fields})

    return emit
