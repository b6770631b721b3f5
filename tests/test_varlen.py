"""Packed sequences of different lengths, on every ring."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cuflash.testing.strategies import PACKED_VARIANTS, PackedProblem
from tests.conftest import Ring

# Sequences without queries, without keys, with more queries than keys, and rows and keys of no sequence.
PACKED = PackedProblem(
    (65, 0, 1, 40, 17), (70, 33, 64, 0, 129), heads=(4, 2), head_dims=(32, 17), dtype="float16", tails=(3, 5)
)


def test_random_problems_are_accurate(ring: Ring) -> None:
    @ring.given(packed=True, examples=ring.examples // 2)
    def check(problem: PackedProblem) -> None:
        ring.check_varlen(problem)

    check()


@pytest.mark.thorough_on_wmma
def test_every_combination_is_accurate(ring: Ring) -> None:
    @ring.given(packed=True, variants=PACKED_VARIANTS, examples=60 if ring.name != "host" else 3)
    def check(problem: PackedProblem) -> None:
        ring.check_varlen(problem)

    check()


@pytest.mark.parametrize("causal", [False, True, "top-left"])
@pytest.mark.parametrize("window_size", [None, (9, 3)])
def test_sequences_of_any_length_and_tails(ring: Ring, causal: Any, window_size: Any) -> None:
    ring.check_varlen(dataclasses.replace(PACKED, causal=causal, window_size=window_size))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_only_the_keys_in_use_are_seen(ring: Ring, dtype: str) -> None:
    ring.check_varlen(dataclasses.replace(PACKED, dtype=dtype, seqused_k=(1, 33, 0, 0, 100), causal=True))


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize(("count", "causal"), [(31, False), (31, True), (32, True)])
def test_any_number_of_sequences(ring: Ring, count: int, causal: bool) -> None:
    """Up to 31 a warp finds the longest jobs among, which come first; more are taken one after the other."""
    lengths = tuple(3 + i * 37 % 90 if i % 9 else 0 for i in range(count))
    ring.check_varlen(PackedProblem(lengths, lengths, head_dims=(8, 8), dtype="float16", tails=(70, 5), causal=causal))


def test_rows_of_no_sequence_are_zero(ring: Ring) -> None:
    problem = dataclasses.replace(PACKED, seqused_k=(1, 33, 64, 0, 100))
    out, lse = ring.attention_varlen(*problem.arrays(ring.xp), return_lse=True, **ring.options(problem))
    dq, dk, dv = (ring.numpy(x) for x in ring.gradients(problem))
    out, lse = ring.numpy(out), ring.numpy(lse)
    assert (out[-3:] == 0).all() and (dq[-3:] == 0).all()
    assert (lse[:, -3:] < -3e38).all()
    for gradient in (dk, dv):
        assert (gradient[1:70] == 0).all() and (gradient[-34:] == 0).all()
        assert (gradient[0] != 0).any()


@pytest.mark.parametrize("spoiled", ["q", "dout"])
def test_keys_out_of_use_have_no_gradient_beside_nan(ring: Ring, spoiled: str) -> None:
    problem = dataclasses.replace(PACKED, seqused_k=(1, 33, 64, 0, 100))
    q, *others = problem.arrays(ring.xp)
    dout = problem.dout(ring.xp)
    {"q": q, "dout": dout}[spoiled][3] = np.nan  # a query of the first sequence, of whose keys one is in use
    options = ring.options(problem)
    _, vjp = ring.attention_varlen_vjp(q, *others, **options)
    _, dk, dv = (ring.numpy(x) for x in vjp(dout))
    for gradient in (dk, dv):
        assert np.isnan(gradient[0]).any()
        assert (gradient[1:70] == 0).all()


@pytest.mark.thorough_on_wmma
def test_no_sequences_at_all(ring: Ring) -> None:
    ring.check_varlen(PackedProblem((), (), tails=(3, 2)))
    ring.check_varlen(PackedProblem((), (), tails=(3, 2), alibi="batch"))
    ring.check_varlen(PackedProblem((), (), tails=(3, 2), dtype="float16"))
    ring.check_varlen(PackedProblem((0, 0), (0, 0)))


def test_slopes_of_no_sequence_are_not_read(ring: Ring) -> None:
    """A read of those of sequence -1 would crash here."""
    slopes = ring.xp.lib.stride_tricks.as_strided(ring.xp.zeros(1, np.float32), (0, 1), (2**40, 4))
    out = ring.attention_varlen(*PackedProblem((), (), tails=(3, 2)).arrays(ring.xp), alibi_slopes=slopes)
    assert (ring.numpy(out) == 0).all()


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"softcap": 2.0}, marks=pytest.mark.thorough_on_host),
        pytest.param({"alibi": "heads"}, marks=pytest.mark.thorough_on_host),
        {"alibi": "batch"},
        pytest.param({"sinks": "float32"}, marks=pytest.mark.thorough_on_host),
        {"dropout_p": 0.3},
        pytest.param({"score_mod": "strength"}, marks=pytest.mark.thorough_on_wmma),  # the first sequence alone
        pytest.param({"score_mod": "relative"}, marks=pytest.mark.thorough_on_host),
        pytest.param({"mask_mod": "padding"}, marks=pytest.mark.thorough_on_wmma),
        {"with_dlse": True},
    ],
    ids=str,
)
def test_variants(ring: Ring, variant: dict[str, Any]) -> None:
    """Batch entries are sequences, positions count within them."""
    ring.check_varlen(dataclasses.replace(PACKED, causal=True, **variant))


@pytest.mark.thorough_on_wmma
@pytest.mark.parametrize("strides", ["transposed", "negative", "sliced", "broadcast"])
def test_any_strides(ring: Ring, strides: Any) -> None:
    ring.check_varlen(dataclasses.replace(PACKED, strides=(strides,) * 4))
