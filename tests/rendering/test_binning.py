"""Tile lists against brute force over pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.rendering.binning import make_pairs, stable_order
from geolrm_jax.rendering.projection import Projected
from kernels_pallas.rasterization.shapes import CUT, TILE, Grid

GRID = Grid(images=2, height=70, width=52)
COUNT = 200


@pytest.mark.parametrize(("count", "bits"), [(1, 4), (5, 31), (3000, 31), (3000, 3)])
def test_stable_order_is_a_stable_argsort(rng, count, bits):
    keys = rng.integers(0, 2**bits, (2, count))
    keys[:, ::3] = keys[:, :1]  # ties
    np.testing.assert_array_equal(stable_order(jnp.asarray(keys, jnp.int32), bits), np.argsort(keys, kind="stable"))


@pytest.fixture
def ellipses(rng):
    """Dots, needles and discs, on and off the picture, some not drawn; float64 numbers that float32 holds."""
    shape = (GRID.images, COUNT)
    half = rng.normal(size=(*shape, 2, 2)) * np.exp(rng.uniform(-2, 3.3, (*shape, 1, 2)))
    covariance = (half @ half.swapaxes(-1, -2) + 0.3 * np.eye(2)).astype(np.float32).astype(np.float64)
    x, y = rng.uniform(-20, 80, (2, *shape)).astype(np.float32).astype(np.float64)
    depth = rng.uniform(0.5, 3, shape).astype(np.float32)
    depth[:, 10:20] = depth[:, :1]  # ties
    opacities = rng.choice([0.003, 0.01, 0.5, 1.0], shape)
    return covariance, x, y, depth, opacities, rng.uniform(size=shape) > 0.1


def run(ellipses, capacity):
    covariance, x, y, depth, opacities, visible = ellipses
    determinants = np.linalg.det(covariance), np.linalg.det(covariance - 0.3 * np.eye(2))
    single = (x, y, covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1], *determinants)
    projected = Projected(*(jnp.asarray(a, jnp.float32) for a in single), jnp.asarray(depth), jnp.asarray(visible))
    return jax.jit(make_pairs, static_argnums=(2, 3))(projected, jnp.asarray(opacities, jnp.float32), GRID, capacity)


def drawn_tiles(ellipses, image, i):
    """Tiles in which some pixel centre's alpha is at least the cut."""
    covariance, x, y, _, opacities, visible = (a[image, i] for a in ellipses)
    rows, columns = np.indices((GRID.rows * TILE, GRID.columns * TILE)) + 0.5
    q = np.linalg.inv(covariance)
    dx, dy = columns - x, rows - y
    alpha = opacities * np.exp(-0.5 * (q[0, 0] * dx**2 + 2 * q[0, 1] * dx * dy + q[1, 1] * dy**2))
    drawn = (alpha >= CUT) & (columns < GRID.width) & (rows < GRID.height)
    hit = drawn.reshape(GRID.rows, TILE, GRID.columns, TILE).any(axis=(1, 3))
    return set(np.flatnonzero(hit)) if visible else set()


def test_every_drawn_pixel_has_its_pair_and_few_pairs_draw_nothing(ellipses):
    pairs, gaussian, overflow = run(ellipses, 4000)
    assert overflow == 0
    splat, slot, start = (np.asarray(a) for a in (pairs.splat, pairs.slot, pairs.start))
    per_image, needed, made = GRID.tiles // GRID.images, 0, 0
    tiles = {(image, i): set() for image in range(GRID.images) for i in range(COUNT)}
    for tile in range(GRID.tiles):
        for s in slot[start[tile] : start[tile + 1]]:
            image, i = divmod(int(gaussian[splat[s]]), COUNT)
            assert image == tile // per_image
            assert tile % per_image not in tiles[image, i]
            tiles[image, i].add(tile % per_image)
    for (image, i), ours in tiles.items():
        exact = drawn_tiles(ellipses, image, i)
        assert exact <= ours
        needed, made = needed + len(exact), made + len(ours)
    assert needed > 500
    print(needed, made)
    assert made < 1.1 * needed  # an ellipse may pass between the pixel centres of a tile, or beside the picture


def test_tiles_are_front_to_back_ties_in_order(ellipses):
    pairs, gaussian, _ = run(ellipses, 4000)
    splat, slot, start = (np.asarray(a) for a in (pairs.splat, pairs.slot, pairs.start))
    depth = np.ravel(ellipses[3])
    for tile in range(GRID.tiles):
        members = np.asarray(gaussian)[splat[slot[start[tile] : start[tile + 1]]]]
        keys = list(zip(depth[members], members, strict=True))
        assert keys == sorted(keys)
    assert np.all(np.diff(splat) >= 0)


def test_capacity_keeps_the_first_and_counts_the_rest(ellipses):
    total = int(run(ellipses, 4000)[0].start[-1])
    pairs, _, overflow = run(ellipses, total - 7)
    assert overflow == 7
    assert pairs.start[-1] == total - 7


def test_more_pairs_than_32_bits_can_count_are_reported_not_wrapped():
    """Two images of 2^17 tiles, 2^14 splats that cover them: 2^32 pairs."""
    grid, shape = Grid(images=2, height=4096, width=8192), (2, 2**14)
    full = [jnp.full(shape, value, jnp.float32) for value in (4096.0, 2048.0, 1e8, 0.0, 1e8, 1e16, 1e16, 1.0)]
    pairs, _, overflow = make_pairs(Projected(*full, jnp.ones(shape, bool)), jnp.ones(shape), grid, 64)
    assert overflow == np.iinfo(np.int32).max
    assert pairs.start[-1] == 0
