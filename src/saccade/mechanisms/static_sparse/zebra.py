"""Zebra: one layer in a few attends to everything before it, the others to a window."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import CachePolicy, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Causal, Pattern, Plan, Window


class Zebra(CachePolicy):
    """Layers in groups: the first of a group is global, the others are local.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j
        over j <= i              when layer mod group_size = 0
        over i - w <= j <= i     otherwise

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). One instance is one layer; a decoder keeps every key of a
    global layer and the last w + 1 of a local one. Paper: arXiv 2312.08618. Which layer is global and where the window
    ends follow the authors' inference code; positions are rotary, and the host's. Deviations: that code masks a cache
    in place, which goes wrong when several tokens are read at once; here any pieces give what the whole gives.
    layer: which layer this is, from 0 (default 0, a global one). group_size: layers a group (4). window: w + 1, keys
    that a local layer sees, the query's own among them (513). Costs N^2 / 2 pairs in a global layer, N (w + 1) in a
    local one, and as many cached tokens as a late query reads. Errors: ValueError or TypeError for sizes that are no
    positive integers, and a layer below 0.

    >>> [int(Zebra(Dims(2, 8), layer=layer, window=3).kept(10).sum()) // 2 for layer in range(6)]
    [10, 3, 3, 3, 10, 3]
    """

    spec = Spec(
        id="zebra",
        name="Zebra",
        title="Zebra: Extending Context Window with Layerwise Grouped Local-Global Attention",
        paper="2312.08618",
        year=2023,
        family="static_sparse",
        uses=("attend", "Causal", "Window"),
    )
    causal = True

    def __init__(self, dims: Dims, *, layer: int = 0, group_size: int = 4, window: int = 513) -> None:
        super().__init__(dims)
        self.layer, self.group_size = positive("layer", layer, least=0), positive("group_size", group_size)
        self.window = positive("window", window)
        self.is_global = layer % group_size == 0
        self.pattern: Pattern = Causal() if self.is_global else Window(window)

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern.plan(q.shape[2], k.shape[2], q.shape[1], device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The next token, or the next few; the state: keys and values that are still held."""
        if state is not None:
            k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        out = attend(q, k, v, self.pattern)
        if not self.is_global:
            k, v = (x[:, :, -self.window :].clone() for x in (k, v))  # or the whole would stay in memory
        return out, (k, v)

    def kept(self, num_tokens: int) -> Tensor:
        ago = num_tokens - 1 - torch.arange(num_tokens)
        return ((ago < self.window) | self.is_global).expand(self.dims.num_kv_heads, -1)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (heads, n), m = q.shape[1:3], k.shape[2]
        reads = [h // (heads // k.shape[1]) for h in range(heads)]
        rows = []
        for i in range(m - n, m):
            first = 0 if self.layer % self.group_size == 0 else max(0, i - (self.window - 1))
            scores = (q[:, :, i - m + n, None] * k[:, reads, first : i + 1]).sum(-1) / q.shape[3] ** 0.5
            rows.append((scores.softmax(-1)[..., None] * v[:, reads, first : i + 1]).sum(2))
        return torch.stack(rows, 2)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 37, {"layer": 5, "group_size": 3, "window": 6}),
            Case(Dims(4, 4, 2), 29, {"layer": 6, "group_size": 3, "window": 5}),
            Case(Dims(2, 8), 23, {"layer": 1, "window": 7}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"layer": 3, "group_size": 1}

    @claim("At a long context a decoder's cache is about a quarter of that of full attention, and the pairs likewise.")
    def quarter(cls) -> Finding:
        n, layers = 16384, [cls(Dims(1, 8), layer=layer) for layer in range(32)]
        tokens = sum(int(layer.kept(n).sum()) for layer in layers)
        pairs = sum(layer.pattern.plan(n, block=(64, 64)).num_attended for layer in layers[:4]) * 8
        cached, attended = tokens / (32 * n), int(pairs) / (32 * n * (n + 1) / 2)
        holds = tokens == 8 * n + 24 * 513 and 1 / 4 < cached < attended < 1 / 4 + 2 * 513 / n
        return Finding(holds, f"cached {cached:.1%}, attended {attended:.1%} in 32 layers at N = {n}")

    @claim("Any group_size layers in a row reach every earlier token; without the global one they would not.")
    def reach(cls) -> Finding:
        n, layers = 101, [cls(Dims(1, 8), layer=layer, window=9) for layer in range(8)]

        def reached(chain: list[Zebra]) -> float:
            seen = torch.eye(n, dtype=torch.float64)
            for layer in chain:
                seen = layer.pattern.dense(n)[0].double() @ seen
            return int((seen > 0).sum()) / (n * (n + 1) / 2)

        runs = [reached(layers[start : start + 4]) for start in range(4)]
        local = reached(layers[1:4])
        figure = f"4 layers from any start reach {min(runs):.0%} of the causal pairs, 3 local ones {local:.0%}"
        return Finding(min(runs) == 1 and local < 0.5, figure)

    @claim("A local layer, computed as blocks of w queries over the block before and their own, is the same window.")
    def blocks(cls) -> Finding:
        w, count = 8, 7
        q, k, v = torch.randn(3, 1, 2, w * count, 4, dtype=torch.float64)
        before = [torch.nn.functional.pad(x, (0, 0, w, 0)).unfold(2, 2 * w, w).mT for x in (k, v)]
        place = torch.arange(w * count).view(count, w, 1), torch.arange(count)[:, None, None] * w + torch.arange(-w, w)
        seen = (place[1] >= 0) & (place[1] <= place[0]) & (place[1] >= place[0] - w)
        scores = (q.unflatten(2, (count, w)) @ before[0].mT / 2).masked_fill(~seen, -torch.inf)
        blocked = (scores.softmax(-1) @ before[1]).flatten(2, 3)
        error = float((cls(Dims(2, 4), layer=1, window=w + 1)(q, k, v) - blocked).abs().max())
        return Finding(error < 64 * torch.finfo(torch.float64).eps * float(v.abs().max()), f"differs by {error:.1e}")
