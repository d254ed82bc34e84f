"""The library of the C++ in kernels/: compiled once for this source, compiler and processor, kept in a folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from isofusion.data import cache
from isofusion.errors import RunFailure

SOURCE = Path(__file__).parent / "kernels" / "kernels.cpp"
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
THREADS = () if sys.platform == "darwin" else ("-fopenmp",)
"""On macOS a second OpenMP beside PyTorch's aborts the process: there the kernels use one thread."""
MACHINE = {
    "x86_64": ("-march=native", "-mprefer-vector-width=512"),
    "AMD64": ("-march=native", "-mprefer-vector-width=512"),
}
TIMEOUT_S = 120


class Unavailable(Exception):
    """Why there is no library; the text says what was tried."""


class TooSlow(Unavailable):
    """The compiler did not end in time."""


def compilers() -> list[str]:
    """C++ compilers to try, best first."""
    named = [os.environ.get("CXX") or "", "c++", "g++", "clang++"]
    return list(dict.fromkeys(found for name in named if name and (found := shutil.which(name))))


def build(folder: Path) -> Path:
    """The kernels, compiled into `folder` where that was not done for this source, compiler and processor.

    Raises Unavailable, with what every compiler said.
    """
    reasons = []
    for compiler in compilers():
        try:
            return _built(folder, compiler)
        except Unavailable as error:
            reasons.append(str(error))
    raise Unavailable("; ".join(reasons) or "no C++ compiler was found ($CXX, c++, g++, clang++)")


def _built(folder: Path, compiler: str) -> Path:
    command = [compiler, *FLAGS, *THREADS, *MACHINE.get(platform.machine(), ())]
    sources = [path.read_text() for path in sorted(SOURCE.parent.glob("*.[ch]*"))]
    facts = "\n".join((*sources, *command, _version(compiler), _processor()))
    path = folder / f"kernels-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    try:
        with cache.lock(path):  # the workers of a study start together: one compiles, the others wait
            if not path.exists():
                _compile_once(path, [*command, str(SOURCE)])
    except RunFailure as error:
        raise Unavailable(str(error)) from None
    return path


def _compile_once(path: Path, command: list[str]) -> None:
    """A compiler that hangs is waited for once, not by every process of a study: a file beside `path` remembers it."""
    slow = path.with_suffix(".slow")
    if slow.exists():
        raise Unavailable(f"{slow.read_text()} (delete {slow} to try again)")
    try:
        cache.write(path, lambda to: _compile([*command, "-o", str(to)]))
    except TooSlow as error:
        cache.write_bytes(slow, str(error).encode())
        raise


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error}") from None
    except subprocess.TimeoutExpired:
        raise TooSlow(f"{command[0]} did not end within {TIMEOUT_S:g} seconds") from None
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr.strip()[-400:]}")


def _version(command: str) -> str:
    try:
        return subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "cpu family", "model"))}))
