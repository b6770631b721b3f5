"""flash-attn's functions of arrays (batch, seqlen, nheads, headdim)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .._attention import attention
from ._attn_probs import signed_weights
from ._options import Array, check_axes, flash_attn_options, named


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    r"""Attention of queries, keys and values, as ``flash_attn.flash_attn_func`` computes it.

    .. math:: \mathrm{out}_i = \sum_j \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}} v_j,
              \qquad s_{ij} = \mathrm{softmax\_scale} \cdot q_i \cdot k_j

    Parameters
    ----------
    q : array, shape (batch, seqlen_q, nheads, headdim)
        Like ``k`` and ``v`` of a dtype that :func:`cuflash.attention` takes, in any strides.
    k : array, shape (batch, seqlen_k, nheads_k, headdim)
        ``nheads`` must be a multiple of ``nheads_k``; query head ``h`` uses key head ``h // (nheads // nheads_k)``.
    v : array, shape (batch, seqlen_k, nheads_k, headdim_v)
        For flash-attn ``headdim_v`` is ``headdim``; here they may differ.
    dropout_p : float, default 0.0
        Probability to drop a weight, in [0, 1); those that stay are divided by ``1 - dropout_p``. Which ones stay is
        random, see :func:`manual_seed`. It should be 0.0 during evaluation.
    softmax_scale : float, optional
        Factor of the scores. Default: ``1 / sqrt(headdim)``.
    causal : bool, default False
        Query ``i`` sees key ``j`` iff ``j <= i + seqlen_k - seqlen_q``: aligned to the bottom right.
    window_size : (int, int), default (-1, -1)
        Query ``i`` sees the keys from ``i + seqlen_k - seqlen_q - window_size[0]`` to
        ``i + seqlen_k - seqlen_q + window_size[1]`` inclusive; -1 means no limit. It may be an array of two ints.
    softcap : float, default 0.0
        If > 0, a score ``s`` becomes ``softcap * tanh(s / softcap)``.
    alibi_slopes : array, shape (nheads,) or (batch, nheads), optional
        float32; ``alibi_slopes[h] * abs(i + seqlen_k - seqlen_q - j)`` is subtracted from the scores.
    deterministic : bool, default False
        Of no effect: there is no backward here, and the forward always is.
    return_attn_probs : bool, default False
        Also return ``softmax_lse`` and ``S_dmask``. For tests: with dropout it takes memory of
        ``seqlen_q * seqlen_k`` for each head.

    Returns
    -------
    out : array, shape (batch, seqlen_q, nheads, headdim_v)
        In the dtype of ``q``. Queries that see no key have 0.
    softmax_lse : array, shape (batch, nheads, seqlen_q)
        Only if ``return_attn_probs``; the log of the sum of exponentials of each row of scores, float32. Queries
        that see no key have -inf, in flash-attn +inf.
    S_dmask : array, shape (batch, nheads, seqlen_q, seqlen_k), or None
        Only if ``return_attn_probs``; the weights before dropout, negative where they were dropped. None if
        ``dropout_p`` is 0, in flash-attn a tensor of no elements.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`cuflash.attention` does, and if an array has not four axes.

    References
    ----------
    https://github.com/Dao-AILab/flash-attention, ``flash_attn/flash_attn_interface.py`` of version 2.8.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.flash_attn import flash_attn_func
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 4, 64), dtype=np.float32)
    >>> flash_attn_func(q, k, v, causal=True, window_size=(32, -1)).shape
    (2, 100, 4, 64)
    """
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_axes(name, array, "batch", f"seqlen_{'q' if name == 'q' else 'k'}", "nheads", "headdim")
    options = flash_attn_options(
        q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    attend = partial(attention, q, k, layout="bshd")
    if not return_attn_probs:
        return attend(v, **options)
    out, lse = attend(v, **options, return_lse=True)
    if not dropout_p:
        return out, lse, None
    seqlen_k = v.shape[1]
    weights = signed_weights(attend, v, options, np.arange(seqlen_k, like=v), seqlen_k)
    return out, lse, weights.swapaxes(1, 2)


@named(q="qkv")
def flash_attn_qkvpacked_func(
    qkv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` of queries, keys and values in one array, of which no copy is made.

    Parameters
    ----------
    qkv : array, shape (batch, seqlen, 3, nheads, headdim)
        Queries, keys and values.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for :func:`flash_attn_func`.

    Returns
    -------
    out, softmax_lse, S_dmask
        As :func:`flash_attn_func` does.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`flash_attn_func` does.

    References
    ----------
    As of :func:`flash_attn_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.flash_attn import flash_attn_qkvpacked_func
    >>> qkv = np.random.default_rng(0).standard_normal((2, 100, 3, 4, 64), dtype=np.float32)
    >>> flash_attn_qkvpacked_func(qkv, causal=True).shape
    (2, 100, 4, 64)
    """
    check_axes("qkv", qkv, "batch", "seqlen", 3, "nheads", "headdim")
    return flash_attn_func(
        qkv[:, :, 0],
        qkv[:, :, 1],
        qkv[:, :, 2],
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
def flash_attn_kvpacked_func(
    q: Array,
    kv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` of keys and values in one array, of which no copy is made.

    Parameters
    ----------
    q : array, shape (batch, seqlen_q, nheads, headdim)
        Queries.
    kv : array, shape (batch, seqlen_k, 2, nheads_k, headdim)
        Keys and values.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As for :func:`flash_attn_func`.

    Returns
    -------
    out, softmax_lse, S_dmask
        As :func:`flash_attn_func` does.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`flash_attn_func` does.

    References
    ----------
    As of :func:`flash_attn_func`.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.flash_attn import flash_attn_kvpacked_func
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 10, 4, 64), dtype=np.float32)
    >>> kv = rng.standard_normal((2, 100, 2, 1, 64), dtype=np.float32)
    >>> flash_attn_kvpacked_func(q, kv, causal=True).shape
    (2, 10, 4, 64)
    """
    check_axes("kv", kv, "batch", "seqlen_k", 2, "nheads_k", "headdim")
    return flash_attn_func(
        q,
        kv[:, :, 0],
        kv[:, :, 1],
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
