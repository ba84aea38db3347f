import hashlib
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from geolrm_jax.evaluation.protocol import (
    Protocol,
    choose_inputs,
    nearest_view_baseline,
    nearest_views,
    object_list_hash,
    white_baseline,
)
from geolrm_jax.geometry.cameras import gobjaverse_rig, orbit
from geolrm_jax.scene import Cameras, Views


def test_inputs_of_the_paper_protocol():
    """By hand: 0, then 12 (180 degrees away), 6 and 18 (90 away), then 45 degrees away: 4 and so on, lowest first."""
    chosen = choose_inputs(Protocol(inputs=20), np.arange(40), gobjaverse_rig(size=32))
    assert chosen[:4] == (0, 12, 6, 18)
    assert sorted(chosen) == sorted(set(range(24)) - {3, 9, 15, 21})
    for fewer in (1, 4, 6, 8, 12, 16):
        assert choose_inputs(Protocol(inputs=fewer), np.arange(40), gobjaverse_rig(size=32)) == chosen[:fewer]


def brute_force(views, count):
    """Farthest-point order in whole steps of 15 degrees, where nothing is rounded."""
    chosen = [views[0]]
    while len(chosen) < count:
        left = [v for v in views if v not in chosen]
        gaps = [min(min((v - c) % 24, (c - v) % 24) for c in chosen) for v in left]
        chosen.append(left[gaps.index(max(gaps))])
    return tuple(chosen)


@pytest.mark.parametrize("turn", [0.0, 17.3, 180.0])
@pytest.mark.parametrize("targets", [(3, 9, 15, 21), (2, 6, 10, 14, 18, 22, 27, 33), (0, 1, 2)])
def test_order_is_farthest_point_whatever_the_rounding(targets, turn):
    rig = orbit(15.0 * np.arange(40) + turn, 20.0, 1.7, 39.6, 32)
    protocol = Protocol(targets=targets, inputs=12)
    assert choose_inputs(protocol, np.arange(len(rig.intrinsics)), rig) == brute_force(
        [v for v in range(24) if v not in targets], 12
    )


def test_all_views_less_duplicates():
    rig = gobjaverse_rig(size=32)
    protocol = Protocol(candidates=(), inputs=34)
    chosen = choose_inputs(protocol, np.arange(len(rig.intrinsics)), rig)
    assert sorted(chosen) == sorted(set(range(40)) - {3, 9, 15, 21, 24, 39})


def test_views_go_by_number_not_by_place(rng):
    """An object of which some views are missing, stored in any order."""
    ids = rng.permutation([v for v in range(40) if v not in (12, 25, 30)])
    rig = gobjaverse_rig(size=32)
    cameras = Cameras(rig.world_from_camera[ids], rig.intrinsics[ids], 32, 32)
    expected = brute_force([v for v in range(24) if v not in (3, 9, 12, 15, 21)], 10)
    assert choose_inputs(Protocol(inputs=10), ids, cameras) == expected


def test_impossible_choices_are_named():
    rig = orbit(np.arange(8) * 45.0, 0.0, 1.5, 40.0, 32)
    with pytest.raises(ValueError, match=r"views \[9, 15, 21\] do not exist.*0, 1, 2, 3, 4, 5, 6, 7"):
        choose_inputs(Protocol(), np.arange(len(rig.intrinsics)), rig)
    with pytest.raises(ValueError, match="8 views asked for, 6 are left"):
        choose_inputs(Protocol(targets=(1, 5), inputs=8), np.arange(len(rig.intrinsics)), rig)
    with pytest.raises(ValueError, match="multiple of 28 on both sides, got 512"):
        Protocol(input_size=512)
    with pytest.raises(ValueError, match="none twice"):
        Protocol(targets=(1, 1))


def test_hash_is_sha256sum_of_the_file(tmp_path):
    (tmp_path / "list.txt").write_text("basket\nboat/é\n")
    expected = hashlib.sha256((tmp_path / "list.txt").read_bytes()).hexdigest()
    assert object_list_hash(["basket", "boat/é"]) == expected != object_list_hash(["boat/é", "basket"])


def views_of(cameras: Cameras, rng) -> Views:
    batch = cameras.intrinsics.shape[:-2]
    alpha = rng.uniform(size=(*batch, cameras.height, cameras.width)).astype(np.float32)
    rgb = alpha[..., None] * rng.uniform(size=(*alpha.shape, 3)).astype(np.float32)
    return Views(cameras, rgb, alpha, np.zeros_like(alpha), np.ones(batch, bool))


def test_nearest_view_is_the_smallest_angle(rng):
    poses = np.broadcast_to(np.eye(4, dtype=np.float32), (2, 9, 4, 4)).copy()
    poses[..., :3, 3] = rng.normal(size=(2, 9, 3))
    cameras = Cameras(poses, np.broadcast_to(np.eye(3, dtype=np.float32), (2, 9, 3, 3)), 4, 4)
    inputs, targets = (jax.tree.map(lambda x, s=s: x[:, s], cameras) for s in (slice(0, 6), slice(6, 9)))
    inputs = views_of(inputs, rng)
    inputs.valid[1, :3] = False
    nearest = np.asarray(nearest_views(inputs, targets))
    for b, t in itertools.product(range(2), range(3)):
        a, c = targets.world_from_camera[b, t, :3, 3], poses[b, :6, :3, 3]
        angle = np.arctan2(np.linalg.norm(np.cross(a, c), axis=-1), c @ a)
        angle[~inputs.valid[b]] = np.inf
        assert nearest[b, t] == angle.argmin()


def test_nearest_view_picture_is_on_white_and_antialiased(rng):
    """Against Pillow's bilinear filter, which is antialiased too."""
    inputs = views_of(orbit(np.array([0.0, 90.0, 180.0, 270.0]), 10.0, 1.5, 40.0, 24), rng)
    targets = views_of(orbit(np.array([100.0, 350.0]), 0.0, 1.5, 40.0, 10), rng)
    baseline = np.asarray(nearest_view_baseline(inputs, targets))
    for picture, view in zip(baseline, (1, 0), strict=True):
        on_white = inputs.rgb[view] + (1 - inputs.alpha[view])[..., None]
        channels = [Image.fromarray(on_white[..., c]).resize((10, 10), Image.Resampling.BILINEAR) for c in range(3)]
        np.testing.assert_allclose(picture, np.stack(channels, axis=-1), atol=1e-5)


def test_white_baseline(rng):
    targets = views_of(orbit(np.array([0.0]), 0.0, 1.5, 40.0, 8), rng)
    np.testing.assert_array_equal(white_baseline(targets), np.ones((1, 8, 8, 3)))
