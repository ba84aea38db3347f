"""Videos through the ffmpeg that imageio-ffmpeg brings along."""

import itertools
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from jaxtyping import Float, UInt8

from geolrm_jax.export.files import written_whole
from geolrm_jax.export.pages import to_uint8

Frame = Float[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w 3"]


def write_video(path: Path | str, frames: Iterable[Frame], fps: float | int = 30) -> int:
    """Writes an H.264 video in yuv420p, which browsers play, and returns the number of frames.

    Frames may come from a generator and are written one by one. That pixel format needs even sizes: an odd last row or
    column is doubled.

    Args:
      path: a name whose suffix ffmpeg knows, ".mp4".
      frames: uint8, or floats in [0, 1]; all of one size.

    Raises:
      ValueError: if there are no frames or their sizes differ; nothing is left behind.
      RuntimeError: if ffmpeg fails, with its words.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: no frames to write")
    with written_whole(path) as temporary:
        command = _command(temporary, first.shape, fps)
        # Popen as such: imageio's own writer asks for a plain fork, which JAX's threads do not bear.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as ffmpeg:
            try:
                count = _send(ffmpeg, path, first, frames)
            except BaseException:
                ffmpeg.kill()
                raise
            errors = ffmpeg.communicate()[1].decode(errors="replace").strip()
        if ffmpeg.returncode:
            raise RuntimeError(f"{path}: ffmpeg failed: {errors}")
    return count


def _command(path: Path, shape: tuple[int, ...], fps: float | int) -> list[str]:
    height, width, _ = shape
    size = f"{width + width % 2}x{height + height % 2}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    coding = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-movflags", "+faststart"]
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, *coding, str(path)]


def _send(ffmpeg: subprocess.Popen, path: Path | str, first: Frame, others: Iterator[Frame]) -> int:
    for count, frame in enumerate(itertools.chain([first], others), start=1):
        if frame.shape != first.shape:
            raise ValueError(f"{path}: frame {count} has shape {frame.shape}, the first had {first.shape}")
        try:
            ffmpeg.stdin.write(_even(to_uint8(frame)).tobytes())
        except BrokenPipeError:  # ffmpeg has given up and says why at the end
            return count
    return count


def _even(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    height, width, _ = frame.shape
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
