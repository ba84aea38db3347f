"""Files of named tensors, read one tensor at a time: safetensors, and torch's `.pth`, `.ckpt`, `.pt` and `.bin`.

Tensors are read with plain file reads at known positions. A memory map would do too, but its pages count as this
process's memory, and after one pass over a checkpoint the whole of it would.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geolrm_jax.export.files import written_whole

# Bytes on disk by safetensors' names; bfloat16, which NumPy lacks, is read as its 16 bits and then widened.
STORED = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
CODES = {np.dtype(kind): code for code, kind in STORED.items() if code != "BF16"}
READ_AS = {"F16": "<f4", "BF16": "<f4"}
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
LONGEST_HEADER = 100_000_000  # safetensors' own limit
BLOCK = 1 << 20


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


class TensorFile:
    """A read-only view of a file's tensors; nothing is read before it is asked for.

    Attributes:
      path: of the file.
      shapes: by name, in the file's order.
      dtypes: of what `read` returns: float16 and bfloat16 are widened to float32, the rest is as stored.
      widened: the names of those.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        self.path = path
        self._entries = dict(entries)
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.widened = tuple(name for name, entry in entries.items() if entry.code in READ_AS)
        self.dtypes = {name: np.dtype(READ_AS.get(e.code, STORED[e.code])) for name, e in entries.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor as an array of its own; float16 and bfloat16 as float32."""
        entry = self._entries[name]
        if not isinstance(entry.place, int):
            stored = entry.place()
        else:
            count = math.prod(entry.shape)
            stored = np.fromfile(self.path, STORED[entry.code], count, offset=entry.place)
            if stored.size != count:
                raise ValueError(f"{self.path}: truncated, {name} ends after {stored.size} of {count} values")
            stored = stored.reshape(entry.shape)
        if entry.code == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(self.dtypes[name], copy=False)

    @functools.cached_property
    def sha256(self) -> str:
        """Of the whole file, in hexadecimal."""
        return sha256_of(self.path)


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file in hexadecimal, read block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def open_tensors(path: Path | str) -> TensorFile:
    """Opens a safetensors file or a torch checkpoint; which of them is told by its content, not its name.

    A torch checkpoint is a dict of tensors, or has one under `state_dict`; whatever else is in it is left out. It is
    opened with `weights_only=True`: a pickle that needs more could run any code and is refused. Files in the format of
    torch before 1.6 cannot be read in parts and are held in memory whole.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is neither, truncated, or asks for more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a .safetensors file or a torch checkpoint")
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return TensorFile(path, _torch_entries(path, whole=start[:1] == b"\x80"))
    if start[8:] == b"{":
        return TensorFile(path, _safetensors_entries(path))
    raise ValueError(f"{path}: neither a .safetensors file nor a torch checkpoint")


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    """The header: eight bytes of length, then JSON with type, shape and byte range of each tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{path}: truncated, its header of {length} bytes is longer than the file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: its header is not JSON: {error}") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, tensor in header.items():
        try:
            code, shape, (begin, end) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name} has no dtype, shape and data_offsets in the header") from error
        if code not in STORED:
            raise ValueError(f"{path}: {name} is of type {code}, expected one of {', '.join(STORED)}")
        if end - begin != math.prod(shape) * np.dtype(STORED[code]).itemsize:
            raise ValueError(f"{path}: {name} has {end - begin} bytes, which is not {shape} of {code}")
        if begin < 0:
            raise ValueError(f"{path}: {name} lies before the data, at byte {begin}")
        if 8 + length + end > size:
            raise ValueError(f"{path}: truncated, {name} ends at byte {8 + length + end} of {size}")
        entries[name] = Entry(code, shape, 8 + length + begin)
    return entries


def _torch_entries(path: Path, *, whole: bool) -> dict[str, Entry]:
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
    except (RuntimeError, EOFError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: a damaged or truncated torch checkpoint ({_reason(error)})") from error
    named = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    named = {k: t for k, t in named.items() if isinstance(t, torch.Tensor)} if isinstance(named, Mapping) else {}
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
    if code is None or tensor.layout is not torch.strided:
        raise ValueError(f"{path}: {name} is of type {tensor.dtype}, {tensor.layout}; expected a plain tensor")
    if start is not None and tensor.numel() and tensor.is_contiguous():
        return Entry(code, tuple(tensor.shape), tensor.data_ptr() - start)

    def load() -> np.ndarray:
        bits = tensor.detach().contiguous()
        return (bits.view(torch.int16).numpy().view(np.uint16) if code == "BF16" else bits.numpy()).copy()

    return Entry(code, tuple(tensor.shape), load)


def write_tensors(
    path: Path | str,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file, one tensor after the other; it is there whole or not at all.

    Args:
      path: of the file; one that is there is replaced.
      shapes: by name, in the order of writing.
      dtypes: by name.
      read: the tensor of a name.

    Raises:
      ValueError: if a tensor read has another shape than the header says.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtypes[name]).itemsize
        header[name] = {"dtype": CODES[np.dtype(dtypes[name])], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            array = np.asarray(read(name), dtypes[name])
            if array.shape != tuple(shape):
                raise ValueError(f"{path}: {name} has shape {array.shape}, expected {tuple(shape)}")
            array.tofile(file)
