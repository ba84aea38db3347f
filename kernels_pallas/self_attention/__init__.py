"""Self-attention of many tokens, valid ones first."""

from kernels_pallas.self_attention.api import self_attention

__all__ = ["self_attention"]
