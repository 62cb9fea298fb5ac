"""The tiles backend: sparse attention in plain torch that saves the time its plan saves, forward and backward.

For every piece of a plan (`pieces.py`) one dense product of few queries with few keys. Query heads that share a key
head and a list are rows of one product, so keys and values are never repeated; adjoining key tiles are read in place.
Cost: listed tiles x D, memory one piece of scores. The plan's lists are read on the host, once a plan: on a GPU the
host waits for those of a plan that it meets for the first time, and for nothing else. Kernels serve better there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saccade.softmax.merge import absorb
from saccade.softmax.pieces import Batch, Piece, Schedule, positions
from saccade.softmax.problem import Problem

name = "tiles"
differentiable = True
BLOCK = (64, 64)
MARKS = 4  # channels of a mark: whole lines of 16 bytes


def reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run a problem; empty when it can."""
    if problem.sink is not None and problem.normalizer.name != "softmax":
        return [f"sinks are logits of a softmax, not of {problem.normalizer.name}; leave sink out"]
    return []


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(o, lse) of a problem; lse is None for normalisers that have none."""
    plan = problem.plan_of_keys(BLOCK, "keys") or problem.plan(BLOCK)
    softmax = problem.normalizer.name == "softmax"
    dtype = torch.promote_types(problem.q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (problem.q, problem.k, problem.v))
    if plan.q_order is not None:
        q = q[:, :, plan.q_order]
    if plan.k_order is not None:
        k, v = k[:, :, plan.k_order], v[:, :, plan.k_order]
    schedule = Schedule.of(plan, len(q), k.shape[1], whole=not softmax)
    bias = None if problem.bias is None else Bias(problem.bias, plan, q.shape[1])
    rule = (Softmax if softmax else Normalized)(problem, schedule, bias)
    o, lse = _Pieces.apply(q, k, v, rule, schedule, *(bias.parameters if bias else ()))
    if plan.q_order is not None:
        back = torch.argsort(plan.q_order)
        o, lse = o[:, :, back], lse[:, :, back]
    if problem.sink is not None:
        o, lse = absorb(o, lse, problem.sink)
    return o.to(problem.q.dtype), lse if softmax else None


class Bias:
    """A bias function of positions, evaluated for one piece at a time."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], plan: Any, num_heads: int) -> None:
        self.function = function
        self.parameters = (
            [p for p in function.parameters() if p.requires_grad] if isinstance(function, torch.nn.Module) else []
        )
        n, m = plan.num_queries, plan.num_keys
        self.q_pos = (torch.arange(n, device=plan.device) if plan.q_order is None else plan.q_order) + (m - n)
        self.k_pos = torch.arange(m, device=plan.device) if plan.k_order is None else plan.k_order
        self.num_heads = num_heads

    def of(self, piece: Piece) -> Tensor:
        """(R, H or 1, bq, L)."""
        rows, keys = (positions(tokens, self.q_pos.device) for tokens in (piece.rows, piece.keys))
        keys = keys.clamp(min=0)
        return torch.stack([self.function(self.q_pos[r], self.k_pos[c]) for r, c in zip(rows, keys, strict=True)])

    def heads(self, batch: Batch, num_pairs: int, ratio: int) -> Tensor:
        """The query head of each row of heads: (P, G)."""
        heads = torch.arange(num_pairs * ratio, device=self.q_pos.device).view(num_pairs, ratio) % self.num_heads
        return heads[batch.pairs, batch.members]


def _take_rows(x: Tensor, rows: slice | Tensor) -> Tensor:
    """(P, G, N, C) -> (P * R, G, bq, C); a view where rows are a slice."""
    if isinstance(rows, slice):
        return x[:, :, rows]
    if len(rows) == 1:
        return x[:, :, rows[0]]
    return x[:, :, rows].transpose(1, 2).flatten(0, 1)


def _put_rows(x: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    """The inverse of `_take_rows`: x (P, G, N, C) <- values (P * R, G, bq, C)."""
    if isinstance(rows, slice):
        x[:, :, rows] = values
    elif len(rows) == 1:
        x[:, :, rows[0]] = values
    else:
        x[:, :, rows] = values.unflatten(0, (-1, len(rows))).transpose(1, 2)


def _add_rows(x: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    if isinstance(rows, slice):
        x[:, :, rows] += values
    else:  # within a piece every query stands once
        _put_rows(x, rows, _take_rows(x, rows) + values)


def _take_keys(x: Tensor, keys: slice | Tensor) -> Tensor:
    """(P, M, C) -> (P * R, L, C); a view where keys are a slice."""
    return x[:, keys] if isinstance(keys, slice) else x[:, keys.clamp(min=0)].flatten(0, 1)


def _add_keys(x: Tensor, keys: slice | Tensor, left: Tensor | None, right: Tensor) -> None:
    """x[keys] += left^T right, with left (P * R, Q, L), right (P * R, Q, C), or += right (P * R, L, C); repeated keys
    add up.
    """
    if isinstance(keys, Tensor):
        right = right if left is None else torch.bmm(left.transpose(1, 2), right)
        x.index_add_(1, keys.clamp(min=0).flatten(), right.reshape(len(x), -1, x.shape[2]))
    elif left is None:
        x[:, keys] += right
    else:
        x[:, keys].baddbmm_(left.transpose(1, 2), right)


def _on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _marked(v: Tensor) -> Tensor:
    """(B, Hkv, M, Dv) -> (B, Hkv, M, Dv + MARKS): zeros for what is not finite, and 1 to mark the keys that have it."""
    lost = ~v.isfinite()
    marks = lost.any(-1, keepdim=True).to(v.dtype).expand(*v.shape[:3], MARKS)
    return torch.cat([v.masked_fill(lost, 0), marks], -1)


def _unmarked(o: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, Dv + MARKS) -> (B, H, N, Dv): NaN where a row gave weight to a marked key, in the channels in which
    some value of its key head is not finite."""
    lost = (~v.isfinite()).any(2, keepdim=True).repeat_interleave(o.shape[1] // v.shape[1], 1)
    return o[..., :-MARKS].masked_fill((o[..., -1:] != 0) & lost, torch.nan)


class _Scratch:
    """Buffers that pieces share, so that no piece waits for fresh pages."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.flat = like, [like.new_empty(0), like.new_empty(0)]

    def __call__(self, which: int, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        if self.flat[which].numel() < size:
            self.flat[which] = self.like.new_empty(size)
        return self.flat[which][:size].view(shape)


class Softmax:
    """The softmax of a piece: partial (o, lse), and gradients from the final lse."""

    def __init__(self, problem: Problem, schedule: Schedule, bias: Bias | None) -> None:
        self.scale, self.softcap, self.bias, self.schedule = problem.scale, problem.softcap, bias, schedule

    def prepare(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The values to multiply. On a CPU, look for NaN and infinity once: where there are none, masks may be
        added, and kernels that do so used. Elsewhere the host would have to wait: values are marked, for `finish`."""
        self.scratch = _Scratch(q)
        self.on_host = _on_host(q)
        if not self.on_host:
            self.clean = self.fused = False
            return _marked(v)
        sizes = [float(torch.stack(torch.aminmax(x.detach())).abs().amax()) for x in (q, k, v)]  # NaN passes through
        most = torch.finfo(q.dtype).max  # no score may overflow either: -inf is a mask only beside a finite score
        largest = sizes[0] * sizes[1] * q.shape[-1] * max(1.0, abs(self.scale))
        self.clean = math.isfinite(sizes[2]) and largest < most
        self.fused = self.clean and self.softcap is None and q.shape[-1] == v.shape[-1]
        return v

    def finish(self, o: Tensor, v: Tensor) -> Tensor:
        """o (B, H, N, Dv) of what the pieces added up, from the values that `prepare` was given."""
        return o if self.on_host else _unmarked(o, v)

    def mask(self, batch: Batch, piece: Piece, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The piece's mask (1, R, 1, bq, L), and which queries see nothing, (R, 1, bq)."""
        mask = self.schedule.mask(batch, piece, q.dtype)
        if mask is None:
            return None, None
        return mask.added[None, :, None], None if mask.blind is None else mask.blind[:, None]

    def with_bias(
        self, batch: Batch, piece: Piece, mask: Tensor | None, shape: tuple[int, int], bias: Tensor | None
    ) -> Tensor | None:
        """Mask plus bias."""
        if bias is None:
            return mask
        assert self.bias is not None
        per_head = bias.shape[1] > 1  # (P, R, G, bq, L), or one for all
        bias = bias[:, self.bias.heads(batch, *shape)].transpose(0, 1) if per_head else bias[None]
        return bias if mask is None else bias + mask

    def forward(
        self, batch: Batch, piece: Piece, shape: tuple[int, int], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q (P * R, G, bq, D), k (P * R, L, D), v (P * R, L, Dv) -> o (P * R, G, bq, Dv), lse (P * R, G, bq)."""
        mask, blind = self.mask(batch, piece, q)
        bias = None if self.bias is None else self.bias.of(piece).to(q.dtype)
        added = self.with_bias(batch, piece, mask, shape, bias)
        if self.fused:
            return self._fused(q, k, v, added, blind)
        s, _ = self._scores(q, k, added, mask)
        top = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
        p = s.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        o = self._values(p, v, mask).div_(total.clamp(min=torch.finfo(s.dtype).tiny))
        return o.view(*q.shape[:3], -1), (top + total.log()).view(q.shape[:3])

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, blind: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same by PyTorch's own flash kernel for the CPU, which takes a mask to add."""
        heads = q.shape[1]
        if added is not None:
            if added.shape[1] > 1:
                added = added.expand(len(q) // added.shape[1], *added.shape[1:]).flatten(0, 1)[:, None]
            added = added[:, 0].expand(len(q), heads, -1, -1)
        k, v = (x[:, None].expand(-1, heads, -1, -1) for x in (k, v))
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added, scale=self.scale)
        if blind is not None:  # the kernel answers 0 for the lse of a row that sees nothing
            lse = lse.unflatten(0, (-1, len(blind))).masked_fill(blind, -torch.inf).flatten(0, 1)
        return o, lse

    def _scores(self, q: Tensor, k: Tensor, added: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scores (P * R, G * bq, L), and tanh of the uncapped ones where there is a softcap."""
        flat = q.flatten(1, 2)
        s = torch.bmm(flat * self.scale, k.transpose(1, 2), out=self.scratch(0, len(flat), flat.shape[1], k.shape[1]))
        slope = None
        if self.softcap is not None:
            slope = s.div_(self.softcap).tanh_().clone()
            s.mul_(self.softcap)
        if added is not None:
            view = self._apart(s, added, q.shape[1])
            view += added
            if not self.clean and mask is not None:
                self._mask_out(s, mask, -torch.inf, len(q))
        return s, slope

    def _apart(self, s: Tensor, mask: Tensor, heads: int) -> Tensor:
        """(P * R, G * bq, L) seen as (P, R, G, bq, L)."""
        return s.view(-1, mask.shape[1], heads, s.shape[1] // heads, s.shape[2])

    def _mask_out(self, s: Tensor, mask: Tensor, value: float, size: int) -> None:
        heads = s.shape[1] // mask.shape[3]
        self._apart(s, mask, heads).masked_fill_(mask == -torch.inf, value)

    def _values(self, p: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """p v, where a value that is not finite reaches only the rows that see it; marked ones are finite."""
        if self.clean or not self.on_host or bool(v.sum().isfinite()):
            return torch.bmm(p, v)
        finite = v.isfinite()
        o = torch.bmm(p, v.masked_fill(~finite, 0))
        seen = torch.ones_like(p)
        if mask is not None:
            self._mask_out(seen, mask, 0.0, len(v))
        up, down, neither = (
            torch.bmm(seen, kind.to(p.dtype)) > 0 for kind in (v == torch.inf, v == -torch.inf, v.isnan())
        )
        o = o.masked_fill(up, torch.inf).masked_fill(down, -torch.inf)
        return o.masked_fill(neither | (up & down), torch.nan)

    def backward(
        self,
        batch: Batch,
        piece: Piece,
        shape: tuple[int, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, list[tuple[Tensor | None, Tensor]], list[Tensor]]:
        """dq like q; for k and for v a product (left, right) whose left^T right is their gradient; gradients of the
        bias.
        """
        mask, _ = self.mask(batch, piece, q)
        with torch.enable_grad():
            bias = None if self.bias is None else self.bias.of(piece).to(q.dtype)
        added = self.with_bias(batch, piece, mask, shape, None if bias is None else bias.detach())
        p, slope = self._scores(q, k, added, mask)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        p.sub_(lse.flatten(1, 2)[..., None]).exp_()
        if not self.clean:
            if mask is not None:
                self._mask_out(p, mask, 0.0, len(q))
            k, v = (x.masked_fill(~x.isfinite(), 0) for x in (k, v))
        flat, grad = q.flatten(1, 2), grad.flatten(1, 2)
        ds = torch.bmm(grad, v.transpose(1, 2), out=self.scratch(1, *p.shape))
        ds.sub_(delta.flatten(1, 2)[..., None]).mul_(p)
        parameters = self._bias_gradient(batch, shape, bias, ds, q.shape[1])
        if slope is not None:
            ds.mul_(1 - slope.square_())
        dq = torch.bmm(ds, k).mul_(self.scale).view(q.shape)
        return dq, [(ds, flat * self.scale), (p, grad)], parameters

    def _bias_gradient(
        self, batch: Batch, shape: tuple[int, int], bias: Tensor | None, ds: Tensor, heads: int
    ) -> list[Tensor]:
        if bias is None or self.bias is None or not bias.requires_grad:
            return []
        apart = ds.view(-1, bias.shape[0], heads, *bias.shape[2:])  # (P, R, G, bq, L)
        if bias.shape[1] == 1:
            grad = apart.sum((0, 2))[:, None]
        else:
            at = self.bias.heads(batch, *shape).flatten()
            grad = torch.zeros_like(bias).index_add_(1, at, apart.transpose(0, 1).flatten(1, 2))
        found = torch.autograd.grad(bias, self.bias.parameters, grad, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.bias.parameters, found, strict=True)]


class Normalized:
    """Any other normaliser of a whole row; its gradient is autograd's, one piece at a time."""

    def __init__(self, problem: Problem, schedule: Schedule, bias: Bias | None) -> None:
        self.problem, self.schedule, self.bias = problem, schedule, bias
        self.softmax = Softmax(problem, schedule, bias)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Softmax.prepare`."""
        return self.softmax.prepare(q, k, v)

    def finish(self, o: Tensor, v: Tensor) -> Tensor:
        """See `Softmax.finish`."""
        return self.softmax.finish(o, v)

    def output(self, batch: Batch, piece: Piece, shape: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o = normalizer(scores) v, differentiable."""
        mask, _ = self.softmax.mask(batch, piece, q)
        bias = None if self.bias is None else self.bias.of(piece).to(q.dtype)
        added = self.softmax.with_bias(batch, piece, None, shape, bias)
        s = torch.bmm(q.flatten(1, 2) * self.problem.scale, k.transpose(1, 2))
        s = s if self.problem.softcap is None else self.problem.softcap * torch.tanh(s / self.problem.softcap)
        s = s.view(-1, 1, q.shape[1], q.shape[2], k.shape[1])
        s = s if added is None else s + added
        s = (
            s
            if mask is None
            else (s + mask.masked_fill(mask == -torch.inf, 0)).masked_fill(mask == -torch.inf, -torch.inf)
        )
        p = self.problem.normalizer(s).flatten(2, 3).flatten(0, 1)
        return self.softmax._values(p, v, mask).view(*q.shape[:3], -1)

    def forward(
        self, batch: Batch, piece: Piece, shape: tuple[int, int], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Softmax.forward`; there is no lse."""
        return self.output(batch, piece, shape, q, k, v), q.new_zeros(q.shape[:3])

    def backward(
        self,
        batch: Batch,
        piece: Piece,
        shape: tuple[int, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, list[tuple[Tensor | None, Tensor]], list[Tensor]]:
        """See `Softmax.backward`."""
        parameters = self.bias.parameters if self.bias else []
        if not self.softmax.on_host:
            v = v.masked_fill(~v.isfinite(), 0)
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            o = self.output(batch, piece, shape, q, k, v)
            wanted = [q, k, v, *parameters]
            found = torch.autograd.grad(o, wanted, grad.view_as(o), allow_unused=True)
        dq, dk, dv, *rest = (torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True))
        return dq, [(None, dk), (None, dv)], rest


class _Pieces(torch.autograd.Function):
    """o, lse = merge over the pieces; the backward pass visits the same pieces with the final lse."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Any, schedule: Schedule, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.contiguous() if x.stride(-1) != 1 else x for x in (q, k, v))
        values = rule.prepare(q, k, v)
        o = q.new_zeros(*q.shape[:3], values.shape[3])
        lse = q.new_full(q.shape[:3], -torch.inf)
        q4, k3, v3, o4 = _by_pair(q, k), _flat(k), _flat(values), _by_pair(o, k)
        lse4 = _by_pair(lse[..., None], k)
        shape = q4.shape[0], q4.shape[1]
        for batch in schedule.batches:
            q_, o_, lse_ = (x[batch.pairs, batch.members] for x in (q4, o4, lse4))
            k_, v_ = k3[batch.pairs], v3[batch.pairs]
            for piece in schedule.pieces(batch):
                rows, keys = piece.rows, piece.keys
                part, part_lse = rule.forward(
                    batch, piece, shape, _take_rows(q_, rows), _take_keys(k_, keys), _take_keys(v_, keys)
                )
                part_lse = part_lse[..., None]
                if not piece.alone:
                    old = _take_rows(lse_, rows)
                    total = torch.logaddexp(old, part_lse)
                    some = total.clamp(min=torch.finfo(total.dtype).min)
                    part = _take_rows(o_, rows) * torch.exp(old - some) + part * torch.exp(part_lse - some)
                    part_lse = total
                _put_rows(o_, rows, part)
                _put_rows(lse_, rows, part_lse)
        o = rule.finish(o, v)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rule, ctx.schedule, ctx.parameters = rule, schedule, parameters
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, lse = ctx.saved_tensors
        rule, schedule, parameters = ctx.rule, ctx.schedule, ctx.parameters
        dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
        of_parameters = [torch.zeros_like(p) for p in parameters]
        delta = (grad * o).sum(-1) - grad_lse
        q4, dq4, grad4, k3, v3 = _by_pair(q, k), _by_pair(dq, k), _by_pair(grad.contiguous(), k), _flat(k), _flat(v)
        lse4, delta4, into = _by_pair(lse[..., None], k), _by_pair(delta[..., None], k), (_flat(dk), _flat(dv))
        shape = q4.shape[0], q4.shape[1]
        for batch in schedule.batches:
            q_, dq_, grad_, lse_, delta_ = (x[batch.pairs, batch.members] for x in (q4, dq4, grad4, lse4, delta4))
            for piece in schedule.pieces(batch):
                rows, keys = piece.rows, piece.keys
                taken = (_take_rows(q_, rows), _take_keys(k3[batch.pairs], keys), _take_keys(v3[batch.pairs], keys))
                others = (_take_rows(lse_, rows)[..., 0], _take_rows(delta_, rows)[..., 0], _take_rows(grad_, rows))
                part, products, found = rule.backward(batch, piece, shape, *taken, *others)
                _add_rows(dq_, rows, part)
                for whole, (left, right) in zip(into, products, strict=True):
                    _add_keys(whole[batch.pairs], keys, left, right)
                for total, more in zip(of_parameters, found, strict=False):
                    total += more
        return dq, dk, dv, None, None, *of_parameters


def _by_pair(x: Tensor, k: Tensor) -> Tensor:
    """(B, H, N, C) -> (B * Hkv, H // Hkv, N, C)."""
    return x.reshape(x.shape[0] * k.shape[1], x.shape[1] // k.shape[1], *x.shape[2:])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])
