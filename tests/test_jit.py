"""Compiling at first use: headers, NVRTC, CuPy's cache, sources and symbols. No GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _backends, _gradients, _params, _wmma
from cuflash._device import KernelSource
from cuflash._jit import compiler, headers, sources
from cuflash._kernel import HEAD_DIMS, NUMBERS, Kernel
from cuflash._launch import LaunchBackend
from cuflash._options import Options
from cuflash._problem import Problem
from tests import cubin

ROOT = Path(__file__).resolve().parents[1]
MAKERS = (_wmma.forward, _wmma.backward_dkdv, _wmma.backward_dq)


def kernels(number: str = "float16", dims: tuple[int, int] = (64, 64)) -> list[Kernel]:
    problem = Problem("float16", 1, 1, 1, 64, 64, *dims, 1.0)
    made = [make(problem, Options(), number, cubin.CHIPS[90]) for make in MAKERS]
    return [kernel for kernel, _ in (*made, _gradients.delta(problem, number))]


# Headers


class Computer:
    """Directories that stand for site-packages and for the system's; a header is a file that names its place."""

    def __init__(self, directory: Path) -> None:
        self.site = directory / "site" / "nvidia"
        self.user_site = directory / "user" / "nvidia"
        self.toolkit = directory / "toolkit"
        self.system = directory / "system"

    def install(self, directory: Path, *names: str) -> Path:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).touch()
        return directory

    def install_toolkit(self, directory: Path) -> Path:
        return self.install(directory / "include", *headers.NEEDED)


FROM_RUNTIME = ("cuda_fp16.h", "cuda_bf16.h", "mma.h")


@pytest.fixture
def computer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Computer]:
    """A computer without any CUDA header."""
    it = Computer(tmp_path)
    spec = SimpleNamespace(submodule_search_locations=[str(it.user_site), str(it.site)])
    monkeypatch.setattr(importlib.util, "find_spec", {"nvidia": spec}.get)
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    system = (f"{it.system}/cuda-{{major}}/include", f"{it.system}/cuda/include")
    monkeypatch.setattr(headers, "_SYSTEM_DIRECTORIES", system)
    headers.cuda_include_directories.cache_clear()
    yield it
    headers.cuda_include_directories.cache_clear()


def resolve(cuda_major: int, header: str) -> Path:
    """The file that NVRTC would take for a header."""
    return next(d / header for d in headers.cuda_include_directories(cuda_major) if (d / header).is_file())


@pytest.mark.parametrize("site", ["site", "user_site"])
def test_headers_of_the_cuda_12_wheels(computer: Computer, site: str) -> None:
    """Two wheels with a directory each; the second may be installed elsewhere."""
    runtime = computer.install(computer.site / "cuda_runtime" / "include", *FROM_RUNTIME)
    compiler_wheel = computer.install(getattr(computer, site) / "cuda_nvcc" / "include", "crt/mma.h")
    assert resolve(12, "mma.h") == runtime / "mma.h"
    assert resolve(12, "crt/mma.h") == compiler_wheel / "crt/mma.h"


def test_headers_of_the_cuda_13_wheels(computer: Computer) -> None:
    """One directory for all wheels."""
    include = computer.install(computer.site / "cu13" / "include", *headers.NEEDED)
    assert headers.cuda_include_directories(13)[-1] == include
    assert resolve(13, "crt/mma.h") == include / "crt/mma.h"


def test_wheels_of_the_other_cuda_version_are_not_taken(computer: Computer) -> None:
    computer.install(computer.site / "cu13" / "include", *headers.NEEDED)
    with pytest.raises(RuntimeError, match="CUDA 12 headers"):
        headers.cuda_include_directories(12)
    runtime = computer.install(computer.site / "cuda_runtime" / "include", *FROM_RUNTIME)
    computer.install(computer.site / "cuda_nvcc" / "include", "crt/mma.h")
    assert resolve(12, "mma.h") == runtime / "mma.h"
    assert resolve(13, "mma.h") == computer.site / "cu13/include/mma.h"


@pytest.mark.parametrize("variable", ["CUDA_PATH", "CUDA_HOME"])
def test_headers_of_a_toolkit(computer: Computer, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    include = computer.install_toolkit(computer.toolkit)
    monkeypatch.setenv(variable, str(computer.toolkit))
    assert headers.cuda_include_directories(12) == (include,)


def test_headers_of_the_system_prefer_the_same_version(computer: Computer) -> None:
    newest = computer.install_toolkit(computer.system / "cuda")
    assert headers.cuda_include_directories(12) == (newest,)
    headers.cuda_include_directories.cache_clear()
    same = computer.install_toolkit(computer.system / "cuda-12")
    assert headers.cuda_include_directories(12) == (same,)


def test_places_come_in_order(computer: Computer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels belong to this NVRTC; what a variable names was chosen; the system's came with it."""
    found = []
    for install in (
        lambda: computer.install_toolkit(computer.system / "cuda"),
        lambda: (monkeypatch.setenv("CUDA_HOME", str(computer.toolkit)), computer.install_toolkit(computer.toolkit))[1],
        lambda: computer.install(computer.site / "cu13" / "include", *headers.NEEDED),
    ):
        expected = install()
        headers.cuda_include_directories.cache_clear()
        found.append(resolve(13, "mma.h") == expected / "mma.h")
    assert found == [True, True, True]


@pytest.mark.parametrize(
    ("major", "command"),
    [
        (12, "pip install nvidia-cuda-runtime-cu12 nvidia-cuda-nvcc-cu12"),
        (13, "pip install nvidia-cuda-runtime nvidia-cuda-crt"),
    ],
)
def test_missing_headers_are_named_with_a_remedy(computer: Computer, major: int, command: str) -> None:
    """mma.h alone is not enough: it includes crt/mma.h."""
    computer.install(computer.site / "cuda_runtime" / "include", *FROM_RUNTIME)
    computer.install(computer.site / "cu13" / "include", *FROM_RUNTIME)
    computer.install(computer.system / "cuda" / "include", *FROM_RUNTIME)
    with pytest.raises(RuntimeError) as error:
        headers.cuda_include_directories(major)
    for said in (f"CUDA {major}", *headers.NEEDED, command, f".[cuda{major}x]", "CUDA_PATH"):
        assert said in str(error.value)
    # Installed in the meantime: found, without a new process.
    computer.install(computer.site / "cuda_nvcc" / "include", "crt/mma.h")
    computer.install(computer.site / "cu13" / "include", "crt/mma.h")
    assert headers.cuda_include_directories(major)


# NVRTC, compiling, and CuPy's cache


class NoGpuModule:
    """In the place of cupy.RawModule: what that does with CuPy's compiler and cache, for sm_80, loading nothing."""

    def __init__(self, *, code: str, options: tuple[str, ...]) -> None:
        self.code = code
        self.options = options

    def get_function(self, name: str) -> Any:
        from cupy.cuda import compiler as cupy_compiler

        program = cupy_compiler._NVRTCProgram(self.code, f"{name}.cu", method="cubin")
        compiled, _ = program.compile((*self.options, "-arch=sm_80"))
        cupy_compiler._kernel_cache_backend.save(f"{name}.cubin", compiled, self.code)


@pytest.fixture
def cupy_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache directory of CuPy."""
    cupy = pytest.importorskip("cupy")
    from cupy.cuda import _compiler_cache

    directory = tmp_path / "cache"
    monkeypatch.setattr(cupy, "RawModule", NoGpuModule)
    backend = _compiler_cache.DiskKernelCacheBackend(str(directory))
    monkeypatch.setattr(cupy.cuda.compiler, "_kernel_cache_backend", backend)
    return directory


def tiny_kernel(body: str = "") -> KernelSource:
    return KernelSource("cuflash_tiny", f'extern "C" __global__ void cuflash_tiny() {{ {body} }}', 32, 0)


@pytest.mark.parametrize("failure", [RuntimeError, ImportError, OSError])
def test_missing_nvrtc_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch, failure: type[Exception]) -> None:
    pytest.importorskip("cupy")
    from cupy_backends.cuda.libs import nvrtc

    def get_version() -> tuple[int, int]:
        raise failure("libnvrtc.so.12: cannot open shared object file")

    monkeypatch.setattr(nvrtc, "getVersion", get_version)
    with pytest.raises(RuntimeError) as error:
        compiler.compile_kernel(tiny_kernel())
    for said in ("NVRTC", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc`", "libnvrtc.so.12: cannot open"):
        assert said in str(error.value)


def test_a_kernel_that_does_not_compile_is_named(cupy_cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cuflash_tiny does not compile.*nonsense.*undefined") as error:
        compiler.compile_kernel(tiny_kernel("nonsense();"))
    assert "CUPY_CACHE" not in str(error.value)


@pytest.mark.parametrize("now", ["a file", "gone"])
def test_an_unwritable_cache_is_named_with_a_remedy(cupy_cache: Path, now: str) -> None:
    """CuPy compiles, and then fails to keep the cubin. (A read-only directory would not stop root.)"""
    cupy_cache.rmdir()
    if now == "a file":
        cupy_cache.touch()
    with pytest.raises(RuntimeError) as error:
        compiler.compile_kernel(tiny_kernel())
    for said in ("cache", str(cupy_cache), "CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY=1"):
        assert said in str(error.value)
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize("shared_bytes", [0, 100_000])
def test_a_kernel_may_use_the_shared_memory_it_wants(monkeypatch: pytest.MonkeyPatch, shared_bytes: int) -> None:
    cupy = pytest.importorskip("cupy")
    raw_kernel = SimpleNamespace(kernel="the function", max_dynamic_shared_size_bytes=None)
    seen: dict[str, Any] = {}

    def raw_module(**options: Any) -> Any:
        seen.update(options)
        return SimpleNamespace(get_function=lambda name: raw_kernel)

    monkeypatch.setattr(cupy, "RawModule", raw_module)
    source = replace(tiny_kernel(), shared_bytes=shared_bytes)
    assert compiler.compile_kernel(source) == "the function"
    assert raw_kernel.max_dynamic_shared_size_bytes == (shared_bytes or None)
    assert seen["code"] == source.code
    assert f"-I{ROOT / 'cuda_src'}" in seen["options"]


# The kernels of a call


class CurrentDevice(threading.local):
    """CuPy's current device: each thread has its own, and begins with number 0."""

    number = 0


class Gpu:
    """What `cuflash._cupy` asks of CuPy, for a GPU with number 1 and memory of NumPy."""

    def __init__(self) -> None:
        self.current = CurrentDevice()
        self.compiled_on: list[int] = []
        self.launched: list[tuple[str, int]] = []
        self.ndarray = np.ndarray
        self.stream, self.captured, self.allocator = 0, False, "the pool"
        self.allocated: list[tuple[str, tuple[int, ...]]] = []
        self.cuda = SimpleNamespace(
            Device=self.use,
            runtime=SimpleNamespace(
                getDeviceProperties=lambda number: self.properties, streamIsCapturing=lambda stream: self.captured
            ),
            get_current_stream=lambda: SimpleNamespace(ptr=self.stream),
            malloc_async="the graph",
            using_allocator=self.allocate_from,
        )
        self.properties = {
            "name": b"A100",
            "major": 8,
            "minor": 0,
            "sharedMemPerBlockOptin": 163 * 1024,
            "multiProcessorCount": 108,
        }

    @contextmanager
    def use(self, number: int) -> Iterator[None]:
        before, self.current.number = self.current.number, number
        yield
        self.current.number = before

    @contextmanager
    def allocate_from(self, allocator: str) -> Iterator[None]:
        before, self.allocator = self.allocator, allocator
        yield
        self.allocator = before

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        self.allocated.append((self.allocator, shape))
        return np.zeros(shape, dtype)

    def compile(self, kernel: KernelSource) -> Any:
        self.compiled_on.append(self.current.number)
        return lambda grid, block, arguments, shared_bytes: self.launched.append((kernel.symbol, *block))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The GPU that calls on NumPy arrays go to; it compiles and launches nothing."""
    pytest.importorskip("cupy")
    from cuflash import _cupy

    gpu = Gpu()
    monkeypatch.setattr(_cupy, "cupy", gpu)
    monkeypatch.setattr(_cupy, "compile_kernel", gpu.compile)
    monkeypatch.setattr(_backends, "numpy_backend", LaunchBackend(_cupy.CupyDevice(1)))
    return gpu


def gradients(rows: int = 64, **options: Any) -> None:
    x, lse = np.zeros((rows, 64), np.float16), np.zeros(rows, np.float32)
    cuflash.attention_backward(x, x, x, x, x, lse, kernel="wmma", **options)


def test_the_kernels_of_a_call_are_compiled_at_the_same_time(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuflash import _cupy

    all_three = threading.Barrier(3)

    def compile_beside_the_others(kernel: KernelSource) -> Any:
        all_three.wait(timeout=30)
        return gpu.compile(kernel)

    monkeypatch.setattr(_cupy, "compile_kernel", compile_beside_the_others)
    gradients()
    delta, dkdv, dq = kernels()[3], *kernels()[1:3]
    assert gpu.launched == [(kernel.symbol, kernel.num_threads) for kernel in (delta, dkdv, dq)]
    gradients(rows=32)  # has the same kernels
    assert gpu.launched[3:] == gpu.launched[:3]
    assert gpu.compiled_on == [1, 1, 1]


def test_what_a_captured_call_needs_for_itself_is_the_graphs_own(gpu: Gpu) -> None:
    """The pool would give it to others, and replays would write to it. Results are the caller's."""
    workspace, results = (64,), [(64, 64)] * 3
    for stream, captured, expected in ((0, False, "the pool"), (1, False, "the pool"), (1, True, "the graph")):
        gpu.stream, gpu.captured = stream, captured
        gpu.allocated.clear()
        gradients()
        assert gpu.allocated == [*(("the pool", shape) for shape in results), (expected, workspace)]
    # What is summed up over the batch is not the result.
    x, batch, lse = np.zeros((1, 1, 64, 64), np.float16), np.zeros((2, 1, 64, 64), np.float16), np.zeros((2, 1, 64))
    gpu.allocated.clear()
    cuflash.attention_backward(batch, batch, x, x, batch, lse.astype(np.float32), kernel="wmma")
    assert [allocator for allocator, _ in gpu.allocated] == ["the pool", *["the graph"] * 3]


def test_one_kernel_that_does_not_compile_stops_the_call(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched, and nothing of the failure is kept: the remedy may need no new process."""
    from cuflash import _cupy

    def compile_all_but_one(kernel: KernelSource) -> Any:
        if "dq" in kernel.symbol:
            raise RuntimeError(f"no header for {kernel.symbol}")
        return gpu.compile(kernel)

    monkeypatch.setattr(_cupy, "compile_kernel", compile_all_but_one)
    with pytest.raises(RuntimeError, match="no header for cuflash_bwd_wmma_dq"):
        gradients()
    assert gpu.launched == []
    monkeypatch.setattr(_cupy, "compile_kernel", gpu.compile)
    gradients()
    assert len(gpu.launched) == 3


@pytest.mark.parametrize(
    ("expression", "about"),
    [("score + typo", "typo.* is undefined"), ("asinf(score)", "no suitable conversion function from .*Dual")],
)
def test_the_error_of_a_compiler_in_a_thread_shows_the_expression(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, cupy_cache: Path, expression: str, about: str
) -> None:
    from cuflash import _cupy

    monkeypatch.setattr(_cupy, "compile_kernel", compiler.compile_kernel)
    with pytest.raises(ValueError, match=rf"score_mod: '{re.escape(expression)}' does not compile(?s:.*){about}"):
        gradients(score_mod=expression)


# Without CuPy, and without a GPU


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


USE_NUMPY = """
import numpy as np, cuflash
x = np.ones((4, 8), np.float32)
out, vjp = cuflash.attention_vjp(x, x, x)
vjp(out)
"""


def test_cuflash_works_where_cupy_cannot_be_imported() -> None:
    assert python(f"import sys; sys.modules['cupy'] = None\n{USE_NUMPY}\nprint('fine')") == "fine"


def test_the_module_of_cupy_arrays_is_imported_for_the_first_of_them() -> None:
    """Without a GPU, CuPy says so: here an array is built over memory that is not there."""
    pytest.importorskip("cupy")
    code = f"""
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import sys, cupy
{USE_NUMPY}
print("cuflash._cupy" in sys.modules)
memory = cupy.cuda.UnownedMemory(4096, 4096, None, 0)
y = cupy.ndarray((4, 8), np.float32, cupy.cuda.MemoryPointer(memory, 0))
try:
    cuflash.attention(y, y, y)
except cupy.cuda.runtime.CUDARuntimeError as error:
    print(error)
print("cuflash._cupy" in sys.modules)
"""
    before, error, after = python(code).splitlines()
    assert (before, after) == ("False", "True")
    assert re.match(r"cudaError(NoDevice|InsufficientDriver)", error)


# Sources and symbols


@pytest.fixture
def copied_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    copy = tmp_path / "cuda_src"
    shutil.copytree(ROOT / "cuda_src", copy)
    monkeypatch.setattr(sources, "cuda_src", lambda: copy)
    sources.cuda_digest.cache_clear()
    yield copy
    sources.cuda_digest.cache_clear()


def test_a_changed_byte_in_any_header_changes_the_text_of_kernels(copied_sources: Path) -> None:
    """CuPy's cache looks at the text alone, not into the headers that it includes."""
    original = kernels()[0].source.code
    files = [path for path in sorted(copied_sources.rglob("*")) if path.is_file()]
    assert len(files) > 10
    for path in files:
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        sources.cuda_digest.cache_clear()
        assert kernels()[0].source.code != original, path
        path.write_bytes(before)
    sources.cuda_digest.cache_clear()
    assert kernels()[0].source.code == original


def test_a_renamed_header_changes_the_text_of_kernels(copied_sources: Path) -> None:
    original = kernels()[0].source.code
    (copied_sources / "cuflash/common/math.cuh").rename(copied_sources / "cuflash/common/arithmetic.cuh")
    sources.cuda_digest.cache_clear()
    assert kernels()[0].source.code != original


@pytest.mark.parametrize("place", ["cuda_src", "cuflash/cuda_src"])
def test_sources_lie_beside_the_package_or_in_it(tmp_path: Path, place: str) -> None:
    """Beside it in the source tree, which an editable install uses as well; in it after an installation."""
    shutil.copytree(ROOT / "cuflash", tmp_path / "cuflash", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "cuda_src", tmp_path / place)
    code = "from cuflash._jit.sources import cuda_src; print(cuda_src())"
    assert python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}") == str(tmp_path / place)


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PACKAGE", tmp_path / "cuflash")
    with pytest.raises(RuntimeError, match=re.escape(str(tmp_path / "cuflash" / "cuda_src"))):
        sources.cuda_src.__wrapped__()


def test_symbols_are_readable_and_unique() -> None:
    built = [kernel for number in NUMBERS for dims in HEAD_DIMS for kernel in kernels(number, dims)]
    assert len({kernel.symbol for kernel in built}) == len({(kernel.template, kernel.arguments) for kernel in built})
    names = "|".join(short for _, short, _ in NUMBERS.values())
    for kernel in built:
        assert re.fullmatch(rf"cuflash_(fwd|bwd)_[a-z_]+_({names})(_d\d+x\d+)?", kernel.symbol)
        dims = re.search(r"_d(\d+)x(\d+)$", kernel.symbol)
        assert dims is None or tuple(map(int, dims.groups())) == kernel.arguments[2:4]


# The structs that kernels take

C_TYPES = {"i4": "int", "i8": "long long", "f4": "float"}


def fields(dtype: np.dtype[Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The innermost fields of a struct in the order of memory: how C++ calls them, and their types."""
    for name, (field, *_) in sorted((dtype.fields or {}).items(), key=lambda item: item[1][1]):
        if field.names:
            yield from fields(field, f"{path}{name}.")
        else:
            yield f"{path}{name}", C_TYPES[field.str[1:]]


def compile_probe(struct: str, dtype: np.dtype[Any]) -> None:
    """Hold a dtype against a struct: same names, order, types and size, hence, aligned as both are, same offsets."""
    pytest.importorskip("cupy")
    leaves = list(fields(dtype))
    checks = [
        f"static_assert(params.{member} == {i} && kSame<decltype(params.{member}), {c_type}>);"
        for i, (member, c_type) in enumerate(leaves)
    ]
    lines = [
        "#include <cuflash/attention/params.cuh>",
        "template <class A, class B> constexpr bool kSame = false;",
        "template <class A> constexpr bool kSame<A, A> = true;",
        f"constexpr cuflash::{struct} params = {{{', '.join(map(str, range(len(leaves))))}}};",
        f"static_assert(sizeof(params) == {dtype.itemsize});",
        *checks,
    ]
    cubin.compile_for(KernelSource(struct, "\n".join(lines), 32, 0), "sm_80")


WITH_MAPS = {"FwdSm90Params": "fwd_sm90", "BwdSm90Params": "bwd_sm90", "DbiasSm90Params": "bwd_sm90_dbias"}


@pytest.mark.compile
@pytest.mark.parametrize("struct", [struct for struct in _params.PARAMS if struct not in WITH_MAPS])
def test_structs_mirror_those_of_the_kernels(struct: str) -> None:
    assert len(list(fields(_params.PARAMS[struct]))) >= 25
    compile_probe(struct, _params.PARAMS[struct])


@pytest.mark.compile
@pytest.mark.parametrize("struct", WITH_MAPS)
def test_structs_with_tensor_maps_mirror_those_of_the_kernels(struct: str) -> None:
    pytest.importorskip("cupy")
    dtype = _params.PARAMS[struct]
    sizes = {name: field.itemsize for name, (field, _) in (dtype.fields or {}).items() if name != "gap"}
    assert len(sizes) >= 5
    assert (dtype.fields or {})["maps"][1] % 64 == 0
    lines = [
        f"#include <cuflash/kernels/{WITH_MAPS[struct]}.cuh>",
        f"using Params = cuflash::{struct};",
        f"static_assert(sizeof(Params) == {dtype.itemsize} && alignof(decltype(Params::maps)) == 64);",
        *(f"static_assert(sizeof(Params::{name}) == {size});" for name, size in sizes.items()),
    ]
    cubin.compile_for(KernelSource(struct, "\n".join(lines), 32, 0), "sm_90")


@pytest.mark.compile
@pytest.mark.parametrize("mistake", ["two fields swapped", "another type"])
def test_a_wrong_mirror_is_seen(mistake: str) -> None:
    names = list(_params.PROBLEM.names or ())
    types = [_params.PROBLEM[name] for name in names]
    if mistake == "two fields swapped":
        names[:2] = reversed(names[:2])
    else:
        types[-1] = np.dtype("i4")
    problem = np.dtype(list(zip(names, types, strict=True)), align=True)
    params = _params.PARAMS["FwdParams"]
    wrong = [(name, problem if name == "problem" else params[name]) for name in params.names or ()]
    with pytest.raises(cubin.CompileError, match="static assert"):
        compile_probe("FwdParams", np.dtype(wrong, align=True))
