"""Train one run from wherever it stands to its end: the run folder is the truth, and a kill costs no more than the
updates since the last checkpoint (DESIGN.md sections 6 and 7).

Files: run.json (config, digests), env.json, metrics.jsonl, checkpoints/step_N; at the end flops.json, data.json and,
for a branch, eval.json and eval_docs.npz; DONE last. `step` is the number of updates done: checkpoint step_N holds the
weights after N updates, and the next batch is stream.batch(N). That integer is the whole state of the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from isofusion.config import RunConfig
from isofusion.errors import InputError, RunFailure
from isofusion.train import checkpoint
from isofusion.train.metrics import MetricsLog, truncate_metrics
from isofusion.train.optimizer import build_optimizer, set_lr_factor
from isofusion.train.process import environment, only_process, reproducible, sigterm
from isofusion.train.schedule import lr_factor
from isofusion.train.step import StepResult, choose_precision, train_step
from isofusion.train.tally import Tally

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
) -> str:
    """Train `config` in `folder`, resuming by itself: "done", or "interrupted" (SIGTERM, stop()) with a checkpoint.

    A branch without a checkpoint of its own starts from runs_root/<parent>/checkpoints/step_<start_step>.
    Raises InputError when the folder or a checkpoint belongs to other settings or data, RunFailure when training cannot
    go on (non-finite loss, full disk, a second process in the same folder); the last whole checkpoint is kept.
    """
    emit = _emitter(config, on_event)
    if is_done(config, folder):
        return "done"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_process(folder), reproducible(threads), sigterm() as terminated:
            run = _Run(config, folder, runs_root, threads, emit, model_factory, stream_factory)
            return run.finish(lambda: terminated.is_set() or bool(stop and stop()))
    except OSError as error:
        raise RunFailure(
            f"{folder}: {error.strerror or error} ({error.filename or 'no file'}); the last whole checkpoint is "
            f"untouched, mend this and resume"
        ) from error


def is_done(config: RunConfig, folder: Path) -> bool:
    """Whether the folder holds this very run, finished. Raises InputError when it holds another one."""
    if (folder / "run.json").exists():
        then = json.loads((folder / "run.json").read_bytes())
        if then["digest"] != config.digest():
            checkpoint.check_same(str(folder), {"config": then["config"]}, {"config": config.model_dump(mode="json")})
    return (folder / "DONE").exists()


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
    ) -> None:
        self.config, self.folder, self.threads, self.emit = config, folder, threads, emit
        self.checkpoints = folder / "checkpoints"
        self.stream = stream_factory(config, "train")
        # opened now, so that validation data which cannot be read stops a branch before it trains
        self.val_stream = stream_factory(config, "val") if config.kind == "branch" else None
        words = self.stream.tokenizer.vocab_size
        if words > config.model.vocab_size:
            raise InputError(
                f"{config.name}: the tokenizer has {words} tokens and the model {config.model.vocab_size}; "
                f"set model.vocab_size to at least {words}"
            )
        self.model = model_factory(config)
        self.model.train()
        self.optimizer = build_optimizer(self.model, config.model, config.train)
        self.step = 0
        self.tally = Tally()
        self.precision = choose_precision(config.train.precision, "cpu")
        self._start(runs_root)
        self._describe()

    def _start(self, runs_root: Path) -> None:
        """Take up the newest whole checkpoint of this run, or the parent's fork, or start at step 0."""
        config = self.config
        checkpoint.clean(self.checkpoints)
        found = checkpoint.newest_whole(self.checkpoints, lambda text: self.emit("message", message=text))
        if found:
            path, files = found
            state = checkpoint.state_of(files)
            now = {"config": config.model_dump(mode="json"), "data_fingerprint": self.stream.fingerprint}
            checkpoint.check_same(str(path), {key: state[key] for key in now}, now)
            self._restore(path, files)
        elif config.kind == "branch":
            path = runs_root / str(config.parent) / "checkpoints" / f"step_{config.start_step}"
            try:
                files = checkpoint.read(path)
            except checkpoint.DamagedCheckpoint as damage:
                raise LostFork(
                    f"{config.name}: needs the fork checkpoint step_{config.start_step} of its trunk {config.parent}: "
                    f"{damage}. Train the trunk past that step (forks must list it), then resume"
                ) from damage
            state = checkpoint.state_of(files)
            then = _heritage(state["config"], state["data_fingerprint"])
            checkpoint.check_same(str(path), then, _heritage(config.model_dump(mode="json"), self.stream.fingerprint))
            self._restore(path, files)
            self.tally = self.tally.child()
        if self.step < config.start_step or self.step > config.end_step:
            raise InputError(f"{config.name}: its checkpoint is at step {self.step}, outside of the run")
        truncate_metrics(self.folder / "metrics.jsonl", self.step)

    def _restore(self, path: Path, files: dict[str, bytes]) -> None:
        state = checkpoint.restore(files, self.model, self.optimizer)
        self.step, self.tally = int(state["step"]), Tally.from_json(state["tally"])
        for key, now in (("precision", self.precision), ("threads", self.threads)):
            if state[key] != now:
                text = f"{path.name} was made with {key} {state[key]}, now {now}: bits may differ"
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
        checkpoint.write_atomic(self.folder / "run.json", json.dumps(about, indent=1))
        checkpoint.write_atomic(self.folder / "env.json", json.dumps(environment(self.threads), indent=1))

    def finish(self, stopping: Callable[[], bool]) -> str:
        """Train to the end, then evaluate a branch and write DONE."""
        if self.step < self.config.end_step and not self._train(stopping):
            return "interrupted"
        config, folder = self.config, self.folder
        summary = self.tally.report(config, self.step)
        if config.kind == "branch":
            from isofusion.evaluate.run import evaluate_run

            self.emit("evaluate", step=self.step)
            record, documents = evaluate_run(self.model, self.stream, self.val_stream, self.step, self.precision)
            record = {**summary, **record, "flops": summary["flops"]["total"]}
            with open(folder / "eval_docs.npz.tmp", "wb") as file:
                np.savez_compressed(file, **documents)  # type: ignore[arg-type]
            os.replace(folder / "eval_docs.npz.tmp", folder / "eval_docs.npz")
            checkpoint.write_atomic(folder / "eval.json", json.dumps(record, indent=1, allow_nan=False))
        checkpoint.write_atomic(folder / "flops.json", json.dumps(summary, indent=1))
        checkpoint.write_atomic(folder / "data.json", json.dumps(self.stream.report(self.step), indent=1, default=str))
        checkpoint.prune(self.checkpoints, {*config.forks, config.end_step})
        checkpoint.write_atomic(folder / "DONE", json.dumps({"step": self.step, "digest": config.digest()}) + "\n")
        self.emit("done", step=self.step)
        return "done"

    def _train(self, stopping: Callable[[], bool]) -> bool:
        """Updates until end_step (True) or a stop (False), with a checkpoint at either."""
        config, train = self.config, self.config.train
        metrics = MetricsLog(self.folder / "metrics.jsonl")
        told, told_tokens = time.monotonic(), self.tally.own_tokens
        try:
            while self.step < config.end_step:
                began = time.monotonic()
                batch = self.stream.batch(self.step)
                factor = lr_factor(self.step, config)
                set_lr_factor(self.optimizer, factor)
                result = train_step(
                    self.model,
                    self.optimizer,
                    batch.torch("cpu"),
                    precision=self.precision,
                    clip=train.clip,
                    balance_weight=config.model.balance_weight if config.model.n_experts else 0.0,
                )
                if not result.finite:
                    raise RunFailure(self._not_finite(result))
                self.step += 1
                self.tally.add(batch)
                now = time.monotonic()
                self.tally.wall_s += now - began
                metrics.append(self._record(result, batch.keys, train.lr * factor, now - began))
                if self.step % train.log_every == 0 or now - told > EVENT_EVERY_S or self.step == config.end_step:
                    rate = (self.tally.own_tokens - told_tokens) / max(now - told, 1e-9)
                    self.emit("train", step=self.step, loss=result.loss, tokens_per_s=rate)
                    told, told_tokens = now, self.tally.own_tokens
                stop = stopping()
                due = self.step % train.checkpoint_every == 0 or self.step in config.forks
                if due or stop or self.step == config.end_step:
                    metrics.sync()
                    self._save()
                if stop and self.step < config.end_step:
                    self.emit("interrupted", step=self.step)
                    return False
        finally:
            metrics.close()
        return True

    def _record(self, result: StepResult, keys: tuple[str, ...], lr: float, wall: float) -> dict[str, Any]:
        """One line of metrics.jsonl: token counts are totals since step 0; losses and `wall` (s) are of this update."""
        losses = {f"loss_{d}": result.nll[d] / n if n else None for d, n in result.targets.items()}
        return {
            "step": self.step,
            "tokens": self.tally.tokens,
            "text_tokens": self.tally.text_tokens,
            "image_tokens": self.tally.image_tokens,
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
            "tally": self.tally.to_json(),
        }
        checkpoint.save(self.checkpoints, self.step, self.model, self.optimizer, state, keep=self.config.forks)

    def _not_finite(self, result: StepResult) -> str:
        named = {"loss": result.loss, "balance loss": result.balance, "gradient norm": result.grad_norm}
        what = next(name for name, value in named.items() if not np.isfinite(value))
        whole = next((f"step_{n}" for n in checkpoint.steps(self.checkpoints)), "none yet")
        return (
            f"run {self.config.name}, update {self.step + 1} of {self.config.end_step}: the {what} is not finite "
            f"(loss {result.loss}, gradient norm {result.grad_norm}). The weights were not updated and the last good "
            f"checkpoint is kept ({whole}). In a new study, lower train.lr (now {self.config.train.lr:g}), raise "
            f"train.warmup_steps (now {self.config.train.warmup_steps}) or set train.precision = 'fp32' (now "
            f"{self.precision})"
        )


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
