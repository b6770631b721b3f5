"""The features that a call may have beyond plain attention: what each adds to the class of options.

Each feature lives once, in cuda_src/cuflash/attention/; here is what the host knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._dropout import threshold
from ._params import STRIDES
from ._problem import Mod, Operand, Problem

Pointer = Callable[[Any], int]

ELEMENTS = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
    "bool": "bool",
    **{f"int{bits}": kind for bits, kind in ((8, "signed char"), (16, "short"), (32, "int"), (64, "long long"))},
    **{
        f"uint{bits}": f"unsigned {kind}" for bits, kind in ((8, "char"), (16, "short"), (32, "int"), (64, "long long"))
    },
}
"""The C++ type of each dtype that an array may have."""

ARGUMENTS = {
    "alibi": "alibi_slopes",
    "mod": "score_mod or mask_mod",
    "dropout": "dropout_p",
    "packed": "packed sequences",
}
"""What a caller calls a feature, where that is not its name."""

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "bool": 1}
"""The sizes of elements that kernels copy tile by tile."""

MAX_ALIBI_SEQLEN = 2**21  # attention/alibi.cuh
SCALARS = {"int": ("int", "i4"), "float": ("float", "f4"), "bool": ("bool", "?")}

# Up to |x| = limit, sums of powers of x^2 are tanh(x) / x, and x / tanh(x), to 2^-24.5.
TANH_OVER_X = (0.17, (0.99999996, -0.333308414, 0.131024664))
X_OVER_TANH = (1.0, (1.00000003, 0.333331875, -0.022209883, 0.00207988807, -0.000166657719))


@dataclass(frozen=True)
class Feature:
    """One member of the class of options.

    Parameters
    ----------
    name : str
        Of the member, and of the feature in the kernel's symbol.
    type, header : str
        Its C++ class and where that is defined; without a header, `definition` defines it.
    dtype : numpy.dtype
        The class as NumPy sees it.
    values : mapping
        What is known before arrays are: sizes, strides, numbers.
    arrays : callable
        From the arrays of a call and the function that gives an array's address to the values that are then known.
    element, element_bytes
        Of an array that kernels copy to shared memory tile by tile: the C++ type and its size.
    flags : tuple of str
        The constants of PlainOptions that it sets.
    methods : mapping
        By the name of a method of PlainOptions, the statement that it adds there.
    """

    name: str
    type: str
    header: str
    dtype: np.dtype[Any]
    values: Mapping[str, Any]
    arrays: Callable[[Mapping[str, Any], Pointer], dict[str, Any]]
    element: str = ""
    element_bytes: int = 0
    flags: tuple[str, ...] = ()
    methods: Mapping[str, str] = field(default_factory=dict)
    definition: str = ""


def _struct(**fields: Any) -> np.dtype[Any]:
    return np.dtype(list(fields.items()), align=True)


def _is_exact(problem: Problem) -> bool:
    """Whether both passes must round scores alike: in float32 weights are no better than their difference."""
    return problem.dtype == "float32"


def _softcap(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    if problem.softcap is None:
        return None
    with np.errstate(all="ignore"):
        scale, inverse = np.float64(problem.softmax_scale), 1 / np.float64(problem.softcap)
        small_limit, square = _completed_square(*TANH_OVER_X, scale * inverse, scale)
        if scale < 0:  # the largest score would not be that of the largest number that the factor is left out of
            small_limit = 0.0
        moderate_limit, reciprocal = _by_products(*X_OVER_TANH, scale * inverse, 1 / scale)
    return Feature(
        name="softcap",
        type="cuflash::Softcap",
        header="softcap",
        dtype=_struct(cap="f4", inverse="f4", limits=("f4", (2,)), square=("f4", (3,)), reciprocal=("f4", (5,))),
        values={
            "cap": problem.softcap,
            "inverse": inverse,
            "limits": (small_limit, moderate_limit),
            "square": square,
            "reciprocal": reciprocal,
        },
        arrays=lambda extras, pointer: {},
        flags=("kChangesScores", "kBendsScores") + (() if _is_exact(problem) else ("kHasShortWays",)),
    )


def _by_products(
    limit: float, coefficients: tuple[float, ...], slope: np.float64, factor: np.float64
) -> tuple[float, list[float]]:
    """Put x = slope * product into a sum of powers of x^2 times a factor, with limit 0 where float32 cannot hold it."""
    sizes = factor * np.array(coefficients) * slope ** (2 * np.arange(len(coefficients)))
    largest = limit / abs(slope)
    held = 1e-15 < largest < 1e15 and np.all((abs(sizes) > 1e-37) & (abs(sizes) < 1e37))
    return (float(largest), sizes.tolist()) if held else (0.0, [0.0] * len(coefficients))


def _completed_square(
    limit: float, coefficients: tuple[float, ...], slope: np.float64, factor: np.float64
) -> tuple[float, list[float]]:
    """Put factor * (a + b x^2 + c x^4) with x = slope * product into d * ((product^2 + e)^2 + f); return d, e and f."""
    a, b, c = coefficients
    shift = np.float64(np.float32(b / (2 * c * slope**2)))
    # What the first is rounded by is an error of all scores: of some numbers beside the right one, the best for it.
    rests = np.float32((a / (c * slope**4) - shift**2) * (1 + 2.0**-23 * np.arange(-16, 17)))
    sums = np.float64(np.float32(shift**2 + rests))
    best = np.argmin(abs(np.float32(factor * a / sums) / (factor * a / sums) - 1))
    square = np.array([factor * a / sums[best], shift, rests[best]])
    largest = limit / abs(slope)
    held = 1e-15 < sums[best] < 1e37 / largest and np.all((abs(square) > 1e-37) & (abs(square) < 1e37))
    return (float(largest), square.tolist()) if held else (0.0, [0.0] * len(square))


def _pair_array(name: str, operand: Operand, flag: str, methods: dict[str, str]) -> Feature:
    return Feature(
        name=name,
        type=f"cuflash::PairArray<{ELEMENTS[operand.dtype]}>",
        header="pairs",
        dtype=_struct(
            data="u8",
            strides=STRIDES,
            seqlens=("i4", (2,)),
            tile="u8",
            place=("i4", (3,)),
        ),
        values={"strides": operand.strides},
        arrays=lambda extras, pointer: {"data": pointer(extras[name])},
        element=ELEMENTS[operand.dtype],
        flags=(flag,),
        methods={"enter": f"{name}.enter(sequence, head);", **methods},
        element_bytes=BYTES[operand.dtype],
    )


def _bias(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    if "bias" not in operands:
        return None
    return _pair_array(
        "bias",
        operands["bias"],
        "kChangesScores",
        {"score": "score = score + cuflash::to_float(bias.at(query, key));", "score_by_bias": "score.slope = 1.0f;"},
    )


def _alibi(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    if "alibi_slopes" not in operands:
        return None
    if max(problem.seqlen_q, problem.seqlen_k) >= MAX_ALIBI_SEQLEN:
        raise NotImplementedError(
            f"alibi_slopes: kernels compute distances below {MAX_ALIBI_SEQLEN}; "
            f"the sequences have lengths {problem.seqlen_q} and {problem.seqlen_k}"
        )
    batch_stride, head_stride, _, _ = operands["alibi_slopes"].strides
    # Kernels may put it on products if no other option sees scores, and scores are not far from products in size.
    alone = problem.softcap is None and "bias" not in operands and (problem.mod is None or not problem.mod.score_mod)
    near = 1e-6 < problem.softmax_scale < 1e6
    return Feature(
        name="alibi",
        type="cuflash::Alibi",
        header="alibi",
        dtype=_struct(slopes="u8", batch_stride="i8", head_stride="i8", inverse_scale="f4", slope="f4", diagonal="i4"),
        values={
            "batch_stride": batch_stride,
            "head_stride": head_stride,
            "inverse_scale": 1 / problem.softmax_scale if near else 0,
        },
        arrays=lambda extras, pointer: {"slopes": pointer(extras["alibi_slopes"])},
        flags=("kChangesScores", "kHasPenalties") if alone and near and not _is_exact(problem) else ("kChangesScores",),
        methods={
            "enter": "alibi.enter(sequence, head);",
            "score": "score = score + alibi.bias(query, key);",
        },
    )


def _mask(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    if "mask" not in operands:
        return None
    return _pair_array("mask", operands["mask"], "kHidesPairs", {"visible": "mask.at(query, key)"})


def _mod(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    mod = problem.mod
    if mod is None:
        return None
    flags, methods = ["kReadsArrays"] if mod.args else [], {"enter": "mod.enter(sequence, head);"}
    if mod.score_mod is not None:
        flags += ["kChangesScores", "kBendsScores", "kBreaksScores"]
        methods["score"] = "score = mod.score_mod(score, query, key);"
    if mod.mask_mod is not None:
        flags.append("kHidesPairs")
        methods["visible"] = "mod.mask_mod(query, key)"
    fields: dict[str, Any] = {}
    members = []
    for name, kind in mod.args:
        if isinstance(kind, str):
            cpp, fields[name] = SCALARS[kind]
            members.append(f"  {cpp} {name};")
        else:
            dtype, rank = kind
            fields[name] = _struct(data="u8", strides=("i8", (rank,)))
            members.append(f"  cuflash::ArrayView<{ELEMENTS[dtype]}, {rank}> {name};")

    def arrays(extras: Mapping[str, Any], pointer: Pointer) -> dict[str, Any]:
        given = extras.get("mod_args", {})
        values: dict[str, Any] = {}
        for name, kind in mod.args:
            x = given[name]
            if isinstance(kind, str):
                values[name] = x
            else:
                values[name] = (pointer(x), tuple(stride // x.dtype.itemsize for stride in x.strides))
        return values

    return Feature(
        name="mod",
        type="Mod",
        header="array_view",
        dtype=_struct(**fields, b="i4", h="i4"),
        values={},
        arrays=arrays,
        flags=tuple(flags),
        methods=methods,
        definition=_mod_class(mod, members),
    )


def _mod_class(mod: Mod, members: list[str]) -> str:
    """The class that holds the expressions of a call. The compiler counts lines from where each expression begins."""
    lines = ["#ifndef INFINITY", "#define INFINITY __int_as_float(0x7f800000)", "#endif"]
    lines += ["struct Mod {", *members, "  int b, h;", ""]
    lines += ["  __device__ __forceinline__ void enter(const cuflash::Sequence& sequence, int head) {"]
    lines += ["    b = sequence.batch;", "    h = head;", "  }"]
    if mod.score_mod is not None:
        lines += [
            "  __device__ __forceinline__ cuflash::Dual score_mod(cuflash::Dual score, int q_idx, int kv_idx) const {"
        ]
        lines += ["    return (", '#line 1 "score_mod"', str(mod.score_mod), "    );", '#line 1 "options"', "  }"]
    if mod.mask_mod is not None:
        lines += ["  __device__ __forceinline__ bool mask_mod(int q_idx, int kv_idx) const {"]
        lines += ["    return (", '#line 1 "mask_mod"', str(mod.mask_mod), "    );", '#line 1 "options"', "  }"]
    return "\n".join([*lines, "};"])


def _block_mask(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    if "block_mask" not in operands:
        return None
    batch_stride, head_stride, num_words, _ = operands["block_mask"].strides

    def arrays(extras: Mapping[str, Any], pointer: Pointer) -> dict[str, Any]:
        some, every = extras["block_mask"].words
        return {"some": pointer(some), "every": pointer(every)}

    return Feature(
        name="block_mask",
        type="cuflash::BlockMask",
        header="block_mask",
        dtype=_struct(some="u8", every="u8", batch_stride="i8", head_stride="i8", num_words="i8", bits=("?", (2,))),
        values={"batch_stride": batch_stride, "head_stride": head_stride, "num_words": num_words},
        arrays=arrays,
        flags=("kHidesPairs", "kSkipsBlocks"),
        methods={"enter": "block_mask.enter(sequence, head);"},
    )


def _sinks(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    if "sinks" not in operands:
        return None
    operand = operands["sinks"]
    return Feature(
        name="sinks",
        type=f"cuflash::Sinks<{ELEMENTS[operand.dtype]}>",
        header="sinks",
        dtype=_struct(data="u8", head_stride="i8", logit="f4"),
        values={"head_stride": operand.strides[1]},
        arrays=lambda extras, pointer: {"data": pointer(extras["sinks"])},
        flags=("kHasSinks",),
        methods={"enter": "sinks.enter(sequence, head);"},
    )


def _dropout(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    if not problem.dropout_p:
        return None

    def arrays(extras: Mapping[str, Any], pointer: Pointer) -> dict[str, Any]:
        seed = extras["seed"]
        return {"seed": seed} if isinstance(seed, int) else {"seed_array": pointer(seed)}

    limit, drops_below = threshold(problem.dropout_p)
    return Feature(
        name="dropout",
        type="cuflash::Dropout",
        header="dropout",
        dtype=_struct(
            seed="u8",
            seed_array="u8",
            threshold="u4",
            inverse="u4",
            survivor_factor="f4",
            batch="i4",
            head="i4",
        ),
        values={
            "threshold": int(limit.view(np.uint16)) * 0x10001,
            "inverse": 0xFFFFFFFF if drops_below else 0,
            "survivor_factor": 1 / (1 - problem.dropout_p),
        },
        arrays=arrays,
        flags=("kHasDropout",),
        methods={"enter": "dropout.enter(sequence, head);"},
    )


def _packed(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    if not problem.packed:
        return None
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    return Feature(
        name="packed",
        type="cuflash::PackedSequences",
        header="packed",
        dtype=_struct(**dict.fromkeys(names, "u8")),
        values={},
        arrays=lambda extras, pointer: {name: pointer(extras[name]) for name in names if extras.get(name) is not None},
        flags=("kPacked",),
    )


# In the order in which they act on a score.
FEATURES = (_softcap, _bias, _alibi, _mod, _mask, _block_mask, _sinks, _dropout, _packed)
