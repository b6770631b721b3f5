"""Exact flash attention, forward and backward, on CuPy and on NumPy arrays."""

from __future__ import annotations

from ._attention import attention, attention_backward, attention_vjp

__version__ = "0.1.0"

__all__ = ["attention", "attention_backward", "attention_vjp"]
