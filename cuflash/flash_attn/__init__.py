"""The functions of flash-attn and torch's ``scaled_dot_product_attention``, for CuPy and NumPy arrays.

Names, order of arguments, defaults, axes and results are those of flash-attn 2.8 and torch 2.13, so that code written
for them needs another import and nothing else::

    from cuflash.flash_attn import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention

They translate their arguments and call :func:`cuflash.attention` and :func:`cuflash.attention_varlen`. CuPy and NumPy
record no gradients: for those call :func:`cuflash.attention_vjp` and :func:`cuflash.attention_varlen_vjp`.

Dropout takes its seeds from a generator of this module, as torch's functions take them from torch's: see
:func:`manual_seed`.
"""

from __future__ import annotations

from ._options import manual_seed
from ._padded import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from ._padding import pad_input, unpad_input
from ._sdpa import scaled_dot_product_attention
from ._varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "manual_seed",
    "pad_input",
    "scaled_dot_product_attention",
    "unpad_input",
]
