"""Tiles, the pairs of splats and tiles, and the shapes at which the model renders."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

TILE = 16  # pixels along a tile's side
PIXELS = TILE * TILE
CUT = 1 / 255  # a splat is drawn in a pixel where its alpha is at least this
STOP = 1e-4  # a pixel is finished before the splat that would bring its transmittance to this or below
GEOMETRY = 6  # numbers of a splat that decide its alpha: centre 2, conic 3, log opacity 1


class Grid(NamedTuple):
    """Images of one size, cut into tiles that are numbered image by image, row by row."""

    images: int
    height: int
    width: int

    @property
    def rows(self) -> int:
        """Rows of tiles in an image."""
        return -(-self.height // TILE)

    @property
    def columns(self) -> int:
        """Columns of tiles in an image."""
        return -(-self.width // TILE)

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return self.images * self.rows * self.columns


class Pairs(NamedTuple):
    """(Splat, tile) pairs of a static capacity P. A slot is a pair's place before the sort by tiles.

    Attributes:
      splat: of each slot, ascending: pairs of one splat are neighbours.
      slot: the slots in tile order, front to back within a tile; those beyond the last tile's run are not in use.
      start: where each tile's run begins in `slot`, and where the last ends.
      first: where each splat's slots begin, and where the last splat's end.
    """

    splat: Int[Array, "p"]
    slot: Int[Array, "p"]
    start: Int[Array, "tiles_and_one"]
    first: Int[Array, "n_and_one"]


class Blended(NamedTuple):
    """Result of blending in tiles; the gradient starts from the last two.

    Attributes:
      sums: weighted sums of the features.
      transmittance: what remains in each pixel.
      last: one more than the place, in its tile's run, of the last pair drawn in each pixel.
    """

    sums: Float[Array, "tiles c px"]
    transmittance: Float[Array, "tiles px"]
    last: Int[Array, "tiles px"]


class Workload(NamedTuple):
    """Sizes of one call of the rasterizer."""

    scenes: int
    views: int
    gaussians: int
    size: int


WORKLOADS = {
    "quickstart": Workload(scenes=2, views=6, gaussians=10_752, size=112),
    "object": Workload(scenes=1, views=1, gaussians=50_000, size=256),
    "training": Workload(scenes=1, views=8, gaussians=131_072, size=448),  # 4,096 anchors, 8 supervised views
    "evaluation": Workload(scenes=1, views=8, gaussians=524_288, size=512),  # 16,384 anchors
}
