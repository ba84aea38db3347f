"""Files of named tensors, read one tensor at a time: safetensors, and torch's `.pth`, `.ckpt`, `.pt` and `.bin`.

Tensors are read with plain file reads at known positions. A memory map would do too, but its pages count as this
process's memory, and after one pass over a checkpoint the whole of it would.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from geolrm_jax.export.files import written_whole
from geolrm_jax.weights.torch_files import Entry, torch_entries

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
LONGEST_HEADER = 100_000_000  # safetensors' own limit
BLOCK = 1 << 20


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
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: expected a .safetensors file or a torch checkpoint")
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return TensorFile(path, torch_entries(path, whole=start[:1] == b"\x80"))
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
            numbers = (*shape, begin, end)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name} has no dtype, shape and data_offsets in the header") from error
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{path}: {name} has shape {list(shape)} at {[begin, end]}, expected natural numbers")
        if not isinstance(code, str) or code not in STORED:
            raise ValueError(f"{path}: {name} is of type {code}, expected one of {', '.join(STORED)}")
        if end - begin != math.prod(shape) * np.dtype(STORED[code]).itemsize:
            raise ValueError(f"{path}: {name} has {end - begin} bytes, which is not {shape} of {code}")
        if 8 + length + end > size:
            raise ValueError(f"{path}: truncated, {name} ends at byte {8 + length + end} of {size}")
        entries[name] = Entry(code, shape, 8 + length + begin)
    return entries


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
