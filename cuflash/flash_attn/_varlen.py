"""flash-attn's functions of packed sequences, arrays (total, nheads, headdim)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _checks
from .._varlen import attention_varlen
from ._attn_probs import signed_weights
from ._options import Array, check_axes, flash_attn_options, named


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Array | None = None,
) -> Any:
    """:func:`flash_attn_func` of each of the sequences that are packed one after the other.

    Parameters
    ----------
    q : array, shape (total_q, nheads, headdim)
        The queries of all sequences.
    k : array, shape (total_k, nheads_k, headdim)
        The keys of all sequences.
    v : array, shape (total_k, nheads_k, headdim_v)
        The values of all sequences.
    cu_seqlens_q, cu_seqlens_k : array, shape (batch + 1,)
        int32; sequence ``b`` has the queries ``cu_seqlens_q[b]:cu_seqlens_q[b + 1]``, and likewise its keys.
    max_seqlen_q, max_seqlen_k : int
        Lengths of the longest sequences. They set the shape of ``S_dmask`` and change nothing else: the kernels read
        the lengths from the arrays.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for :func:`flash_attn_func`, within each sequence.
    block_table : None
        flash-attn's paged keys and values are not supported.

    Returns
    -------
    out : array, shape (total_q, nheads, headdim_v)
        In the dtype of ``q``.
    softmax_lse : array, shape (nheads, total_q)
        Only if ``return_attn_probs``.
    S_dmask : array, shape (batch, nheads, max_seqlen_q, max_seqlen_k), or None
        Only if ``return_attn_probs``; as :func:`flash_attn_func` returns it, filled up with 0.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`cuflash.attention_varlen` does; NotImplementedError for a ``block_table``.

    References
    ----------
    https://github.com/Dao-AILab/flash-attention, ``flash_attn/flash_attn_interface.py`` of version 2.8.

    Examples
    --------
    Sequences of 30 and 70 tokens:

    >>> import numpy as np
    >>> from cuflash.flash_attn import flash_attn_varlen_func
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 4, 64), dtype=np.float32)
    >>> cu_seqlens = np.array([0, 30, 100], np.int32)
    >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 70, 70, causal=True).shape
    (100, 4, 64)
    """
    if block_table is not None:  # first, for with one k and v have four axes
        raise NotImplementedError("block_table: paged keys and values are not supported; only None is allowed")
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_axes(name, array, f"total_{'q' if name == 'q' else 'k'}", "nheads", "headdim")
    options = flash_attn_options(
        q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )

    def attend(values: Array, **options: Any) -> Any:
        return attention_varlen(q, k, values, cu_seqlens_q, cu_seqlens_k, **options)

    if not return_attn_probs:
        return attend(v, **options)
    out, lse = attend(v, **options, return_lse=True)
    if not dropout_p:
        return out, lse, None
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not _checks.is_size(length):
            raise ValueError(f"{name}: got {length!r}; it must be an int >= 0")
    key = np.arange(v.shape[0], like=v)
    first_key = cu_seqlens_k[np.searchsorted(cu_seqlens_k, key, side="right") - 1]
    weights = signed_weights(attend, v, options, key - first_key, max_seqlen_k)
    return out, lse, _padded(weights, cu_seqlens_q, max_seqlen_q).swapaxes(1, 2)


def _padded(x: Array, cu_seqlens: Array, max_seqlen: int) -> Array:
    """The sequences packed in x as (batch, max_seqlen, ...), filled up with 0."""
    row = cu_seqlens[:-1, None] + np.arange(max_seqlen, like=x)
    row = np.where(row < cu_seqlens[1:, None], row, x.shape[0])
    return np.concatenate([x, np.zeros((1, *x.shape[1:]), x.dtype, like=x)])[row]


@named(q="qkv", cu_seqlens_q="cu_seqlens", max_seqlen_q="max_seqlen")
def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of queries, keys and values in one array, of which no copy is made.

    Parameters
    ----------
    qkv : array, shape (total, 3, nheads, headdim)
        Queries, keys and values.
    cu_seqlens : array, shape (batch + 1,)
        int32; sequence ``b`` has the rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
    max_seqlen : int
        Length of the longest sequence.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for :func:`flash_attn_varlen_func`.

    Returns
    -------
    out, softmax_lse, S_dmask
        As :func:`flash_attn_varlen_func` does.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`flash_attn_varlen_func` does.

    References
    ----------
    As of :func:`flash_attn_varlen_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.flash_attn import flash_attn_varlen_qkvpacked_func
    >>> qkv = np.random.default_rng(0).standard_normal((100, 3, 4, 64), dtype=np.float32)
    >>> flash_attn_varlen_qkvpacked_func(qkv, np.array([0, 30, 100], np.int32), 70).shape
    (100, 4, 64)
    """
    check_axes("qkv", qkv, "total", 3, "nheads", "headdim")
    return flash_attn_varlen_func(
        qkv[:, 0],
        qkv[:, 1],
        qkv[:, 2],
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@named(k="kv", v="kv")
def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of keys and values in one array, of which no copy is made.

    Parameters
    ----------
    q : array, shape (total_q, nheads, headdim)
        Queries.
    kv : array, shape (total_k, 2, nheads_k, headdim)
        Keys and values.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As for :func:`flash_attn_varlen_func`.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for :func:`flash_attn_varlen_func`.

    Returns
    -------
    out, softmax_lse, S_dmask
        As :func:`flash_attn_varlen_func` does.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`flash_attn_varlen_func` does.

    References
    ----------
    As of :func:`flash_attn_varlen_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.flash_attn import flash_attn_varlen_kvpacked_func
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((20, 4, 64), dtype=np.float32)
    >>> kv = rng.standard_normal((100, 2, 1, 64), dtype=np.float32)
    >>> cu_seqlens_q, cu_seqlens_k = np.array([[0, 10, 20], [0, 30, 100]], np.int32)
    >>> flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, 10, 70).shape
    (20, 4, 64)
    """
    check_axes("kv", kv, "total_k", 2, "nheads_k", "headdim")
    return flash_attn_varlen_func(
        q,
        kv[:, 0],
        kv[:, 1],
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
