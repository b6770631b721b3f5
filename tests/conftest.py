"""The rings: one test function runs on NumPy, on the kernels' source compiled for the CPU, and on a GPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import cuflash
from cuflash import _backends, _launch, _numpy, _plan
from cuflash.testing import (
    assert_attention_accurate,
    assert_attention_varlen_accurate,
    assert_gradients_accurate,
    assert_gradients_varlen_accurate,
)
from cuflash.testing.strategies import AttentionProblem, PackedProblem, attention_problems, packed_problems

HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Ring:
    """Where the tests run, and how large problems may be there.

    Parameters
    ----------
    name, kernel : str
        The ring, and the kernel family that its calls name.
    xp : module
        The array library.
    dtypes : tuple of str
        The dtypes that it computes.
    head_dims : tuple of int
        Head dimensions of random problems; on the host each kernel takes seconds to compile, so few.
    head_dim_pairs : tuple of (int, int)
        Head dimensions of queries and values to go through one by one.
    max_seqlen, examples : int
        Of random problems, and how many of them.
    long_seqlen : int
        The longest sequence of other tests.
    """

    name: str
    kernel: str
    xp: Any
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    head_dim_pairs: tuple[tuple[int, int], ...]
    max_seqlen: int
    examples: int
    long_seqlen: int

    def given(
        self, *, examples: int | None = None, packed: bool = False, **restrictions: Any
    ) -> Callable[..., Callable[[], None]]:
        """Decorate a test of one problem, so that a call runs it on many: the same ones every time."""
        problems = packed_problems if packed else attention_problems
        restrictions = {
            "dtypes": [dtype for dtype in self.dtypes if dtype != "float64"],
            "head_dims": self.head_dims,
            "max_seqlen": self.max_seqlen,
        } | restrictions
        configured = settings(
            max_examples=examples or self.examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        return lambda test: configured(given(problems(**restrictions))(test))

    def asarray(self, x: np.ndarray[Any, Any]) -> Any:
        """Return a NumPy array as an array of this ring, with the same strides."""
        if self.xp is np:
            return x
        if x.size == 0:
            return self.xp.asarray(x)
        low, high = np.lib.array_utils.byte_bounds(x)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        start = x.__array_interface__["data"][0] - low
        return self.xp.ndarray(x.shape, x.dtype, self.xp.asarray(memory).data + start, strides=x.strides)

    def numpy(self, x: Any) -> np.ndarray[Any, Any]:
        """Return an array of this ring as a NumPy array."""
        return x if self.xp is np else self.xp.asnumpy(x)

    def attention(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        return cuflash.attention(q, k, v, kernel=self.kernel, **options)

    def attention_backward(self, *arrays: Any, **options: Any) -> Any:
        return cuflash.attention_backward(*arrays, kernel=self.kernel, **options)

    def attention_vjp(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        return cuflash.attention_vjp(q, k, v, kernel=self.kernel, **options)

    def attention_varlen(self, *arrays: Any, **options: Any) -> Any:
        return cuflash.attention_varlen(*arrays, kernel=self.kernel, **options)

    def attention_varlen_vjp(self, *arrays: Any, **options: Any) -> Any:
        return cuflash.attention_varlen_vjp(*arrays, kernel=self.kernel, **options)

    def options(self, problem: AttentionProblem | PackedProblem) -> dict[str, Any]:
        """Return the options of a problem as the calls of this ring take them."""
        return problem.options_for(self.xp, "callable" if self.name == "numpy" else "expression")

    def gradients(self, problem: AttentionProblem | PackedProblem, *, deterministic: bool = False) -> Any:
        """Compute the gradients of a problem, those of its bias and its sinks too, from its own forward pass."""
        options = self.options(problem)
        asked = {f"return_d{name}": True for name in ("bias", "sinks") if name in options}
        of_vjp = self.attention_varlen_vjp if isinstance(problem, PackedProblem) else self.attention_vjp
        _, vjp = of_vjp(*problem.arrays(self.xp), **options, **asked, deterministic=deterministic)
        return vjp(problem.dout(self.xp), *([problem.dlse(self.xp)] if problem.with_dlse else []))

    def check_forward(self, problem: AttentionProblem) -> None:
        """Hold the output and the log-sum-exp of a problem against the reference."""
        q, k, v = problem.arrays(self.xp)
        out, lse = self.attention(q, k, v, return_lse=True, **self.options(problem))
        assert_attention_accurate(q, k, v, out, lse, **problem.options)

    def check_backward(self, problem: AttentionProblem, *, deterministic: bool = False) -> None:
        """Hold the gradients of a problem against the reference."""
        dq, dk, dv, *others = self.gradients(problem, deterministic=deterministic)
        options = problem.options | {"dlse": problem.dlse()} | self._named(problem, others)
        assert_gradients_accurate(problem.dout(), *problem.arrays(), dq, dk, dv, **options)

    def check_varlen_forward(self, problem: PackedProblem) -> None:
        """Hold the output and the log-sum-exp of a packed problem against the reference."""
        out, lse = self.attention_varlen(*problem.arrays(self.xp), return_lse=True, **self.options(problem))
        assert_attention_varlen_accurate(*problem.arrays(), out, lse, **problem.options)

    def check_varlen(self, problem: PackedProblem) -> None:
        """Hold the results of a packed problem, forward and backward, against the reference."""
        self.check_varlen_forward(problem)
        dq, dk, dv, *others = self.gradients(problem)
        options = problem.options | {"dlse": problem.dlse()} | self._named(problem, others)
        assert_gradients_varlen_accurate(problem.dout(), *problem.arrays(), dq, dk, dv, **options)

    def _named(self, problem: AttentionProblem | PackedProblem, others: list[Any]) -> dict[str, Any]:
        """Return the gradients of options, in the order of the calls' results, by name."""
        names = [f"d{name}" for name in ("bias", "sinks") if name in problem.options]
        return dict(zip(names, others, strict=True))

    @property
    def may_take_tuned_kernels(self) -> bool:
        """Whether calls go to tuned kernels where these can compute them, and else to others, which round otherwise."""
        return self.name == "gpu" and self.kernel == "auto"

    def assert_same_bits(self, actual: Any, expected: Any) -> None:
        """Assert that two arrays agree to the last bit; NaN equals NaN."""
        actual, expected = self.numpy(actual), self.numpy(expected)
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual.astype(np.float64), expected.astype(np.float64))

    def assert_untouched(self, result: Any, expected: Any, poison: float) -> None:
        """Hold a result beside a hidden poison against the one without it: the same bits.

        Tuned kernels compute rows beside NaN in another way, and may round them otherwise; on the host they are those
        of sm80.
        """
        by_sm80 = self.name == "host" and self.kernel != "wmma"
        if (self.may_take_tuned_kernels or by_sm80) and np.isnan(poison):
            eps = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-20}[str(result.dtype)]
            result, expected = self.numpy(result).astype(np.float64), self.numpy(expected).astype(np.float64)
            np.testing.assert_allclose(result, expected, rtol=0, atol=2 * eps * np.abs(expected).max())
        else:
            self.assert_same_bits(result, expected)


ALL_HEAD_DIM_PAIRS = (
    *((1, 1), (3, 8), (16, 16), (17, 32), (32, 17), (33, 64), (64, 64), (80, 80), (96, 64), (128, 128)),
    *((100, 200), (192, 128), (192, 192), (255, 1), (256, 256)),
)


def numpy_ring() -> Ring:
    return Ring(
        name="numpy",
        kernel="auto",
        xp=np,
        dtypes=(*HALF, "float32", "float64"),
        head_dims=(1, 3, 8, 17, 32, 64),
        head_dim_pairs=ALL_HEAD_DIM_PAIRS,
        max_seqlen=129,
        examples=100,
        long_seqlen=1000,
    )


def host_ring(kernel: str) -> Ring:
    return Ring(
        name="host",
        kernel=kernel,
        xp=np,
        dtypes=("float16" if kernel == "wmma" else "bfloat16", "float32"),  # one of 16 bits: templates are the same
        head_dims=(1, 8, 17, 32),
        head_dim_pairs=((192, 128), (256, 256)),  # mutants have 64
        max_seqlen=65,
        examples=8,
        long_seqlen=150,
    )


def gpu_ring(kernel: str) -> Ring:
    import cupy

    if kernel in ("auto", "sm80"):  # problems for which a chip may have tuned kernels
        return Ring(
            name="gpu",
            kernel="auto",
            xp=cupy,
            dtypes=(*HALF, "float32") if kernel == "sm80" else HALF,
            head_dims=(8, 64, 96, 128),
            head_dim_pairs=tuple(pair for pair in ALL_HEAD_DIM_PAIRS if not any(dim % 8 for dim in pair)),
            max_seqlen=400,
            examples=40,
            long_seqlen=1000,
        )
    return Ring(
        name="gpu",
        kernel=kernel,
        xp=cupy,
        dtypes=(*HALF, "float32"),
        head_dims=(1, 3, 8, 17, 32, 64, 96),
        head_dim_pairs=ALL_HEAD_DIM_PAIRS,
        max_seqlen=129,
        examples=60,
        long_seqlen=1000,
    )


@functools.cache
def host_backend() -> Any:
    """Return the launch path on the emulated GPU; one for all tests, so that plans and kernels are kept."""
    from cuflash._launch import LaunchBackend
    from tests.hostcuda import HostDevice

    return LaunchBackend(HostDevice())


def forget_plans() -> None:
    """Forget which family a call of kernel="auto" goes to."""
    _plan._plan_forward.cache_clear()
    _plan._plan_backward.cache_clear()


@functools.cache
def why_no_gpu() -> str | None:
    """Return why the gpu ring cannot run here, or None if it can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no GPU: {error}"
    return None if count else "no GPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ring",
        action="append",
        choices=("numpy", "host", "gpu"),
        help="run the tests that go through several rings on this one only; may be given more than once",
    )


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        on_host = item.get_closest_marker("host") and item.get_closest_marker("thorough_on_host")
        if on_host or (runs_by_wmma(item) and item.get_closest_marker("thorough_on_wmma")):
            item.add_marker(pytest.mark.thorough)


def runs_by_wmma(item: pytest.Item) -> bool:
    """Whether a test that the host ring runs by the family sm80 too is here the one by wmma."""
    return hasattr(item, "callspec") and item.callspec.params.get("ring") == ("host", "wmma")


RINGS = [
    pytest.param(("numpy", "auto"), marks=pytest.mark.numpy, id="numpy"),
    pytest.param(("host", "wmma"), marks=pytest.mark.host, id="host-wmma"),
    pytest.param(("host", "auto"), marks=pytest.mark.host, id="host-auto"),
    pytest.param(("gpu", "wmma"), marks=pytest.mark.gpu, id="gpu-wmma"),
    pytest.param(("gpu", "auto"), marks=pytest.mark.gpu, id="gpu-auto"),
    pytest.param(("gpu", "sm80"), marks=pytest.mark.gpu, id="gpu-sm80"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ring" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--ring") or ("numpy", "host", "gpu")
        metafunc.parametrize("ring", [ring for ring in RINGS if ring.values[0][0] in chosen], indirect=True)


@pytest.fixture
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ring]:
    """A ring that can run here; the calls of the test go to its kernels."""
    name, kernel = request.param
    if name == "numpy":
        # Small problems shall meet several blocks.
        monkeypatch.setattr(_numpy, "BLOCK_ROWS", 32)
        monkeypatch.setattr(_numpy, "BLOCK_KEYS", 24)
        yield numpy_ring()
    elif name == "host":
        if shutil.which("g++") is None:
            pytest.skip("the host ring needs g++")
        monkeypatch.setattr(_backends, "numpy_backend", host_backend())
        yield host_ring(kernel)
    else:
        reason = why_no_gpu()
        if reason is not None:
            pytest.skip(reason)
        if kernel == "sm80":  # what "auto" means without Hopper's family
            monkeypatch.setattr(_launch, "AUTO", ("sm80", "wmma"))
        forget_plans()
        yield gpu_ring(kernel)
        forget_plans()


@pytest.fixture
def gpu() -> Any:
    """CuPy, where there is a GPU."""
    reason = why_no_gpu()
    if reason is not None:
        pytest.skip(reason)
    import cupy

    return cupy
