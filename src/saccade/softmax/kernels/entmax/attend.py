"""The function that others call: when it can be, its order of tokens, its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.softmax.kernels.entmax.launch import Launch
from saccade.where import Plan


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, alpha: float
    ) -> Tensor:
        o, *rest = Launch.of(q, k, v, plan, scale, alpha).forward(any(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(q, k, v, *rest)
        ctx.plan, ctx.scale, ctx.alpha = plan, scale, alpha
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *rest = ctx.saved_tensors
        do = do if do.stride(3) == 1 else do.contiguous()
        return *Launch.of(q, k, v, ctx.plan, ctx.scale, ctx.alpha).backward(do, *rest), None, None, None


SIDES = (16, 32, 64, 128, 256)


def reasons(q: Tensor, v: Tensor, plan: Plan | None, alpha: float) -> list[str]:
    """Why these kernels cannot run a problem, beside what any of this package cannot; empty when they can."""
    found = []
    if alpha > 2:
        found.append(f"for alpha above 2 its slopes are not bounded, got {alpha}")
    if max(q.shape[3], v.shape[3]) > 256:
        found.append(f"more than 256 channels do not fit its tiles, got {q.shape[3]} and {v.shape[3]}")
    if plan is not None:
        if plan.bits is not None:
            found.append("its entmax has no bit masks")
        if plan.token_indices is not None:
            found.append("its entmax has no lists of single keys")
        if any(side not in SIDES for side in plan.block):
            found.append(f"the plan's tiles {plan.block} are none of {', '.join(map(str, SIDES))} tokens on a side")
    return found


def attend_entmax(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, alpha: float) -> Tensor:
    """Entmax attention over the pairs of a plan, differentiable in q, k and v.

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), in q's dtype: float32 or narrower. scale:
    factor of the scores. alpha: in (1, 2]. A row that sees nothing gives zeros. The caller has asked `reasons`.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if scale <= 0:  # the kernels take maxima before they scale
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if plan.k_order is not None:
        k, v = k[:, :, plan.k_order], v[:, :, plan.k_order]
    if plan.q_order is None:
        o: Tensor = _Entmax.apply(q, k, v, plan, scale, alpha)
        return o
    o = _Entmax.apply(q[:, :, plan.q_order], k, v, plan, scale, alpha)
    return o[:, :, torch.argsort(plan.q_order)]
