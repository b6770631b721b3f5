"""torch's scaled_dot_product_attention, with its broadcasting of any number of axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import _check_options, _checks
from .._attention import attention
from .._backends import backend_of
from ._options import Array, dropout, named


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    r"""Attention as ``torch.nn.functional.scaled_dot_product_attention`` computes it.

    .. math:: \mathrm{out}_i = \sum_j \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}} v_j,
              \qquad s_{ij} = \mathrm{scale} \cdot q_i \cdot k_j + \mathrm{attn\_mask}_{ij}

    Parameters
    ----------
    query : array, shape (..., Hq, L, E)
        Like ``key`` and ``value`` of a dtype that :func:`cuflash.attention` takes, with 2 or more axes in any strides.
        All axes before the last two broadcast; more than two of them are copied where their strides do not allow to
        see them as one.
    key : array, shape (..., H, S, E)
        Keys.
    value : array, shape (..., H, S, Ev)
        Values.
    attn_mask : array, shape broadcastable to (..., Hq, L, S), optional
        bool, True where a query attends to a key; or of the dtype of ``query`` or float32, and added to the scores.
    dropout_p : float, default 0.0
        Probability to drop a weight, in [0, 1); those that stay are divided by ``1 - dropout_p``. Which ones stay is
        random, see :func:`manual_seed`. It should be 0.0 during evaluation.
    is_causal : bool, default False
        Query ``i`` sees key ``j`` iff ``j <= i``: aligned to the top left.
    scale : float, optional
        Factor of the scores. Default: ``1 / sqrt(E)``.
    enable_gqa : bool, default False
        Whether ``Hq`` may be a multiple of ``H``; query head ``h`` then uses key head ``h // (Hq // H)``.

    Returns
    -------
    array, shape (..., Hq, L, Ev)
        In the dtype of ``query``. Queries that see no key have 0.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError
        As :func:`cuflash.attention` does; ValueError for ``attn_mask`` together with ``is_causal``, and if numbers of
        heads differ without ``enable_gqa``. (torch raises RuntimeError.)

    References
    ----------
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.flash_attn import scaled_dot_product_attention
    >>> rng = np.random.default_rng(0)
    >>> query = rng.standard_normal((2, 8, 10, 64), dtype=np.float32)
    >>> key, value = rng.standard_normal((2, 2, 2, 100, 64), dtype=np.float32)
    >>> mask = rng.random((10, 100)) < 0.5
    >>> scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).shape
    (2, 8, 10, 64)
    """
    _checks.flag("is_causal", is_causal)
    _checks.flag("enable_gqa", enable_gqa)
    arrays = {"query": query, "key": key, "value": value}
    backend = backend_of(*arrays.values(), names=tuple(arrays))
    _checks.dtype_of(arrays, backend.dtypes)
    for name, x in arrays.items():
        if x.ndim < 2:
            raise ValueError(f"{name}: shape is {x.shape}; it must have 2 or more axes, (..., sequence, dim)")
    for name, of, axis, what in (("key", "query", -1, "head dimension"), ("value", "key", -2, "sequence length")):
        size, expected = arrays[name].shape[axis], arrays[of].shape[axis]
        if size != expected:
            raise ValueError(f"{name}: its {what} is {size}, but {of}'s is {expected}; they must be equal")
    rank = max(x.ndim for x in arrays.values())
    batch = _broadcast("axes before the heads", {name: x.shape[:-3] for name, x in arrays.items()})
    heads = {name: x.shape[-3:-2] or (1,) for name, x in arrays.items()}
    heads_q, heads_kv = heads.pop("query"), _broadcast("heads", heads)
    if not enable_gqa:
        heads_q = _broadcast("heads without enable_gqa=True", {"query": heads_q, "key and value": heads_kv})
    options = {"scale": scale, "causal": "top-left" if is_causal else False, **dropout(dropout_p)}
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask: got an array together with is_causal=True; only one of them is allowed")
        backend_of(query, attn_mask, names=("query", "attn_mask"))
        scores_shape = (*batch, *heads_q, query.shape[-2], key.shape[-2])[-rank:]
        options |= _mask_option(attn_mask, scores_shape, batch, query.dtype)
    q, k, v = _stack(query, batch, heads_q), _stack(key, batch, heads_kv), _stack(value, batch, heads_kv)
    with named(q="query", k="key", v="value"):
        out: Array = attention(q, k, v, **options)
    return out.reshape((*batch, *out.shape[1:])[-rank:])


def _broadcast(what: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        listed = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
        raise ValueError(f"{what} do not broadcast ({listed}); they must be equal or 1") from None


def _stack(x: Array, batch: tuple[int, ...], heads: tuple[int, ...]) -> Array:
    """The array as (batch, heads, rows, columns); a batch of 1 stays so, because attention broadcasts it."""
    if math.prod(x.shape[:-3]) == 1:
        batch, x = (), x.reshape(x.shape[-3:])
    x = np.broadcast_to(x, (*batch, *heads, *x.shape[-2:]))
    return x.reshape(math.prod(batch), *x.shape[-3:])


def _mask_option(mask: Array, scores_shape: tuple[int, ...], batch: tuple[int, ...], dtype: Any) -> dict[str, Array]:
    """The mask as attention takes it: True and False as `mask`, numbers as `bias`."""
    if not _check_options.fits(mask.shape, scores_shape):
        raise ValueError(f"attn_mask: shape is {mask.shape}; it must broadcast to {scores_shape}")
    if mask.dtype not in ("bool", dtype, "float32"):
        raise TypeError(f"attn_mask: dtype is {mask.dtype}; allowed are bool, float32 and query's {dtype}")
    mask = mask.reshape((1,) * (2 - mask.ndim) + mask.shape)
    return {"mask" if mask.dtype == "bool" else "bias": _stack(mask, batch, mask.shape[-3:-2])}
