"""MW-MAE: every head attends within windows of its own size, from pairs of tokens to the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.softmax import RelativeTable, attend_heads
from saccade.where import Blocks, Full, Pattern, PerHead, Plan

WINDOWS = (2, 5, 10, 25, 50, 125, 0, 0)  # for 250 tokens: every divisor between 1 and 250, and two global heads


class MwMae(Attention):
    """Multi-window attention: head h attends within windows of w_h tokens that do not overlap, w_h = 0 everywhere.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D) + b_h(i - j)) v_j   over floor(j / w_h) = floor(i / w_h)
        w_h = 0: the same over all j, with b_h = 0

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). b_h: a learned entry for each difference |d| < w_h, one
    table a windowed head. Windows are not shifted; in a layer only the global heads carry anything across a border.
    The paper puts it into the decoder of a masked autoencoder for audio spectrograms, 4 blocks of 8 heads on N = 250
    patches in the order of time. Paper: arXiv 2306.00561, section 3 (multi-window attention); the sizes, the bias and
    that global heads have none follow the authors' code (layers.py and the base configuration).
    Deviations: a window must divide N there, here the last one may be shorter; the bias starts at zero, not at small
    random numbers, and its table has room for the largest window in every head; key heads may be shared. Their option
    to shift every other block's windows, off in the paper, is not offered.
    windows: w_h, one a query head (default None: 2, 5, 10, 25, 50, 125, 0, 0, of another number of heads each takes
    the size at its place in the list). bias: learn b (True).
    Costs N w_h D a head, N^2 D a global one. Small windows are finer than tiles: at N = 16,384 the windowed heads see
    0.2 % of the pairs, in tiles of 64 that hold 1.0 %. Errors: ValueError or TypeError for sizes that are no integers
    >= 0, or whose number is not that of the heads.

    >>> audio, x = MwMae(Dims(8, 4)), torch.randn(1, 8, 250, 4)
    >>> audio(x, x, x).shape, round(audio.plan(x, x).density, 4)
    (torch.Size([1, 8, 250, 4]), 0.3585)
    """

    spec = Spec(
        id="mw_mae",
        name="MW-MAE (multi-window attention)",
        title="Masked Autoencoders with Multi-Window Local-Global Attention Are Better Audio Learners",
        paper="2306.00561",
        year=2023,
        family="static_sparse",
        uses=("attend_heads", "PerHead", "Blocks", "RelativeTable"),
    )
    per_head = True

    def __init__(self, dims: Dims, *, windows: Sequence[int] | None = None, bias: bool = True) -> None:
        super().__init__(dims)
        if windows is None:
            windows = [WINDOWS[h * len(WINDOWS) // dims.num_heads] for h in range(dims.num_heads)]
        if not isinstance(windows, (list, tuple)) or len(windows) != dims.num_heads:
            raise ValueError(f"windows: got {windows!r} for {dims.num_heads} heads; pass a list with one size a head")
        self.windows = [positive("windows", size, least=0) for size in windows]
        self.local = [h for h, size in enumerate(self.windows) if size]
        self.whole = [h for h, size in enumerate(self.windows) if not size]
        self.within = PerHead([Blocks(self.windows[h]) for h in self.local]) if self.local else None
        largest = max(self.windows)
        self.bias = RelativeTable(len(self.local), (largest,)) if bias and self.local else None

    def pattern(self) -> Pattern:
        """What each query head sees."""
        return PerHead([Blocks(size) if size else Full() for size in self.windows])

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern().plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = (self.local, self.within, self.bias), (self.whole, None, None)
        return attend_heads(q, k, v, [group for group in groups if group[0]])

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table, seen_before = dict(self.named_parameters()).get("bias.table"), 0
        heads, n = [], q.shape[2]
        for h, size in enumerate(self.windows):
            shared = h // (q.shape[1] // k.shape[1])
            rows = []
            for i in range(n):
                first, end = (i - i % size, min(i - i % size + size, n)) if size else (0, n)
                scores = (q[:, h, i, None] * k[:, shared, first:end]).sum(-1) / q.shape[3] ** 0.5
                if size and table is not None:
                    centre = table.shape[1] // 2
                    scores = scores + torch.stack([table[seen_before, centre + i - j] for j in range(first, end)])
                rows.append((scores.softmax(-1)[..., None] * v[:, shared, first:end]).sum(1))
            seen_before += size > 0
            heads.append(torch.stack(rows, 1))
        return torch.stack(heads, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8), 35, {"windows": (5, 7, 0, 1)}),
            Case(Dims(4, 4, 2), 30, {"windows": (0, 3, 10, 0), "bias": False}),
            Case(Dims(3, 8), 23, {"windows": (4, 23, 9)}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, object]:
        return {"windows": [0] * dims.num_heads}

    @claim("At N = 250 the mean density is 35.9 %, and a head of window w reaches w - 1 tokens at most.")
    def density(cls) -> Finding:
        seen = cls(Dims(8, 4)).pattern().dense(250, heads=8)
        share = float(seen.double().mean())
        apart = (torch.arange(250)[:, None] - torch.arange(250)).abs()
        reach = [int(apart[mask].max()) for mask in seen]
        exact = sum(size or 250 for size in WINDOWS) / (8 * 250)
        holds = share == exact and reach == [(size or 250) - 1 for size in WINDOWS]
        return Finding(holds, f"{share:.2%} of the pairs; heads reach {', '.join(map(str, reach))} tokens")

    @claim("No windows at all is multi-head attention; windows of N tokens are that with a relative bias.")
    def limits(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 3, 41, 8, dtype=torch.float64)
        wide = cls(Dims(3, 8), windows=(41,) * 3).double()
        with torch.no_grad():
            wide.bias.table.normal_()
            at = torch.arange(41)[:, None] - torch.arange(41) + 40
            scores = q @ k.mT / 8**0.5
            truths = scores.softmax(-1) @ v, (scores + wide.bias.table[:, at]).softmax(-1) @ v
            found = cls(Dims(3, 8), windows=(0,) * 3)(q, k, v), wide(q, k, v)
        errors = [float((one - two).abs().max()) for one, two in zip(found, truths, strict=True)]
        apart = float((truths[0] - truths[1]).abs().max())
        small = 64 * torch.finfo(torch.float64).eps * float(v.abs().max())
        return Finding(
            max(errors) < small < apart, f"differ by {errors[0]:.1e} and {errors[1]:.1e}; the bias moves {apart:.1f}"
        )

    @claim("Nothing crosses the border of a window in a windowed head; the global heads alone mix windows.")
    def borders(cls) -> Finding:
        q, k, v = torch.randn(3, 1, 8, 250, 4, dtype=torch.float64)
        v.requires_grad_()
        with torch.enable_grad():
            out = cls(Dims(8, 4)).double()(q, k, v)
            (grad,) = torch.autograd.grad(out[0, :, 130].sum(), v)
        read = grad[0].ne(0).any(-1)
        holds = all(
            read[h].nonzero()[:, 0].tolist() == list(range(130 - 130 % size, 130 - 130 % size + size))
            for h, size in enumerate(WINDOWS)
            if size
        )
        across = read[:, 0].nonzero()[:, 0].tolist()
        counts = ", ".join(map(str, read.sum(1).tolist()))
        return Finding(holds and across == [6, 7], f"token 130 reads {counts} tokens; heads {across} read token 0")
