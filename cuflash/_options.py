"""The options of a call as the class that kernels take: written in CUDA C++, and mirrored by NumPy.

This module puts the features of a call together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._features import ARGUMENTS, FEATURES, Feature, Pointer
from ._problem import BLOCK_SIZE, Mod, Operand, Problem


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
    def names_in_every_tile(self) -> set[str]:
        """The features that act on all tiles of pairs: with a block mask those that only hide pairs act on few."""
        hiding = {"kHidesPairs", "kSkipsBlocks", "kReadsArrays"} if "block_mask" in self.names else set()
        return {feature.name for feature in self.features if not feature.flags or not hiding.issuperset(feature.flags)}

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
            lines += ["  template <class Key>"]
            lines += _method(
                "cuflash::Dual score(cuflash::Dual score, int query, Key key) const", [*scores, "return score;"]
            )
        if any("kHasPenalties" in feature.flags for feature in self.features):
            lines += _method("float penalty(int query, int key) const", ["return alibi.penalty(query, key);"])
            lines += _method(
                "bool penalties_are_line(int query, int key, int width) const",
                ["return alibi.penalties_are_line(query, key, width);"],
            )
            lines += _method("float penalty_step(int query, int key) const", ["return alibi.penalty_step(query, key);"])
        if "softcap" in names:
            if not scores:
                lines += ["  static constexpr bool kLeavesFactor = true;"]
                lines += ["  template <cuflash::Size kSize>"]
                lines += _method("float factor() const", ["return softcap.factor<kSize>();"])
                lines += ["  template <cuflash::Size kSize>"]
                lines += _method(
                    "cuflash::Dual over_factor(float product) const", ["return softcap.over_factor<kSize>(product);"]
                )
            lines += ["  template <cuflash::Size kSize>"]
            lines += _method(
                "cuflash::Dual scaled(float product, float scale) const",
                ["return softcap.score<kSize>(product, scale);"],
            )
            lines += _method(
                "bool allows(cuflash::Size size, float largest_product) const",
                ["return softcap.allows(size, largest_product);"],
            )
        if "bias" in names:
            lines += ["  template <class Key>"]
            lines += _method(
                "cuflash::Dual score_by_bias(cuflash::Dual score, int query, Key key) const",
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
            lines += ["  template <class Key>"]
            lines += _method("bool visible(int query, Key key) const", [f"return {visible};"])
        if "sinks" in names:
            lines += _method("float sink() const", ["return sinks.logit;"])
        if "dropout" in names:
            lines += ["  template <int kTiles>"]
            lines += _method(
                "cuflash::Draw<kTiles> draw(unsigned query, unsigned key) const",
                ["return dropout.draw<kTiles>(query, key);"],
            )
            lines += _method("float survivor_factor() const", ["return dropout.survivor_factor;"])
        if "block_mask" in names:
            lines += ["  template <int kBlock>"]
            lines += _method(
                "static cuflash::Job query_job(const cuflash::Problem& problem, int index)",
                ["return cuflash::BatchedSequences::query_job<kBlock>(problem, index, false);"],
            )
        if "packed" in names:
            lines += ["  template <int kBlock>"]
            lines += _method(
                "static int num_query_jobs(const cuflash::Problem& problem)",
                ["return cuflash::PackedSequences::num_query_jobs<kBlock>(problem);"],
            )
            lines += ["  template <int kBlock>"]
            lines += _method(
                "cuflash::Job query_job(const cuflash::Problem& problem, int index) const",
                ["return packed.query_job<kBlock>(problem, index);"],
            )
            lines += ["  template <int kBlock>"]
            lines += _method(
                "static int num_key_jobs(const cuflash::Problem& problem)",
                ["return cuflash::PackedSequences::num_key_jobs<kBlock>(problem);"],
            )
            lines += ["  template <int kBlock>"]
            lines += _method(
                "cuflash::Job key_job(const cuflash::Problem& problem, int index) const",
                ["return packed.key_job<kBlock>(problem, index);"],
            )
            lines += ["  template <int kBlock>"]
            lines += _method(
                "static long long query_tile(const cuflash::Problem& problem, const cuflash::Sequence& sequence, "
                "int head, int tile)",
                ["return cuflash::PackedSequences::query_tile<kBlock>(problem, sequence, head, tile);"],
            )
            lines += ["  template <int kBlock>"]
            lines += _method(
                "static long long key_tile(const cuflash::Problem& problem, const cuflash::Sequence& sequence, "
                "int head, int tile)",
                ["return cuflash::PackedSequences::key_tile<kBlock>(problem, sequence, head, tile);"],
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
            f"{array.name}.template load<kBlockM, kBlockN, kNumThreads>(memory + {offset}, {place}, thread);"
            for array, offset in zip(arrays, offsets, strict=False)
        ]
        lines = []
        if loads:
            lines += [f"  {tile}", f"  static constexpr int kTileBytes = {offsets[-1]};"]
            lines += ["  template <int kBlockM, int kBlockN, int kNumThreads>"]
            lines += _method(
                "void load(unsigned char* memory, int first_query, int first_key, int thread = threadIdx.x) const",
                loads,
            )
            same = " && ".join(f"{array.name}.strides.batch == 0" for array in arrays)
            lines += _method("bool same_in_batch() const", [f"return {same};"])
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


PLAIN = Options()
"""No features."""


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
