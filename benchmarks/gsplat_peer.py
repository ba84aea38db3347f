"""gsplat as a peer in benchmarks: its pure-PyTorch functions on CPU, its kernels on CUDA.

  pip install torch jaxtyping rich ninja && pip install --no-deps gsplat

Of `gsplat.cuda._torch_impl`, projection, tile offsets and the pixel compositor run as they are. Three steps get
vectorised CPU stand-ins: binning, which there is a Python loop over Gaussians, and the two that only exist for CUDA:
the search for (pixel, Gaussian) pairs, and nerfacc's sums along rays.
"""

import contextlib
import math
import sys
import types
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from gsplat.cuda import _torch_impl, _wrapper
from gsplat.rendering import rasterization
from torch import Tensor

TILE = 16
CUT, STOP, MAX_ALPHA = 1 / 255, 1e-4, 0.999  # gsplat's constants


def program(
    inputs: dict[str, np.ndarray], size: int, loss_of: Callable, threads: int | None
) -> tuple[Callable, Callable, Callable]:
    """forward() -> (rgb, alpha, depth), both() -> (loss, gradients) and memory() -> peak bytes of `both`, or None.

    Args:
      inputs: as for `render`.
      size: of the square images, in pixels.
      loss_of: of rgb, alpha and depth.
      threads: on CPU; None is the GPU. A call there ends when the GPU has finished.
    """
    if threads:
        torch.set_num_threads(threads)
    device = "cpu" if threads else "cuda"
    leaves = {name: torch.tensor(a, device=device, requires_grad=True) for name, a in inputs.items()}

    def finish():
        if not threads:
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad():
            pictures = render(leaves, size)
        finish()
        return pictures

    def both():
        loss = loss_of(*render(leaves, size))
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        finish()
        return loss, {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}

    def memory():
        if threads:
            return None
        torch.cuda.reset_peak_memory_stats()
        both()
        return torch.cuda.max_memory_allocated()

    return forward, both, memory


def render(inputs: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """rgb (V, H, W, 3), alpha (V, H, W) and accumulated depth (V, H, W) by gsplat, on the device of the inputs.

    Args:
      inputs: means (G, 3), scales (G, 3), quats (G, 4), opacities (G,), colors (G, 3), world_from_camera (V, 4, 4),
        intrinsics (V, 3, 3), background (3,). On CPU gradients reach all of them, on CUDA not the intrinsics.
      size: of the square images, in pixels.
    """
    draw = _render_cuda if inputs["means"].is_cuda else _render_torch
    pixels, alpha = draw(inputs, torch.linalg.inv(inputs["world_from_camera"]), size)
    return pixels[..., :3], alpha[..., 0], pixels[..., 3]


def _render_cuda(inputs: dict[str, Tensor], camera_from_world: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """gsplat's public function."""
    gaussians = (inputs[key] for key in ("means", "quats", "scales", "opacities", "colors"))
    backgrounds = inputs["background"].expand(len(camera_from_world), -1)
    intrinsics = inputs["intrinsics"].detach()
    pixels, alpha, _ = rasterization(
        *gaussians,
        camera_from_world,
        intrinsics,
        size,
        size,
        packed=False,
        backgrounds=backgrounds,
        render_mode="RGB+D",
    )
    return pixels, alpha


def _render_torch(inputs: dict[str, Tensor], camera_from_world: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """gsplat's `_torch_impl`, its functions in the order of `gsplat.rendering._rasterization`."""
    views, tiles = len(camera_from_world), math.ceil(size / TILE)
    covars, _ = _torch_impl._quat_scale_to_covar_preci(inputs["quats"], inputs["scales"], True, False)
    radii, means2d, depths, conics, _ = _torch_impl._fully_fused_projection(
        inputs["means"], covars, camera_from_world, inputs["intrinsics"], size, size
    )
    keys, flat = bin_by_tile(means2d, radii, depths, tiles, tiles)
    offsets = _torch_impl._isect_offset_encode(keys, views, tiles, tiles)
    features = torch.cat([inputs["colors"].expand(views, -1, -1), depths[..., None]], dim=-1)
    background = torch.cat([inputs["background"], torch.zeros(1)]).expand(views, -1)
    opacities = inputs["opacities"].expand(views, -1)
    with stand_ins():
        return _torch_impl._rasterize_to_pixels(
            means2d, conics, features, opacities, size, size, TILE, offsets, flat, background
        )


@contextlib.contextmanager
def stand_ins():
    """Puts the functions below where gsplat's compositor looks for its CUDA kernel and for nerfacc."""
    nerfacc = types.ModuleType("nerfacc")
    nerfacc.render_weight_from_alpha, nerfacc.accumulate_along_rays = weights_along_rays, sum_along_rays
    with (
        mock.patch.object(_wrapper, "rasterize_to_indices_in_range", drawn_pairs),
        mock.patch.dict(sys.modules, nerfacc=nerfacc),
    ):
        yield


@torch.no_grad()
def bin_by_tile(means2d: Tensor, radii: Tensor, depths: Tensor, columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """What `_isect_tiles` returns: the keys of all (Gaussian, tile) pairs, ascending, and the Gaussians.

    A key is image, tile (in the fewest bits) and the bits of the depth (32); a pair is made for every tile that the box
    of half sizes `radii` around the centre touches; Gaussians are numbered through all images.
    """
    limits = torch.tensor([columns, rows])
    low = torch.floor((means2d - radii) / TILE).long().clamp(torch.tensor(0), limits).reshape(-1, 2)
    high = torch.ceil((means2d + radii) / TILE).long().clamp(torch.tensor(0), limits).reshape(-1, 2)
    extent = (high - low) * (radii > 0).all(-1).reshape(-1, 1)
    count = extent.prod(-1)
    flat = torch.repeat_interleave(count)
    nth = torch.arange(len(flat)) - (count.cumsum(0) - count)[flat]
    width = extent[flat, 0]
    tile = (low[flat, 1] + nth // width) * columns + low[flat, 0] + nth % width
    image = flat // means2d.shape[-2]
    key = ((image << (columns * rows).bit_length() | tile) << 32) | depths.flatten()[flat].view(torch.int32).long()
    key, order = torch.sort(key)
    return key, flat[order].int()


@torch.no_grad()
def drawn_pairs(
    start, end, transmittances, means2d, conics, opacities, width, height, tile_size, offsets, flat
) -> tuple[Tensor, Tensor, Tensor]:
    """What `rasterize_to_indices_in_range` returns: Gaussian, pixel and image of all pairs that are drawn.

    Pairs of one pixel are neighbours, front to back. Looked at are those in the batches `start` to `end`, each of
    `tile_size` squared, of every tile's list; `transmittances` is what the batches before have left.
    """
    per_batch, (rows, columns) = tile_size**2, offsets.shape[-2:]
    ends = torch.cat([offsets.flatten()[1:], torch.tensor([len(flat)], dtype=offsets.dtype)])
    splats = torch.cat([means2d.flatten(0, -2), conics.flatten(0, -2), opacities.reshape(-1, 1)], dim=-1)
    found = [(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0))]
    for tile, (first, last) in enumerate(zip(offsets.flatten().tolist(), ends.tolist(), strict=True)):
        listed = flat[first + start * per_batch : min(last, first + end * per_batch)].long()
        image, row, column = tile // (rows * columns), tile // columns % rows, tile % columns
        y = torch.arange(row * tile_size, min((row + 1) * tile_size, height))
        x = torch.arange(column * tile_size, min((column + 1) * tile_size, width))
        pixel, place, alpha = _reached(splats[listed], x + 0.5, y + 0.5)
        number = ((image * height + y[:, None]) * width + x).flatten()  # through all images
        found.append((listed[place], number[pixel], alpha))
    gaussian, pixel, alpha = (torch.cat(parts) for parts in zip(*found, strict=True))
    left = transmittances.flatten()[pixel] * torch.exp(_log_transmittance(alpha, pixel)[1])
    kept = (left > STOP).nonzero()[:, 0]
    gaussian, pixel = gaussian[kept], pixel[kept]
    return gaussian % means2d.shape[-2], pixel % (width * height), pixel // (width * height)


def _reached(splats: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of a tile, row by row, the splats whose alpha reaches the cut in each, and that alpha."""
    mean_x, mean_y, a, b, c, opacity = splats.unbind(-1)
    dx, dy = x[:, None] - mean_x, y[:, None] - mean_y
    exponent = torch.addcmul((0.5 * c * dy**2)[:, None] + (0.5 * a * dx**2)[None], (b * dx)[None], dy[:, None])
    exponent = exponent.flatten(0, 1)
    pixel, place = (exponent <= torch.log(opacity / CUT)).nonzero(as_tuple=True)
    return pixel, place, torch.clamp_max(opacity[place] * torch.exp(-exponent[pixel, place]), MAX_ALPHA)


def _log_transmittance(alpha: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of log(1 - alpha) over the pairs in front of each, without itself and with it.

    Of one cumulative sum over all pixels, less what it was where the pixel begins: in float64, for it grows long.
    """
    log = torch.log1p(-alpha).double()
    total = torch.cumsum(log, 0)
    lengths = torch.unique_consecutive(pixel, return_counts=True)[1]
    begins = lengths.cumsum(0) - lengths
    before = torch.repeat_interleave((total - log)[begins], lengths, output_size=len(alpha))
    return (total - log - before).to(alpha.dtype), (total - before).to(alpha.dtype)


def weights_along_rays(alpha: Tensor, *, ray_indices: Tensor, n_rays: int) -> tuple[Tensor, Tensor]:
    """nerfacc's `render_weight_from_alpha`: weights alpha T and transmittances T."""
    del n_rays
    transmittance = torch.exp(_log_transmittance(alpha, ray_indices)[0])
    return alpha * transmittance, transmittance


def sum_along_rays(weights: Tensor, values: Tensor | None, *, ray_indices: Tensor, n_rays: int) -> Tensor:
    """nerfacc's `accumulate_along_rays`: sums (n_rays, C) of weights (M,) times values (M, C), or of weights alone."""
    terms = weights[:, None] if values is None else weights[:, None] * values
    rays, lengths = torch.unique_consecutive(ray_indices, return_counts=True)
    sums = torch.segment_reduce(terms, "sum", lengths=lengths, axis=0)
    return torch.zeros(n_rays, terms.shape[-1]).index_copy(0, rays, sums)
