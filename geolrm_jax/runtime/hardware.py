"""What devices can do at most, and what a process uses of its memory."""

import dataclasses
import resource
import sys

import jax

# Dense bfloat16 operations per second of one chip, by JAX's name of the kind: the first that the name begins with.
# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e ("peak compute per chip"). NVIDIA: the data sheets of H200,
# H100, GH200, A100 and B200 (bfloat16 tensor core, half of the number "with sparsity").
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one TPU chip has, in bytes and bytes per second.

    Attributes:
      flops: dense bfloat16 operations per second.
      hbm: memory.
      hbm_bandwidth: of the memory.
      ici: between chips, both ways and over all links together.
      dimensions: of the torus; every chip has two links along each.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    ici: float
    dimensions: int


# By the name that a topology begins with; cloud.google.com/tpu/docs/v5e, /v5p, /v6e ("key chip specifications").
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 400e9, 2),
    "v5p": Chip(459e12, 95e9, 2765e9, 1200e9, 3),
    "v6e": Chip(918e12, 32e9, 1638e9, 800e9, 2),
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of such a device, None if the table has none (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


def memory() -> dict[str, float]:
    """Peak bytes of this process: `host_memory`, resident, and `device_memory` of its fullest device, if devices tell.

    A CPU does not.
    """
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"host_memory": float(resident)} | ({} if None in told else {"device_memory": float(max(told))})
