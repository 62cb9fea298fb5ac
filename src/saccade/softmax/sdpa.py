"""The sdpa backend: PyTorch's own kernels, for attention that is dense or plainly causal."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.softmax.normalizers import Softmax
from saccade.softmax.problem import Problem

name = "sdpa"
differentiable = True
built_in = ("full", "causal")
splits_keys = True
HALF = (torch.float16, torch.bfloat16)
CUDNN_QUERIES = 2048  # with fewer, cuDNN saves little and still prepares each new shape for a tenth of a second


def reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run a problem; empty when it can."""
    n, m = problem.q.shape[2], problem.k.shape[2]
    found = []
    if not (problem.is_full or (problem.is_causal and (n == m or n == 1))):
        found.append(
            f"where is {problem.where!r}; it knows Full(), and Causal() with as many queries as keys or one query"
        )
    elif problem.is_causal and n > 1 and problem.q.device.type == "cpu" and not _finite(problem.k, problem.v):
        found.append("k or v hold NaN or infinity, which its masked entries would let reach earlier queries")
    if problem.bias is not None:
        found.append("a bias would be an N x M tensor")
    if problem.sink is not None:
        found.append("it knows no sinks")
    if problem.softcap is not None:
        found.append("it knows no softcap")
    if not isinstance(problem.normalizer, Softmax):
        found.append(f"it normalises by softmax, not {problem.normalizer.name}")
    if problem.needs_lse:
        found += _reasons_of_lse(problem)
    if problem.q.dtype == torch.float64 and problem.q.device.type != "cpu":
        found.append("in float64 it would form N x M scores on this device")
    return found


def _reasons_of_lse(problem: Problem) -> list[str]:
    q, v = problem.q, problem.v
    if q.device.type != "cuda" or q.dtype not in HALF:
        return [f"it returns no lse in {q.dtype} on {q.device.type}"]
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 256:
        return [f"it returns no lse for head dims {q.shape[3]} and {v.shape[3]}, only for equal multiples of 8 to 256"]
    if problem.wants_gradients:
        return ["its lse has no gradients, and q, k or v asks for them"]
    return []


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(o, lse or None). Its kernels multiply masked entries by zero: under Causal() on a GPU, where looking for them
    would make the host wait, NaN and infinity in k and v may spread to earlier queries of their tile."""
    q, k, v = problem.q, problem.k, problem.v
    causal = problem.is_causal and q.shape[2] > 1
    if problem.needs_lse:
        if _suits_cudnn(problem) and q.shape[3] <= 128:
            cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
            o, lse, *_ = cudnn(q, k, v, None, True, 0.0, causal, scale=problem.scale)
            return o, lse.squeeze(-1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        o, lse, *_ = flash(q, k, v, 0.0, causal, scale=problem.scale)
        return o, lse
    with _cudnn_first() if _suits_cudnn(problem) else nullcontext():
        o = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=problem.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return o, None


def _suits_cudnn(problem: Problem) -> bool:
    """Half precision on compute capability 9, where cuDNN is the fastest, and a problem of some size."""
    q = problem.q
    hopper = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] == 9
    large = q.shape[2] >= CUDNN_QUERIES and q.dtype in HALF
    return hopper and large and torch.backends.cuda.cudnn_sdp_enabled()


def _cudnn_first() -> AbstractContextManager[Any]:
    """PyTorch's kernels with cuDNN in front of the others; those that the user switched off stay off."""
    allowed = torch.backends.cuda
    order = [SDPBackend.CUDNN_ATTENTION]
    order += [SDPBackend.FLASH_ATTENTION] * allowed.flash_sdp_enabled()
    order += [SDPBackend.EFFICIENT_ATTENTION] * allowed.mem_efficient_sdp_enabled()
    order += [SDPBackend.MATH] * allowed.math_sdp_enabled()
    return sdpa_kernel(order, set_priority=True)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(x.sum().isfinite()) for x in tensors)  # a sum that overflows errs on the careful side
