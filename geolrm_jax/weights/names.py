"""Name maps as data: rows that say what a parameter is called there and here, and how its axes lie.

A row is `(their module, our module, kind)`, the kind naming the tensors of such a module; or, for a tensor that stands
alone, `(their key, our path, layout)`. `{n}` in their name is the number of a layer: ours are stacked, with a leading
layer axis. Both directions, import and export, come from the one table.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from flax import traverse_util


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the axes of a tensor lie, there and here."""

    axes: str
    """An einops pattern, theirs first."""
    flipped: bool = False
    """Height and width run the other way here."""

    def here(self, x: np.ndarray) -> np.ndarray:
        """Theirs as ours."""
        x = rearrange(x, self.axes)
        return x[::-1, ::-1] if self.flipped else x

    def there(self, x: np.ndarray) -> np.ndarray:
        """Ours as theirs."""
        here, there = reversed(self.axes.split("->"))
        return rearrange(x[::-1, ::-1] if self.flipped else x, f"{here}->{there}")

    def there_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of theirs, by that of ours."""
        return self.there(np.broadcast_to(np.float32(0), shape)).shape


SAME = Layout("... -> ...")
ONE_LEADING = Layout("1 ... -> ...")
TWO_LEADING = Layout("1 1 ... -> ...")
MATRIX = Layout("o i -> i o")
CONVOLUTION = Layout("o i h w -> h w i o")
# torch defines it as the gradient of a convolution, which reads the kernel from its far end.
TRANSPOSED_CONVOLUTION = Layout("i o h w -> h w i o", flipped=True)

Kind = Mapping[str, tuple[str, Layout]]  # their tensor: (our tensor, layout)
LINEAR: Kind = {"weight": ("kernel", MATRIX), "bias": ("bias", SAME)}
CONV: Kind = {"weight": ("kernel", CONVOLUTION), "bias": ("bias", SAME)}
CONV_TRANSPOSED: Kind = {"weight": ("kernel", TRANSPOSED_CONVOLUTION), "bias": ("bias", SAME)}
NORM: Kind = {"weight": ("scale", SAME), "bias": ("bias", SAME)}
BATCH_NORM: Kind = NORM | {
    "running_mean": ("mean", SAME),
    "running_var": ("var", SAME),
    "num_batches_tracked": ("count", SAME),
}

LAYER = re.compile(r"(.*?\b(?:layer|layers|blocks)\.)(\d+)(\..*)")

Row = tuple[str, str, Kind | Layout]
Tree = Mapping[str, Any]


def under(theirs: str, ours: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of a part, put under the names it has in a whole."""
    return tuple((f"{theirs}.{there}", f"{ours}.{here}", kind) for there, here, kind in rows)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays, and where it comes from.

    Attributes:
      collection: "params" or "batch_stats".
      path: below the collection, with points.
      shape: of ours, with the layer axis where there is one.
      dtype: of ours.
      keys: theirs; one for each layer where ours is stacked.
      layout: of one layer.
      stacked: whether ours has a layer axis.
    """

    collection: str
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    keys: tuple[str, ...]
    layout: Layout
    stacked: bool

    @property
    def there_shape(self) -> tuple[int, ...]:
        """The shape of each of their tensors."""
        return self.layout.there_shape(self.shape[1:] if self.stacked else self.shape)

    def load(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Our array, read one of their tensors at a time."""
        ours = np.empty(self.shape, self.dtype)
        layers = ours if self.stacked else ours[None]
        for n, key in enumerate(self.keys):
            layers[n] = self.layout.here(read(key))
        return ours

    def store(self, ours: np.ndarray, key: str) -> np.ndarray:
        """Their tensor `key`, from our array."""
        return self.layout.there(ours[self.keys.index(key)] if self.stacked else ours)


def match(rows: Iterable[Row], variables: Tree) -> list[Leaf]:
    """Every array of ours with their names for it.

    Args:
      rows: the table; rows for parts that the model does not have are left out.
      variables: `params` and `batch_stats` as shapes.

    Raises:
      ValueError: if the table has no name for some of the arrays.
    """
    ours = {
        path: (collection, leaf)
        for collection, tree in variables.items()
        for path, leaf in traverse_util.flatten_dict(tree, sep=".").items()
    }
    leaves = []
    for there, here, kind in rows:
        tensors = {there: (here, kind)} if isinstance(kind, Layout) else _tensors(there, here, kind)
        for key, (path, layout) in tensors.items():
            if path in ours:
                collection, leaf = ours.pop(path)
                stacked = "{n}" in key
                keys = tuple(key.format(n=n) for n in range(leaf.shape[0])) if stacked else (key,)
                leaves.append(Leaf(collection, path, leaf.shape, np.dtype(leaf.dtype), keys, layout, stacked))
    if ours:
        raise ValueError(f"the other layout has no name for these of the model's arrays: {', '.join(ours)}")
    return leaves


def _tensors(there: str, here: str, kind: Kind) -> dict[str, tuple[str, Layout]]:
    return {f"{there}.{tensor}": (f"{here}.{name}", layout) for tensor, (name, layout) in kind.items()}


def renamed(keys: Collection[str], old_by_new: Mapping[str, str]) -> dict[str, str]:
    """The name that a table has for each key: parts of names that changed later are turned back.

    Args:
      keys: as a file has them.
      old_by_new: parts of names, with the points around them.

    Returns:
      The file's key by the table's. Where a file has both names of one tensor, the newer one stays as it is.
    """
    there = set(keys)
    found: dict[str, str] = {}
    for key in keys:
        old = key
        for new_part, old_part in old_by_new.items():
            old = old.replace(new_part, old_part)
        found[key if old in there else old] = key
    return found


FULL_LIST = 50  # keys up to which each has a line of its own


def check(leaves: Iterable[Leaf], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises one ValueError that lists every key that is missing, unexpected or of another shape.

    Of a long list, those that differ in the layer alone share a line.

    Args:
      leaves: what is wanted.
      shapes: what is there.
      where: the name of the file.
    """
    wanted = {key: leaf.there_shape for leaf in leaves for key in leaf.keys}
    missing = [key for key in wanted if key not in shapes]
    unexpected = [f"{key} {list(shapes[key])}" for key in shapes if key not in wanted]
    misshapen = [
        f"{key} {list(shapes[key])}, expected {list(shape)}"
        for key, shape in wanted.items()
        if key in shapes and tuple(shapes[key]) != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    lines = [
        f"  {len(keys)} {what}:\n"
        + "\n".join(f"    {line}" for line in (collapse(keys) if len(keys) > FULL_LIST else keys))
        for what, keys in problems.items()
        if keys
    ]
    if lines:
        raise ValueError(f"{where} does not fit the model:\n" + "\n".join(lines))


def collapse(keys: Iterable[str]) -> list[str]:
    """Keys that differ in the number of a layer alone, as one: `layers.{0-5,7}.norm.weight`."""
    numbers = defaultdict(list)
    for key in keys:
        found = LAYER.match(key)
        before, number, after = found.groups() if found else (key, "", "")
        numbers[before, after].append(number)
    return [before + _one_of(layers) + after for (before, after), layers in numbers.items()]


def _one_of(numbers: Sequence[str]) -> str:
    """`{0-5,7}`, or the number itself where there is one."""
    if len(numbers) == 1:
        return numbers[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return "{" + ",".join("-".join(map(str, run)) for run in runs) + "}"


def nest(leaves: Iterable[Leaf], of: Callable[[Leaf], Any]) -> dict[str, Any]:
    """`{"params": ..., "batch_stats": ...}` as nested dicts, with `of(leaf)` in each leaf's place."""
    flat: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for leaf in leaves:
        flat[leaf.collection][leaf.path] = of(leaf)
    return {collection: traverse_util.unflatten_dict(tree, sep=".") for collection, tree in flat.items()}


def parameter_count(leaves: Iterable[Leaf]) -> int:
    """Numbers in the arrays that are trained."""
    return sum(math.prod(leaf.shape) for leaf in leaves if leaf.collection == "params")
