"""Videos through the ffmpeg that imageio-ffmpeg brings along."""

from collections.abc import Iterable
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
      frames: uint8, or floats in [0, 1]; all of one size.

    Raises:
      ValueError: if there are no frames or their sizes differ; nothing is left behind.
    """
    count, first = 0, None
    with written_whole(path) as temporary:
        writer = None
        try:
            for count, frame in enumerate(frames, start=1):
                if writer is None:
                    first = frame.shape
                    writer = _open(temporary, first, fps)
                if frame.shape != first:
                    raise ValueError(f"{path}: frame {count} has shape {frame.shape}, the first had {first}")
                writer.send(_even(to_uint8(frame)))
            if writer is None:
                raise ValueError(f"{path}: no frames to write")
        finally:
            if writer is not None:
                writer.close()
    return count


def _open(path: Path, shape: tuple[int, ...], fps: float | int):
    height, width, _ = shape
    size = (width + width % 2, height + height % 2)
    writer = imageio_ffmpeg.write_frames(
        str(path), size, fps=fps, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=2, quality=8
    )
    writer.send(None)  # starts the generator
    return writer


def _even(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    height, width, _ = frame.shape
    return np.ascontiguousarray(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
