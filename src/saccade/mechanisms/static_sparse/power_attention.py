"""PowerAttention: key blocks at distances that are powers of two, so that few layers reach every token."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import BlockBand, Causal, Or, Pattern, Plan, Sinks


class PowerAttention(Attention):
    """A window of blocks, the first block, and the blocks at distance 1, 2, 4, 8, ...

        query i sees key j  iff  j <= i  and  (g < window  or  g = 2^k  or  j < sinks block),
        g = i // block - j // block

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D); the same on every head and layer. A block at distance g is
    reached over as many layers as g has ones in binary, at most, so d layers reach every distance up to 2^(d + 1) - 2.
    Paper: arXiv 2503.03588, algorithm 1 (the mask), section 4.1 (the sizes), theorem B.1 (the reach). Deviations: none
    in the mask; `sinks` is 1 there, and some of the paper's models keep full attention in 2 of 7 layers, which is a
    matter of the host. block: tokens a block (default 256). window: blocks of the window, counting the query's own (5).
    sinks: blocks at the start that every query sees (1). Costs window + sinks + log2(N / (block window)) key blocks a
    query, about. Beyond 8,192 tokens these are five intervals a row and more; a kernel of `hopper` holds four, so that
    `triton` runs it. Errors: ValueError or TypeError for sizes that are no positive integers (sinks may be 0).

    >>> power, x = PowerAttention(Dims(2, 8), block=4, window=2), torch.randn(1, 2, 64, 8)
    >>> power(x, x, x).shape, power.plan(x, x).dense()[0, -1].view(16, 4).any(1).nonzero().flatten().tolist()
    (torch.Size([1, 2, 64, 8]), [0, 7, 11, 13, 14, 15])
    """

    spec = Spec(
        id="power_attention",
        name="PowerAttention",
        title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
        paper="2503.03588",
        year=2025,
        family="static_sparse",
        uses=("attend", "BlockBand", "Sinks", "Causal"),
    )
    causal = True

    def __init__(self, dims: Dims, *, block: int = 256, window: int = 5, sinks: int = 1) -> None:
        super().__init__(dims)
        self.block, self.window = positive("block", block), positive("window", window)
        self.sinks = positive("sinks", sinks, least=0)

    def pattern(self, num_tokens: int) -> Pattern:
        """What `num_tokens` tokens see."""
        size, most = self.block, (num_tokens - 1) // self.block
        gaps = (1 << k for k in range(most.bit_length()))
        far = (BlockBand(size, gap + 1, -gap) for gap in gaps if gap >= self.window)
        return Causal() & Or.of(BlockBand(size, self.window), *far, Sinks(self.sinks * size))

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        n, m, heads = q.shape[2], k.shape[2], q.shape[1]
        return self.pattern(m).plan(n, m, heads, block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern(k.shape[2]))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (heads, n), m = q.shape[1:3], k.shape[2]
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for row in range(n):
            i, seen = row + m - n, []
            for j in range(i + 1):
                gap = i // self.block - j // self.block
                if gap < self.window or bin(gap).count("1") == 1 or j < self.sinks * self.block:
                    seen.append(j)
            for h in range(heads):
                g = h // (heads // k.shape[1])
                scores = (q[:, h, row, None] * k[:, g, seen]).sum(-1) / q.shape[3] ** 0.5
                out[:, h, row] = (scores.softmax(-1)[..., None] * v[:, g, seen]).sum(1)
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 67, {"block": 3, "window": 2, "sinks": 2}),
            Case(Dims(2, 4), 41, {"block": 2, "window": 3, "sinks": 0}, batch=1),
            Case(Dims(3, 8), 23, {"block": 1, "window": 1, "sinks": 3}),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"window": 1, "block": length}

    @claim("d layers reach every block distance 0 .. 2^(d+1) - 2 and miss the next; a window of that cost, d (w - 1).")
    def reach(cls) -> Finding:
        blocks, size = 128, 2
        n, width = blocks * size, blocks.bit_length()  # as many blocks as the last query reads
        gap = torch.arange(n)[:, None] // size - torch.arange(n) // size
        ones = torch.stack([gap >> k & 1 for k in range(width)]).sum(0)
        mask = cls(Dims(1, 8), block=size, window=1, sinks=0).pattern(n).dense(n)[0]
        band = (BlockBand(size, width) & Causal()).dense(n)[0]
        after, local, found, exact = mask, band, [], True
        for depth in range(1, width - 1):
            exact &= torch.equal(after, (ones <= depth).tril())  # complete for every query, not only for the last
            found.append((_covered(after, size), _covered(local, size)))
            after, local = after.double() @ mask.double() > 0, local.double() @ band.double() > 0
        exact &= found == [(2 ** (d + 1) - 1, d * (width - 1) + 1) for d in range(1, width - 1)]
        power, window = (list(blocks) for blocks in zip(*found, strict=True))
        figure = f"{power} blocks in a row after 1 to {width - 2} layers, with a window of {width} blocks {window}"
        return Finding(exact and bool(band.sum() >= mask.sum()), figure)

    @claim("At 32 K tokens and 10 blocks a query, 6 layers connect all, as in the paper; a sliding window needs 15.")
    def depth(cls) -> Finding:
        n, block = 32768, 256
        patterns = [cls(Dims(1, 8), sinks=sinks).pattern(n) for sinks in (1, 0)]
        patterns += [Causal() & (BlockBand(block, 9) | Sinks(block)), Causal() & BlockBand(block, 10)]
        plans = [pattern.plan(n, block=(block, block)) for pattern in patterns]
        most = [int(plan.indptr.diff().max()) for plan in plans]
        power, bare, sliding, window = (_layers(plan) for plan in plans)
        figure = (
            f"{power} layers ({bare} without the sink) at density {plans[0].density:.1%}, sliding window with sink "
            f"{sliding} layers at {plans[2].density:.1%}, without {window}; {most[0]} blocks a query at most"
        )
        fair = most[0] == most[2] == most[3] == 10 and plans[0].density <= plans[2].density
        return Finding(fair and power == bare == 6 and min(sliding, window) >= 15, figure)

    @claim("Cost is N log N: a query reads a block more when N doubles; about 94 % of the scores at 32 K are left out.")
    def cost(cls) -> Finding:
        module, lengths, most, kept = cls(Dims(1, 8)), [32768, 65536, 131072, 262144], [], []
        for n in lengths:
            plan = module.pattern(n).plan(n, block=(256, 256))
            most.append(int(plan.indptr.diff().max()))
            kept.append(plan.density * (n + 1) / (2 * n))
        figure = f"{most} blocks at most at N = {lengths}; {1 - kept[0]:.1%} of N^2 left out at 32 K (the paper: 94 %)"
        return Finding(most == [10, 11, 12, 13] and abs(1 - kept[0] - 0.94) < 0.01, figure)

    @claim("Stacked layers pass information just that far: gradients of the last output reach the tokens promised.")
    def flows(cls) -> Finding:
        n, reached = 61, []
        layer, x = cls(Dims(1, 8), block=1, window=1, sinks=0), torch.randn(1, 1, n, 8, dtype=torch.float64)
        ones = torch.tensor([bin(n - 1 - j).count("1") for j in range(n)])
        exact = True
        for depth in range(1, 6):
            token = x.clone().requires_grad_()
            hidden = token
            for _ in range(depth):
                hidden = layer(hidden, hidden, hidden)
            (gradient,) = torch.autograd.grad(hidden[0, 0, -1].sum(), token)
            touched = gradient[0, 0].abs().sum(-1) > 0
            exact &= torch.equal(touched, ones <= depth)
            reached.append(int(touched.sum()))
        return Finding(exact, f"{reached} of {n} tokens after 1 to 5 layers, as many as the ones in binary say")


def _covered(seen: Tensor, size: int) -> int:
    """Blocks of `size` tokens in a row, from its own backwards, of which the last token has seen every key."""
    blocks = seen[-1].view(-1, size).all(1).flip(0)
    return int(blocks.int().cumprod(0).sum())


def _layers(plan: Plan) -> int:
    """Layers until the last block has reached every block, over the tiles that the plan lists."""
    rows = plan.num_row_tiles
    tiles = torch.zeros(rows, rows, dtype=torch.bool)
    tiles[torch.arange(rows).repeat_interleave(plan.indptr.diff()), plan.indices.long()] = True
    seen, layers = tiles[-1], 1
    while not seen.all():
        seen, layers = tiles[seen].any(0), layers + 1
    return layers
