"""Pages that are one file, and the pictures in them: contact sheets, error maps, depth maps."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from geolrm_jax.export.files import written_whole

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9dbe0; --ground: #fff; --raised: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #a3a8b0; --line: #363a41; --ground: #15171a; --raised: #1e2125; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.5rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .2rem; }
p { max-width: 46rem; margin: .3rem 0 .8rem; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; font-size: .875rem; color: var(--soft); }
td.number, th.number { text-align: right; }
td { overflow-wrap: anywhere; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 4px; background: #fff; }
figcaption { padding-top: .2rem; line-height: 1.35; }
"""


def to_uint8(image: Float[np.ndarray, "..."] | UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Values in [0, 1] as 0 to 255, rounded and clipped; uint8 as it is.

    Raises:
      ValueError: if a value is not finite.
    """
    if image.dtype == np.uint8:
        return image
    if not np.isfinite(image).all():
        raise ValueError(f"picture of shape {image.shape}: has values that are not finite")
    return np.round(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def error_map(
    image: Float[np.ndarray, "*batch h w 3"], reference: Float[np.ndarray, "*batch h w 3"], top: float = 0.5
) -> UInt8[np.ndarray, "*batch h w 3"]:
    """Absolute error averaged over channels, from black over red and yellow to white at `top`."""
    share = np.abs(np.asarray(image, np.float32) - np.asarray(reference, np.float32)).mean(axis=-1) / top
    return to_uint8(np.stack([3.0 * share, 3.0 * share - 1.0, 3.0 * share - 2.0], axis=-1))


def depth_map(
    depth: Float[np.ndarray, "*batch h w"], alpha: Float[np.ndarray, "*batch h w"]
) -> UInt8[np.ndarray, "*batch h w 3"]:
    """Depth as grey, near dark and far light, over the range where alpha exceeds one half; elsewhere white.

    The leading axes share one range, so that views of an object can be compared.
    """
    solid = alpha > 0.5
    near, far = (depth[solid].min(), depth[solid].max()) if solid.any() else (0.0, 1.0)
    grey = 0.1 + 0.75 * (depth - near) / max(far - near, 1e-6)
    return to_uint8(np.repeat(np.where(solid, grey, 1.0)[..., None], 3, axis=-1))


def contact_sheet(
    rows: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]], gap: int = 4, ground: int = 255
) -> UInt8[np.ndarray, "sheet_h sheet_w 3"]:
    """Pictures of one size in rows, which may differ in length, `gap` pixels apart on a ground of one grey.

    Raises:
      ValueError: if there is no picture or their sizes differ.
    """
    sizes = {picture.shape for row in rows for picture in row}
    if len(sizes) != 1:
        raise ValueError(f"contact sheet: expected pictures of one size, got {sorted(sizes) or 'none'}")
    height, width, _ = sizes.pop()
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(shape, ground, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = i * (height + gap), j * (width + gap)
            sheet[y : y + height, x : x + width] = picture
    return sheet


def data_uri(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """The picture as a PNG inside an address."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(picture: UInt8[np.ndarray, "h w 3"], caption: str) -> str:
    """A picture with a line under it; the caption is text, not HTML."""
    height, width, _ = picture.shape
    text = html.escape(caption)
    image = f'<img src="{data_uri(picture)}" alt="{text}" width="{width}" height="{height}" loading="lazy">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, kind: str = "results") -> str:
    """A table of texts, escaped here.

    Args:
      header: one name a column, or nothing.
      text_columns: columns after these are numbers, set to the right.
      kind: CSS class of the table.
    """

    def line(cells, tag):
        kinds = ("" if column < text_columns else ' class="number"' for column in range(len(cells)))
        return "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    head = f"<thead><tr>{line(header, 'th')}</tr></thead>" if header else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def write_page(path: Path | str, title: str, body: str, style: str = "") -> None:
    """Writes one HTML file that needs nothing beside it.

    Args:
      body: HTML after the heading.
      style: CSS added to the common one.
    """
    heading = html.escape(title)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<h1>{heading}</h1>\n{body}\n</body>\n</html>\n"
    )
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
