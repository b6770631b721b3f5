"""flash-attn's way from padded to packed sequences and back."""

from __future__ import annotations

import numpy as np

from .. import _padding
from .._backends import backend_of
from ._options import Array


def unpad_input(
    hidden_states: Array, attention_mask: Array, unused_mask: Array | None = None
) -> tuple[Array, Array, Array, int, Array]:
    """Pack the tokens of padded sequences one after the other.

    Parameters
    ----------
    hidden_states : array, shape (batch, seqlen, ...)
        Padded sequences.
    attention_mask : array, shape (batch, seqlen)
        bool or int; True or 1 where there is a token.
    unused_mask : array, shape (batch, seqlen), optional
        True or 1 where a place is kept that holds no token.

    Returns
    -------
    hidden_states : array, shape (total, ...)
        The tokens that either mask selects.
    indices : array, shape (total,)
        Where they stood in the flattened (batch, seqlen).
    cu_seqlens : array, shape (batch + 1,)
        int32; sequence ``b`` has the rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
    max_seqlen_in_batch : int
        Length of the longest sequence. It is known on the host, so on CuPy arrays the call waits for the GPU.
    seqused : array, shape (batch,)
        int32; how many tokens `attention_mask` selects in each sequence.

    Raises
    ------
    TypeError, ValueError
        As :func:`cuflash.unpad_input` does.

    References
    ----------
    https://github.com/Dao-AILab/flash-attention, ``flash_attn/bert_padding.py`` of version 2.8.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.flash_attn import pad_input, unpad_input
    >>> x = np.arange(1, 7).reshape(2, 3, 1)
    >>> packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, np.array([[1, 1, 0], [1, 0, 0]]))
    >>> packed[:, 0], indices, cu_seqlens, max_seqlen
    (array([1, 2, 4]), array([0, 1, 3]), array([0, 2, 3], dtype=int32), 2)
    >>> pad_input(packed, indices, 2, 3)[:, :, 0]
    array([[1, 2, 0],
           [4, 0, 0]])
    """
    _padding.check_tokens("hidden_states", hidden_states, "attention_mask", attention_mask)
    if unused_mask is not None:
        _padding.check_tokens("hidden_states", hidden_states, "unused_mask", unused_mask)
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    return (*_padding.unpad_input(hidden_states, kept), used.sum(axis=-1, dtype=np.int32))


def pad_input(hidden_states: Array, indices: Array, batch: int, seqlen: int) -> Array:
    """Put packed tokens back to where :func:`unpad_input` found them, and 0 elsewhere.

    Parameters
    ----------
    hidden_states : array, shape (total, ...)
        Packed tokens.
    indices : array, shape (total,)
        Their places in the flattened (batch, seqlen).
    batch, seqlen : int
        The shape of the padded batch.

    Returns
    -------
    array, shape (batch, seqlen, ...)

    Raises
    ------
    TypeError, ValueError
        As :func:`cuflash.pad_input` does.

    References
    ----------
    As of :func:`unpad_input`.

    Examples
    --------
    See :func:`unpad_input`.
    """
    backend_of(hidden_states, indices, names=("hidden_states", "indices"))
    return _padding.pad_input(hidden_states, indices, batch, seqlen)
