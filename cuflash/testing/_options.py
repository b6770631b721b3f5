"""The options of a call, checked and brought to NumPy in one place for everything in this package."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _checks
from .._problem import Causal, Layout, WindowSize

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`cuflash.attention`, and what else tells its results.

    `dlse` is the gradient of the log-sum-exp. With `cu_seqlens_q` and `cu_seqlens_k` the arrays are packed; the loop
    over their sequences sets `first_batch`, the number of the first batch entry, to the number of the sequence.
    """

    scale: float | None = None
    causal: Causal = False
    window_size: WindowSize = None
    softcap: float | None = None
    alibi_slopes: Any = None
    bias: Any = None
    mask: Any = None
    block_mask: Any = None
    sinks: Any = None
    dropout_p: float = 0.0
    seed: Any = None
    score_mod: Any = None
    mask_mod: Any = None
    mod_args: Any = None
    layout: Layout = "bhsd"
    dlse: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    seqused_k: Any = None
    first_batch: int = 0

    def __post_init__(self) -> None:
        _checks.causal(self.causal)
        _checks.window_size(self.window_size)
        _checks.layout(self.layout)
        for name in ("score_mod", "mask_mod"):
            mod = getattr(self, name)
            if isinstance(mod, str):
                raise TypeError(f"{name} is the CUDA expression {mod!r}; give a Python callable of the same meaning")
        if self.dropout_p > 0 and self.seed is None:
            raise ValueError(f"dropout_p is {self.dropout_p} and seed is None; dropout needs a seed")
        for name in ARRAY_OPTIONS:
            array = getattr(self, name)
            if array is not None:
                object.__setattr__(self, name, as_numpy(array))

    @property
    def packed(self) -> bool:
        """Whether the arrays hold sequences one after the other."""
        return self.cu_seqlens_q is not None

    def replace(self, **changes: Any) -> Options:
        """Return the same options but for these."""
        return dataclasses.replace(self, **changes)


ARRAY_OPTIONS = ("alibi_slopes", "bias", "mask", "sinks", "seed", "dlse", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")


def as_numpy(x: Any) -> Array:
    """Return a NumPy or CuPy array as a NumPy array."""
    return np.asarray(x.get() if hasattr(x, "get") else x)
