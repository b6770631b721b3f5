"""Exact flash attention, forward and backward, on CuPy and on NumPy arrays."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._attention import attention, attention_backward, attention_vjp
from ._block_mask import BlockMask, make_block_mask
from ._dropout import dropout_mask
from ._merge import merge_states, merge_states_backward
from ._padding import pad_input, unpad_input
from ._varlen import attention_varlen, attention_varlen_backward, attention_varlen_vjp

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_varlen_vjp",
    "attention_vjp",
    "dropout_mask",
    "make_block_mask",
    "merge_states",
    "merge_states_backward",
    "pad_input",
    "unpad_input",
]

if TYPE_CHECKING:
    from . import flash_attn as flash_attn
else:

    def __getattr__(name: str) -> Any:
        """The subpackage `flash_attn`, which is imported when it is first asked for."""
        if name == "flash_attn":
            return import_module(".flash_attn", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), "flash_attn"})
