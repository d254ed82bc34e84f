"""A GPU that computes nothing: torch compiles for it, and every tensor on it has a shape and no contents.

`load()` starts the process again with a small library in front of CUDA's, `install()` replaces what would ask the
driver. Then, inside a FakeTensorMode, the code for device "cuda" runs as on an H200: torch.compile traces it, Inductor
generates its Triton kernels and Triton's own ptxas compiles them for sm_90; only their launches do nothing. A number
that the host would have to read from the device does not exist, so asking for one raises.

It reaches into torch (2.11 and 2.14 were tried): where a later one has moved something, it fails, and is never wrong.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor

LOADED = "ISOFUSION_STAND_IN"  # the library, in the environment of the process that has it
SHARED_MEMORY = 232448  # bytes that one block of an H200 may use
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150 << 30,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=SHARED_MEMORY,
    shared_memory_per_multiprocessor=SHARED_MEMORY + 1024,
    L2_cache_size=60 << 20,
    gcnArchName="",
    is_multi_gpu_board=0,
    is_integrated=0,
)


def missing() -> str | None:
    """What this machine lacks for it, in words."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA; another environment can have one (pip install torch)"
    if sys.platform != "linux":
        return "it needs Linux"
    try:
        distribution("triton")
    except PackageNotFoundError:
        return "Triton is not installed"
    return None if shutil.which("g++") else "there is no g++"


def load() -> None:
    """Start this process again with the library. Raises SystemExit where it cannot be had."""
    if LOADED in os.environ:
        return
    if reason := missing():
        raise SystemExit(f"{Path(sys.argv[0]).name}: {reason}")
    library = str(build(Path(tempfile.mkdtemp(prefix="isofusion-stand-in-"))))
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": library, LOADED: library})


def build(folder: Path) -> Path:
    """Under the name of the driver's library: who opens that gets this one."""
    out, source = folder / "libcuda.so.1", Path(__file__).with_suffix(".cpp")
    at = Path(torch.__file__).parent
    headers = distribution("triton").locate_file("triton/backends/nvidia/include")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{at / 'include'}", f"-I{headers}", str(source)]
    command += [f"-L{at / 'lib'}", "-lc10", f"-Wl,-rpath,{at / 'lib'}", f"-Wl,-soname,{out.name}", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{source.name} does not compile:\n{done.stderr[-2000:]}")
    return out


def install(on_kernel: Callable[[str, int], None], mode: fake_tensor.FakeTensorMode) -> None:
    """After `load`. `on_kernel`: called with the name and the shared memory, in bytes, of every compiled kernel."""
    ctypes.CDLL(os.environ[LOADED]).stand_in()
    shutil.rmtree(Path(os.environ[LOADED]).parent, ignore_errors=True)
    _runtime()
    _triton(on_kernel)
    _inductor(mode)


def _runtime() -> None:
    cuda: Any = torch.cuda
    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "get_device_properties": PROPERTIES,
        "_get_device_properties": PROPERTIES,  # for who took hold of the function above before
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": PROPERTIES.name,
        "synchronize": None,
        "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }.items():
        setattr(cuda, name, lambda *args, value=value, **named: value)
    cuda.device = cuda._DeviceGuard = cuda.Event = cuda.Stream = cuda.stream = cuda.current_stream = _Nothing
    for name in ("getCurrentRawStream", "getDevice", "exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", lambda *args: 0)
    accelerator: Any = torch.accelerator
    accelerator.is_available = lambda: False
    fake_tensor.init_gpu_context = lambda device: None


class _Nothing:
    """Whatever is done with it does nothing and returns it."""

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _Nothing]:
        return lambda *args, **named: self


def _triton(on_kernel: Callable[[str, int], None]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Utils:
        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            on_kernel(name, shared)
            return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

        def unload_module(self, module: int) -> None:
            pass

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    class Driver:
        utils = Utils()

        def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
            return lambda *args, **named: None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cuda

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    driver.set_active(Driver())


def _inductor(mode: fake_tensor.FakeTensorMode) -> None:
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    settings: Any = config
    settings.compile_threads = 1
    settings.use_static_cuda_launcher = False
    settings.fx_graph_cache = False
    settings.joint_graph_constant_folding = False  # computes small constants on the device
    others: Any = (fuse_attention, triton_helpers, triton_heuristics.CachingAutotuner)
    others[0]._sfdp_init = lambda *args: None  # patterns of hand-written attention: makes examples on the device
    others[1].set_driver_to_gpu = lambda *args: None
    others[2].benchmark_all_configs = lambda self, *args, **named: dict.fromkeys(self.launchers, 1.0)
    guards: Any = torch._C._dynamo.guards

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        with mode:
            return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    def view(x: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
        return torch.as_strided(x, size, stride, x.storage_offset() + offset)

    guards._empty_strided_cuda, guards._reinterpret_tensor = empty, view
