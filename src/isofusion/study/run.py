"""One session of a locked study: make the data ready, train what is not DONE, say how it went.

The run folders are the truth (`DONE` is written last): killing anything at any moment loses at most the steps since the
last checkpoint, and `resume=True` goes on from there. The work itself is the pool's (`isofusion.study.pool`).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from isofusion.config import RunConfig
from isofusion.errors import InputError, RunFailure
from isofusion.processors import cores
from isofusion.study.holder import only_one
from isofusion.study.lock import record_session, write_atomic
from isofusion.study.pool import TRAIN, Pool, is_done
from isofusion.study.progress import Progress
from isofusion.study.spec import StudySpec

DATA_LOCK = "data.lock"  # what the study's data was, by split and source


class Interrupted(Exception):
    """The study was asked to stop; every run checkpointed. `code` is the exit status (128 + signal)."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.code = 128 + signum


def prepare(spec: StudySpec, out: Path | None = None) -> list[str]:
    """Once, before the workers: torch is there, and the data can be read (index, tokenizer and caches are built).

    Returns what a person should know of the data before it is used: bad samples that are left out, validation that is
    in training too or scarce, domains that are never validated. Raises InputError where the data is not what an
    earlier session of the study in `out` used.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError("training needs torch: pip install 'isofusion[train]'")
    from isofusion.data import ahead
    from isofusion.data.duplicates import leaks
    from isofusion.data.generate import generate
    from isofusion.data.stream import Stream
    from isofusion.study.gpu import gpu_bytes, measure_peak

    train = spec.arms[0].sizes[0].train
    ahead.index(spec.data, ("train", "val"), cores())
    streams = {split: Stream(spec.data, spec.seeds[0], split, train.rows_per_step) for split in ("train", "val")}
    words = streams["train"].tokenizer.vocab_size
    for arm in spec.arms:
        for size in arm.sizes:
            if size.model.vocab_size < words:
                raise InputError(
                    f'arm "{arm.name}", size "{size.name}": vocab_size {size.model.vocab_size} is less than the '
                    f"{words} tokens of {spec.data.tokenizer}; raise it, or leave it out to take the tokenizer's"
                )
    if out is not None:
        found = {split: {s.name: s.digest for s in stream.sources} for split, stream in streams.items()}
        pin_data(out, found | {"text": {"the tokenizer": streams["train"].tokenizer.digest}})
    twice = streams["train"].near_duplicates()
    if gpu_bytes() is not None:  # a GPU reads the world faster than one process draws it
        longest = max(spec.runs(), key=lambda run: run.end_step * run.train.rows_per_step)
        seeds = sorted({run.seed for run in spec.runs()})
        generate(spec.data, seeds, longest.train.rows_per_step, longest.end_step, cores())
        measure_peak()
    notes = spec.notes() + [f"source {name}: {leak}" for name, found in twice.items() for leak in leaks(found)]
    notes += streams["val"].scarce()
    for split, stream in streams.items():
        for index in (source.index for source in stream.sources if hasattr(source, "index")):
            if index.bad:
                reasons = ", ".join(f"{reason} {count}" for reason, count in index.bad.items())
                notes.append(f"source {index.name} ({split}): left out: {reasons}; first: {index.examples[0]}")
    return notes


def pin_data(out: Path, found: dict[str, dict[str, str]]) -> None:
    """Keep what the study's data was (split -> source -> digest) at its first session. Raises InputError if it changed.

    Every run checks what it trained on itself; runs that have not begun, and validation, are held to it by this.
    """
    place = out / DATA_LOCK
    if not place.exists():
        write_atomic(place, json.dumps(found, indent=1) + "\n")
        return
    try:
        pinned = json.loads(place.read_text())
        names = [(split, name) for split in pinned for name in {**pinned[split], **found.get(split, {})}]
    except (ValueError, TypeError):
        raise InputError(
            f"{place}: is damaged; it says what the study's files were when it began. Restore it; or, if you are sure "
            f"that they have not changed, delete it and it is written anew from the files there are now"
        ) from None
    changed = [
        f"{name} ({split})" for split, name in names if found.get(split, {}).get(name) != pinned[split].get(name)
    ]
    if changed:
        raise InputError(
            f"{out}: the files of {', '.join(changed)} are not those this study began with, and its runs must be "
            f"compared on the same data: put them back, or start a new study with another --out"
        )


def refuse_what_does_not_fit(spec: StudySpec, out: Path, jobs: int) -> None:
    """Raises InputError when memory or disk cannot hold the study."""
    from isofusion.study.estimate import fits

    if problems := fits(spec, out, jobs):
        raise InputError(f"{spec.name} does not fit this machine: " + "; ".join(problems))


def run_study(
    spec: StudySpec,
    out: Path,
    *,
    jobs: int,
    threads: int,
    resume: bool,
    make_progress: Callable[[dict[str, RunConfig], set[str]], Progress],
    command: str = "",
    train: str = TRAIN,
    get_ready: Callable[[StudySpec, Path], object] = prepare,
    before_start: Callable[[], None] = lambda: None,
) -> None:
    """Train every run of `spec` that is not DONE under `<out>/runs`; the caller has locked the study.

    `command` is shown as what to type to go on. Raises InputError (bad input, or unfinished and not `resume`),
    RunFailure (some runs failed, the others are done) or Interrupted.
    """
    from isofusion.study.ledger import Ledger

    configs = {run.name: run for run in spec.runs()}
    root = out / "runs"
    with only_one(out) as fd:
        done = {name for name in configs if is_done(root / name)}
        begun = [name for name in configs if (root / name).is_dir()]
        if begun and not resume and len(done) < len(configs):
            raise InputError(
                f"{out}: this study has {len(done)} of {len(configs)} runs finished; add --resume to go on, "
                f"or choose another --out"
            )
        ledger = Ledger(out)
        if len(done) < len(configs):
            get_ready(spec, out)
            before_start()
            record_session(out, jobs=jobs, threads=threads)
            pool = Pool(
                configs,
                root,
                out / "logs",
                jobs,
                threads,
                make_progress(configs, done),
                train=train,
                on_done=ledger.update,
                keep_open=fd,
            )
            pool.go()
            try:
                ledger.rebuild()
            finally:  # a full disk must not hide why the runs stopped; the index is rebuilt from the folders
                _verdict(pool, out, command)
        else:
            ledger.rebuild()


def _verdict(pool: Pool, out: Path, command: str) -> None:
    total, finished = len(pool.configs), sum(is_done(pool.root / name) for name in pool.configs)
    go_on = f"; go on with: {command}" if command else ""
    if pool.signum is not None:
        raise Interrupted(f"stopped with {finished} of {total} runs done, nothing is lost{go_on}", pool.signum)
    if not pool.failed:
        return
    causes = {name: cause for name, cause in pool.failed.items() if cause[0] != "blocked"} or pool.failed
    listed = "\n".join(f"  {name}: {message}" for name, (_, message) in list(causes.items())[:6])
    more = f"\n  and {len(causes) - 6} more" if len(causes) > 6 else ""
    text = f"{len(pool.failed)} of {total} runs did not finish ({finished} are done):\n{listed}{more}\n"
    text += f"details: {out / 'logs'}{go_on}"
    if all(kind == "input" for kind, _ in causes.values()):
        messages = {message for _, message in causes.values()}
        raise InputError(messages.pop() if len(messages) == 1 else text)
    raise RunFailure(text)
