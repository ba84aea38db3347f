"""The shapes at which the model attends."""

from typing import NamedTuple


class Workload(NamedTuple):
    """Sizes of one call: queries, keys and values are (scenes, tokens, heads, width)."""

    scenes: int
    tokens: int
    heads: int
    width: int


WORKLOADS = {
    "dinov2": Workload(scenes=8, tokens=1025, heads=12, width=64),  # 8 views of 448² and the class token
    "proposal": Workload(scenes=1, tokens=4096, heads=16, width=24),
    "training": Workload(scenes=1, tokens=4096, heads=16, width=48),
    "evaluation": Workload(scenes=1, tokens=16_384, heads=16, width=48),
    "largest": Workload(scenes=1, tokens=65_536, heads=16, width=48),
}


def even_split(count: int, largest: int) -> int:
    """Size of the fewest equal parts of `count` that are at most `largest`; the last part may be padded."""
    return -(-count // -(-count // largest))
