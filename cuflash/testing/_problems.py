"""Problems to test attention with, of padded and of packed sequences: they build their arrays from a seed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

import cuflash

from .._problem import BLOCK_SIZE, Causal, Layout, Operand, WindowSize, ceil_div
from .mods import MASK_MODS, SCORE_MODS, Shape

Strides = Literal["contiguous", "transposed", "negative", "sliced", "broadcast", "offset", "repeated"]
Mods = Literal["callable", "expression"]


class PairArray(NamedTuple):
    """How a bias or a mask is made: an array that broadcasts to all pairs of queries and keys.

    Parameters
    ----------
    shape : tuple of int
        2 to 4 sizes that broadcast to ``(B, Hq, M, N)``.
    strides : str
        As for :class:`AttentionProblem`, or ``"offset"``, one element off the start of its memory, or
        ``"repeated"``, a stride of 0 along the rows.
    dtype : str
        Of a bias; that of the problem if empty.
    hidden : float
        The share of the pairs that it hides; if it hides any, then also the whole first row.

    Examples
    --------
    >>> problem = AttentionProblem((2, 17, 8), (2, 33, 8), (2, 33, 8), mask=PairArray((1, 33), hidden=0.5))
    >>> problem.options["mask"].shape
    (1, 33)
    """

    shape: tuple[int, ...]
    strides: Strides = "contiguous"
    dtype: str = ""
    hidden: float = 0.0

    def shown(self, rng: np.random.Generator) -> NDArray[Any]:
        """Return which elements hide nothing."""
        shown = rng.random(self.shape) >= self.hidden
        if self.hidden and self.shape[-2] > 1:
            shown[..., 0, :] = False
        return shown


class _Maker(NamedTuple):
    """Makes the arrays of a problem, each from the problem's seed and a number of its own."""

    xp: Any
    dtype: str
    seed: int

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index))

    def normal(self, index: int, shape: tuple[int, ...], dtype: str = "") -> NDArray[Any]:
        return self.rng(index).standard_normal(shape).astype(_dtype(dtype or self.dtype))

    def lse(self, index: int, shape: tuple[int, ...]) -> Any:
        """Make an array of the dtype that a log-sum-exp has."""
        return self.xp.asarray(self.normal(index, shape, "float64" if self.dtype == "float64" else "float32"))


@dataclass(frozen=True, kw_only=True, repr=False)
class _Variants:
    """The options that padded and packed problems share, beyond the mask of positions.

    Parameters
    ----------
    softcap : float, optional
        As in :func:`cuflash.attention`.
    alibi : str, optional
        The shape of `alibi_slopes`: ``"heads"`` or ``"batch"``, which has heads as well.
    sinks : str, optional
        The dtype of `sinks`.
    dropout_p : float
        As in :func:`cuflash.attention`, with a seed made of the problem's.
    score_mod, mask_mod : str, optional
        Names of entries of :data:`cuflash.testing.mods.SCORE_MODS` and of ``MASK_MODS``.
    with_dlse : bool
        Whether the log-sum-exp has a gradient.
    """

    softcap: float | None = None
    alibi: Literal["heads", "batch"] | None = None
    sinks: str | None = None
    dropout_p: float = 0.0
    score_mod: str | None = None
    mask_mod: str | None = None
    with_dlse: bool = False

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        given = [(f.name, getattr(self, f.name)) for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print as hypothesis asks for it."""
        printer.text(repr(self))

    def _variant_options(self, make: _Maker, mods: Mods, pairs: Shape) -> dict[str, Any]:
        """Return the keyword arguments of these options, as far as they are used."""
        options: dict[str, Any] = {}
        batch, heads = pairs[:2]
        if self.softcap is not None:
            options["softcap"] = self.softcap
        if self.alibi is not None:
            shape = (heads,) if self.alibi == "heads" else (batch, heads)
            options["alibi_slopes"] = make.xp.asarray(make.rng(6).uniform(0, 0.5, shape).astype(np.float32))
        if self.sinks is not None:
            options["sinks"] = make.xp.asarray(make.normal(7, (heads,), self.sinks))
        if self.dropout_p > 0:
            options |= {"dropout_p": self.dropout_p, "seed": int(make.rng(8).integers(2**64, dtype=np.uint64))}
        mod_args: dict[str, Any] = {}
        for index, name, catalogue in ((9, "score_mod", SCORE_MODS), (10, "mask_mod", MASK_MODS)):
            if getattr(self, name) is not None:
                mod = catalogue[getattr(self, name)]
                args = mod.make_args(make.rng(index), pairs)
                options[name] = mod.callable(args) if mods == "callable" else mod.expression
                mod_args |= args
        if mod_args and mods == "expression":
            options["mod_args"] = {
                name: make.xp.asarray(value) if isinstance(value, np.ndarray) else value
                for name, value in mod_args.items()
            }
        return options


@dataclass(frozen=True, repr=False)
class AttentionProblem(_Variants):
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
    bias, mask : PairArray, optional
        How the options are made.
    block_mask : bool
        Whether there is a `block_mask`, of random blocks.
    softcap, dropout_p
        The options, as in :func:`cuflash.attention`; dropout gets a seed made of the problem's.
    alibi : {"heads", "batch"}, optional
        The shape of `alibi_slopes`: (Hq,) or (B, Hq).
    sinks : str, optional
        The dtype of `sinks`.
    score_mod, mask_mod : str, optional
        Names of entries of ``SCORE_MODS`` and ``MASK_MODS`` in :mod:`cuflash.testing.mods`.
    with_dlse : bool
        Whether the log-sum-exp has a gradient.

    Examples
    --------
    >>> problem = AttentionProblem(q=(2, 17, 8), k=(1, 33, 8), v=(1, 33, 4), causal=True, softcap=30.0)
    >>> [x.shape for x in problem.arrays()], problem.dout().shape
    ([(2, 17, 8), (1, 33, 8), (1, 33, 4)], (2, 17, 4))
    >>> problem.options["softcap"]
    30.0
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
    bias: PairArray | None = None
    mask: PairArray | None = None
    block_mask: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the call, with NumPy arrays and Python callables."""
        return self.options_for(np)

    def options_for(self, xp: Any, mods: Mods = "callable") -> dict[str, Any]:
        """Build the keyword arguments of the call.

        Parameters
        ----------
        xp : module
            ``numpy``, ``cupy`` or one like them.
        mods : {"callable", "expression"}
            Whether `score_mod` and `mask_mod` are Python callables, or CUDA expressions with `mod_args`.

        Returns
        -------
        dict
            Options that the problem does not use are left out, but for `scale`, `causal`, `window_size`, `layout`.
        """
        make = self._make(xp)
        options: dict[str, Any] = {
            "scale": self.scale,
            "causal": self.causal,
            "window_size": self.window_size,
            "layout": self.layout,
            **self._variant_options(make, mods, self.pairs),
        }
        if self.bias is not None:
            bias = make.normal(4, self.bias.shape, self.bias.dtype)
            bias = np.where(self.bias.shown(make.rng(11)), bias, bias.dtype.type(-np.inf))
            options["bias"] = _laid_out(bias, self.bias.strides, "bhsd", xp)
        if self.mask is not None:
            options["mask"] = _laid_out(self.mask.shown(make.rng(5)), self.mask.strides, "bhsd", xp)
        if self.block_mask:
            batch, heads, seqlen_q, seqlen_k = self.pairs
            blocks = (batch, heads, ceil_div(seqlen_q, BLOCK_SIZE), ceil_div(seqlen_k, BLOCK_SIZE))
            visible = xp.asarray(make.rng(12).random(blocks) < 0.7)
            options["block_mask"] = cuflash.BlockMask.from_blocks(visible, shape=(seqlen_q, seqlen_k))
        return options

    @property
    def pairs(self) -> Shape:
        """The shape of all pairs of queries and keys, (B, Hq, M, N)."""
        q, k, v = (Operand.of(shape, shape, self.layout).shape for shape in (self.q, self.k, self.v))
        (batch,) = np.broadcast_shapes(q[:1], k[:1], v[:1])
        return batch, q[1], q[2], k[2]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        batch, heads, seqlen_q, _ = self.pairs
        rows = (seqlen_q, heads) if self.layout == "bshd" else (heads, seqlen_q)
        shape = (batch, *rows, self.v[-1])
        return shape[4 - self._rank :] if self._rank > 2 else (seqlen_q, self.v[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """The shape of the log-sum-exp."""
        return self.pairs[4 - self._rank : 3]

    def arrays(self, xp: Any = np) -> tuple[Any, Any, Any]:
        """Build ``(q, k, v)`` as arrays of the module `xp`: ``numpy``, ``cupy`` or one like them."""
        q, k, v = (self._array(i, shape, xp) for i, shape in enumerate((self.q, self.k, self.v)))
        return q, k, v

    def dout(self, xp: Any = np) -> Any:
        """Build a gradient of the output as an array of the module `xp`."""
        return self._array(3, self.out_shape, xp)

    def dlse(self, xp: Any = np) -> Any:
        """Build a gradient of the log-sum-exp as an array of the module `xp`, or None if the problem has none."""
        return self._make(xp).lse(13, self.lse_shape) if self.with_dlse else None

    @property
    def _rank(self) -> int:
        return max(len(self.q), len(self.k), len(self.v))

    def _make(self, xp: Any) -> _Maker:
        return _Maker(xp, self.dtype, self.seed)

    def _array(self, index: int, shape: tuple[int, ...], xp: Any) -> Any:
        return _laid_out(self._make(xp).normal(index, shape), self.strides[index], self.layout, xp)


@dataclass(frozen=True, repr=False)
class PackedProblem(_Variants):
    """A problem of packed sequences to test attention with.

    Rows beyond the last sequence, and keys that are not used, are NaN.

    Parameters
    ----------
    lengths_q, lengths_k : tuple of int
        The lengths of the sequences.
    seqused_k : tuple of int, optional
        How many keys of each sequence are used.
    heads : (int, int)
        Numbers of query heads and of key/value heads.
    head_dims : (int, int)
        Head dimensions of the keys and of the values.
    tails : (int, int)
        Numbers of rows of `q`, and of `k` and `v`, beyond the last sequence.
    dtype, scale, causal, window_size, strides, seed, softcap, alibi, sinks, dropout_p, score_mod, mask_mod, with_dlse
        As for :class:`AttentionProblem`.

    Examples
    --------
    >>> problem = PackedProblem((3, 0, 5), (4, 2, 0), heads=(2, 1), causal=True)
    >>> [x.shape for x in problem.arrays()]
    [(8, 2, 8), (6, 1, 8), (6, 1, 8), (4,), (4,)]
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    seqused_k: tuple[int, ...] | None = None
    heads: tuple[int, int] = (1, 1)
    head_dims: tuple[int, int] = (8, 8)
    tails: tuple[int, int] = (0, 0)
    dtype: str = "float32"
    scale: float | None = None
    causal: Causal = False
    window_size: WindowSize = None
    strides: tuple[Strides, Strides, Strides, Strides] = ("contiguous",) * 4
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the call, with NumPy arrays and Python callables."""
        return self.options_for(np)

    def options_for(self, xp: Any, mods: Mods = "callable") -> dict[str, Any]:
        """Build the keyword arguments of the call, as :meth:`AttentionProblem.options_for` does."""
        pairs = (len(self.lengths_q), self.heads[0], sum(self.lengths_q), sum(self.lengths_k))
        options = {
            "scale": self.scale,
            "causal": self.causal,
            "window_size": self.window_size,
            **self._variant_options(_Maker(xp, self.dtype, self.seed), mods, pairs),
        }
        if self.seqused_k is not None:
            options["seqused_k"] = xp.asarray(np.array(self.seqused_k, np.int32))
        return options

    def arrays(self, xp: Any = np) -> tuple[Any, Any, Any, Any, Any]:
        """Build ``(q, k, v, cu_seqlens_q, cu_seqlens_k)`` as arrays of the module `xp`."""
        q = self._rows(0, self.heads[0], self.head_dims[0], xp)
        k, v = (self._rows(i, self.heads[1], self.head_dims[i - 1], xp) for i in (1, 2))
        cu_q, cu_k = (np.array([0, *accumulate(x)], np.int32) for x in (self.lengths_q, self.lengths_k))
        return q, k, v, xp.asarray(cu_q), xp.asarray(cu_k)

    def dout(self, xp: Any = np) -> Any:
        """Build a gradient of the output as an array of the module `xp`."""
        return self._rows(3, self.heads[0], self.head_dims[1], xp)

    def dlse(self, xp: Any = np) -> Any:
        """Build a gradient of the log-sum-exp as an array of the module `xp`, or None if the problem has none."""
        shape = (self.heads[0], sum(self.lengths_q) + self.tails[0])
        return _Maker(xp, self.dtype, self.seed).lse(13, shape) if self.with_dlse else None

    def _rows(self, index: int, heads: int, head_dim: int, xp: Any) -> Any:
        """Build the packed array with this index: of queries, or for 1 and 2 of keys."""
        of_keys = index in (1, 2)
        lengths, tail = (self.lengths_k, self.tails[1]) if of_keys else (self.lengths_q, self.tails[0])
        used = lengths if self.seqused_k is None or not of_keys else self.seqused_k
        values = _Maker(xp, self.dtype, self.seed).normal(index, (sum(lengths) + tail, heads, head_dim))
        seen = [i < n for length, n in zip(lengths, used, strict=True) for i in range(length)]
        values[~np.array([*seen, *[False] * tail], bool)] = np.nan
        return _laid_out(values, self.strides[index], "bshd", xp)


def _dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _laid_out(values: NDArray[Any], strides: Strides, layout: Layout, xp: Any) -> Any:
    """Return an array of the module `xp` that holds `values` with such strides."""
    if strides == "transposed":
        return _among_nan(values.swapaxes(-1, -2), xp).swapaxes(-1, -2)
    if strides == "negative":
        return _among_nan(values[..., ::-1, ::-1], xp)[..., ::-1, ::-1]
    if strides == "sliced":
        *outer, rows, columns = values.shape
        parent = np.full((*outer, rows + 2, 2 * columns + 1), np.nan).astype(values.dtype)
        parent[..., 1:-1, 1::2] = values
        return _among_nan(parent, xp)[..., 1:-1, 1::2]
    if strides == "broadcast" and values.ndim > 2:
        one_head = values[..., :1, :] if layout == "bshd" else values[..., :1, :, :]
        return xp.broadcast_to(_among_nan(one_head, xp), values.shape)
    if strides == "offset":
        parent = np.concatenate([values.ravel()[:1], values.ravel()]) if values.size else values.ravel()
        return _among_nan(parent, xp)[parent.size - values.size :].reshape(values.shape)
    if strides == "repeated":
        return xp.broadcast_to(_among_nan(values[..., :1, :], xp), values.shape)
    return _among_nan(values, xp)


def _among_nan(values: NDArray[Any], xp: Any) -> Any:
    """Return a contiguous array of the module `xp`, on a GPU with NaN in front of it and behind it in memory.

    In memory of the host a sanitizer knows where an array ends.
    """
    if xp is np:
        return np.array(values, order="C")
    guard = 512 // values.itemsize  # so that it is aligned as memory is
    memory = np.full(guard + values.size + guard, np.nan).astype(values.dtype)
    memory[guard:-guard] = values.ravel()
    return xp.asarray(memory)[guard:-guard].reshape(values.shape)
