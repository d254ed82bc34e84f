"""Accelerators by name: peak dense bf16 FLOP/s, and accelerator-hours to training FLOPs.

Peaks are the makers' own figures *without* structured sparsity (data sheets often print twice that). Each carries the
source it was checked against. What a run really reaches is peak times MFU, the model FLOPs utilisation.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from isofusion.errors import InputError


@dataclass(frozen=True)
class Accelerator:
    """One device: peak dense bf16 FLOP/s and where the number stands."""

    name: str
    peak: float
    what: str
    source: str

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


_NVIDIA = "data sheet, dense (half the printed figure with sparsity); as in torchtitan's table of peaks"
_GOOGLE = "Google Cloud TPU documentation, peak compute per chip (bf16)"

ACCELERATORS: dict[str, Accelerator] = {
    a.name: a
    for a in (
        Accelerator("a100", 312e12, "NVIDIA A100 (SXM or PCIe)", "NVIDIA A100 data sheet; as in torchtitan"),
        Accelerator("h100", 989e12, "NVIDIA H100 SXM", f"NVIDIA H100 {_NVIDIA}"),
        Accelerator("h100-nvl", 835e12, "NVIDIA H100 NVL", f"NVIDIA H100 {_NVIDIA}"),
        Accelerator("h100-pcie", 756e12, "NVIDIA H100 PCIe", f"NVIDIA H100 {_NVIDIA}"),
        Accelerator("h200", 989e12, "NVIDIA H200 SXM", f"NVIDIA H200 {_NVIDIA}"),
        Accelerator("b200", 2250e12, "NVIDIA B200 (HGX, 1,000 W)", f"NVIDIA Blackwell {_NVIDIA}"),
        Accelerator("l40s", 362e12, "NVIDIA L40S", f"NVIDIA L40S {_NVIDIA}"),
        Accelerator("mi250x", 383e12, "AMD MI250X (both dies)", "AMD MI250X page; torchtitan has half of it per die"),
        Accelerator("mi300x", 1307.4e12, "AMD MI300X", "AMD MI300X data sheet, bf16 dense; torchtitan rounds to 1,300"),
        Accelerator("mi325x", 1307.4e12, "AMD MI325X", "AMD MI325X data sheet, bf16 dense; torchtitan rounds to 1,300"),
        Accelerator("tpu-v4", 275e12, "Google TPU v4, one chip", _GOOGLE),
        Accelerator("tpu-v5e", 197e12, "Google TPU v5e, one chip", _GOOGLE),
        Accelerator("tpu-v5p", 459e12, "Google TPU v5p, one chip", _GOOGLE),
        Accelerator("tpu-v6e", 918e12, "Google TPU v6e (Trillium), one chip", _GOOGLE),
    )
}


def accelerator(name: str) -> Accelerator:
    """The device of this name ("H100", "tpu v5p", ...). Raises InputError with the names there are."""
    key = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-").removeprefix("amd-")
    key = key.removeprefix("google-").removesuffix("-sxm")
    key = f"tpu-{key}" if f"tpu-{key}" in ACCELERATORS else key
    if key in ACCELERATORS:
        return ACCELERATORS[key]
    close = difflib.get_close_matches(key, ACCELERATORS, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise InputError(
        f"--gpu {name}: not a device whose peak is known here.{hint} Known: {', '.join(ACCELERATORS)}; "
        "or give the FLOPs yourself with --compute"
    )


def training_flops(hours: float, device: Accelerator, mfu: float) -> float:
    """FLOPs of `hours` device-hours at a model FLOPs utilisation `mfu` in (0, 1]: hours * 3600 * peak * mfu."""
    if not hours > 0:
        raise InputError(f"--gpu-hours {hours:g}: give a positive number of device-hours")
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu:g}: give the share of the peak that is reached, above 0 and at most 1, e.g. 0.4")
    return hours * 3600.0 * device.peak * mfu
