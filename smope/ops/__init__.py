"""Operators with a readable PyTorch definition and a CUDA kernel compiled at first use."""

from smope.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_core

__all__ = ["ms_deform_attn", "ms_deform_attn_core"]
