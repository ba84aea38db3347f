"""Deformable attention: weighted bilinear samples of feature maps at learned places."""

from kernels_pallas.deformable_attention.api import deformable_attention, multiview_deformable_attention

__all__ = ["deformable_attention", "multiview_deformable_attention"]
