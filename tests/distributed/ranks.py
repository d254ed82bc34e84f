"""The ranks of a list of jobs: `ranks.py JOBS.json N`. Not a test itself.

JOBS.json: [{"run": RunConfig, "root": folder of runs, "stop": [rank, calls] or null, "asynchronous", "replicas",
"env": variables of this job}, ...].
What torch needs is imported once, then the ranks are forked; whoever started this holds their store (MASTER_PORT).
Rank 0 writes JOBS.json.done, the status or error of each job; the ranks go from one to the next together.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import isofusion.evaluate.run
import isofusion.train.sharded  # noqa: F401
from isofusion.config import RunConfig
from isofusion.errors import InputError, RunFailure
from isofusion.train.loop import train_run
from isofusion.train.parallel import Parallel, connected


def work(job: dict[str, Any], parallel: Parallel) -> str:
    run, root = RunConfig.model_validate(job["run"]), Path(job["root"])
    if job["replicas"] > 1:
        shape = (job["replicas"], parallel.ranks // job["replicas"])
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard"))
        parallel = replace(parallel, replicas=job["replicas"], mesh=mesh)
    calls, told = 0, []

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return bool(job["stop"]) and job["stop"] == [parallel.rank, calls]

    os.environ |= job["env"]
    try:
        status = train_run(
            run, root / run.name, root, threads=1, stop=stop, on_event=told.append, parallel=parallel,
            asynchronous=job["asynchronous"],
        )  # fmt: skip
    except (InputError, RunFailure) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for name in job["env"]:
            del os.environ[name]
    assert bool(told) == parallel.first
    return status


def rank_of(path: Path) -> None:
    with connected("cpu", timeout_s=60) as parallel:
        said = [parallel.exchange(work(job, parallel)) for job in json.loads(path.read_text())]
    if parallel.first:
        path.with_suffix(".done").write_text(json.dumps(said))


def main(path: Path, ranks: int) -> int:
    """The number of ranks that failed."""
    torch.use_deterministic_algorithms(True)  # imports for seconds: once, before the ranks are forked
    for rank in range(ranks):
        if os.fork() == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            try:
                rank_of(path)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    return sum(os.wait()[1] != 0 for _ in range(ranks))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
