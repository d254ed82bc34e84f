"""Every data test has a cache of its own, and helpers that write small files, good and broken."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOFUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real corpus is not beside this checkout (../shared/data)")
    return SHARED


class Files:
    """Writers of test files."""

    @staticmethod
    def image(seed: int = 0, size: tuple[int, int] = (20, 12), fmt: str = "PNG", mode: str = "RGB") -> bytes:
        """A random smooth picture, `size` = (width, height)."""
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 256, (5, 6, len(mode)), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(small.squeeze(), mode=None).resize(size, Image.Resampling.BILINEAR).save(out, format=fmt)
        return out.getvalue()

    @staticmethod
    def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    @staticmethod
    def jsonl(path: Path, rows: list[object]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
        return path


@pytest.fixture
def files() -> Files:
    return Files()
