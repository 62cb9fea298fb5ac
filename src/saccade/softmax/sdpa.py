"""The sdpa backend: PyTorch's own kernels, for attention that is dense or plainly causal."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.softmax.normalizers import Softmax
from saccade.softmax.problem import Problem

name = "sdpa"
differentiable = True


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
        found.append("it returns no lse")
    if problem.q.dtype == torch.float64 and problem.q.device.type != "cpu":
        found.append("in float64 it would form N x M scores on this device")
    return found


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(o, None). Its kernels multiply masked entries by zero: under Causal() on a GPU, where looking for them would
    make the host wait, NaN and infinity in k and v may spread to earlier queries of their tile."""
    causal = problem.is_causal and problem.q.shape[2] > 1
    grouped = problem.q.shape[1] != problem.k.shape[1]
    o = torch.nn.functional.scaled_dot_product_attention(
        problem.q, problem.k, problem.v, is_causal=causal, scale=problem.scale, enable_gqa=grouped
    )
    return o, None


def _finite(*tensors: Tensor) -> bool:
    return all(bool(x.sum().isfinite()) for x in tensors)  # a sum that overflows errs on the careful side
