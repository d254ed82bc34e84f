"""How many runs share a GPU: by memory and cores, never by a GPU that tests would need."""

from __future__ import annotations

import importlib.util
import os
import stat
import types
from pathlib import Path

import pytest

from isofusion.errors import InputError
from isofusion.study import gpu
from isofusion.study.gpu import CONTEXT_BYTES, gpu_split, run_bytes
from isofusion.study.spec import StudySpec

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ISOFUSION_MEMORY_GB", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "x")  # so that it is put back afterwards
        monkeypatch.delenv(name)


@pytest.fixture
def spec() -> StudySpec:
    return StudySpec.from_toml(STUDIES / "world-gpu.toml")


def test_memory_and_cores_bound_the_jobs(spec: StudySpec) -> None:
    needs = run_bytes(spec)
    assert needs == sorted(needs, reverse=True)
    assert gpu_split(spec, 140e9, 16, None, None) == (8, 2)
    assert float(os.environ["ISOFUSION_MEMORY_GB"]) == pytest.approx((0.9 * 140e9 / 8 - CONTEXT_BYTES) / 1e9, abs=0.01)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "2"
    three = sum(needs[:3]) / 0.9
    assert gpu_split(spec, three * 1.001, 16, None, None) == (3, 2)
    assert gpu_split(spec, three * 0.999, 16, None, None) == (2, 2)
    assert gpu_split(spec, 1e6, 16, None, None) == (1, 2)  # the run itself finds a micro-batch that fits, or says no
    assert gpu_split(spec, 140e9, 4, None, None) == (2, 2)
    assert gpu_split(spec, 140e9, 16, 12, 1) == (12, 1)  # what was asked for
    assert float(os.environ["ISOFUSION_MEMORY_GB"]) == pytest.approx(14.75, abs=0.01)  # set before: left alone
    with pytest.raises(InputError, match="12 jobs x 2 threads must be"):
        gpu_split(spec, 140e9, 16, 12, None)


def test_free_memory_is_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 141000\n")
    driver.chmod(driver.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    read = gpu.gpu_bytes.__wrapped__
    monkeypatch.setattr(gpu.Path, "exists", lambda self: True)
    assert read() == 141000 * 2**20
    monkeypatch.setenv("ISOFUSION_DEVICE", "cpu")
    assert read() is None
    monkeypatch.delenv("ISOFUSION_DEVICE")
    driver.write_text("#!/bin/sh\necho 'no devices were found'\n")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 5000\n")
    python.chmod(driver.stat().st_mode)
    monkeypatch.setattr(gpu.sys, "executable", str(python))
    assert read() == 5000  # no answer: torch is asked
    python.write_text("#!/bin/sh\nexit 1\n")
    assert read() is None


def test_the_gpu_study_is_a_ladder_of_three_arms(spec: StudySpec) -> None:
    assert len(spec.arms) == 3
    assert all(len(arm.sizes) >= 5 for arm in spec.arms)
    assert len(spec.budgets) >= 5
    heads = {size.model.head_dim for arm in spec.arms for size in arm.sizes}
    assert min(heads) >= 16  # FlexAttention's kernels take no smaller heads
    assert all(size.model.width % 8 == 0 for arm in spec.arms for size in arm.sizes)  # grouped products in bf16


def test_a_gpu_study_is_prepared_before_its_runs_start(spec: StudySpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the longest run, and the card's own rate, both while nothing else runs."""
    if importlib.util.find_spec("torch") is None:  # asked for by name only: importing it costs more than the test
        pytest.skip("training needs the [train] extra")
    from isofusion.study import run

    class Nothing:
        """A stream that costs nothing to open."""

        sources = ()
        tokenizer = types.SimpleNamespace(vocab_size=512)

        def __init__(self, *settings: object) -> None:
            pass

        def near_duplicates(self) -> dict:
            return {}

        def scarce(self) -> list:
            return []

    calls: list[tuple] = []
    monkeypatch.setattr("isofusion.data.stream.Stream", Nothing)
    monkeypatch.setattr("isofusion.study.gpu.gpu_bytes", lambda: 140e9)
    monkeypatch.setattr("isofusion.study.gpu.measure_peak", lambda: calls.append(("peak",)))
    monkeypatch.setattr("isofusion.data.generate.generate", lambda *arguments: calls.append(arguments))
    run.prepare(spec)
    (data, seeds, rows, steps, processes), last = calls
    assert (data, seeds, rows, processes) == (spec.data, [0], 32, run.cores())
    assert steps == 33554432 // (32 * 256)
    assert last == ("peak",)
