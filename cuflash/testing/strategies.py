"""hypothesis strategies for attention problems; needs the package ``hypothesis``.

See :mod:`cuflash.testing` for a property test written with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from .._problem import Causal, Layout, WindowSize

Strides = Literal["contiguous", "transposed", "negative", "sliced", "broadcast"]

STRIDES: tuple[Strides, ...] = ("contiguous", "transposed", "negative", "sliced", "broadcast")
LENGTHS = (0, 1, 17, 63, 64, 65, 129)


@dataclass(frozen=True)
class AttentionProblem:
    """A problem to test attention with: shapes, options and a seed, from which it builds its arrays.

    Parameters
    ----------
    q, k, v : tuple of int
        The shapes of the arrays, in the problem's layout.
    dtype : str
        ``"float16"``, ``"bfloat16"`` (needs ``ml_dtypes``), ``"float32"`` or ``"float64"``.
    scale, causal, window_size, layout
        The options, as in :func:`cuflash.attention`.
    strides : tuple of str
        How `q`, `k`, `v` and `dout` lie in memory: ``"contiguous"``; ``"transposed"``, the last axis strided;
        ``"negative"``, the last two axes backwards; ``"sliced"``, every second column of a larger array full
        of NaN; ``"broadcast"``, a stride of 0 along the heads.
    seed : int
        The seed of the normally distributed values.

    Examples
    --------
    >>> problem = AttentionProblem(q=(2, 17, 8), k=(1, 33, 8), v=(1, 33, 4), causal=True)
    >>> [x.shape for x in problem.arrays()], problem.dout().shape
    ([(2, 17, 8), (1, 33, 8), (1, 33, 4)], (2, 17, 4))
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    dtype: str = "float32"
    scale: float | None = None
    causal: Causal = False
    window_size: WindowSize = None
    layout: Layout = "bhsd"
    strides: tuple[Strides, Strides, Strides, Strides] = ("contiguous",) * 4
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the call."""
        return {
            "scale": self.scale,
            "causal": self.causal,
            "window_size": self.window_size,
            "layout": self.layout,
        }

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        rank = max(len(self.q), len(self.k), len(self.v))
        if rank == 2:
            return (self.q[0], self.v[1])
        batch = np.broadcast_shapes(*(shape[:-3] for shape in (self.q, self.k, self.v)))
        q = self.q
        if len(q) == 2:
            q = (q[0], 1, q[1]) if self.layout == "bshd" else (1, *q)
        return (*batch, *q[-3:-1], self.v[-1])

    def arrays(self, xp: Any = np) -> tuple[Any, Any, Any]:
        """Build ``(q, k, v)`` as arrays of the module `xp`: ``numpy``, ``cupy`` or one like them."""
        q, k, v = (self._array(i, shape, xp) for i, shape in enumerate((self.q, self.k, self.v)))
        return q, k, v

    def dout(self, xp: Any = np) -> Any:
        """Build a gradient of the output as an array of the module `xp`."""
        return self._array(3, self.out_shape, xp)

    def _array(self, index: int, shape: tuple[int, ...], xp: Any) -> Any:
        values = np.random.default_rng((self.seed, index)).standard_normal(shape).astype(_dtype(self.dtype))
        return _laid_out(values, self.strides[index], self.layout, xp)


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _laid_out(values: NDArray[Any], strides: Strides, layout: Layout, xp: Any) -> Any:
    """Return an array of the module `xp` that holds `values` with such strides."""
    if strides == "transposed":
        return xp.asarray(np.ascontiguousarray(values.swapaxes(-1, -2))).swapaxes(-1, -2)
    if strides == "negative":
        return xp.asarray(np.ascontiguousarray(values[..., ::-1, ::-1]))[..., ::-1, ::-1]
    if strides == "sliced":
        *outer, rows, columns = values.shape
        parent = np.full((*outer, rows + 2, 2 * columns + 1), np.nan).astype(values.dtype)
        parent[..., 1:-1, 1::2] = values
        return xp.asarray(parent)[..., 1:-1, 1::2]
    if strides == "broadcast" and values.ndim > 2:
        one_head = values[..., :1, :] if layout == "bshd" else values[..., :1, :, :]
        return xp.broadcast_to(xp.asarray(np.ascontiguousarray(one_head)), values.shape)
    return xp.asarray(values)


@st.composite
def attention_problems(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = ("float32",),
    ranks: Sequence[int] = (2, 3, 4),
    layouts: Sequence[Layout] = ("bhsd", "bshd"),
    max_seqlen: int = 65,
    head_dims: Sequence[int] = (1, 3, 8, 16, 17, 32, 64),
    same_head_dims: bool = False,
    group_sizes: Sequence[int] = (1, 2, 3),
    causal: Sequence[Causal] = (False, True, "top-left"),
    windows: bool = True,
    scales: Sequence[float | None] = (None, 0.5, -0.25),
    strides: Sequence[Strides] = STRIDES,
) -> AttentionProblem:
    """Draw small attention problems; each argument restricts them to what the code under test supports.

    Parameters
    ----------
    dtypes : sequence of str
        Dtypes of the arrays.
    ranks : sequence of int
        Ranks of the arrays, 2 to 4; with several, the arrays of one problem may differ in rank.
    layouts : sequence of str
        ``"bhsd"``, ``"bshd"``.
    max_seqlen : int
        The longest sequence; lengths are 0, 1, and those around multiples of 64, not the same for queries and
        keys.
    head_dims : sequence of int
        Values of the head dimension, of queries and keys and, drawn apart, of the values.
    same_head_dims : bool
        Whether the values have the head dimension of the keys.
    group_sizes : sequence of int
        Numbers of query heads for each key/value head.
    causal : sequence
        Values of the option `causal`.
    windows : bool
        Whether some problems have a `window_size`.
    scales : sequence of float or None
        Values of the option `scale`.
    strides : sequence of str
        Memory layouts, as in :class:`AttentionProblem`.

    Returns
    -------
    hypothesis.strategies.SearchStrategy[AttentionProblem]

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(attention_problems(max_seqlen=17, windows=False))
    ... def test(problem):
    ...     assert problem.q[-1] == problem.k[-1]
    >>> test()
    """
    layout = draw(st.sampled_from(layouts))
    lengths = st.sampled_from([length for length in LENGTHS if length <= max_seqlen] + [max_seqlen])
    seqlen_q, seqlen_k = draw(lengths), draw(lengths)
    head_dim = draw(st.sampled_from(head_dims))
    head_dim_v = head_dim if same_head_dims else draw(st.sampled_from(head_dims))
    rank_q, rank_k, rank_v = (draw(st.sampled_from(ranks)) for _ in range(3))
    batch = draw(st.integers(1, 3))
    heads_kv = 1 if 2 in (rank_q, rank_k, rank_v) else draw(st.integers(1, 2))
    heads = 1 if rank_q == 2 else heads_kv * draw(st.sampled_from(group_sizes))

    def shape(rank: int, heads: int, rows: int, columns: int) -> tuple[int, ...]:
        stack = (rows, heads, columns) if layout == "bshd" else (heads, rows, columns)
        return {2: (rows, columns), 3: stack, 4: (draw(st.sampled_from([batch, 1])), *stack)}[rank]

    limits = st.none() | st.integers(0, max(seqlen_q, seqlen_k) + 1)
    kinds = st.sampled_from(strides)
    return AttentionProblem(
        q=shape(rank_q, heads, seqlen_q, head_dim),
        k=shape(rank_k, heads_kv, seqlen_k, head_dim),
        v=shape(rank_v, heads_kv, seqlen_k, head_dim_v),
        dtype=draw(st.sampled_from(dtypes)),
        scale=draw(st.sampled_from(scales)),
        causal=draw(st.sampled_from(causal)),
        window_size=draw(st.none() | st.tuples(limits, limits)) if windows else None,
        layout=layout,
        strides=(draw(kinds), draw(kinds), draw(kinds), draw(kinds)),
        seed=draw(st.integers(0, 2**16)),
    )
