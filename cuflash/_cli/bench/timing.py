"""Median and spread, and contenders measured in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

Call = Callable[[], Any]
Failure = str
"""Why something could not be measured, in one line."""


@dataclass(frozen=True)
class Contender:
    """One implementation, ready to be called on its inputs, and the context in which its turns run."""

    call: Call
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Spread:
    """The median of samples and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, _, high = quantiles(samples, n=4, method="inclusive")
        return cls(median(samples), low, high)

    def __mul__(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def fields(self, unit: str) -> dict[str, Any]:
        """The keys of a record: ``{"ms": ..., "ms_quartiles": [..., ...]}`` for the unit "ms"."""
        return {unit: _rounded(self.median), f"{unit}_quartiles": [_rounded(self.low), _rounded(self.high)]}


def describe(error: BaseException) -> Failure:
    """An exception as one line that fits into a record."""
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    return f"{type(error).__name__}: {message}"[:200].removesuffix(": ")


def measure_in_turn(
    contenders: Mapping[str, Contender],
    sample: Callable[[Call, int], Sequence[float]],
    *,
    rounds: int = 4,
    round_ms: float = 40,
    max_repeats: int = 50,
) -> dict[str, Spread | Failure]:
    """Time all contenders, one after the other, several times over.

    A clock that drifts during the measurement then drifts for everyone. A round before the first warms up.

    Parameters
    ----------
    contenders
        What to time, by name.
    sample
        ``sample(call, repeats)`` gives the milliseconds of each of ``repeats`` calls.
    rounds
        How often each contender has its turn.
    round_ms
        About how long one turn lasts; it is at least one call.
    max_repeats
        The most calls in one turn.

    Returns
    -------
    dict
        For each name the spread over all rounds, or why the calls failed.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    repeats: dict[str, int] = {}
    failures: dict[str, Failure] = {}
    for round_number in range(rounds + 1):
        for name, contender in contenders.items():
            if name in failures:
                continue
            try:
                with contender.context():
                    if round_number == 0:
                        _, estimate = sample(contender.call, 2)  # the very first call may compile or load
                        repeats[name] = max(1, min(max_repeats, int(round_ms / max(estimate, 1e-6))))
                    else:
                        samples[name].extend(sample(contender.call, repeats[name]))
            except Exception as error:  # whatever stops one contender must not stop the others
                failures[name] = describe(error)
    return {name: failures[name] if name in failures else Spread.of(samples[name]) for name in contenders}


def wall_clock(call: Call, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` calls that are done when they return."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
