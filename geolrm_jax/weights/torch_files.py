"""torch's checkpoints: where in the file each tensor lies, so that it can be read by itself."""

import dataclasses
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

TORCH_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
      code: its type, a key of STORED.
      shape: of the tensor.
      place: its first byte's position in the file, or what loads it where it is not one run of bytes there.
    """

    code: str
    shape: tuple[int, ...]
    place: int | Callable[[], np.ndarray]


def torch_entries(path: Path, *, whole: bool) -> dict[str, Entry]:
    """Entries of a torch checkpoint; `whole` for the old format, which cannot be mapped."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a torch checkpoint: reading it needs torch, pip install 'geolrm-jax[torch]'"
        ) from error

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
        start = None if whole else _start_of_mapping(path, list(_tensors(loaded)))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, it asks for more than tensors and plain values, or is damaged ({_reason(error)}); save "
            "the model's state_dict() alone, where the file comes from"
        ) from error
    except (
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        OSError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path}: a damaged or truncated torch checkpoint ({_reason(error)})") from error
    named = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    named = {k: t for k, t in named.items() if isinstance(t, torch.Tensor)} if isinstance(named, Mapping) else {}
    if not all(isinstance(name, str) for name in named):
        raise ValueError(f"{path}: its tensors have no names: the keys of its dict are no strings")
    if not named:
        raise ValueError(f"{path}: no dict of tensors in it, neither at the top nor under state_dict")
    return {name: _torch_entry(path, name, tensor, start) for name, tensor in named.items()}


def _reason(error: Exception) -> str:
    """The line of torch's long messages that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (telling or lines)[0].split(". ")[0]


def _tensors(tree: Any) -> Iterator[Any]:
    """All tensors of a loaded checkpoint, wherever they are."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
    elif hasattr(tree, "untyped_storage"):
        yield tree


def _start_of_mapping(path: Path, tensors: list[Any]) -> int | None:
    """The address at which torch has mapped the file's first byte, or None where it cannot be told.

    torch tells the addresses of the tensors and zip the positions of the records: they differ by the start, the one
    number that takes every address to a record.
    """
    with zipfile.ZipFile(path) as archive:
        records = [r for r in archive.infolist() if "/data/" in r.filename and r.file_size]
        order = [r.filename for r in archive.infolist() if r.filename.endswith("/byteorder")]
        if order and archive.read(order[0]).decode() != sys.byteorder:
            return None
    with path.open("rb") as file:
        positions = {_position(file, record) for record in records}
    addresses = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    if not addresses:
        return None
    starts = [min(addresses) - position for position in positions]
    fitting = [start for start in starts if all(address - start in positions for address in addresses)]
    return fitting[0] if len(fitting) == 1 else None


def _position(file: Any, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored (not compressed) record begin: behind its local header, whose length varies."""
    file.seek(record.header_offset + 26)
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return record.header_offset + 30 + name + extra


def _torch_entry(path: Path, name: str, tensor: Any, start: int | None) -> Entry:
    import torch

    code = TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None or tensor.layout is not torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else tensor.layout
        raise ValueError(f"{path}: {name} is of type {tensor.dtype}, {kind}; expected a plain tensor")
    if start is not None and tensor.numel() and tensor.is_contiguous() and not tensor.is_neg():
        return Entry(code, tuple(tensor.shape), tensor.data_ptr() - start)

    def load() -> np.ndarray:
        bits = tensor.detach().resolve_neg().contiguous()
        return (bits.view(torch.int16).numpy().view(np.uint16) if code == "BF16" else bits.numpy()).copy()

    return Entry(code, tuple(tensor.shape), load)
