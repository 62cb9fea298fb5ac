"""MSWA: sliding windows of several sizes, a size for each group of heads and for each group of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import CachePolicy, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Pattern, PerHead, Plan, Window

SCALES = (1 / 4, 1 / 2, 1, 2)


def factors(name: str, scales: Sequence[float]) -> tuple[float, ...]:
    """The scales as a tuple: at least one, each a finite number above 0."""
    wanted = f"pass a list of at least one finite factor above 0, such as {SCALES}"
    if not isinstance(scales, (list, tuple)) or any(type(scale) not in (int, float) for scale in scales):
        raise TypeError(f"{name}: got {scales!r}; {wanted}")
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"{name}: got {scales!r}; {wanted}")
    return tuple(scales)


def shared_out(scales: Sequence[float], index: int, count: int) -> float:
    """The scale of number `index` of `count`, which are cut into equal runs, one a scale.

    >>> [shared_out((1, 2, 4, 8), i, 8) for i in range(8)], [shared_out((1, 2, 4, 8), i, 2) for i in range(2)]
    ([1, 1, 2, 2, 4, 4, 8, 8], [2, 8])
    """
    return scales[(2 * index + 1) * len(scales) // (2 * count)]


class Mswa(CachePolicy):
    """Causal sliding windows from w / 16 to 4 w in one model.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j   over i - w_lh < j <= i
        w_lh = max(1, floor(w a_l b_h)),   a_l, b_h in (1/4, 1/2, 1, 2)

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). The heads of a layer are cut into four equal runs, the layers
    likewise from shallow to deep, so that the mean window of a model is (15/16)^2 w. One instance is one layer. A
    decoder keeps the last w_lh keys of each head; of query heads that share a key head, the longest decides. Paper:
    arXiv 2501.01039, MSWA-h and MSWA-l combined. Deviations: shared key heads are ours, and so are counts that four
    does not divide: a head or layer then takes the scale at its middle, so that a single layer has a = 1 (MSWA-h, the
    paper's variant over heads alone). window: w, the query included (default 128). layer: which layer this is, from 0
    (0). num_layers: of how many (1). head_scales: b ((1/4, 1/2, 1, 2); (1,) is MSWA-l, the variant over layers alone).
    layer_scales: a (the same). Costs N w_lh D a head and a cache of w_lh tokens. Windows are as fine
    as tiles: at N = 16,384 and w = 128, 1.5 % of the causal pairs are seen, tiles of 128 hold 3.5 %, of 64 2.3 %, and a
    call takes little longer than starting it. Errors: TypeError or ValueError for
    sizes that are no positive integers, a layer that the model does not have, scales that are none, or no numbers above
    0.

    >>> deep = Mswa(Dims(8, 16), window=64, layer=31, num_layers=32)
    >>> deep.windows(), deep.kept(1000).sum(1).tolist()
    ([32, 32, 64, 64, 128, 128, 256, 256], [32, 32, 64, 64, 128, 128, 256, 256])
    """

    spec = Spec(
        id="mswa",
        name="MSWA",
        title="MSWA: Refining Local Attention with Multi-Scale Window Attention",
        paper="2501.01039",
        year=2025,
        family="static_sparse",
        uses=("attend", "PerHead", "Window"),
    )
    causal = True
    per_head = True

    def __init__(
        self,
        dims: Dims,
        *,
        window: int = 128,
        layer: int = 0,
        num_layers: int = 1,
        head_scales: Sequence[float] = SCALES,
        layer_scales: Sequence[float] = SCALES,
    ) -> None:
        super().__init__(dims)
        self.window, self.num_layers = positive("window", window), positive("num_layers", num_layers)
        self.layer = positive("layer", layer, least=0)
        if layer >= num_layers:
            raise ValueError(f"layer: got {layer} of num_layers {num_layers}; pass 0 to {num_layers - 1}")
        self.head_scales = factors("head_scales", head_scales)
        self.layer_scales = factors("layer_scales", layer_scales)

    def windows(self) -> list[int]:
        """Keys that each query head sees."""
        base = self.window * shared_out(self.layer_scales, self.layer, self.num_layers)
        heads = self.dims.num_heads
        return [max(1, int(base * shared_out(self.head_scales, h, heads))) for h in range(heads)]

    def held(self) -> list[int]:
        """Keys that each key head keeps for the longest of its query heads."""
        windows, group = self.windows(), self.dims.group
        return [max(windows[h : h + group]) for h in range(0, len(windows), group)]

    def pattern(self) -> Pattern:
        """What each query head sees."""
        return PerHead([Window(size) for size in self.windows()])

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern().plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern())

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: dict[int, list[Tensor]] | None = None
    ) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """The next token, or the next few; the state: by number of keys held, the keys and values of those heads."""
        windows, held, group = self.windows(), self.held(), self.dims.group
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        after = {}
        for size in sorted(set(held)):
            heads = [h for h, keys in enumerate(held) if keys == size]
            cache = [x[:, heads] for x in (k, v)]
            if state:
                cache = [torch.cat(pair, 2) for pair in zip(state[size], cache, strict=True)]
            mine = [h * group + g for h in heads for g in range(group)]
            out[:, mine] = attend(q[:, mine], cache[0], cache[1], PerHead([Window(windows[h]) for h in mine]))
            after[size] = [x[:, :, -size:].clone() for x in cache]  # or the whole would stay in memory
        return out, after

    def kept(self, num_tokens: int) -> Tensor:
        return torch.arange(num_tokens) >= num_tokens - torch.tensor(self.held())[:, None]

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (heads, n), m = q.shape[1:3], k.shape[2]

        def run(index: int, count: int, runs: int) -> int:
            middle = (index + 0.5) / count
            return sum(middle >= edge / runs for edge in range(1, runs))

        a = self.layer_scales[run(self.layer, self.num_layers, len(self.layer_scales))]
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for h in range(heads):
            shared = h // (heads // k.shape[1])
            b = self.head_scales[run(h, heads, len(self.head_scales))]
            for i in range(m - n, m):
                seen = [j for j in range(i + 1) if j == i or i - j + 1 <= self.window * a * b]
                scores = (q[:, h, i - m + n, None] * k[:, shared, seen]).sum(-1) / q.shape[3] ** 0.5
                out[:, h, i - m + n] = (scores.softmax(-1)[..., None] * v[:, shared, seen]).sum(1)
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8), 37, {"window": 24, "layer": 1, "num_layers": 4}),
            Case(Dims(8, 4, 2), 29, {"window": 7, "layer": 6, "num_layers": 7}),
            Case(Dims(3, 8), 23, {"window": 5, "head_scales": (2, 1 / 4, 1), "layer_scales": (3 / 2,)}, batch=1),
            Case(Dims(5, 4, 1), 31, {"window": 6, "layer": 2, "num_layers": 3, "layer_scales": (1 / 2, 1)}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"window": 4 * length}

    @classmethod
    def keys_read(cls, window: int, num_layers: int, length: int) -> Tensor:
        """(layers, heads): keys with a gradient from the last query, heads 8."""
        counts = []
        for layer in range(num_layers):
            q, k, v = torch.randn(3, 1, 8, length, 4, dtype=torch.float64)
            v.requires_grad_()
            module = cls(Dims(8, 4), window=window, layer=layer, num_layers=num_layers)
            (grad,) = torch.autograd.grad(module(q, k, v)[:, :, -1].sum(), v)
            counts.append(grad[0].abs().sum(-1).count_nonzero(-1))
        return torch.stack(counts)

    @claim("The mean window is (15/16)^2 w, and the longest head of the deepest layers reaches 4 w.")
    def scales(cls) -> Finding:
        read = cls.keys_read(64, 8, 300)
        mean, least, most = float(read.double().mean()), int(read.min()), int(read.max())
        figure = f"{least} to {most} keys, {mean:.2f} on average ({mean / 64:.4f} w) at w = 64, 8 layers of 8 heads"
        return Finding((least, mean, most) == (4, 64 * (15 / 16) ** 2, 256), figure)

    @claim("A decoder's cache is (15/16)^2 of that of a uniform window w, and it is enough.")
    def cache(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 8, 150, 4, dtype=torch.float64)
        tokens, errors = [], []
        for scales in ({}, {"head_scales": (1,), "layer_scales": (1,)}):
            held = 0
            for layer in range(4):
                module = cls(Dims(8, 4), window=32, layer=layer, num_layers=4, **scales)
                state: dict[int, list[Tensor]] = {}
                rows = []
                for piece in zip(*(x.split([97, 1, 1, 51], 2) for x in (q, k, v)), strict=True):
                    row, state = module.step(*piece, state=state)
                    rows.append(row)
                errors.append(float((torch.cat(rows, 2) - module(q, k, v)).abs().max()))
                held += sum(keys[..., 0].numel() for keys, _ in state.values())
            tokens.append(held)
        ours, uniform = tokens
        enough = max(errors) < 64 * torch.finfo(torch.float64).eps * float(v.abs().max())
        figure = f"{ours} tokens in 4 layers of 8 heads, uniform {uniform} ({ours / uniform:.4f}); decode within"
        return Finding(ours * 256 == uniform * 225 and enough, f"{figure} {max(errors):.1e}")

    @claim("With equal windows it is sliding-window attention.")
    def equal(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 4, 97, 8, dtype=torch.float64)
        ours = cls(Dims(4, 8), window=11, head_scales=(1, 1, 1, 1), layer_scales=(1,))(q, k, v)
        position = torch.arange(97)
        back = position[:, None] - position
        scores = (q @ k.mT / 8**0.5).masked_fill((back < 0) | (back >= 11), -torch.inf)
        error = float((ours - scores.softmax(-1) @ v).abs().max())
        return Finding(error < 64 * torch.finfo(torch.float64).eps * float(v.abs().max()), f"differs by {error:.1e}")
