"""Does a sparse mechanism save anything? Its plan, the largest tensor that it makes, and its multiplications."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.contract import Attention
from saccade.testing.registry import named
from saccade.testing.subject import Subject

LENGTH = 1024


class Largest(TorchDispatchMode):
    """Records the entries of the largest tensor that any operation makes; views count as what they look at."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def stretched(subject: Subject, length: int) -> Subject:
    """The subject at the least multiple of its own size, axis by axis on a grid, that has `length` tokens; batch 1."""
    case, grid = subject.case, subject.case.dims.grid
    if grid is None:
        return subject.variant(batch=1, length=case.length * -(-length // case.length))
    larger, axis = list(grid), 0
    while torch.Size(larger).numel() < length:
        larger[axis] += grid[axis]
        axis = min(range(len(grid)), key=lambda i: larger[i])
    return subject.variant(batch=1, dims=replace(case.dims, grid=tuple(larger)), length=torch.Size(larger).numel())


def fused(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of PyTorch's fused attention on a CPU, which its own counter knows nothing of; masks save none."""
    batch, heads, n, d = q
    return 2 * batch * heads * n * k[2] * (d + v[3])


def measure(subject: Subject) -> tuple[int, int]:
    """(entries of the largest tensor, floating-point operations of the matrix products) of one call."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton, where it is installed

    module, inputs = subject.build(torch.float32), subject.inputs(torch.float32)
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter, Largest() as largest:
        module(*inputs)
    return largest.entries, counter.get_total_flops()


@named(over="class", applies=lambda cls: issubclass(cls, Attention) and cls.plan is not Attention.plan)
def saves_work(cls: type[Attention]) -> None:
    """A plan leaves pairs out; the fast path then multiplies less than dense attention, and makes no N x M tensor."""
    subjects = [stretched(Subject(cls, case), LENGTH) for case in cls.cases()]
    plans = [cls.plan(one.build(torch.float32), *one.inputs(torch.float32)[:2]) for one in subjects]  # type: ignore[arg-type]
    ranked = sorted((float(plan.density), i) for i, plan in enumerate(plans) if plan is not None)
    assert ranked, "plan: gave None at every case; leave it out, or return the Plan that compute follows"
    density, index = ranked[0]
    assert density < 1, f"plan: density {density:.3f} at best, at {LENGTH} tokens or more; a case must leave pairs out"
    subject = subjects[index]
    entries, flops = measure(subject)
    dims, n = subject.case.dims, subject.case.length
    dense = 4 * dims.num_heads * n * n * dims.head_dim
    assert flops < dense, f"{flops:.2e} operations at N = {n}, dense attention needs {dense:.2e}"
    if entries >= n * n:
        twice = stretched(subject, 2 * n)
        growth = measure(twice)[0] / entries
        square = (twice.case.length / n) ** 1.5  # between linear and quadratic growth
        assert growth < square, (
            f"a tensor of {entries:.2e} entries at N = {n} grows {growth:.1f} times at twice N: it is N x M"
        )
