"""The public functions for packed sequences of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _checks
from ._attention import ScoreMod
from ._plan import Array, make_vjp, run_backward, run_forward
from ._problem import Causal, WindowSize
from ._variants import gather

PACKED_LAYOUT = "bshd"  # packed arrays are one row of (sequence, heads, dim)


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    /,
    *,
    seqused_k: Array | None = None,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: ScoreMod | None = None,
    mod_args: dict[str, Any] | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
) -> Any:
    """Exact attention within each of several sequences, packed one after the other without padding.

    Computes ``attention(q[q0:q1], k[k0:k1], v[k0:k1], layout="bshd", ...)`` for every sequence ``s``, where
    ``q0, q1 = cu_seqlens_q[s : s + 2]`` and ``k0, k1 = cu_seqlens_k[s : s + 2]``. ``M`` and ``N`` in the formulas of
    :func:`attention` are the lengths of the sequence, ``i`` and ``j`` count within it, and ``b`` is its number ``s``.

    Parameters
    ----------
    q : array, shape (total_q, Hq, D)
        The queries of all sequences.
    k : array, shape (total_k, Hkv, D)
    v : array, shape (total_k, Hkv, Dv)
        Their keys and values.
    cu_seqlens_q, cu_seqlens_k : array of int32, shape (B + 1,)
        Where the sequences begin, and the last one ends: 0 first, never decreasing, at most ``total_q`` or
        ``total_k`` last. A sequence may have no queries or no keys. On a GPU they are read by the kernels alone, so a
        CUDA graph can be replayed with other lengths; offsets beyond the arrays are cut off there.
    seqused_k : array of int32, shape (B,), optional
        How many keys of each sequence are used: its first. Default: all. ``N`` is that number.
    alibi_slopes : array, shape (Hq,) or (B, Hq), optional
    scale, causal, window_size, softcap, sinks, dropout_p, seed, score_mod, mask_mod, mod_args, out, return_lse
        As for :func:`attention`.
    kernel : {"auto", "sm90", "sm80", "wmma"}, default "auto"
        As for :func:`attention`; "fa1" and "naive" have no packed sequences.

    Returns
    -------
    out : array, shape (total_q, Hq, Dv)
        In the dtype of ``q``. Rows that see no key, or belong to no sequence, are 0.
    lse : array, shape (Hq, total_q)
        Only if ``return_lse``. Rows that belong to no sequence are -inf.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`attention` does. The values of ``cu_seqlens_q``, ``cu_seqlens_k`` and ``seqused_k`` are checked in
        NumPy arrays only.

    See Also
    --------
    unpad_input, pad_input : pack a padded batch, and back.

    References
    ----------
    As of :func:`attention`; packed sequences as in T. Dao's flash-attn, https://github.com/Dao-AILab/flash-attention.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 100, 4, 64), dtype=np.float32)
    >>> offsets = np.array([0, 30, 100], np.int32)  # sequences of 30 and 70
    >>> out = cuflash.attention_varlen(q, k, v, offsets, offsets, causal=True)
    >>> first = cuflash.attention(q[:30], k[:30], v[:30], layout="bshd", causal=True)
    >>> out.shape, bool(np.allclose(out[:30], first, atol=1e-6))
    ((100, 4, 64), True)
    """
    backend, variant = gather(
        {"q": q, "k": k, "v": v},
        offsets={"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
        out=out,
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        seed=seed,
        score_mod=score_mod,
        mask_mod=mask_mod,
        mod_args=mod_args,
    )
    window_size = _checks.window_size(window_size)
    options = (scale, causal, window_size, PACKED_LAYOUT, kernel, softcap, dropout_p, variant.mod)
    return run_forward(backend, variant, q, k, v, out, return_lse, options)


def attention_varlen_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    /,
    *,
    seqused_k: Array | None = None,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: ScoreMod | None = None,
    mod_args: dict[str, Any] | None = None,
    kernel: str = "auto",
    dlse: Array | None = None,
    return_dsinks: bool = False,
    deterministic: bool = False,
) -> tuple[Array, ...]:
    """Gradients of :func:`attention_varlen`, by the formulas of :func:`attention_backward`.

    Parameters
    ----------
    dout : array, shape (total_q, Hq, Dv)
        Gradient with respect to ``out``, in the dtype of ``q``.
    q, k, v, cu_seqlens_q, cu_seqlens_k : array
        The inputs of :func:`attention_varlen`.
    out : array, shape (total_q, Hq, Dv)
    lse : array, shape (Hq, total_q)
        What it returned with ``return_lse=True``.
    seqused_k, scale, causal, window_size, softcap, alibi_slopes, sinks, dropout_p, seed
        As they were in the forward call.
    score_mod, mask_mod, mod_args
        Likewise.
    kernel : {"auto", "sm90", "sm80", "wmma"}, default "auto"
        As for :func:`attention_backward`.
    dlse : array, shape (Hq, total_q), optional
        Gradient with respect to ``lse``. Default: 0.
    return_dsinks, deterministic : bool, default False
        As for :func:`attention_backward`.

    Returns
    -------
    dq, dk, dv : array
        In the shapes and dtypes of ``q``, ``k`` and ``v``; 0 where a row belongs to no sequence or is not used.
    dsinks : array, shape (Hq,)
        Only if ``return_dsinks``. In the dtype of ``sinks``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`attention_varlen` and :func:`attention_backward` do.

    References
    ----------
    Those of :func:`attention_varlen` and :func:`attention_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 100, 4, 64), dtype=np.float32)
    >>> offsets = np.array([0, 30, 100], np.int32)
    >>> out, lse = cuflash.attention_varlen(q, k, v, offsets, offsets, return_lse=True)
    >>> dq, dk, dv = cuflash.attention_varlen_backward(dout, q, k, v, out, lse, offsets, offsets)
    >>> dk.shape
    (100, 4, 64)
    """
    backend, variant = gather(
        {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse},
        offsets={"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        seed=seed,
        score_mod=score_mod,
        mask_mod=mask_mod,
        mod_args=mod_args,
        dlse=dlse,
    )
    window_size = _checks.window_size(window_size)
    options = (scale, causal, window_size, PACKED_LAYOUT, kernel, softcap, dropout_p, variant.mod)
    return run_backward(backend, variant, (dout, q, k, v, out, lse), (False, return_dsinks, deterministic), options)


def attention_varlen_vjp(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    /,
    *,
    return_lse: bool = False,
    return_dsinks: bool = False,
    deterministic: bool = False,
    **options: Any,
) -> tuple[Any, Callable[..., tuple[Array, ...]]]:
    """Attention of packed sequences, and its vector-Jacobian product, by the formula of :func:`attention_vjp`.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k : array
        As for :func:`attention_varlen`.
    **options
        Those of :func:`attention_varlen`, but ``out``; a ``kernel`` by name computes the gradients too, so it must have
        them.
    return_lse : bool, default False
        Whether to return ``lse`` too.
    return_dsinks, deterministic : bool, default False
        As for :func:`attention_backward`.

    Returns
    -------
    out : array, shape (total_q, Hq, Dv)
        What :func:`attention_varlen` returns; with ``return_lse`` the pair ``(out, lse)``.
    vjp : callable
        ``vjp(dout, dlse=None)`` returns ``(dq, dk, dv)``, then ``dsinks`` if asked for. It keeps references to all
        arrays of the call and to ``out``: leave them unchanged until it has been called.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`attention_varlen` and :func:`attention_vjp` do.

    References
    ----------
    Those of :func:`attention_varlen` and :func:`attention_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 100, 4, 64), dtype=np.float32)
    >>> offsets = np.array([0, 30, 100], np.int32)
    >>> out, vjp = cuflash.attention_varlen_vjp(q, k, v, offsets, offsets, causal=True)
    >>> dq, dk, dv = vjp(np.ones_like(out))
    >>> dq.shape
    (100, 4, 64)
    """
    return make_vjp(
        attention_varlen,
        attention_varlen_backward,
        (q, k, v),
        (cu_seqlens_q, cu_seqlens_k),
        options,
        return_lse=return_lse,
        return_dsinks=return_dsinks,
        deterministic=deterministic,
    )
