"""Tools to test attention code: a float64 reference, an accuracy rule, and hypothesis strategies.

Everything takes NumPy and CuPy arrays. The strategies need the package ``hypothesis`` and live in
:mod:`cuflash.testing.strategies`; the rest needs NumPy alone. A property test of your own
kernel takes ten lines:

.. code-block:: python

    from hypothesis import given

    from cuflash.testing import assert_attention_accurate
    from cuflash.testing.strategies import attention_problems

    @given(attention_problems(dtypes=["float16", "float32"], layouts=["bhsd"], max_seqlen=65))
    def test_my_attention(problem):
        q, k, v = problem.arrays()  # or problem.arrays(cupy)
        out, lse = my_attention(q, k, v, **problem.options)
        assert_attention_accurate(q, k, v, out, lse, **problem.options)

The problems have 2-D to 4-D arrays of any strides, grouped heads, lengths of 0 and around block sizes, both
causal alignments and sliding windows; restrict them by the arguments of ``attention_problems`` to what your
kernel supports. A failing problem is shrunk, and printed so that it can be pasted into a test of its own.

With ``attention_problems(variants=["softcap", "bias", "sinks"])`` some problems have these options too;
``strategies.VARIANTS`` lists them all. ``problem.options_for(cupy, mods="expression")`` builds them with CuPy
arrays, and with CUDA expressions in place of Python callables. ``packed_problems`` draws packed sequences, for
:func:`assert_attention_varlen_accurate`.

A result is *accurate* when its largest error against the reference is at most twice that of plain attention,
the usual formula computed with the same input dtype (scores in float32, weights rounded to the input dtype),
plus one rounding of the result. Values that are NaN or infinite must be so in the same places.
"""

from __future__ import annotations

from ._accuracy import (
    assert_attention_accurate,
    assert_attention_varlen_accurate,
    assert_gradients_accurate,
    assert_gradients_varlen_accurate,
)
from ._reference import (
    plain_attention,
    plain_attention_backward,
    reference_attention,
    reference_attention_backward,
    reference_attention_varlen,
    reference_attention_varlen_backward,
)

__all__ = [
    "assert_attention_accurate",
    "assert_attention_varlen_accurate",
    "assert_gradients_accurate",
    "assert_gradients_varlen_accurate",
    "plain_attention",
    "plain_attention_backward",
    "reference_attention",
    "reference_attention_backward",
    "reference_attention_varlen",
    "reference_attention_varlen_backward",
]
