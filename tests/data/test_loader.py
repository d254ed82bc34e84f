"""Input workers change the waiting and nothing else."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="batches as tensors need the [train] extra")

from isofusion.config import DataConfig  # noqa: E402
from isofusion.data.batch import SLOT_VECTORS  # noqa: E402
from isofusion.data.loader import Loader, open_stream  # noqa: E402
from isofusion.errors import InputError, RunFailure  # noqa: E402

DATA = DataConfig(
    sources=[
        {"name": "c", "domain": "caption", "format": "world", "weight": 2},
        {"name": "i", "domain": "interleaved", "format": "world", "weight": 1},
    ],
    row_len=256,
    image_size=48,
    patch_size=8,
)
OPEN = partial(open_stream, DATA, 0, "train", 3)

MODULE = '''
"""A stream that workers can import."""
import os, time
from isofusion.errors import InputError

class Stream:
    def __init__(self, real, how):
        self.real, self.how = real(), how
    def batch(self, step):
        if step == 3:
            if self.how == "input":
                raise InputError("captions/a.tar: sample 7 was good when indexed, and is not now")
            if self.how == "bug":
                raise KeyError("seven")
            if self.how == "die":
                os._exit(9)
            if self.how == "slow":
                time.sleep(1)
        return self.real.batch(step)
'''


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of its own, and a module that the workers find."""
    root = tmp_path_factory.mktemp("loader")
    (root / "loader_streams.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOFUSION_CACHE", str(root / "cache"))
        patch.syspath_prepend(str(root))
        yield root


def broken(how: str) -> Any:
    import loader_streams

    return partial(loader_streams.Stream, OPEN, how)


def test_workers_give_the_batches_of_no_workers() -> None:
    stream = OPEN()
    with Loader(stream, 2, 9) as alone, Loader(None, 2, 9, workers=2, opener=OPEN, micro_rows=2) as many:
        for _ in range(2, 9):
            one, two = alone.next(), many.next()
            assert one.host.keys == two.host.keys
            for name in (*SLOT_VECTORS, "patches", "patch_slot"):
                np.testing.assert_array_equal(getattr(one.host, name), getattr(two.host, name))
            assert [part.rows for part in two.parts] == [2, 1]
            assert torch.equal(torch.cat([part.targets for part in two.parts]), one.parts[0].targets)
        for loader in (alone, many):
            assert loader.wait_s > 0
            with pytest.raises(StopIteration):
                loader.next()
        processes = [worker.process for worker in many.workers]
    for process in processes:
        with pytest.raises(ValueError, match="closed"):
            process.is_alive()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("input", InputError, "^captions/a.tar: sample 7 was good when indexed, and is not now$"),
        ("bug", RunFailure, "input worker failed at step 3: KeyError: 'seven'"),
        ("die", RunFailure, "input worker ended with exit code 9.*resume the run.*ISOFUSION_INPUT_WORKERS=0"),
    ],
)
def test_an_error_arrives_at_its_step_in_its_own_words(how: str, error: type[Exception], message: str) -> None:
    with Loader(None, 0, 6, workers=1, opener=broken(how)) as loader:
        for _ in range(3):
            loader.next()
        with pytest.raises(error, match=message):
            loader.next()


def test_a_killed_worker_is_told_of_and_leaving_early_leaves_nobody_behind() -> None:
    with Loader(None, 0, 99, workers=1, opener=broken("slow")) as loader:
        loader.next()
        worker = loader.workers[0].process
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        with pytest.raises(RunFailure, match="killed by signal 9"):
            [loader.next() for _ in range(9)]
    began = time.monotonic()
    with Loader(None, 2, 99, workers=1, opener=broken("slow")) as loader:
        loader.next()
        process = loader.workers[0].process
        pid = process.pid
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_import_no_torch(places: Path) -> None:
    import subprocess
    import sys

    code = "import sys, isofusion.data.loader, isofusion.data.stream; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_split_keeps_every_slot_and_patch() -> None:
    batch = OPEN().batch(0)
    parts = batch.split(1)
    assert [part.rows for part in parts] == [1, 1, 1]
    for name in (*SLOT_VECTORS, "patches"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(batch, name))
    for part in parts:
        np.testing.assert_array_equal(part.patch_slot, np.flatnonzero(part.modality))
    tensors = batch.torch()
    assert tensors.facts.real_slots == int((batch.doc_id >= 0).sum())
    assert sum(tensors.facts.targets) == len(tensors.target_slot) == int((batch.targets >= 0).sum())
    assert tensors.target_slot.tolist() == np.flatnonzero(batch.targets >= 0).tolist()
