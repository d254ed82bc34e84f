"""How the kernels in C++ come to be: which compiler, once, and what is said where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isofusion.errors import InputError
from isofusion.model import kernel_build, native

needs_native = pytest.mark.skipif(not native.available(), reason=f"kernels: {native.describe()}")


@pytest.mark.skipif(
    not kernel_build.compilers(), reason="no C++ compiler: PyTorch's operations run, which the other tests hold"
)
def test_where_there_is_a_compiler_the_kernels_are_there(tmp_path: Path) -> None:
    """Else every test of them would be skipped, and nobody would know."""
    library = native.load(tmp_path)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert hasattr(library, "has_products") == ("avx512_bf16" in flags)


def test_without_a_compiler_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(kernel_build.Unavailable, match=r"no C\+\+ compiler was found"):
        native.load(tmp_path)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "cxx"
    fake.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/bin-of-sh-alone")
        with pytest.raises(kernel_build.Unavailable, match="cxx failed: no such flag"):
            native.load(tmp_path / "kernels")
    assert not list((tmp_path / "kernels").glob("kernels-*.so"))


def test_a_compiler_that_hangs_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, calls = tmp_path / "cxx", tmp_path / "calls"
    fake.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho once >> {calls}\nexec sleep 60\n')
    fake.chmod(0o755)
    monkeypatch.setattr(kernel_build, "compilers", lambda: [str(fake)])
    monkeypatch.setattr(kernel_build, "TIMEOUT_S", 0.5)
    with pytest.raises(kernel_build.Unavailable, match=r"cxx did not end within 0.5 seconds$"):
        native.load(tmp_path / "kernels")
    with pytest.raises(
        kernel_build.Unavailable, match=r"did not end within 0.5 seconds \(delete .*\.slow to try again\)"
    ):
        native.load(tmp_path / "kernels")
    assert calls.read_text().splitlines() == ["once"]
    (slow,) = (tmp_path / "kernels").glob("*.slow")
    slow.unlink()
    with pytest.raises(kernel_build.Unavailable):
        native.load(tmp_path / "kernels")
    assert len(calls.read_text().splitlines()) == 2


@needs_native
def test_the_next_compiler_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_first(command: list[str]) -> None:
        tried.append(command[0])
        if len(tried) == 1:
            raise kernel_build.Unavailable("broken")
        Path(command[-1]).touch()

    tried: list[str] = []
    monkeypatch.setattr(kernel_build, "compilers", lambda: ["one", "two"])
    monkeypatch.setattr(kernel_build, "_compile", fails_first)
    assert kernel_build.build(tmp_path).exists()
    assert tried == ["one", "two"]


@needs_native
def test_a_library_is_compiled_once_and_again_for_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(kernel_build, "_compile", lambda command: made.append(command[-1]) or Path(command[-1]).touch())
    first = kernel_build.build(tmp_path)
    assert kernel_build.build(tmp_path) == first
    assert len(made) == 1
    monkeypatch.setattr(kernel_build, "_processor", lambda: "another")
    assert kernel_build.build(tmp_path) != first
    assert len(made) == 2


@needs_native
def test_a_library_that_a_power_cut_left_empty_is_compiled_again(tmp_path: Path) -> None:
    path = kernel_build.build(tmp_path)
    whole = path.stat().st_size
    path.write_bytes(b"")
    assert native.load(tmp_path)
    assert path.stat().st_size == whole


@pytest.mark.parametrize(
    ("asked", "path", "said"),
    [
        ("torch", True, "torch (ISOFUSION_KERNELS=torch)"),
        ("auto", False, "torch (no C++ compiler was found ($CXX, c++, g++, clang++))"),
        pytest.param("native", True, "native", marks=needs_native),
    ],
)
def test_which_kernels_run_is_chosen_and_said(asked: str, path: bool, said: str) -> None:
    assert _in_a_process(asked, path).stdout.strip() == said


def test_what_cannot_be_had_or_is_unknown_is_refused() -> None:
    for asked, path, said in (
        ("native", False, "ISOFUSION_KERNELS=native, but no C++ compiler was found"),
        ("fast", True, "ISOFUSION_KERNELS=fast: must be one of auto, torch, native"),
    ):
        done = _in_a_process(asked, path)
        assert done.returncode
        assert InputError.__name__ in done.stderr
        assert said in done.stderr


def _in_a_process(asked: str, path: bool) -> subprocess.CompletedProcess[str]:
    code = "from isofusion.model import native; print(native.describe())"
    environment = {**os.environ, "ISOFUSION_KERNELS": asked, **({} if path else {"PATH": "/nowhere", "CXX": ""})}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
