"""cuflash in PyTorch: an autograd function on the tensors' own memory. Run python examples/torch_bridge.py."""

from contextlib import nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import torch

import cuflash

try:
    import cupy
except ImportError:  # then tensors are on the CPU
    cupy = None


def as_array(tensor: torch.Tensor) -> Any:
    """Give the array on a tensor's memory. bfloat16 travels as int16: NumPy's DLPack has no name for it."""
    from_dlpack = (cupy if tensor.is_cuda else np).from_dlpack
    if tensor.dtype == torch.bfloat16:
        return from_dlpack(tensor.detach().view(torch.int16)).view(ml_dtypes.bfloat16)
    return from_dlpack(tensor.detach())


def as_tensor(array: Any) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def call(function: Any, *tensors: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Call a function of cuflash on PyTorch's stream: nobody waits, and no memory is used again too early."""
    with cupy.cuda.Stream.from_external(torch.cuda.current_stream()) if tensors[0].is_cuda else nullcontext():
        return [as_tensor(array) for array in function(*map(as_array, tensors), **options)]


class Attention(torch.autograd.Function):  # type: ignore[misc]  # without PyTorch mypy knows no such class
    """``Attention.apply(q, k, v, options)``, with those options of ``cuflash.attention`` that are no arrays."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        out, lse = call(cuflash.attention, q, k, v, return_lse=True, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        return (*call(cuflash.attention_backward, dout, *ctx.saved_tensors, **ctx.options), None)


if __name__ == "__main__":
    device = "cuda" if cupy and torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(2, heads, 128, 64, device=device, requires_grad=True) for heads in (8, 2, 2))
    ours = Attention.apply(q, k, v, {"causal": True})
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for dx, dy in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, theirs)), strict=True):
        print(f"{device}: a gradient {tuple(dx.shape)} differs from PyTorch's by at most {(dx - dy).abs().max():.1e}")
