"""What attention and its gradients are: the reference in float64, and the plain one of a dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import _check_options
from ._formula import Arithmetic, forward, gradients, stored
from ._options import Array, Options


def reference_attention(
    q: Any, k: Any, v: Any, /, *, dtype: DTypeLike = np.float64, **options: Any
) -> tuple[Array, Array]:
    r"""Compute attention in float64, as the formula says.

    .. math:: O = \mathrm{softmax}(S) V, \qquad \mathrm{lse}_i = \log \sum_j \exp(s_{ij}), \qquad
              S = \text{scale} \cdot Q K^T

    Sums run over the visible keys alone: what a hidden key or value holds, NaN included, has no influence.
    A row without visible keys gives 0 and a log-sum-exp of -inf.

    Parameters
    ----------
    q, k, v : array
        Queries ``(..., Hq, M, D)``, keys ``(..., Hkv, N, D)`` and values ``(..., Hkv, N, Dv)``, of 2 to 4 axes,
        NumPy or CuPy, of any floating dtype; the batch axes broadcast, and ``Hq`` is a multiple of ``Hkv``.
    dtype : dtype, default float64
        The type to compute in; ``numpy.longdouble`` gives a reference for float64.
    **options
        Those of :func:`cuflash.attention` that change the result: `scale`, `causal`, `window_size`, `softcap`,
        `alibi_slopes`, `bias`, `mask`, `block_mask`, `sinks`, `dropout_p`, `seed`, `score_mod`, `mask_mod`, `layout`.
        `score_mod` and `mask_mod` are Python callables.

    Returns
    -------
    out : numpy.ndarray
        ``(..., Hq, M, Dv)`` in `dtype`, in the layout asked for.
    lse : numpy.ndarray
        ``(..., Hq, M)`` in `dtype`, whatever the layout.

    Raises
    ------
    TypeError
        If an option is not one of these, `score_mod` or `mask_mod` is a CUDA expression, or `score_mod` uses a function
        that has no derivative here.
    ValueError
        If an option has a value that is not allowed, or shapes do not fit together (in words of NumPy's).

    References
    ----------
    A. Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, section 3.2.1; the order of the options and
    their sources are those of :func:`cuflash.attention`.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 4)), np.zeros((2, 4)), np.array([[1.0], [3.0]])
    >>> out, lse = reference_attention(q, k, v)
    >>> out.item(), round(lse.item(), 4)
    (2.0, 0.6931)
    >>> out, lse = reference_attention(q, k, v, mask=np.array([[True, False]]))
    >>> out.item(), lse.item()
    (1.0, 0.0)
    """
    results = forward(q, k, v, Options.of(options), Arithmetic.reference(dtype))
    return results["out"], results["lse"]


def reference_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    dlse: Any = None,
    return_dbias: bool = False,
    return_dsinks: bool = False,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, ...]:
    r"""Compute the gradients of ``sum(dout * out) + sum(dlse * lse)`` in float64, as the formula says.

    .. math:: dV = P^T dO, \quad dS = P \circ (dO V^T - \mathrm{rowsum}(dO \circ O) + d\mathrm{lse}), \quad
              dQ = \text{scale} \cdot dS K, \quad dK = \text{scale} \cdot dS^T Q

    With options the formulas are those of :func:`cuflash.attention_backward`.

    Parameters
    ----------
    dout : array
        The gradient of the output, of the output's shape.
    q, k, v, dtype, **options
        As in :func:`reference_attention`.
    dlse : array, optional
        The gradient of the log-sum-exp, of its shape; 0 by default.
    return_dbias, return_dsinks : bool, default False
        Whether to return the gradients of `bias` and of `sinks`.

    Returns
    -------
    dq, dk, dv[, dbias][, dsinks] : numpy.ndarray
        Of the shapes of `q`, `k`, `v`, `bias` and `sinks`, in `dtype`; gradients of broadcast axes and grouped heads
        are summed.

    Raises
    ------
    TypeError, ValueError
        As :func:`reference_attention` does; ValueError also if `return_dbias` or `return_dsinks` is True and there is
        no `bias` or no `sinks`.

    References
    ----------
    T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", arXiv:2205.14135,
    appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 4)), np.zeros((2, 4)), np.array([[1.0], [3.0]])
    >>> dq, dk, dv = reference_attention_backward(np.ones((1, 1)), q, k, v)
    >>> dv.ravel().tolist()
    [0.5, 0.5]
    """
    results = gradients(dout, q, k, v, Options.of(options, dlse=dlse), Arithmetic.reference(dtype))
    return _returned(results, return_dbias, return_dsinks)


def reference_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    /,
    *,
    seqused_k: Any = None,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, Array]:
    """Compute attention of packed sequences in float64, one after the other, as :func:`reference_attention` does.

    Parameters
    ----------
    q, k, v : array
        Packed queries ``(total_q, Hq, D)``, keys ``(total_k, Hkv, D)`` and values ``(total_k, Hkv, Dv)``.
    cu_seqlens_q, cu_seqlens_k : array of int
        Where the sequences begin, and where the last one ends: one more number than there are sequences.
    seqused_k : array of int, optional
        How many keys of each sequence are used; all of them by default.
    dtype, **options
        As in :func:`reference_attention`, without `bias`, `mask`, `block_mask` and `layout`.

    Returns
    -------
    out : numpy.ndarray
        ``(total_q, Hq, Dv)``; 0 in rows of no sequence.
    lse : numpy.ndarray
        ``(Hq, total_q)``; -inf in rows of no sequence.

    Raises
    ------
    TypeError, ValueError
        As :func:`reference_attention` does; ValueError also for offsets that :func:`cuflash.attention_varlen` refuses.

    References
    ----------
    As of :func:`cuflash.attention_varlen`.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((3, 1, 4)), np.zeros((2, 1, 4)), np.array([[[1.0]], [[3.0]]])
    >>> out, lse = reference_attention_varlen(q, k, v, np.array([0, 1, 2]), np.array([0, 2, 2]))
    >>> out.ravel().tolist()
    [2.0, 0.0, 0.0]
    """
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    return reference_attention(q, k, v, dtype=dtype, **lengths, **options)


def reference_attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    /,
    *,
    seqused_k: Any = None,
    dlse: Any = None,
    return_dsinks: bool = False,
    dtype: DTypeLike = np.float64,
    **options: Any,
) -> tuple[Array, ...]:
    """Compute the gradients of packed sequences in float64, as :func:`reference_attention_backward` those of each.

    Parameters
    ----------
    dout : array
        The gradient of the output, ``(total_q, Hq, Dv)``.
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, dtype, **options
        As in :func:`reference_attention_varlen`.
    dlse, return_dsinks
        As in :func:`reference_attention_backward`.

    Returns
    -------
    dq, dk, dv[, dsinks] : numpy.ndarray
        0 in rows of no sequence and for keys that are not used.

    Raises
    ------
    TypeError, ValueError
        As :func:`reference_attention_backward` and :func:`reference_attention_varlen` do.

    References
    ----------
    As of :func:`cuflash.attention_varlen`.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((3, 1, 4)), np.zeros((2, 1, 4)), np.array([[[1.0]], [[3.0]]])
    >>> cu_seqlens = np.array([0, 1, 2]), np.array([0, 2, 2])
    >>> _, _, dv = reference_attention_varlen_backward(np.ones((3, 1, 1)), q, k, v, *cu_seqlens)
    >>> dv.ravel().tolist()
    [0.5, 0.5]
    """
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    options |= {"dlse": dlse, "return_dsinks": return_dsinks, "dtype": dtype}
    return reference_attention_backward(dout, q, k, v, **lengths, **options)


def plain_attention(q: Any, k: Any, v: Any, /, **options: Any) -> tuple[Array, Array]:
    r"""Compute attention as plain array code in the input's dtype would: the yardstick of accuracy.

    .. math:: O = \mathrm{round}(\mathrm{round}(\mathrm{softmax}(S)) V)

    Scores and softmax are computed in float32 (float64 for float64 inputs), the weights are rounded to the
    input's dtype before they meet the values, and so is the output.

    Parameters
    ----------
    q, k, v, **options
        As in :func:`reference_attention`, the arrays all of one dtype.

    Returns
    -------
    out : numpy.ndarray
        As :func:`reference_attention` does, in the dtype of `q`.
    lse : numpy.ndarray
        Likewise, in float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        As :func:`reference_attention` does.

    References
    ----------
    A yardstick as in the tests of https://github.com/Dao-AILab/flash-attention, ``tests/test_flash_attn.py``, which
    allow twice the error of attention written in PyTorch.

    Examples
    --------
    >>> import numpy as np
    >>> out, lse = plain_attention(*np.ones((3, 5, 8), np.float16))
    >>> out.dtype.name, lse.dtype.name
    ('float16', 'float32')
    """
    checked = Options.of(options)
    results = stored(forward(q, k, v, checked, Arithmetic.plain(q.dtype)), q.dtype, checked)
    return results["out"], results["lse"]


def plain_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    dlse: Any = None,
    return_dbias: bool = False,
    return_dsinks: bool = False,
    **options: Any,
) -> tuple[Array, ...]:
    """Compute the gradients as plain array code in the input's dtype would; see :func:`plain_attention`.

    The formulas are those of :func:`reference_attention_backward`. As a backward pass that is given `out` and `lse`
    of the forward pass, it computes ``rowsum(dO * O)`` from the rounded output and ``P = exp(S - lse)`` from `lse`;
    ``P`` and ``dS`` are rounded to the input's dtype before they are multiplied.

    Parameters
    ----------
    dout, q, k, v, dlse, return_dbias, return_dsinks, **options
        As in :func:`reference_attention_backward`, the arrays all of one dtype.

    Returns
    -------
    dq, dk, dv[, dbias][, dsinks] : numpy.ndarray
        As :func:`reference_attention_backward` does, in the dtypes of what they are the gradients of.

    Raises
    ------
    TypeError, ValueError
        As :func:`reference_attention_backward` does.

    References
    ----------
    As of :func:`plain_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> dq, dk, dv = plain_attention_backward(*np.ones((4, 5, 8), np.float16))
    >>> dv.dtype.name, dv.shape
    ('float16', (5, 8))
    """
    checked = Options.of(options, dlse=dlse)
    results = gradients(dout, q, k, v, checked, Arithmetic.plain(q.dtype))
    return _returned(stored(results, q.dtype, checked), return_dbias, return_dsinks)


def _returned(results: dict[str, Array], return_dbias: bool, return_dsinks: bool) -> tuple[Array, ...]:
    given = [name.removeprefix("d") for name in results]
    _check_options.gradient_flags(given, return_dbias=return_dbias, return_dsinks=return_dsinks, deterministic=False)
    names = ["dq", "dk", "dv"] + ["dbias"] * return_dbias + ["dsinks"] * return_dsinks
    return tuple(results[name] for name in names)
