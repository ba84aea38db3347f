"""The shapes at which the model samples features."""

from typing import NamedTuple


class Workload(NamedTuple):
    """Sizes of one call; maps are (height, width) of each level."""

    scenes: int
    views: int
    queries: int
    heads: int
    channels: int
    points: int
    maps: tuple[tuple[int, int], ...]

    @property
    def samples(self) -> int:
        """Bilinear samples of all views."""
        return self.scenes * self.views * self.queries * self.heads * len(self.maps) * self.points


INPUT_448 = ((112, 112), (64, 64))  # the image encoder's two levels for images of 448 x 448 pixels
WORKLOADS = {
    "quickstart": Workload(2, 4, 896, heads=4, channels=24, points=2, maps=((28, 28), (16, 16))),
    "proposal": Workload(1, 4, 4096, heads=16, channels=24, points=8, maps=INPUT_448),
    "training": Workload(1, 8, 4096, heads=16, channels=48, points=8, maps=INPUT_448),
    "evaluation": Workload(1, 21, 16_384, heads=16, channels=48, points=8, maps=INPUT_448),
}
