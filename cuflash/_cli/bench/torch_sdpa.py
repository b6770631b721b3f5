"""PyTorch's fused attention, on the same device and stream as CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cuflash._cli.bench.timing import Contender

BACKENDS = {"torch-flash": SDPBackend.FLASH_ATTENTION, "torch-cudnn": SDPBackend.CUDNN_ATTENTION}


def forward(peer: str, q: Any, k: Any, v: Any, causal: bool) -> Contender:
    q, k, v = (_tensor(x) for x in (q, k, v))
    return Contender(
        call=lambda: scaled_dot_product_attention(q, k, v, is_causal=causal),
        context=lambda: sdpa_kernel(BACKENDS[peer]),
    )


def backward(peer: str, dout: Any, q: Any, k: Any, v: Any, causal: bool) -> Contender:
    """Only the backward pass, on a graph that is kept."""
    q, k, v = (_tensor(x).requires_grad_() for x in (q, k, v))
    dout = _tensor(dout)
    with sdpa_kernel(BACKENDS[peer]):
        out = scaled_dot_product_attention(q, k, v, is_causal=causal)
    return Contender(call=lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))


def _tensor(array: Any) -> Any:
    """A CuPy array as a tensor of the same memory; by way of integers, which every DLPack knows."""
    integers = torch.from_dlpack(array.view(f"int{8 * array.itemsize}"))
    return integers.view(getattr(torch, np.dtype(array.dtype).name))
