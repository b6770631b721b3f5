"""The options of a call, checked and brought to NumPy in one place for everything in this package."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check_options, _checks, _variants
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
        _checks.scale("scale", self.scale, 1, "float64")
        _check_options.softcap(self.softcap, "float64")
        _check_options.dropout_p(self.dropout_p, has_seed=self.seed is not None)
        for name in ARRAY_OPTIONS:
            array = getattr(self, name)
            if array is not None:
                object.__setattr__(self, name, as_numpy(array))
        for name, kinds in (("mask", "b"), ("bias", "fV")):  # V: those of ml_dtypes
            array = getattr(self, name)
            if array is not None and array.dtype.kind not in kinds:
                raise TypeError(f"{name}: dtype {array.dtype} is not supported here")
        if self.block_mask is not None:
            given = {name for name in ("mask", "mask_mod") if getattr(self, name) is not None}
            _variants.check_block_mask(self.block_mask, given)

    @classmethod
    def of(cls, given: dict[str, Any], *, dlse: Any = None) -> Options:
        """Return the options that a caller gave by name; what changes no result here is refused, not ignored."""
        left_out = {"dlse", "first_batch", *(PADDED_ONLY if "cu_seqlens_q" in given else PACKED_ONLY)}
        allowed = [field.name for field in dataclasses.fields(cls) if field.name not in left_out]
        for name in given:
            if name not in allowed:
                raise TypeError(f"{name}: is not an option here; allowed are {', '.join(allowed)}")
        return cls(**given, dlse=dlse)

    @property
    def packed(self) -> bool:
        """Whether the arrays hold sequences one after the other."""
        return self.cu_seqlens_q is not None

    def replace(self, **changes: Any) -> Options:
        """Return the same options but for these."""
        return dataclasses.replace(self, **changes)


PADDED_ONLY = ("bias", "mask", "block_mask", "layout")
PACKED_ONLY = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
ARRAY_OPTIONS = ("alibi_slopes", "bias", "mask", "sinks", "seed", "dlse", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")


def as_numpy(x: Any) -> Array:
    """Return a NumPy or CuPy array as a NumPy array."""
    return np.asarray(x.get() if hasattr(x, "get") else x)
