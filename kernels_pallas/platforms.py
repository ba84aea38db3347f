"""What the operations share of their choice of an implementation: which device can run which kernel."""

import functools
import re
import warnings
from typing import Any

OLDEST_GPU = 8.0  # compute capability from which Triton works, and cuDNN's flash attention


def obstacle_of_gpu(device: Any) -> str:
    """Why kernels for NVIDIA GPUs cannot run on this device; empty if they can."""
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not re.fullmatch(r"\d+\.\d+", capability):
        return f"it needs an NVIDIA GPU, and this is {device.device_kind!r}"
    if float(capability) < OLDEST_GPU:
        return f"it needs compute capability {OLDEST_GPU}, and {device.device_kind!r} has {capability}"
    return ""


def obstacle_of_tpu(device: Any) -> str:
    """Why kernels for TPUs cannot run on this device; empty if they can."""
    return "" if device.platform == "tpu" else f"it needs a TPU, and this is {device.device_kind!r}"


@functools.cache
def warn_once(message: str) -> None:
    """Warns, and never again of the same."""
    warnings.warn(message, stacklevel=2)
