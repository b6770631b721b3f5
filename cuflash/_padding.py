"""From padded to packed sequences and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _checks
from ._backends import backend_of

Array = Any
"""``cupy.ndarray`` or ``numpy.ndarray``. NumPy's functions hand CuPy's arrays over to CuPy's."""


def unpad_input(x: Array, attention_mask: Array) -> tuple[Array, Array, Array, int]:
    """Pack the tokens of padded sequences one after the other, for :func:`attention_varlen`.

    The gradient of ``x`` is ``pad_input(dx_unpad, indices, batch, seqlen)``.

    Parameters
    ----------
    x : array, shape (batch, seqlen, ...)
        Padded sequences, of any dtype.
    attention_mask : array of bool or int, shape (batch, seqlen)
        True or 1 where there is a token, False or 0 where there is padding, anywhere in a sequence.

    Returns
    -------
    x_unpad : array, shape (total, ...)
        The tokens.
    indices : array of int, shape (total,)
        Where they stood in the flattened (batch, seqlen), for :func:`pad_input`.
    cu_seqlens : array of int32, shape (batch + 1,)
        Sequence ``b`` has the rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
    max_seqlen : int
        Length of the longest sequence.

    Raises
    ------
    TypeError, ValueError
        If an array is not of this kind, dtype or shape.

    Notes
    -----
    How many tokens there are is known to the host only after the GPU has counted them: on CuPy arrays the call waits.

    References
    ----------
    T. Dao, flash-attn, ``flash_attn/bert_padding.py``, https://github.com/Dao-AILab/flash-attention.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> x = np.arange(1, 7).reshape(2, 3, 1)
    >>> mask = np.array([[True, True, False], [True, False, False]])
    >>> x_unpad, indices, cu_seqlens, max_seqlen = cuflash.unpad_input(x, mask)
    >>> x_unpad[:, 0], indices, cu_seqlens, max_seqlen
    (array([1, 2, 4]), array([0, 1, 3]), array([0, 2, 3], dtype=int32), 2)
    """
    check_tokens("x", x, "attention_mask", attention_mask)
    tokens = attention_mask != 0
    batch, seqlen = tokens.shape
    indices = np.flatnonzero(tokens)
    seqlens = tokens.sum(axis=1)
    cu_seqlens = np.zeros_like(seqlens, shape=batch + 1, dtype=np.int32)
    cu_seqlens[1:] = seqlens.cumsum()
    max_seqlen = int(seqlens.max()) if batch else 0
    return x.reshape(batch * seqlen, *x.shape[2:])[indices], indices, cu_seqlens, max_seqlen


def check_tokens(name: str, x: Array, mask_name: str, mask: Array) -> None:
    """Refuse a mask that does not say of each place of the padded sequences `x` whether it is taken."""
    backend_of(x, mask, names=(name, mask_name))
    if mask.dtype.kind not in "biu":
        raise TypeError(f"{mask_name}: dtype {mask.dtype} is not supported here; allowed are bool and int")
    if mask.ndim != 2 or x.shape[:2] != mask.shape:
        raise ValueError(
            f"{mask_name}: shape is {mask.shape}; it must be (batch, seqlen), the first two axes of {name}, "
            f"whose shape is {x.shape}"
        )


def pad_input(x_unpad: Array, indices: Array, batch: int, seqlen: int) -> Array:
    """Put packed tokens back to where :func:`unpad_input` found them, and 0 elsewhere.

    The gradient of ``x_unpad`` is ``dx.reshape(batch * seqlen, ...)[indices]``.

    Parameters
    ----------
    x_unpad : array, shape (total, ...)
        Packed tokens, of any dtype.
    indices : array of int, shape (total,)
        Their places in the flattened (batch, seqlen), from 0 to ``batch * seqlen - 1``, no place twice. On CuPy arrays
        this is not checked: the call would have to wait for the GPU.
    batch, seqlen : int
        The shape of the padded batch.

    Returns
    -------
    array, shape (batch, seqlen, ...)

    Raises
    ------
    TypeError, ValueError
        If an array is not of this kind, dtype or shape.

    References
    ----------
    As of :func:`unpad_input`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> cuflash.pad_input(np.array([[1], [2], [4]]), np.array([0, 1, 3]), batch=2, seqlen=3)[:, :, 0]
    array([[1, 2, 0],
           [4, 0, 0]])
    """
    backend_of(x_unpad, indices, names=("x_unpad", "indices"))
    if indices.dtype.kind not in "iu":
        raise TypeError(f"indices: dtype {indices.dtype} is not supported here; allowed are integers")
    if x_unpad.ndim == 0 or indices.shape != x_unpad.shape[:1]:
        raise ValueError(
            f"indices: shape is {indices.shape}; it must be (total,), the first axis of the tokens, whose shape is "
            f"{x_unpad.shape}"
        )
    for name, size in (("batch", batch), ("seqlen", seqlen)):
        if not _checks.is_size(size):
            raise ValueError(f"{name}: got {size!r}; it must be an int >= 0")
    batch, seqlen = int(batch), int(seqlen)  # Python's, whose product has any size
    if isinstance(indices, np.ndarray):
        _checks.within("indices", indices, 0, batch * seqlen - 1, "below batch * seqlen")
        places, counts = np.unique(indices, return_counts=True)
        if len(places) != len(indices):
            raise ValueError(
                f"indices: has {places[counts > 1][0]} more than once; each token needs a place of its own"
            )
    padded = np.zeros_like(x_unpad, shape=(batch * seqlen, *x_unpad.shape[1:]))
    padded[indices] = x_unpad
    return padded.reshape(batch, seqlen, *x_unpad.shape[1:])
