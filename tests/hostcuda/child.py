"""Launches in a process of their own: under sanitizers, and of kernels that may crash.

The arrays travel to the child and back, also those behind pointers in structs. Each buffer that owns memory becomes one
allocation there, so that its ends are known; views of one buffer share it, as they do here.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostcuda.errors import HostCudaError
from tests.hostcuda.launch import LaunchOptions, address, array_at, is_value

KIND_POINTER, KIND_VALUE = 0, 1
ALIGNMENT = 512  # as in runner.cpp

SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:history_size=4:atexit_sleep_ms=0",
}


def launch(runner: Path, library: Path, options: LaunchOptions, arguments: tuple[Any, ...], timeout: float) -> None:
    regions = _Regions()
    encoded = [_encode(argument, regions) for argument in arguments]
    buffers = regions.buffers
    message = b"".join(
        [
            bytes(options),
            struct.pack("<q", len(buffers)),
            *(part for buffer in buffers for part in _encode_region(buffer)),
            struct.pack("<q", len(encoded)),
            *encoded,
        ]
    )
    try:
        child = subprocess.run(
            [runner, library],
            input=message,
            capture_output=True,
            timeout=timeout,
            env={**os.environ, **SANITIZER_OPTIONS},
            preexec_fn=_without_address_randomisation,
        )
    except subprocess.TimeoutExpired as error:
        raise HostCudaError(f"the kernel was still running after {timeout} s") from error
    if child.returncode != 0:
        report = child.stderr.decode(errors="replace").strip()
        raise HostCudaError(f"{report}\n(exit status {child.returncode})")
    regions.write_back(child.stdout)


class _Regions:
    """The buffers behind the arguments, each once."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []  # address and size

    def locate(self, array: np.ndarray[Any, Any]) -> tuple[int, int]:
        """Number of the buffer that an array lies in, and the offset of its first element there."""
        buffer = _owner(array)
        span = (address(buffer), buffer.nbytes)
        if span not in self.spans:
            self.spans.append(span)
        return self.spans.index(span), address(array) - span[0]

    @property
    def buffers(self) -> list[np.ndarray[Any, Any]]:
        return [_bytes_at(*span) for span in self.spans]

    def write_back(self, data: bytes) -> None:
        position = 0
        for buffer in self.buffers:
            after = np.frombuffer(data, np.uint8, buffer.size, position)
            if not np.array_equal(after, buffer):  # the memory of an input may be read-only
                ctypes.memmove(address(buffer), after.tobytes(), buffer.size)
            position += buffer.size


def _owner(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array whose memory this one is a view of."""
    owner, base = array, array.base
    while base is not None:
        if isinstance(base, np.ndarray):
            owner = base
        base = getattr(base, "base", None)
    return owner


def _bytes_at(start: int, size: int) -> np.ndarray[Any, Any]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))


def _encode_region(buffer: np.ndarray[Any, Any]) -> tuple[bytes, bytes]:
    return struct.pack("<QQ", buffer.size, address(buffer) % ALIGNMENT), buffer.tobytes()


def _encode(argument: Any, regions: _Regions) -> bytes:
    if is_value(argument):
        value = argument.tobytes()
        pointers = list(_pointers_in(value, regions))
        places = b"".join(struct.pack("<qqq", *pointer) for pointer in pointers)
        return struct.pack(f"<qq{len(value)}sq", KIND_VALUE, len(value), value, len(pointers)) + places
    region, offset = (-1, 0) if isinstance(argument, int) else regions.locate(argument)
    return struct.pack("<qqq", KIND_POINTER, region, offset)


def _pointers_in(value: bytes, regions: _Regions) -> Iterator[tuple[int, int, int]]:
    """Where pointers to arrays are in a struct, and the buffer and the offset of what they point to."""
    for place in range(0, len(value) - 7, 8):
        array = array_at(*struct.unpack_from("<Q", value, place))
        if array is not None:
            yield place, *regions.locate(array)


_libc = ctypes.CDLL(None)
ADDR_NO_RANDOMIZE = 0x0040000


def _without_address_randomisation() -> None:
    """Older ThreadSanitizers die when libraries land where they keep their shadow memory."""
    if hasattr(_libc, "personality"):
        _libc.personality(ADDR_NO_RANDOMIZE)
