"""flash-attn's options as cuflash's, and the random seeds of dropout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import _check_options, _checks
from .._backends import backend_of
from .._problem import WindowSize

Array = Any
"""``cupy.ndarray`` or ``numpy.ndarray``."""

_generator = np.random.default_rng()


def manual_seed(seed: int) -> None:
    """Make the dropout of the calls that follow repeatable.

    Each call of a function of :mod:`cuflash.flash_attn` with ``dropout_p > 0`` draws one seed for
    :func:`cuflash.attention`. Before the first ``manual_seed`` they come from the entropy of the operating system.

    Parameters
    ----------
    seed : int
        At least 0. The calls draw ``numpy.random.default_rng(seed).integers(2**64, dtype=numpy.uint64)``, then the next
        number of that generator, and so on.

    Raises
    ------
    TypeError, ValueError
        As ``numpy.random.default_rng`` does.

    Notes
    -----
    In a CUDA graph the seed is a constant: every replay drops the same weights. Call :func:`cuflash.attention` with
    ``seed=`` an array to change it between replays.

    References
    ----------
    Named after ``torch.manual_seed``, https://docs.pytorch.org/docs/stable/generated/torch.manual_seed.html.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.flash_attn import flash_attn_func, manual_seed
    >>> q = k = v = np.random.default_rng(0).standard_normal((2, 100, 4, 64), dtype=np.float32)
    >>> manual_seed(0)
    >>> out = flash_attn_func(q, k, v, dropout_p=0.1)
    >>> manual_seed(0)
    >>> bool((flash_attn_func(q, k, v, dropout_p=0.1) == out).all())
    True
    """
    global _generator
    _generator = np.random.default_rng(seed)


def dropout(dropout_p: float) -> dict[str, Any]:
    """The options of dropout, with a new seed where there is any."""
    dropout_p = _check_options.dropout_p(dropout_p, has_seed=True)
    seed = int(_generator.integers(2**64, dtype=np.uint64)) if dropout_p else None
    return {"dropout_p": dropout_p, "seed": seed}


def flash_attn_options(
    q: Array,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Array | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> dict[str, Any]:
    """The options of flash-attn's functions by cuflash's names; -1 in a window and a softcap <= 0 become None."""
    _checks.flag("deterministic", deterministic)
    _checks.flag("return_attn_probs", return_attn_probs)
    if softmax_scale is not None:
        _checks.scale("softmax_scale", softmax_scale, q.shape[-1], str(q.dtype))
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window_size": _window(window_size),
        "softcap": None if _checks.is_real(softcap) and softcap <= 0 else softcap,
        "alibi_slopes": alibi_slopes,
        **dropout(dropout_p),
    }


def _window(window_size: Any) -> WindowSize:
    """flash-attn's window by cuflash's rules, in which None is no limit."""

    def limit(side: Any) -> Any:
        return None if isinstance(side, (int, np.integer)) and side == -1 else side

    sides = window_size.tolist() if hasattr(window_size, "tolist") else window_size  # flash-attn takes an array too
    try:
        return _checks.window_size(tuple(map(limit, sides)) if isinstance(sides, (tuple, list)) else sides)
    except ValueError:
        raise ValueError(
            f"window_size: got {window_size!r}; it must be (left, right), each a number of keys >= 0 or -1 for no limit"
        ) from None


def check_axes(name: str, array: Array, *axes: str | int) -> None:
    """Refuse an array whose shape is not like these axes: a name is any length, a number is that length."""
    backend_of(array, names=(name,))
    if len(array.shape) != len(axes) or any(
        isinstance(axis, int) and axis != size for axis, size in zip(axes, array.shape, strict=True)
    ):
        raise ValueError(f"{name}: shape is {array.shape}; it must be ({', '.join(map(str, axes))})")


@contextmanager
def named(**names: str) -> Iterator[None]:
    """Let errors name the caller's arguments: ``named(q="query")`` around, or on, what passes the query on as q."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name = re.compile(rf"\b({'|'.join(names)})(?=:|'s | has | is )")
        error.args = (name.sub(lambda found: names[found[0]], str(error)),)
        raise
