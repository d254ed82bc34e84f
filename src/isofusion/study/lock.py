"""`study.lock`: what was decided before training (docs/study-file.md).

The lock holds the whole resolved study, the hold-out, metric and exclusions with their own digest, the digest of every
run, the package versions and the thread budget. A study whose definition differs from its lock does not run; whatever
else changed later (an edited lock, other versions, another thread count) is listed by `later_changes` for the report.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

from isofusion.errors import InputError, explain
from isofusion.study.jobs import append, now, read_lines
from isofusion.study.spec import METRIC, REMARKS, StudySpec, vocab_size

LOCK = "study.lock"
SHAPE = {"spec": dict, "digest": str, "runs": dict, "threads": int, "versions": dict, "locked_at": str}
SESSIONS = "sessions.jsonl"
PACKAGES = ("isofusion", "torch", "numpy", "scipy", "pydantic", "tokenizers", "pillow", "pyarrow")


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on, read from package metadata (nothing is imported)."""
    from isofusion import __version__

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = __version__ if package == "isofusion" else None
    return found


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def definition(spec: StudySpec) -> dict[str, Any]:
    """The study without its remarks: what the lock protects."""
    return {key: value for key, value in spec.model_dump(mode="json").items() if key not in REMARKS}


def analysis(spec: StudySpec) -> dict[str, Any]:
    """What the fit will look at, decided before the numbers exist."""
    return {"holdout": spec.holdout, "compute": spec.compute, "exclude": sorted(spec.exclude), "metric": METRIC}


def write_lock(
    out: Path,
    spec: StudySpec,
    *,
    toml: Path | None,
    jobs: int,
    threads: int,
    data: Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Write `<out>/study.lock` atomically and return it; an existing lock must agree (see `check_lock`).

    `data` and `overrides`: what the command line added to the file, for `StudySpec.from_toml` to read it so again.
    """
    if (out / LOCK).exists():
        return check_lock(out, spec)
    lock = {
        "format": 1,
        "locked_at": now(),
        "toml": str(toml) if toml else None,
        "data": str(data) if data else None,
        "cwd": os.getcwd(),
        "overrides": list(overrides),
        "spec": spec.model_dump(mode="json"),
        "digest": _digest(definition(spec)),
        "analysis": analysis(spec),
        "analysis_digest": _digest(analysis(spec)),
        "runs": {run.name: run.digest() for run in spec.runs()},
        "versions": versions(),
        "jobs": jobs,
        "threads": threads,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / LOCK, json.dumps(lock, indent=1) + "\n")
    return lock


def read_lock(out: Path) -> dict[str, Any]:
    """The lock of a study folder. Raises InputError where there is none or it cannot be read."""
    path = out / LOCK
    try:
        lock = json.loads(path.read_text())
        shapes: list[tuple[Any, Any]] = [(lock[key], kind) for key, kind in SHAPE.items()]
        shapes += [(lock["spec"]["data"], dict), (lock.get("overrides", []), list)]
        shapes += [(lock.get(key), (str, NoneType)) for key in ("toml", "data", "cwd")]
        if not all(isinstance(value, kind) for value, kind in shapes):
            raise TypeError
    except FileNotFoundError:
        raise InputError(f"{out}: not a study folder (no {LOCK}); run `isofusion study run` or `study lock`") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: is damaged; restore it, or start again with another --out") from None
    return lock


def given_folder(lock: dict[str, Any]) -> Path | None:
    """--data of the command that wrote the lock; None where the study's file itself named the folder, or none."""
    folder = lock["data"] if "data" in lock else lock["spec"]["data"].get("folder")  # older locks do not tell
    return Path(folder) if folder else None


def locked_spec(out: Path) -> StudySpec:
    """The study as it was locked."""
    from pydantic import ValidationError

    try:
        return StudySpec.stored(read_lock(out)["spec"])
    except ValidationError as error:
        raise InputError(
            f"{out / LOCK}: {explain(error)}: it was written by another version of isofusion, or edited; use that "
            f"version, restore the file, or start again with another --out (finished runs stay in {out / 'runs'})"
        ) from None


def refused_since(out: Path) -> str:
    """What to do about a study that was locked before this version began to refuse it; empty for any other."""
    from pydantic import ValidationError

    try:
        spec = locked_spec(out)
    except (InputError, OSError):
        return ""
    try:
        StudySpec.model_validate(spec.model_dump())
    except ValidationError as error:
        return (
            f"; {out / LOCK} is of an earlier version that allowed what this one refuses ({explain(error)}): its "
            f"finished runs can be reported (isofusion study report {out}); to train more, change that and give "
            f"another --out"
        )
    return ""


def spelled_as_locked(lock: dict[str, Any], spec: StudySpec) -> StudySpec:
    """`spec` with the lock's spelling of its data folder, which the digests hold, where both are the same folder."""
    locked, now = lock["spec"]["data"].get("folder"), spec.data.folder
    if locked == now or not _same_folder(Path(locked or "."), Path(now or ".")):
        return spec
    return spec.model_copy(update={"data": spec.data.model_copy(update={"folder": locked})})


def _same_folder(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    try:
        return one.samefile(other)
    except OSError:  # one of them is not here
        return False


def check_lock(out: Path, spec: StudySpec) -> dict[str, Any]:
    """Return the lock if the study is still the locked one; else InputError that lists every changed field."""
    lock = read_lock(out)
    if changed := differences(_completed(lock["spec"]), spec.model_dump(mode="json")):
        words = spec.data.tokenizer
        if words == lock["spec"]["data"]["tokenizer"] and any(_unknown(spec, line) for line in changed):
            raise InputError(
                f"the tokenizer {words} is not here, and the study in {out / LOCK} was locked with it: put it back, or "
                f"run the command where it is; nothing was touched"
            )
        listed = "\n".join(f"  {line}" for line in changed[:12])
        more = f"\n  and {len(changed) - 12} more" if len(changed) > 12 else ""
        folder, place = lock["spec"]["data"].get("folder"), lock.get("cwd")  # older locks do not tell
        same = place and _same_folder(Path(place, folder or "."), Path(spec.data.folder or "."))
        if same and folder != spec.data.folder:
            more += f"\n  (the same folder, named from {place} when the study was locked: run the command there)"
        raise InputError(
            f"the study differs from the one locked in {out / LOCK} ({lock['locked_at']}):\n{listed}{more}\n"
            f"take the change back to go on, or start a new study with another --out; nothing was touched"
        )
    runs = {run.name: run.digest() for run in spec.runs()}
    if runs != lock["runs"]:
        names = sorted(name for name in runs.keys() | lock["runs"].keys() if runs.get(name) != lock["runs"].get(name))
        raise InputError(
            f"{out / LOCK}: {len(names)} runs would differ from the locked ones (first: {names[0]}): it was edited, or "
            f"written by another version of isofusion; restore it, or start a new study with another --out"
        )
    return lock


def _completed(spec: dict[str, Any]) -> dict[str, Any]:
    """A locked study with the defaults of settings that are younger than its lock, where it can be read."""
    from pydantic import ValidationError

    try:
        return StudySpec.stored(spec).model_dump(mode="json")
    except ValidationError:
        return spec


def _unknown(spec: StudySpec, line: str) -> bool:
    """Whether a difference is the size of a vocabulary that only a tokenizer which is not here could tell."""
    return ".vocab_size: " in line and vocab_size(spec.data.tokenizer, spec.data.folder) is None


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every field that differs, remarks apart; arms and sizes are matched by name."""
    before, after = (_flat({k: v for k, v in tree.items() if k not in REMARKS}) for tree in (old, new))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            lines.append(f"{key}: {before[key]!r} -> removed")
        elif key not in before:
            lines.append(f"{key}: added, {after[key]!r}")
        elif before[key] != after[key]:
            lines.append(f"{key}: {before[key]!r} -> {after[key]!r}")
    return lines


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, list) and tree and all(isinstance(item, dict) and "name" in item for item in tree):
        tree = {item["name"]: {k: v for k, v in item.items() if k != "name"} for item in tree}
    if isinstance(tree, dict) and tree:
        return {
            key: value
            for part, child in tree.items()
            for key, value in _flat(child, f"{prefix}.{part}" if prefix else str(part)).items()
        }
    return {prefix: tree}


def record_session(out: Path, *, jobs: int, threads: int) -> None:
    """Append what this `study run` runs with; `later_changes` compares it with the lock."""
    line = {"started_at": now(), "pid": os.getpid(), "jobs": jobs, "threads": threads, "versions": versions()}
    append(out / SESSIONS, line)


def later_changes(out: Path) -> list[str]:
    """Everything that changed after the lock, one sentence each; empty when nothing did. For the report."""
    lock, found = read_lock(out), []
    spec = {key: value for key, value in lock["spec"].items() if key not in REMARKS}
    if _digest(spec) != lock["digest"] or _digest(lock.get("analysis")) != lock.get("analysis_digest"):
        found.append(f"{LOCK} was edited by hand after it was written")
    for name, digest in lock["runs"].items():
        try:
            trained = json.loads((out / "runs" / name / "run.json").read_text())["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if trained != digest:
            found.append(f"run {name} was trained with another configuration than the locked one")
    for session in read_lines(out / SESSIONS):
        if not {"started_at", "threads", "versions"} <= session.keys():
            continue
        when = session["started_at"]
        if session["threads"] != lock["threads"]:
            found.append(f"from {when}: {session['threads']} threads per run instead of {lock['threads']}")
        for package, version in session["versions"].items():
            if version != lock["versions"].get(package):
                found.append(f"from {when}: {package} {version} instead of {lock['versions'].get(package)}")
    toml = lock.get("toml")
    if toml and Path(toml).is_file():
        try:
            data = given_folder(lock)
            there = data if data and data.is_dir() else None  # a report may be made where the data is not
            read = StudySpec.from_toml(toml, data=there, overrides=lock.get("overrides", ()))
        except InputError as error:
            found.append(f"the study's file no longer reads: {error}")
        else:
            now = spelled_as_locked(lock, read).model_dump(mode="json")
            found += [
                f"{toml} was edited after the lock (the results are of the locked study): {line}"
                for line in differences(_completed(lock["spec"]), now)
                if not (data and line.startswith("data.folder:"))  # given by --data, not by the file
                and not _unknown(read, line)
            ]
    return list(dict.fromkeys(found))


def write_atomic(path: Path, text: str) -> None:
    """Write through a temporary file, fsync and rename, so that a reader never sees half a file."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with tmp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:  # a write to a full disk does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        tmp.unlink(missing_ok=True)
