"""SQLite index over the run folders of a study. The folders are the truth: deleting the index loses nothing.

`results` is the table every fit and report starts from: one row per finished branch, the whole cost (trunk up to the
fork + cool-down) counted. Tuning runs and excluded runs are rows too, but only where they are asked for. `jobs` holds
the SLURM jobs of a study that was submitted, as of the last `study status`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sqlite3
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from isofusion.config import ModelConfig, RunConfig
from isofusion.data.sample import DOMAINS
from isofusion.errors import InputError, RunFailure

INDEX = "ledger.sqlite"
COUNTS = ("n_encoder", "n_decoder", "n_total", "n_active", "n_nonembedding")
COLUMNS = (
    *("run", "arm", "fusion", "n_experts", "size", "seed", "parent", "width", "depth"),
    *COUNTS,
    *("n", "tokens", "text_tokens", "image_tokens", "flops", "flops_6nd"),
    *(f"loss_{name}" for name in (*DOMAINS, "mean")),
    *(f"{kind}_{name}" for kind in ("oracle", "bound", "blind", "shuffled") for name in DOMAINS),
    *("wall_s", "tokens_per_s", "steps", "eval_path", "budget", "lr", "routing", "top_k", "variant", "excluded"),
)
"""Columns of results.csv, in this order. Tokens, nats per target token, FLOPs, seconds."""

JOB_COLUMNS = ("run", "job_id", "state", "message", "submitted_at", "after", "starts", "node", "log")
"""Columns of `jobs`: the newest job of each submitted run."""
STATE_COLUMNS = ("run", "kind", "arm", "size", "seed", "variant", "parent", "start_step", "end_step", "digest")


def _json(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def read_config(folder: Path) -> RunConfig | None:
    """The configuration of a run folder, from its run.json; None where there is none or it is torn."""
    tree = _json(folder / "run.json")
    if tree is None:
        return None
    try:
        return RunConfig.stored(tree.get("config", tree))
    except ValueError:
        return None


@cache
def _parameters(model: str) -> dict[str, int]:
    from isofusion.model.count import count_parameters

    counted = count_parameters(ModelConfig.model_validate_json(model))
    return {name: int(getattr(counted, name)) for name in COUNTS}


def seconds(folder: Path, last_step: int | None = None) -> float:
    """Training seconds of a run folder's own steps, up to `last_step`, from metrics.jsonl."""
    total = 0.0
    try:
        with (folder / "metrics.jsonl").open() as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if last_step is not None and record["step"] > last_step:
                    break
                total += record.get("wall") or 0.0
    except OSError:
        return 0.0
    return total


def result_row(out: Path, config: RunConfig, excluded: bool = False) -> dict[str, Any] | None:
    """One row of `results` for a finished branch; None for a trunk or a run that is not DONE."""
    folder = out / "runs" / config.name
    evaluation = _json(folder / "eval.json")
    if config.kind != "branch" or not (folder / "DONE").exists() or evaluation is None:
        return None
    counts = _parameters(config.model.model_dump_json())
    wall = seconds(folder) + (seconds(out / "runs" / config.parent, config.start_step) if config.parent else 0.0)
    row: dict[str, Any] = {
        "run": config.name,
        "arm": config.arm,
        "fusion": config.model.fusion,
        "n_experts": config.model.n_experts,
        "size": config.size,
        "seed": config.seed,
        "parent": config.parent,
        "width": config.model.width,
        "depth": config.model.depth,
        **counts,
        "n": counts["n_active" if config.model.n_experts else "n_total"],
        **{key: evaluation.get(key) for key in ("tokens", "text_tokens", "image_tokens", "flops", "flops_6nd")},
        "loss_mean": evaluation.get("mean"),
        "wall_s": round(wall, 3),
        "tokens_per_s": round(evaluation["tokens"] / wall, 1) if wall > 0 else None,
        "steps": config.end_step,
        "eval_path": f"runs/{config.name}/eval.json",
        "budget": config.budget_tokens,
        "lr": config.train.lr,
        "routing": config.model.routing if config.model.n_experts else None,
        "top_k": config.model.top_k if config.model.n_experts else None,
        "variant": config.variant,
        "excluded": int(excluded),
    }
    for domain in DOMAINS:
        measured = evaluation.get("domains", {}).get(domain) or {}
        for kind in ("loss", "oracle", "bound", "blind", "shuffled"):
            row[f"{kind}_{domain}"] = measured.get(kind)
    return {column: row[column] for column in COLUMNS}


def unread(out: Path) -> list[str]:
    """Finished runs that have no row although they should: their run.json or eval.json cannot be read."""
    found = []
    for folder in sorted((out / "runs").glob("*/")):
        config = read_config(folder)
        whole = config is not None and (config.kind == "trunk" or _json(folder / "eval.json") is not None)
        if (folder / "DONE").exists() and not whole:
            found.append(folder.name)
    return found


def state_of(folder: Path) -> str:
    """done | failed | unfinished (has a checkpoint or metrics) | waiting, from the files of a run folder."""
    if (folder / "DONE").exists():
        return "done"
    if (folder / "failure.json").exists():
        return "failed"
    return "unfinished" if (folder / "run.json").exists() else "waiting"


def progress_of(folder: Path) -> tuple[int | None, float | None]:
    """(last step, its training loss) of a run folder, read from the end of metrics.jsonl."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            lines = file.read().splitlines()
    except OSError:
        return None, None
    for line in reversed(lines):
        try:
            record = json.loads(line)
            return int(record["step"]), record.get("loss")
        except (ValueError, KeyError, TypeError):
            continue
    return None, None


class Ledger:
    """The index of one study folder."""

    def __init__(self, out: Path) -> None:
        self.out = Path(out)
        self.path = self.out / INDEX

    def _excluded(self) -> set[str]:
        lock = _json(self.out / "study.lock") or {}
        return set(lock.get("spec", {}).get("exclude", ()))

    def _connect(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            columns = ", ".join(f'"{name}"' for name in STATE_COLUMNS)
            connection.execute(f"CREATE TABLE IF NOT EXISTS runs ({columns}, config TEXT, PRIMARY KEY (run))")
            columns = ", ".join(f'"{name}"' for name in COLUMNS)
            connection.execute(f"CREATE TABLE IF NOT EXISTS results ({columns}, PRIMARY KEY (run))")
            columns = ", ".join(f'"{name}"' for name in JOB_COLUMNS)
            connection.execute(f"CREATE TABLE IF NOT EXISTS jobs ({columns}, PRIMARY KEY (run))")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _write(self, connection: sqlite3.Connection, folder: Path, excluded: set[str]) -> None:
        config = read_config(folder)
        if config is None:
            return
        state = {**config.model_dump(include=set(STATE_COLUMNS)), "run": config.name, "digest": config.digest()}
        values = [state[name] for name in STATE_COLUMNS] + [config.canonical_json()]
        connection.execute(f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * len(values))})", values)
        row = result_row(self.out, config, config.name in excluded)
        if row is not None:
            values = [row[name] for name in COLUMNS]
            connection.execute(f"INSERT OR REPLACE INTO results VALUES ({', '.join('?' * len(values))})", values)

    def update(self, run: str) -> None:
        """Index one finished run. The index is a convenience: if it is broken it is rebuilt, if that fails, later."""
        try:
            with contextlib.closing(self._connect(self.path)) as connection:
                self._write(connection, self.out / "runs" / run, self._excluded())
        except sqlite3.Error:
            with contextlib.suppress(RunFailure):  # a full disk: the study ends with a rebuild, or says why not
                self.rebuild()

    def rebuild(self) -> None:
        """Write the index and results.csv anew from the run folders, atomically. Raises RunFailure (full disk)."""
        tmp = self.out / f"{INDEX}.{os.getpid()}.tmp"
        try:
            tmp.unlink(missing_ok=True)
            with contextlib.closing(self._connect(tmp)) as connection:
                excluded = self._excluded()
                connection.execute("BEGIN")
                for folder in sorted((self.out / "runs").glob("*/")):
                    self._write(connection, folder, excluded)
                connection.execute("COMMIT")
            os.replace(tmp, self.path)
            write_csv(self.out / "results.csv", self.rows())
        except (sqlite3.Error, OSError) as error:
            raise RunFailure(
                f"{self.out}: cannot write {INDEX} and results.csv ({error}); the run folders are untouched; free some "
                f"space, or copy the folder to where it can be written, and do this again (a study: with --resume)"
            ) from error
        finally:
            for path in (tmp, tmp.with_name(f"{tmp.name}-journal")):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def write_jobs(self, rows: Iterable[dict[str, Any]]) -> None:
        """Put the states of jobs (JOB_COLUMNS) in place of those that were there; a ledger that cannot be written stays
        as it is. Only a login node does this: SQLite on a shared disk is not for many nodes at once.
        """
        if not self.path.exists():  # a ledger that is there is taken to hold the results
            with contextlib.suppress(RunFailure):
                self.rebuild()
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._connect(self.path)) as connection:
            connection.execute("BEGIN")
            connection.execute("DELETE FROM jobs")
            values = [[row[name] for name in JOB_COLUMNS] for row in rows]
            connection.executemany(f"INSERT INTO jobs VALUES ({', '.join('?' * len(JOB_COLUMNS))})", values)
            connection.execute("COMMIT")

    def rows(self, *, all_runs: bool = False) -> list[dict[str, Any]]:
        """Rows of `results`, sorted by arm, n, seed, tokens; without tuning and excluded runs unless `all_runs`."""
        if not self.path.exists():
            self.rebuild()
        where = "" if all_runs else "WHERE variant = '' AND excluded = 0"
        connection = sqlite3.connect(self.path)
        try:
            found = connection.execute(f"SELECT * FROM results {where} ORDER BY arm, n, size, seed, variant, tokens")
            return [dict(zip(COLUMNS, values, strict=True)) for values in found]
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: {error}; rebuild it with `isofusion study status --rebuild`") from None
        finally:
            connection.close()


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """results.csv: the columns of COLUMNS in order, an empty cell for what is not known."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with tmp.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def results(out: Path, *, all_runs: bool = False) -> list[dict[str, Any]]:
    """One dict per finished branch of the study in `out` (columns: COLUMNS), rebuilt from the run folders.

    `all_runs` adds tuning runs (`variant` not empty) and excluded runs (`excluded` = 1). Raises InputError when `out`
    holds no runs.
    """
    out = Path(out)
    if not (out / "runs").is_dir():
        if (out / "study.lock").exists():
            raise InputError(f"{out}: the study is locked and none of its runs has started; `isofusion study run` it")
        raise InputError(f"{out}: no runs here; a study folder holds runs/, study.lock and results.csv")
    ledger = Ledger(out)
    ledger.rebuild()
    return ledger.rows(all_runs=all_runs)
