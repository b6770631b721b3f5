"""The options of a call as the class that kernels take: written in CUDA C++, and mirrored by NumPy.

Each feature lives once, in cuda_src/cuflash/attention/; this module puts those of a call together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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

BLOCK_SIZE = 128  # attention/block_mask.cuh
MAX_ALIBI_SEQLEN = 2**21  # attention/alibi.cuh
SCALARS = {"int": ("int", "i4"), "float": ("float", "f4"), "bool": ("bool", "?")}


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


def _softcap(problem: Problem, operands: Mapping[str, Operand]) -> Feature | None:
    if problem.softcap is None:
        return None
    return Feature(
        name="softcap",
        type="cuflash::Softcap",
        header="softcap",
        dtype=_struct(cap="f4", inverse="f4"),
        values={"cap": problem.softcap, "inverse": 1 / problem.softcap},
        arrays=lambda extras, pointer: {},
        flags=("kChangesScores",),
        methods={
            "score": "score = softcap.score(score);",
            "score_if_small": "score = softcap.score_if_small(score);",
            "is_small": "return softcap.is_small(score);",
        },
    )


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
    return Feature(
        name="alibi",
        type="cuflash::Alibi",
        header="alibi",
        dtype=_struct(slopes="u8", batch_stride="i8", head_stride="i8", slope="f4", diagonal="i4"),
        values={"batch_stride": batch_stride, "head_stride": head_stride},
        arrays=lambda extras, pointer: {"slopes": pointer(extras["alibi_slopes"])},
        flags=("kChangesScores",),
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
        flags.append("kChangesScores")
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

    return Feature(
        name="dropout",
        type="cuflash::Dropout",
        header="dropout",
        dtype=_struct(seed="u8", seed_array="u8", threshold="u4", survivor_factor="f4", batch="i4", head="i4"),
        values={"threshold": round(problem.dropout_p * 65536), "survivor_factor": 1 / (1 - problem.dropout_p)},
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


@dataclass(frozen=True)
class Options:
    """The features of a call."""

    features: tuple[Feature, ...] = ()

    @classmethod
    def of(cls, problem: Problem, operands: Mapping[str, Operand]) -> Options:
        found = (make(problem, operands) for make in FEATURES)
        return cls(tuple(feature for feature in found if feature is not None))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(feature.name for feature in self.features)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of the public functions that ask for the features."""
        return tuple(ARGUMENTS.get(name, name) for name in self.names)

    @property
    def type(self) -> str:
        """The C++ class."""
        return "Options" if self.features else "cuflash::PlainOptions"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype([(feature.name, feature.dtype) for feature in self.features], align=True)

    def fill(self, extras: Mapping[str, Any], pointer: Pointer) -> np.ndarray[Any, Any]:
        """The options of one call, as a structured array of size 1."""
        filled = np.zeros(1, self.dtype)
        for feature in self.features:
            member = filled[feature.name]
            for name, value in {**feature.values, **feature.arrays(extras, pointer)}.items():
                member[name] = value
        return filled

    def allows_tile(self, block_m: int, block_n: int) -> bool:
        """Whether kernels may go through the pairs in tiles of this size: a tile lies in one block of a block mask."""
        return "block_mask" not in self.names or (BLOCK_SIZE % block_m == 0 and BLOCK_SIZE % block_n == 0)

    @property
    def code(self) -> str:
        """The C++ that defines the class."""
        if not self.features:
            return ""
        headers = sorted({feature.header for feature in self.features})
        flags = sorted({flag for feature in self.features for flag in feature.flags})
        lines = [f"#include <cuflash/attention/{header}.cuh>" for header in headers]
        lines += [feature.definition for feature in self.features if feature.definition]
        lines += ["struct Options : cuflash::PlainOptions {"]
        lines += [f"  {feature.type} {feature.name};" for feature in self.features]
        lines += [f"  static constexpr bool {flag} = true;" for flag in flags]
        lines += [f"  using Bias = {feature.element};" for feature in self.features if feature.name == "bias"]
        lines += self._methods()
        return "\n".join([*lines, "};", ""])

    def _methods(self) -> list[str]:
        names = self.names
        lines = _method("void enter(const cuflash::Sequence& sequence, int head)", self._statements("enter"))
        scores = self._statements("score")
        if scores:
            lines += _method(
                "cuflash::Dual score(cuflash::Dual score, int query, int key) const", [*scores, "return score;"]
            )
        if "softcap" in names:
            small = [f.methods.get("score_if_small", f.methods.get("score", "")) for f in self.features]
            lines += ["  static constexpr bool kHasSmallScores = true;"]
            lines += _method("bool is_small(float score) const", self._statements("is_small"))
            lines += _method(
                "cuflash::Dual score_if_small(cuflash::Dual score, int query, int key) const",
                [*filter(None, small), "return score;"],
            )
        if "bias" in names:
            lines += _method(
                "cuflash::Dual score_by_bias(cuflash::Dual score, int query, int key) const",
                [*self._statements("score", "score_by_bias"), "return score;"],
            )
        lines += self._tile_methods()
        visible = " && ".join(self._statements("visible"))
        if "block_mask" in names:
            decided = f"(block_mask.every_visible || ({visible}))" if visible else "true"
            visible = f"block_mask.some_visible && {decided}"
            lines += _method("bool shows_all() const", ["return block_mask.every_visible;"])
            lines += _method("bool hides_all() const", ["return !block_mask.some_visible;"])
        elif visible:
            lines += _method("bool shows_all() const", ["return false;"])
        if visible:
            lines += _method("bool visible(int query, int key) const", [f"return {visible};"])
        if "sinks" in names:
            lines += _method("float sink() const", ["return sinks.logit;"])
        if "dropout" in names:
            lines += _method("unsigned draw(int query, int key) const", ["return dropout.draw(query, key);"])
            lines += _method("float survivor_factor() const", ["return dropout.survivor_factor;"])
        if "packed" in names:
            for rows in ("query", "key"):
                lines += ["  template <int kBlock>"]
                lines += _method(
                    f"cuflash::Job {rows}_job(const cuflash::Problem& problem) const",
                    [f"return packed.{rows}_job<kBlock>(problem);"],
                )
        return lines

    def _tile_methods(self) -> list[str]:
        """What is copied of a tile of pairs, one array behind the other, and where it is then found."""
        arrays = [feature for feature in self.features if feature.element]
        tile, place = "template <int kBlockM, int kBlockN>", "first_query, first_key"
        offsets = ["0"]
        for feature in arrays:
            offsets.append(f"{offsets[-1]} + {feature.type}::template kTileBytes<kBlockM, kBlockN>")
        looks = [
            f"{array.name}.template look_at<kBlockN>(memory + {offset}, {place});"
            for array, offset in zip(arrays, offsets, strict=False)
        ]
        if "block_mask" in self.names:
            looks.append(f"block_mask.template look_at<kBlockM, kBlockN>({place});")
        loads = [
            f"{array.name}.template load<kBlockM, kBlockN, kNumThreads>(memory + {offset}, {place});"
            for array, offset in zip(arrays, offsets, strict=False)
        ]
        lines = []
        if loads:
            lines += [f"  {tile}", f"  static constexpr int kTileBytes = {offsets[-1]};"]
            lines += ["  template <int kBlockM, int kBlockN, int kNumThreads>"]
            lines += _method("void load(unsigned char* memory, int first_query, int first_key) const", loads)
        if looks:
            lines += [f"  {tile}"]
            lines += _method("void look_at(const unsigned char* memory, int first_query, int first_key)", looks)
        return lines

    def tile_bytes(self, block_m: int, block_n: int) -> int:
        """The shared memory that a tile of pairs takes for arrays of the options."""
        return sum(block_m * (block_n * feature.element_bytes + 16) for feature in self.features if feature.element)

    def _statements(self, *methods: str) -> list[str]:
        """The statements that features add to some methods, in the order of the features."""
        found = (feature.methods.get(method) for feature in self.features for method in methods)
        return [statement for statement in found if statement is not None]


def explain(mod: Mod | None, message: str) -> str | None:
    """What a compiler's message says about an expression of the caller; None if it is about something else."""
    found = re.search(r"\b(score_mod|mask_mod)[(:]\d.*error.*(\n.+){0,2}", message)
    # Or it is about what an expression uses, such as an array with a wrong number of indices.
    found = found or re.search(r".*error.*(?s:.*?)(?:at line \d+ of |^)(score_mod|mask_mod)\b.*", message, re.MULTILINE)
    if mod is None or found is None:
        return None
    return f"{found[1]}: {getattr(mod, found[1])!r} does not compile:\n{found[0]}"


def _method(signature: str, statements: list[str]) -> list[str]:
    return [f"  __device__ __forceinline__ {signature} {{", *(f"    {statement}" for statement in statements), "  }"]
