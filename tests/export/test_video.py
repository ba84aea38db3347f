import warnings

import imageio_ffmpeg
import jax.numpy as jnp
import numpy as np
import pytest

from geolrm_jax.export.video import write_video


def read_video(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def gradient(height, width, level):
    """A smooth frame, which compression keeps."""
    ramp = np.linspace(0, 1, width)[None, :, None] * np.ones((height, 1, 3))
    return (0.5 * ramp + 0.5 * level).astype(np.float32)


def test_frames_come_back(tmp_path):
    frames = [gradient(63, 81, level) for level in np.linspace(0, 1, 12)]
    assert write_video(tmp_path / "a.mp4", iter(frames), fps=10.0) == 12
    meta, read = read_video(tmp_path / "a.mp4")
    assert meta["size"] == (82, 64) and meta["codec"] == "h264" and "yuv420p" in meta["pix_fmt"] and meta["fps"] == 10
    assert len(read) == 12 and meta["duration"] == pytest.approx(1.2, abs=0.05)
    for frame, shown in zip(frames, read, strict=True):
        assert np.abs(shown[:63, :81] / 255.0 - frame).mean() < 0.02


def test_bytes_and_floats_give_the_same_video(tmp_path, rng):
    frames = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames)
    write_video(tmp_path / "b.mp4", frames.astype(np.float32) / 255)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_bad_frames_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"a\.mp4: no frames"):
        write_video(tmp_path / "a.mp4", [])
    sizes = [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)]
    with pytest.raises(ValueError, match="frame 2 has shape"):
        write_video(tmp_path / "a.mp4", sizes)
    with pytest.raises(ValueError, match="not finite"):
        write_video(tmp_path / "a.mp4", [np.full((16, 16, 3), np.nan, np.float32)])
    assert list(tmp_path.iterdir()) == []


def test_ffmpeg_is_quoted_when_it_fails(tmp_path):
    with pytest.raises(RuntimeError, match=r"a\.unknown: ffmpeg failed: .*format"):
        write_video(tmp_path / "a.unknown", np.zeros((200, 64, 64, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_no_plain_fork(tmp_path):
    """JAX warns of a deadlock when a process with its threads forks."""
    jnp.ones(3).block_until_ready()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_video(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8)) == 2
