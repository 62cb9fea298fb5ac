"""Attention from its equations, in the dtype of its inputs: the truth in float64, and what plain code gives elsewhere.

A query sees a list of entries, each a key with a weight: over the entries e of query i, which stand for the keys j(e),

    s_e = softcap(scale q_i . k_j(e)) + bias_ij(e) + log w_e,   p = normalizer(s),   o_i = sum_e p_e v_j(e),

so that a key listed twice counts twice. Nothing here comes from saccade.softmax, whose answers it judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Entries(NamedTuple):
    """keys: int64 (B or 1, H, N, L); log_weights: float64, same shape, -inf where nothing is listed."""

    keys: Tensor
    log_weights: Tensor

    def seen(self, m: int) -> Tensor:
        """bool (B or 1, H, N, M)."""
        marks = torch.zeros(*self.keys.shape[:3], m, dtype=torch.int64)
        return marks.scatter_add(-1, self.keys, (self.log_weights > -torch.inf).long()) > 0


def entries_of(mask: Tensor) -> Entries:
    """Every key that a mask (H, N, M) or (B, H, N, M) admits, once."""
    mask = mask[None] if mask.ndim == 3 else mask
    keys = torch.arange(mask.shape[-1]).expand(mask.shape)
    return Entries(keys, torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf))


def entries_chosen(
    mask: Tensor,
    chosen: Tensor,
    group_of: Tensor,
    block: tuple[int, int],
    tokens: Tensor | None = None,
    log_weights: Tensor | None = None,
) -> Entries:
    """Of what a mask (N, M) admits: the keys of the chosen tiles, and after them the single keys.

    chosen (G, rows, K) and tokens (G, rows, K'): numbers of key tiles and of keys, -1 for none. group_of: (B, H).
    """
    (n, m), (bq, bk) = mask.shape, block
    row = torch.arange(n) // bq
    tile = torch.arange(m) // bk
    marks = torch.stack([(chosen == t).any(-1) for t in range(-(-m // bk))], -1)  # (G, rows, tiles)
    seen = marks[:, row][:, :, tile] & mask
    keys, weights = entries_of(seen)
    if tokens is not None:
        single = tokens[:, row]  # (G, N, K')
        given = torch.zeros(single.shape, dtype=torch.float64) if log_weights is None else log_weights[:, row].double()
        allowed = (single >= 0) & mask.expand(len(single), n, m).gather(-1, single.clamp(min=0))
        keys = torch.cat([keys, single.clamp(min=0)[None]], -1)
        weights = torch.cat([weights, given.masked_fill(~allowed, -torch.inf)[None]], -1)
    return Entries(keys[0][group_of], weights[0][group_of])


Weigh = Callable[[Tensor], Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entries: Entries,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    weigh: Weigh | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(o, lse) over the entries; bias (H or 1, N, M), weigh: scores (..., L) -> weights (default: the softmax)."""
    (batch, heads, n, d), (kv_heads, m) = q.shape, k.shape[1:3]
    repeat = torch.arange(heads, device=q.device) // (heads // kv_heads)
    k, v = k[:, repeat], v[:, repeat]
    s = q @ k.transpose(2, 3) * (1 / math.sqrt(d) if scale is None else scale)
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    if bias is not None:
        s = s + bias.to(s.dtype)
    keys = entries.keys.to(q.device).expand(batch, heads, n, -1)
    log_weights = entries.log_weights.to(q).expand(keys.shape)
    s = torch.where(log_weights > -torch.inf, s.gather(-1, keys) + log_weights.nan_to_num(neginf=0.0), -torch.inf)
    lse = None
    if weigh is not None:
        p = weigh(s)
    else:
        p, lse = softmax(s, sink)
    spread = torch.zeros(batch, heads, n, m, dtype=q.dtype, device=q.device)
    return spread.scatter_add(-1, keys, p) @ v, lse


def softmax(s: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """p_e = exp(s_e) / z, lse = log z, z = sum_e exp(s_e) + exp(sink); zeros and -inf where there is no entry."""
    if sink is not None:
        s = torch.cat([s, sink.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)
    top = s.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    e = torch.exp(s - top)
    z = e.sum(-1, keepdim=True)
    none = z == 0
    z = z.masked_fill(none, 1.0)
    lse = (top + z.log()).masked_fill(none, -torch.inf).squeeze(-1)
    return (e / z)[..., : s.shape[-1] - (sink is not None)], lse


def sigmoid(shift: float) -> Weigh:
    """p_e = 1 / (1 + exp(-s_e - shift))."""
    return lambda s: 1 / (1 + torch.exp(-(s + shift)))


def entmax(alpha: float) -> Weigh:
    """p_e = max(0, (alpha - 1) s_e - tau)^(1 / (alpha - 1)) that add up to 1; tau by halving.

    The halving has no derivative; the sum's has: d tau = sum_e u_e dz_e / sum_e u_e, u = p^(2 - alpha) on the support.
    """

    def halved(z: Tensor) -> Tensor:
        top = z.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        below, above = top - 1, top  # the sum is at least 1 at top - 1, and 0 at top
        for _ in range(80):
            tau = (below + above) / 2
            large = (z - tau).clamp(min=0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
            below, above = torch.where(large, tau, below), torch.where(large, above, tau)
        return (z - below).clamp(min=0)

    def weigh(s: Tensor) -> Tensor:
        d = halved((alpha - 1) * s.detach())  # p^(alpha - 1)
        on = d != 0
        z = torch.where(on, (alpha - 1) * s, 0.0)
        u = torch.where(on, d.masked_fill(~on, 1.0).pow((2 - alpha) / (alpha - 1)), 0.0)
        moved = z - (u * z).sum(-1, keepdim=True) / u.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        d = d.masked_fill(~on, 1.0) + torch.where(on, moved - moved.detach(), 0.0)
        return torch.where(on, d.pow(1 / (alpha - 1)), 0.0)

    return weigh


def entmax_by_sorting(s: Tensor, alpha: float) -> Tensor:
    """entmax of one list of finite scores (L,) for alpha 1.5 or 2, exact: the support is a run of the largest scores.

    alpha = 2: tau = (sum - 1) / K over the K largest. alpha = 1.5, with z = s / 2: tau = mean - sqrt((1 - K var) / K).
    The right K is the one for which the K-th score lies above tau and the next one does not.
    """
    z = (alpha - 1) * s
    largest = z.sort(descending=True).values
    for count in range(1, len(z) + 1):
        part = largest[:count]
        if alpha == 2:
            tau = (part.sum() - 1) / count
        else:
            inside = (1 - count * (part - part.mean()).square().mean()) / count
            if inside < 0:
                continue
            tau = part.mean() - inside.sqrt()
        if part[-1] > tau and (count == len(z) or largest[count] <= tau):
            return (z - tau).clamp(min=0).pow(1 / (alpha - 1))
    raise AssertionError("some count must fit")


def positions(n: int, m: int) -> tuple[range, range]:
    """Where the queries stand and where the keys stand."""
    return range(m - n, m), range(m)


def relative_bias(table: Tensor, grid: tuple[int, ...] | None, n: int, m: int) -> Tensor:
    """b_h(i, j) = table[h, c_a(i) - c_a(j) + e_a - 1, ...], differences held to the table's edges: (H, N, M)."""
    sizes = grid if grid is not None else (m,)
    extents = [(size + 1) // 2 for size in table.shape[1:]]

    def coordinates(position: int) -> list[int]:
        found = []
        for size in reversed(sizes):
            position, rest = (position // size, position % size) if grid is not None else (0, position)
            found.insert(0, rest)
        return found

    def entry(i: int, j: int) -> Tensor:
        at = [
            min(max(a - b, 1 - e), e - 1) + e - 1
            for a, b, e in zip(coordinates(i), coordinates(j), extents, strict=True)
        ]
        return table[(slice(None), *at)]

    queries, keys = positions(n, m)
    return torch.stack([torch.stack([entry(i, j) for j in keys], -1) for i in queries], -2)


def alibi_bias(heads: int, n: int, m: int) -> Tensor:
    """b_h(i, j) = -2^(-8 h / H) |i - j|, h = 1 .. H: (H, N, M)."""
    queries, keys = positions(n, m)
    return torch.tensor(
        [[[-(2 ** (-8 * h / heads)) * abs(i - j) for j in keys] for i in queries] for h in range(1, heads + 1)],
        dtype=torch.float64,
    )


def coordinate_bias(function: nn.Module, coordinates: Tensor, n: int) -> Tensor:
    """b(i, j) = function(x_i - x_j): (H or 1, N, M)."""
    queries = coordinates[len(coordinates) - n :]
    return function(queries[:, None] - coordinates[None, :]).permute(2, 0, 1)
