"""hypothesis strategies for attention problems; needs the package ``hypothesis``.

See :mod:`cuflash.testing` for a property test written with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from .. import _checks
from .._problem import MAX_HEAD_DIM, MAX_SEQLEN, Causal, Layout, WindowSize
from ._problems import AttentionProblem, Mods, PackedProblem, PairArray, Strides
from .mods import MASK_MODS, SCORE_MODS, Shape

__all__ = [
    "LENGTHS",
    "PACKED_VARIANTS",
    "PAIR_STRIDES",
    "STRIDES",
    "VARIANTS",
    "AttentionProblem",
    "Mods",
    "PackedProblem",
    "PairArray",
    "Strides",
    "attention_problems",
    "packed_problems",
]

STRIDES: tuple[Strides, ...] = ("contiguous", "transposed", "negative", "sliced", "broadcast")
"""How arrays of problems lie in memory, unless it is said: see :class:`AttentionProblem`."""

PAIR_STRIDES: tuple[Strides, ...] = (*STRIDES, "offset", "repeated")
"""How biases and masks do: see :class:`PairArray`."""

DTYPES = ("float16", "bfloat16", "float32", "float64")
LENGTHS = (0, 1, 17, 63, 64, 65, 129)
"""Of sequences, up to the longest that is asked for, which is drawn too."""

PACKED_VARIANTS = ("softcap", "alibi", "sinks", "dropout", "dlse", "score_mod", "mask_mod")
"""The options of :func:`packed_problems`."""

VARIANTS = (*PACKED_VARIANTS, "bias", "mask", "block_mask")
"""The options of :func:`attention_problems`."""


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
    variants: Sequence[str] = (),
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
        The longest sequence; lengths are those of :data:`LENGTHS` up to it, and itself, drawn apart for queries
        and keys.
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
        Memory layouts, as in :class:`AttentionProblem` and :class:`PairArray`.
    variants : sequence of str
        Further options, of which problems use none, some or all; :data:`VARIANTS` lists them.

    Returns
    -------
    hypothesis.strategies.SearchStrategy[AttentionProblem]

    Raises
    ------
    ValueError
        When it draws, if an argument has a value that no problem can have, a name that is not in :data:`VARIANTS` say.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(attention_problems(max_seqlen=17, windows=False))
    ... def test(problem):
    ...     assert problem.q[-1] == problem.k[-1]
    >>> test()
    """
    _check_names("variants", variants, VARIANTS)
    _check_names("ranks", ranks, (2, 3, 4))
    _check_names("layouts", layouts, ("bhsd", "bshd"))
    _check_shared(dtypes, max_seqlen, head_dims, group_sizes, causal, strides)
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

    kinds = st.sampled_from(strides)
    problem = AttentionProblem(
        q=shape(rank_q, heads, seqlen_q, head_dim),
        k=shape(rank_k, heads_kv, seqlen_k, head_dim),
        v=shape(rank_v, heads_kv, seqlen_k, head_dim_v),
        dtype=draw(st.sampled_from(dtypes)),
        scale=draw(st.sampled_from(scales)),
        causal=draw(st.sampled_from(causal)),
        window_size=draw(_window_sizes(max(seqlen_q, seqlen_k))) if windows else None,
        layout=layout,
        strides=(draw(kinds), draw(kinds), draw(kinds), draw(kinds)),
        seed=draw(st.integers(0, 2**16)),
    )
    chosen = draw(st.sets(st.sampled_from(variants))) if variants else set()
    own: dict[str, Any] = {"block_mask": "block_mask" in chosen}
    if "bias" in chosen:
        # Of -inf, a score that is not added to may become anything.
        hidden = 0.0 if "score_mod" in chosen else draw(st.sampled_from([0.0, 0.2]))
        dtype = draw(st.sampled_from(["", problem.dtype if problem.dtype == "float64" else "float32"]))
        own["bias"] = draw(_pair_arrays(problem.pairs, dtype, hidden))
    if "mask" in chosen:
        own["mask"] = draw(_pair_arrays(problem.pairs, "", draw(st.sampled_from([0.3, 1.0]))))
    return dataclasses.replace(problem, **own, **draw(_shared_variants(chosen, problem.dtype)))


@st.composite
def packed_problems(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = ("float32",),
    max_sequences: int = 4,
    max_seqlen: int = 65,
    head_dims: Sequence[int] = (1, 3, 8, 16, 17, 32, 64),
    group_sizes: Sequence[int] = (1, 2, 3),
    causal: Sequence[Causal] = (False, True, "top-left"),
    windows: bool = True,
    scales: Sequence[float | None] = (None, 0.5, -0.25),
    strides: Sequence[Strides] = STRIDES,
    variants: Sequence[str] = (),
) -> PackedProblem:
    """Draw small problems of packed sequences, of length 0 as well, some with unused keys and rows after the last.

    Parameters
    ----------
    dtypes, max_seqlen, head_dims, group_sizes, causal, windows, scales, strides
        As in :func:`attention_problems`.
    max_sequences : int
        The largest number of sequences; the smallest is 1.
    variants : sequence of str
        Further options, of which problems use none, some or all; :data:`PACKED_VARIANTS` lists them.

    Returns
    -------
    hypothesis.strategies.SearchStrategy[PackedProblem]

    Raises
    ------
    ValueError
        When it draws, if an argument has a value that no problem can have, a name that is not in
        :data:`PACKED_VARIANTS` say.

    Examples
    --------
    >>> from hypothesis import given
    >>> @given(packed_problems(max_sequences=2))
    ... def test(problem):
    ...     assert len(problem.lengths_q) == len(problem.lengths_k) <= 2
    >>> test()
    """
    _check_names("variants", variants, PACKED_VARIANTS)
    _check_numbers("max_sequences", [max_sequences], 1)
    _check_shared(dtypes, max_seqlen, head_dims, group_sizes, causal, strides)
    lengths = st.sampled_from([length for length in LENGTHS if length <= max_seqlen] + [max_seqlen])
    sequences = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=max_sequences))
    lengths_q, lengths_k = zip(*sequences, strict=True)
    used = draw(st.none() | st.tuples(*(st.integers(0, length) for length in lengths_k)))
    heads_kv = draw(st.integers(1, 2))
    kinds = st.sampled_from(strides)
    dtype = draw(st.sampled_from(dtypes))
    chosen = draw(st.sets(st.sampled_from(variants))) if variants else set()
    return PackedProblem(
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        seqused_k=used,
        heads=(heads_kv * draw(st.sampled_from(group_sizes)), heads_kv),
        head_dims=(draw(st.sampled_from(head_dims)), draw(st.sampled_from(head_dims))),
        tails=draw(st.sampled_from([(0, 0), (3, 0), (0, 5), (2, 1)])),
        dtype=dtype,
        scale=draw(st.sampled_from(scales)),
        causal=draw(st.sampled_from(causal)),
        window_size=draw(_window_sizes(max_seqlen)) if windows else None,
        strides=(draw(kinds), draw(kinds), draw(kinds), draw(kinds)),
        seed=draw(st.integers(0, 2**16)),
        **draw(_shared_variants(chosen, dtype)),
    )


def _check_names(argument: str, names: Sequence[Any], allowed: tuple[Any, ...]) -> None:
    """Refuse a name that no problem would have: a test of it would pass without a look."""
    for name in names:
        if name not in allowed:
            raise ValueError(f"{argument}: got {name!r}; allowed are {', '.join(map(repr, allowed))}")


def _check_numbers(argument: str, numbers: Sequence[int], least: int, most: int = MAX_SEQLEN) -> None:
    for number in numbers:
        if not _checks.is_size(number) or not least <= number <= most:
            raise ValueError(f"{argument}: got {number!r}; allowed are ints of {least} to {most}")


def _check_shared(
    dtypes: Sequence[str],
    max_seqlen: int,
    head_dims: Sequence[int],
    group_sizes: Sequence[int],
    causal: Sequence[Causal],
    strides: Sequence[Strides],
) -> None:
    """Refuse what the library would refuse of every problem, or what means something else here."""
    _check_names("dtypes", dtypes, DTYPES)
    _check_numbers("max_seqlen", [max_seqlen], 0)
    _check_numbers("head_dims", head_dims, 1, MAX_HEAD_DIM)
    _check_numbers("group_sizes", group_sizes, 1)
    _check_names("causal", causal, (False, True, "top-left"))
    _check_names("strides", strides, PAIR_STRIDES)


def _window_sizes(seqlen: int) -> st.SearchStrategy[WindowSize]:
    limits = st.none() | st.integers(0, seqlen + 1)
    return st.none() | st.tuples(limits, limits)


@st.composite
def _pair_arrays(draw: st.DrawFn, pairs: Shape, dtype: str, hidden: float) -> PairArray:
    rank = draw(st.integers(2, 4))
    full = pairs[4 - rank :]
    shape = draw(st.just(full) | st.tuples(*(st.sampled_from([size, 1]) for size in full)))
    return PairArray(shape, draw(st.sampled_from(PAIR_STRIDES)), dtype, hidden)


@st.composite
def _shared_variants(draw: st.DrawFn, chosen: set[str], dtype: str) -> dict[str, Any]:
    """Draw what the chosen variants are, as arguments of a problem."""
    long = dtype if dtype == "float64" else "float32"
    kinds: dict[str, tuple[str, Sequence[Any]]] = {
        "softcap": ("softcap", [30.0, 2.0]),
        "alibi": ("alibi", ["heads", "batch"]),
        "sinks": ("sinks", [long, dtype]),
        "dropout": ("dropout_p", [0.17, 0.5]),
        "dlse": ("with_dlse", [True]),
        "score_mod": ("score_mod", sorted(SCORE_MODS)),
        "mask_mod": ("mask_mod", sorted(MASK_MODS)),
    }
    return {name: draw(st.sampled_from(values)) for variant, (name, values) in kinds.items() if variant in chosen}
