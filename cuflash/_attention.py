"""The public functions: attention, its backward, and both as a vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _checks
from ._backends import backend_of
from ._block_mask import BlockMask
from ._plan import Array, make_vjp, run_backward, run_forward
from ._problem import Causal, Layout, WindowSize
from ._variants import PLAIN, gather

ScoreMod = str | Callable[..., Any]
"""A CUDA C++ expression for CuPy arrays, a Python callable for NumPy arrays."""


def attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    block_mask: BlockMask | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: ScoreMod | None = None,
    mod_args: dict[str, Any] | None = None,
    layout: Layout = "bhsd",
    out: Array | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
) -> Any:
    r"""Exact attention in memory linear in the sequence lengths [1]_.

    Computes, for every batch entry ``b`` and head ``h``,

    .. math:: \mathrm{out}_i = \sum_j \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}} v_j,
              \qquad s_{ij} = \mathrm{scale} \cdot q_i \cdot k_j

    where the sums run over the keys ``j`` that query ``i`` sees. The options change that in this order:

    1. ``softcap``: :math:`s \leftarrow c \tanh(s / c)`
    2. ``bias``: :math:`s \leftarrow s + \mathrm{bias}_{bhij}`
    3. ``alibi_slopes``: :math:`s \leftarrow s - m_{bh} \, |i + N - M - j|`
    4. ``score_mod``: :math:`s \leftarrow f(s, b, h, i, j)`
    5. ``causal``, ``window_size``, ``mask``, ``mask_mod`` and ``block_mask`` hide keys; a key is seen if all of them
       allow it. Whatever the score of a hidden key is, NaN included, it takes no part.
    6. ``sinks``: one more term :math:`e^{\mathrm{sink}_h}` in the sum of the denominator
    7. ``dropout_p``: weights are 0 with this probability and divided by ``1 - dropout_p`` otherwise, after the
       division by their sum

    Parameters
    ----------
    q : array, shape (..., Hq, M, D)
        Queries. Like ``k`` and ``v`` a ``cupy.ndarray`` (float16, bfloat16, float32) or a ``numpy.ndarray``
        (float64 as well), with 2 to 4 axes and any strides; no copy is made.
    k : array, shape (..., Hkv, N, D)
        Keys. ``Hq`` must be a multiple of ``Hkv``; query head ``h`` uses key head ``h // (Hq // Hkv)``.
        Batch axes broadcast.
    v : array, shape (..., Hkv, N, Dv)
        Values. ``D`` and ``Dv`` may differ; both are 1 to 256.
    scale : float, optional
        Factor of the scores. Default: ``1 / sqrt(D)``.
    causal : bool or {"bottom-right", "top-left"}, default False
        Query ``i`` sees key ``j`` iff ``j <= i + N - M`` (True, the same as "bottom-right"), or iff ``j <= i``
        ("top-left"). They agree when ``M == N``. With 2 queries and 4 keys::

            bottom-right   1 1 1 0     top-left   1 0 0 0
                           1 1 1 1                1 1 0 0

    window_size : (int or None, int or None), optional
        How many keys a query sees to the left and to the right of its own position, which is aligned as for
        ``causal``, without it as for "bottom-right"; None means no limit.
    softcap : float, optional
        Bounds the scores to ``-softcap`` to ``softcap``; greater than 0 [2]_.
    alibi_slopes : array, shape (Hq,) or (B, Hq), optional
        Slopes of the linear biases of ALiBi [3]_, float32.
    bias : array, optional
        Added to the scores; in the dtype of ``q`` or float32. Its shape broadcasts to ``(B, Hq, M, N)``, in every
        layout; any strides, strides of 0 included.
    mask : array of bool, optional
        True where a query sees a key. Shapes and strides as for ``bias``.
    block_mask : BlockMask, optional
        Which blocks of 128 x 128 pairs have pairs that are seen, from :func:`make_block_mask`. The others are
        skipped; in those that are seen wholly ``mask`` and ``mask_mod`` are not looked at. For the rest the call needs
        what the block mask was made of.
    sinks : array, shape (Hq,), optional
        A logit per head that takes weight and gives no value [4]_; in the dtype of ``q`` or float32.
    dropout_p : float, default 0.0
        Probability of dropping a weight, in [0, 1). It counts in steps of 1/65536, so from ``1 - 1/131072`` on none
        stays, but weights that stay are divided by ``1 - dropout_p`` as given: at 0.99999 about 1.5e-5 of them, by
        1e-5.
    seed : int or array, optional
        Which weights are dropped: an int in [0, 2**64), or an array of one uint64, which is read when the kernel
        runs. The same seed drops the same weights in every kernel and backend, forward and backward: those of
        :func:`dropout_mask`, from the counters of Philox4x32-7 [5]_.
    score_mod : str or callable, optional
        Programmable scores [6]_. For CuPy arrays a CUDA C++ expression in ``score``, ``b``, ``h``, ``q_idx``,
        ``kv_idx`` and the names of ``mod_args``, such as ``"score + table(h, q_idx - kv_idx + 512)"``; it is compiled
        into the kernel, and so is its derivative. For NumPy arrays a Python callable
        ``f(score, b, h, q_idx, kv_idx)`` of arrays that broadcast, differentiated through NumPy's functions.
    mask_mod : str or callable, optional
        Likewise, True where a query sees a key; it has no score (None in a callable).
    mod_args : dict, optional
        What the expressions use beside: arrays, as ``name(i, j)`` with an index for each of 1 to 4 axes, and
        numbers (int of 32 bits, float, bool).
    layout : {"bhsd", "bshd"}, default "bhsd"
        Order of the axes: (batch, heads, sequence, dim), or (batch, sequence, heads, dim) as in flash-attn and JAX.
    out : array, optional
        Where to write the result; it must not overlap an input.
    return_lse : bool, default False
        Also return the log of the sum of exponentials of each row of scores.
    kernel : {"auto", "sm90", "sm80", "wmma", "fa1", "naive"}, default "auto"
        Kernel family for CuPy arrays; NumPy arrays take "auto" alone. "auto" is the fastest that can compute the call:
        "sm90" for float16 and bfloat16 on a Hopper GPU, where its copy engine can take the arrays (last axis
        contiguous, rows that begin at multiples of 16 bytes), "sm80" for all dtypes on any GPU since compute capability
        8.0, also on Hopper where few queries meet many keys, else "wmma". A family by name either computes the call or
        says why not, in a ``NotImplementedError``. "fa1" and "naive" are older ways, to compare with.

    Returns
    -------
    out : array, shape (..., Hq, M, Dv)
        In the dtype of ``q``. Rows that see no key are 0.
    lse : array, shape (..., Hq, M)
        Only if ``return_lse``; natural logarithm, float32 (float64 for float64 inputs), in every layout with heads
        before the sequence. It counts the sink and is without dropout. Rows that see no key are -inf, or the sink.

    Raises
    ------
    TypeError
        If an array is of a kind or dtype that is not supported, or an option of a type that is not allowed.
    ValueError
        If shapes do not fit together, or an option has a value that is not allowed. An expression that does not
        compile is one, also if it is a ``score_mod`` that has no derivative.
    NotImplementedError
        If no kernel can compute the call on this GPU.
    RuntimeError
        On CuPy arrays, if NVRTC or the CUDA headers are missing, or CuPy's cache cannot be written; the message says
        what to do.

    See Also
    --------
    attention_varlen : sequences of different lengths without padding.
    merge_states : put together what was computed on parts of the keys.

    Notes
    -----
    Runs on CuPy's current stream and does not synchronise. Scores and sums are float32; float16 and bfloat16 weights
    are rounded to the input type before they multiply ``v``. float32 products have about float32 accuracy, or that of
    TF32 if the environment variable ``CUPY_TF32=1`` was set when cuflash first ran. The same call gives bitwise the
    same result. A NaN or infinity in an input reaches the results that plain attention computes
    from it, and no others; a row whose scores are all -inf counts as one that sees no key, while values and incoming
    gradients are finite.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
       arXiv:2307.08691.
    .. [2] Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", arXiv:2408.00118.
    .. [3] O. Press, N. Smith, M. Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length
       Extrapolation", ICLR 2022, arXiv:2108.12409.
    .. [4] G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453; as a learned
       logit: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925.
    .. [5] J. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    .. [6] J. Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
       arXiv:2412.05496.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 4, 100, 64), dtype=np.float32)
    >>> cuflash.attention(q, k, v, causal=True).shape
    (2, 4, 100, 64)

    A mask and a bias broadcast, here over batch and heads:

    >>> near = abs(np.arange(100)[:, None] - np.arange(100)) < 20
    >>> masked = cuflash.attention(q, k, v, mask=near)
    >>> windowed = cuflash.attention(q, k, v, window_size=(19, 19))
    >>> bool(np.allclose(masked, windowed, atol=1e-6))
    True

    The linear biases of ALiBi, as an option and as a programmable score:

    >>> slopes = 2.0 ** -np.arange(1, 5, dtype=np.float32)
    >>> alibi = cuflash.attention(q, k, v, alibi_slopes=slopes, softcap=30.0)
    >>> programmed = cuflash.attention(
    ...     q, k, v, softcap=30.0, score_mod=lambda score, b, h, i, j: score - slopes[h] * abs(i - j)
    ... )
    >>> bool(np.allclose(alibi, programmed, atol=1e-6))
    True
    """
    if score_mod is alibi_slopes is mask_mod is bias is mod_args is mask is block_mask is sinks is seed is None:
        backend, variant = backend_of(q, k, v) if out is None else backend_of(q, k, v, out), PLAIN
    else:
        backend, variant = gather(
            {"q": q, "k": k, "v": v},
            out=out,
            alibi_slopes=alibi_slopes,
            bias=bias,
            mask=mask,
            block_mask=block_mask,
            sinks=sinks,
            seed=seed,
            score_mod=score_mod,
            mask_mod=mask_mod,
            mod_args=mod_args,
        )
    window_size = _checks.window_size(window_size)
    options = (scale, causal, window_size, layout, kernel, softcap, dropout_p, variant.mod)
    return run_forward(backend, variant, q, k, v, out, return_lse, options)


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    /,
    *,
    scale: float | None = None,
    causal: Causal = False,
    window_size: WindowSize = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    block_mask: BlockMask | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | Array | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: ScoreMod | None = None,
    mod_args: dict[str, Any] | None = None,
    layout: Layout = "bhsd",
    kernel: str = "auto",
    dlse: Array | None = None,
    return_dbias: bool = False,
    return_dsinks: bool = False,
    deterministic: bool = False,
) -> tuple[Array, ...]:
    r"""Gradients of attention with respect to its inputs.

    With the weights :math:`p_{ij} = e^{s_{ij} - \mathrm{lse}_i}`, recomputed tile by tile, and
    :math:`\delta_i = \mathrm{dout}_i \cdot \mathrm{out}_i - \mathrm{dlse}_i`,

    .. math:: dv_j = \sum_i \tilde p_{ij} \, \mathrm{dout}_i, \quad
              ds_{ij} = \tilde p_{ij} \, \mathrm{dout}_i \cdot v_j - p_{ij} \, \delta_i, \quad
              dq_i = \mathrm{scale} \sum_j s'_{ij} \, ds_{ij} k_j, \quad
              dk_j = \mathrm{scale} \sum_i s'_{ij} \, ds_{ij} q_i

    :math:`\tilde p` are the weights after dropout, :math:`s'` is the derivative of the score by the product
    :math:`\mathrm{scale} \cdot q_i \cdot k_j`: 1 unless there is a ``softcap`` or a ``score_mod``. Further

    .. math:: d\mathrm{bias}_{bhij} = \frac{\partial s_{ij}}{\partial \mathrm{bias}_{bhij}} \, ds_{ij}, \quad
              d\mathrm{sink}_h = -\sum_{b,i} e^{\mathrm{sink}_h - \mathrm{lse}_i} \, \delta_i

    Parameters
    ----------
    dout : array, shape (..., Hq, M, Dv)
        Gradient with respect to ``out``, in the dtype of ``q``.
    q, k, v : array
        The inputs of :func:`attention`.
    out : array, shape (..., Hq, M, Dv)
    lse : array, shape (..., Hq, M)
        What ``attention(q, k, v, ..., return_lse=True)`` returned.
    scale, causal, window_size, softcap, alibi_slopes, bias, mask, block_mask, sinks, dropout_p, seed
        As they were in the forward call.
    score_mod, mask_mod, mod_args, layout
        Likewise.
    kernel : {"auto", "sm90", "sm80", "wmma", "naive"}, default "auto"
        As for :func:`attention`; it need not be the same, for each takes ``out`` and ``lse`` of any. "fa1" has no
        gradients.
    dlse : array, shape (..., Hq, M), optional
        Gradient with respect to ``lse``, in its dtype. Default: 0.
    return_dbias, return_dsinks : bool, default False
        Whether to return the gradients of ``bias`` and of ``sinks`` too.
    deterministic : bool, default False
        Whether the result must be bitwise the same in every run. If not, "sm90" up to 128 columns and "sm80" for
        float16 and bfloat16 add up ``dq`` in float32 in whatever order their blocks come, which is mostly faster;
        other results are the same bits in any case.

    Returns
    -------
    dq, dk, dv : array
        In the shapes and dtypes of ``q``, ``k`` and ``v``; summed over the query heads that share a key head, and
        over broadcast batch axes.
    dbias : array
        Only if ``return_dbias``. In the shape and dtype of ``bias``, summed over the axes along which it was broadcast.
    dsinks : array, shape (Hq,)
        Only if ``return_dsinks``. In the dtype of ``sinks``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`attention` does; ValueError also if ``return_dbias`` or ``return_dsinks`` is True and ``bias`` or
        ``sinks`` is None, TypeError if a callable ``score_mod`` has no derivative.

    Notes
    -----
    Beyond the results it takes 4 bytes for each row of queries of a head ("sm90" 8), and for an input that was
    broadcast along the batch its gradient for the whole batch, in its own dtype and in float32. "sm90" takes the
    float32 sums of ``dq`` too, with 64 or 128 columns and in whole tiles of up to 128 rows, and 4 bytes for 128 keys of
    a head; beyond 128 columns, and with ``deterministic``, no sums, but 4 bytes for 128 queries of a head, and for its
    128 keys, or 64. "sm80" takes such sums, but with ``deterministic``, and in float32, none.

    References
    ----------
    T. Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2; J. Shah et al., "FlashAttention-3", arXiv:2407.08608,
    appendix B.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 2, 100, 64), dtype=np.float32)
    >>> bias = np.zeros((2, 1, 100), np.float32)
    >>> out, lse = cuflash.attention(q, k, v, bias=bias, return_lse=True)
    >>> dq, dk, dv, dbias = cuflash.attention_backward(dout, q, k, v, out, lse, bias=bias, return_dbias=True)
    >>> dk.shape, dbias.shape
    ((2, 100, 64), (2, 1, 100))
    """
    if score_mod is alibi_slopes is mask_mod is bias is mod_args is mask is block_mask is sinks is seed is dlse is None:
        backend, variant = backend_of(q, k, v, out, dout, lse), PLAIN
    else:
        backend, variant = gather(
            {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse},
            alibi_slopes=alibi_slopes,
            bias=bias,
            mask=mask,
            block_mask=block_mask,
            sinks=sinks,
            seed=seed,
            score_mod=score_mod,
            mask_mod=mask_mod,
            mod_args=mod_args,
            dlse=dlse,
        )
    window_size = _checks.window_size(window_size)
    options = (scale, causal, window_size, layout, kernel, softcap, dropout_p, variant.mod)
    gradients = (return_dbias, return_dsinks, deterministic)
    return run_backward(backend, variant, (dout, q, k, v, out, lse), gradients, options)


def attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    return_lse: bool = False,
    return_dbias: bool = False,
    return_dsinks: bool = False,
    deterministic: bool = False,
    **options: Any,
) -> tuple[Any, Callable[..., tuple[Array, ...]]]:
    r"""Attention, and the function that pulls a gradient of its result back to its inputs.

    The vector-Jacobian product of a loss :math:`L`: out of
    :math:`\partial L / \partial \mathrm{out}` and :math:`\partial L / \partial \mathrm{lse}` it makes

    .. math:: \mathrm{vjp}(d\mathrm{out}, d\mathrm{lse}) = \left(
              \frac{\partial L}{\partial q}, \frac{\partial L}{\partial k}, \frac{\partial L}{\partial v}\right)

    Parameters
    ----------
    q, k, v : array
        As for :func:`attention`.
    **options
        Those of :func:`attention`, but ``out``; a ``kernel`` by name computes the gradients too, so it must have them.
    return_lse : bool, default False
        Whether to return ``lse`` too.
    return_dbias, return_dsinks, deterministic : bool, default False
        As for :func:`attention_backward`.

    Returns
    -------
    out : array, shape (..., Hq, M, Dv)
        ``attention(q, k, v, **options)``; with ``return_lse`` the pair ``(out, lse)``.
    vjp : callable
        ``vjp(dout, dlse=None)`` returns ``(dq, dk, dv)``, then ``dbias`` and ``dsinks`` if asked for. It keeps
        references to all arrays of the call and to ``out``: leave them unchanged until it has been called.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`attention` and :func:`attention_backward` do, TypeError also for ``out``. What is wrong with ``dout``
        and ``dlse``, or if a ``kernel`` by name has no gradients, ``vjp`` says.

    See Also
    --------
    attention_backward : the formulas, and for callers who keep ``out`` and ``lse`` themselves.

    References
    ----------
    Those of :func:`attention_backward`; the interface is that of ``jax.vjp``,
    https://docs.jax.dev/en/latest/_autosummary/jax.vjp.html.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 100, 64), dtype=np.float32)
    >>> sinks = np.zeros(2, np.float32)
    >>> out, vjp = cuflash.attention_vjp(q, k, v, causal=True, sinks=sinks, return_dsinks=True)
    >>> dq, dk, dv, dsinks = vjp(np.ones_like(out))
    >>> dq.shape, dsinks.shape
    ((2, 100, 64), (2,))
    """
    return make_vjp(
        attention,
        attention_backward,
        (q, k, v),
        (),
        options,
        return_lse=return_lse,
        return_dbias=return_dbias,
        return_dsinks=return_dsinks,
        deterministic=deterministic,
    )
