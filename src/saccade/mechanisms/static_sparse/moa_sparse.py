"""MoA: every head has a span of its own, which grows with the length by its own rule; a profile chooses the rules."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import BlockBand, Causal, Pattern, PerHead, Plan, Sinks

Rule = Mapping[str, Any]


def per_head(name: str, values: float | Sequence[float], num_heads: int) -> list[float]:
    """One number a head: `values` itself, or the same number for all of them."""
    found: list[Any] = list(values) if isinstance(values, (list, tuple)) else [values] * num_heads
    if any(type(value) not in (int, float) for value in found):
        raise TypeError(f"{name}: got {values!r}; pass a number, or a list with one a head")
    if len(found) != num_heads:
        raise ValueError(f"{name}: got {len(found)} numbers for {num_heads} heads; pass one, or one a head")
    return found


class MoaSparse(Attention):
    """Mixture of sparse attention: one global block and a causal band, as wide as the head's elastic rule says.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j   over j <= i with j in block 0, or at most n_h - 1 blocks back
        n_h = max(1, floor(floor(alpha_h / block) + beta_h ceil(N / block))),   in tokens S_h(N) = alpha_h + beta_h N

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). A head with a small beta stays local however long the text
    is, one with beta near 1 sees everything. `saccade tune moa_sparse` chooses the rules of every layer: an integer
    programme over what each rule would hide of the `influence` of dense attention, below a bound on the mean density at
    every length and with no more than two rules a layer. Paper: arXiv 2406.14909, equation 2 (elastic rules), 3 and 4
    (influence), 5 (the programme), section 5 (calibration on answers that depend on a long context); rounding, the
    global block, the two rules a layer and that the influence of a block counts by its size follow the authors' code
    (elastic_block_sparse.py, elastic_generate.py, optimizer.py).
    Deviations: N is the number of keys at hand unless `length` fixes it (the authors' decoder fixes it at prompt plus
    longest answer), and it need not be a multiple of the block. Query heads that share a key head have rules of their
    own; the authors copy the keys first.
    alpha, beta: a number, or one a query head (default 0 and 0.5: half of the keys in every head; the paper has none).
    block: tokens a block (64). length: N of the rule (None: the number of keys).
    Costs N S_h(N) D a head, and a cache of block + S_h(N) tokens. Errors: ValueError or TypeError for numbers that do
    not fit the heads, or sizes that are no positive integers.

    >>> moa, x = MoaSparse(Dims(2, 4), alpha=(16, 0), beta=(0.0, 1.0), block=8), torch.randn(1, 2, 64, 4)
    >>> moa.blocks(64), moa.plan(x, x).dense()[:, -1].sum(-1).tolist()
    ([2, 8], [24, 64])
    """

    spec = Spec(
        id="moa_sparse",
        name="MoA (mixture of sparse attention)",
        title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        paper="2406.14909",
        year=2024,
        family="static_sparse",
        uses=("attend", "PerHead", "BlockBand", "Sinks"),
    )
    causal = True
    per_head = True

    def __init__(
        self,
        dims: Dims,
        *,
        alpha: float | Sequence[float] = 0.0,
        beta: float | Sequence[float] = 0.5,
        block: int = 64,
        length: int | None = None,
    ) -> None:
        super().__init__(dims)
        self.alpha, self.beta = per_head("alpha", alpha, dims.num_heads), per_head("beta", beta, dims.num_heads)
        self.block = positive("block", block)
        self.length = None if length is None else positive("length", length)

    def blocks(self, num_keys: int) -> list[int]:
        """Blocks of the band of each head, the query's own included."""
        whole = -(-(self.length or num_keys) // self.block)
        rules = zip(self.alpha, self.beta, strict=True)
        return [max(1, int(alpha // self.block + beta * whole)) for alpha, beta in rules]

    def pattern(self, num_keys: int) -> Pattern:
        """What each query head sees of `num_keys` keys."""
        bands = (BlockBand(self.block, size) for size in self.blocks(num_keys))
        return PerHead([(Sinks(self.block) | band) & Causal() for band in bands])

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern(k.shape[2]).plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern(k.shape[2]))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (heads, n), m, size = q.shape[1:3], k.shape[2], self.block
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        total = self.length or m
        for h in range(heads):
            shared = h // (heads // k.shape[1])
            lengths = sum(1 for start in range(0, total, size)) * self.beta[h] + self.alpha[h] // size
            for i in range(m - n, m):
                back = [i // size - j // size for j in range(i + 1)]
                seen = [j for j in range(i + 1) if j < size or back[j] == 0 or back[j] + 1 <= lengths]
                scores = (q[:, h, i - m + n, None] * k[:, shared, seen]).sum(-1) / q.shape[3] ** 0.5
                out[:, h, i - m + n] = (scores.softmax(-1)[..., None] * v[:, shared, seen]).sum(1)
        return out

    # The search. What drives it stands in saccade.bench.tune.

    @classmethod
    def candidates(cls, lengths: Sequence[int], *, block: int = 64, alphas: int = 11, betas: int = 9) -> list[Rule]:
        """Rules that a head may have: alpha on a grid from -min(lengths) to max(lengths), beta on one from 0 to 1.

        alpha is cut to whole blocks. Those with an empty span at the shortest length or one beyond the longest are left
        out, and of those that mean the same at all `lengths` all but the first.
        """
        least, most = min(lengths), max(lengths)
        distinct: dict[tuple[int, ...], Rule] = {}
        offsets = [int(alpha // block) * block for alpha in torch.linspace(-least, most, alphas).tolist()]
        for alpha, beta in itertools.product(offsets, torch.linspace(0, 1, betas).tolist()):
            if alpha + beta * least > 0 and alpha + beta * most <= most:
                rule = cls(Dims(1, 1), alpha=alpha, beta=beta, block=block)
                bands = tuple(min(rule.blocks(n)[0], -(-n // block)) for n in lengths)
                distinct.setdefault(bands, {"alpha": alpha, "beta": beta, "block": block})
        return list(distinct.values())

    @classmethod
    def assemble(cls, rules: Sequence[Rule]) -> dict[str, Any]:
        """The parameters of a layer whose heads have these rules."""
        sizes = {rule["block"] for rule in rules}
        if len(sizes) != 1:
            raise ValueError(f"rules: got blocks of {sorted(sizes)} tokens; all heads of a layer have one size")
        return {"alpha": [r["alpha"] for r in rules], "beta": [r["beta"] for r in rules], "block": sizes.pop()}

    @classmethod
    def influence(cls, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, *, block: int = 64) -> Tensor:
        """By how much leaving out each block of a dense causal layer changes the loss, to first order.

            E_ij = A_ij (sum_k G_ik A_ik - G_ij) / (1 - A_ij),   G = dL/dA;   E_00 = -A_00 G_00

        q (B, H, N, D), k, v (B, Hkv, N, D); gradient: dL/do, like q. The other weights of a row grow to fill the gap,
        which a first row cannot. Returns sums over blocks and the batch, (H, rows, cols). Forms `block` rows at a time.
        """
        group, n = q.shape[1] // k.shape[1], k.shape[2]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        rows = []
        for start in range(0, n, block):
            end = min(start + block, n)
            at, before = torch.arange(start, end, device=q.device), torch.arange(end, device=q.device)
            scores = q[:, :, at] @ k[:, :, :end].mT * q.shape[3] ** -0.5
            a = scores.masked_fill(before > at[:, None], -torch.inf).softmax(-1)
            g = gradient[:, :, at] @ v[:, :, :end].mT
            rest = (1 - a).clamp(min=torch.finfo(a.dtype).eps)
            effect = a * ((g * a).sum(-1, keepdim=True) - g) / rest
            if start == 0:
                effect[:, :, 0] = -(a * g)[:, :, 0]
            padded = torch.nn.functional.pad(effect.sum((0, 2)), (0, n - end + -n % block))
            rows.append(padded.unflatten(1, (-1, block)).sum(2))
        return torch.stack(rows, 1)

    @classmethod
    def lost(cls, influence: Tensor, rule: Rule) -> Tensor:
        """What a rule is predicted to cost each head: the sizes of the influence (H, rows, cols) of all it hides."""
        rows = torch.arange(influence.shape[1], device=influence.device)
        (band,) = cls(Dims(1, 1), **rule).blocks(len(rows) * rule["block"])
        back = rows[:, None] - rows
        hidden = (back >= band) & (rows > 0)
        return (influence.abs() * hidden).sum((1, 2))

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 53, {"alpha": (8, 0, -4, 21), "beta": (0.0, 0.5, 0.25, 0.125), "block": 4}),
            Case(Dims(2, 8), 37, {"alpha": -9, "beta": 0.75, "block": 3, "length": 29}),
            Case(Dims(3, 4), 23, {"alpha": (6, 0, 0), "beta": (0.0, 1.0, 0.3), "block": 2}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, float]:
        return {"alpha": 0, "beta": 1.0}

    @claim("A head reads min(N, block + S_h(N)) keys up to the rounding to blocks: local ones stay so as N grows.")
    def elastic(cls) -> Finding:
        alpha, beta, size = (96, 0, -64, 0), (0.0, 0.25, 0.5, 1.0), 16
        module, found, holds = cls(Dims(4, 8), alpha=alpha, beta=beta, block=size), [], True
        for n in (256, 512, 1024):
            last = module.pattern(n).dense(n, heads=4)[:, -1].sum(-1).tolist()
            wanted = [min(n, size + a + b * n) for a, b in zip(alpha, beta, strict=True)]
            holds &= all(abs(one - two) < size for one, two in zip(last, wanted, strict=True))
            found.append(f"{', '.join(map(str, last))} at N = {n}")
        return Finding(holds, f"the last query reads {'; '.join(found)}")

    @claim("The influence is exact to first order: it is the slope of the loss as one weight is taken away.")
    def slope(cls) -> Finding:
        n, size = 11, 3
        q, k, v, gradient = torch.randn(4, 1, 1, n, 4, dtype=torch.float64)
        later = torch.ones(n, n).triu(1) > 0
        a = (q[0, 0] @ k[0, 0].T / 2).masked_fill(later, -torch.inf).softmax(-1)
        sums = torch.zeros(4, 4, dtype=torch.float64)
        for i, j in itertools.product(range(1, n), range(n)):
            if j <= i:  # with a linear loss the change is its own slope
                gone = a[i].clone()
                gone[j] = 0
                moved = gone / gone.sum() - a[i]
                sums[i // size, j // size] += (moved @ v[0, 0]) @ gradient[0, 0, i]
        sums[0, 0] -= v[0, 0, 0] @ gradient[0, 0, 0]
        error = float((cls.influence(q, k, v, gradient, block=size)[0] - sums).abs().max())
        small = 256 * torch.finfo(torch.float64).eps * float(sums.abs().max())
        return Finding(error < small, f"sums over blocks differ from taking weights away by {error:.1e}")

    @claim(
        "On planted heads a retrieval head gets a large beta, a local one beta 0; uniform windows keep less influence."
    )
    def separates(cls) -> Finding:
        n, size, lengths = 256, 16, (128, 256)
        losses = []
        for length in lengths:
            rows = torch.arange(length // size)
            back = rows[:, None] - rows
            local, early = ((back >= 0) & (back < 2)).double(), (back >= 0).double()  # one near, one everywhere
            losses.append(torch.stack([local, early]))
        rules = cls.candidates(lengths, block=size)
        cost = torch.tensor([[b * size / n for b in cls(Dims(1, 1), **r).blocks(n)] for r in rules])[:, 0].clamp(max=1)
        lost = torch.stack([torch.stack([cls.lost(e, r) for e in losses]).sum(0) for r in rules], 1)  # (2, rules)
        pairs = [(i, j) for i, j in itertools.product(range(len(rules)), repeat=2) if cost[i] + cost[j] <= 2 * 0.6]
        one, two = min(pairs, key=lambda p: (float(lost[0, p[0]] + lost[1, p[1]]), float(cost[p[0]] + cost[p[1]])))
        uniform = min(float(lost[:, i].sum()) for i, j in pairs if i == j)
        best, betas = float(lost[0, one] + lost[1, two]), (rules[one]["beta"], rules[two]["beta"])
        total = sum(float(e.sum()) for e in losses)
        figure = f"beta {betas[0]:.2f} and {betas[1]:.2f}; of the influence {best / total:.1%} is lost"
        figure += f", {uniform / total:.1%} by the best uniform rule"
        return Finding(betas[0] < 0.2 and betas[1] > 0.8 and best < uniform, figure)
