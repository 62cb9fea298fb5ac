"""Sparse Transformer: full causal attention in two steps of about sqrt(N) keys, one near and one far."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import known, positive
from saccade.softmax import attend_heads, merge
from saccade.where import Band, BlockBand, Blocks, Causal, Columns, Pattern, PerHead, Plan, Strided, Window


class SparseTransformer(Attention):
    """Attention factorised into two sparse sets A1 (near) and A2 (far), through which every earlier token is reached.

        o_i = sum_{j in A(i)} softmax_j(q_i . k_j / sqrt(D)) v_j
        strided: A1 = {j <= i : i - j < l}            A2 = {j <= i : (i - j) mod l = 0}
        fixed:   A1 = {j <= i : floor(j/l) = floor(i/l)}   A2 = {j <= i : l - (s+1) c <= j mod l < l - s c}
        merged:  A = A1 | A2 on every head   split: A = A1 on the first half of the heads (near), A2 on the others (far)

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D). l: `stride`, c: `columns`, s: the sub-block of a head.
    Strided suits data with a period (images, audio), fixed suits text. Paper: arXiv 1904.10509, sections 4.3 (the
    sets), 5.1, equations 7 and 8 (merged, split) and 5.5 (how the stripes are computed); sub-blocks and the window's
    end are those of the authors' published code.
    Deviations: the window has l keys, the query's own among them, as in the code (l + 1 in the text; merged, the two
    are one, since A2 holds i - l). Fixed and split, a query before the first summary column has an empty A2, and its
    far heads give zeros; the published code has no such heads. Summary columns need not be whole blocks of 32 tokens,
    as they must in that code. One factor a layer, taken in turns (equation 6), is not offered.
    kind: "strided" or "fixed" (default "strided"). heads: "merged" or "split" ("merged"; of an odd number the larger
    part is far). stride: l (128); about sqrt(N) is best. columns: c, summary columns a block, fixed only (None: 32).
    subblocks: how many sub-blocks of c columns, counted from the block's end, the far heads take turns at, fixed only
    (1: one for all).
    Costs N (l + N / (2 l)) D strided, N (l / 2 + c N / (2 l)) D fixed. A2 is attended on its own, where its
    stripes are blocks: residues modulo l, where they fill the sequence, are taken as batch entries and read where they
    lie, else the plan sorts the tokens. The result is merged with that of A1; no one order of tokens makes both few
    tiles, and the plan of the whole, as they stand, has half of the causal ones at l = 128.
    Errors: ValueError or TypeError for an unknown kind or heads, one head to split, sizes that are no positive
    integers, columns that do not divide the stride, sub-blocks that do not fit into it or do not divide the far heads,
    and columns or subblocks given to strided.

    >>> sparse, x = SparseTransformer(Dims(2, 8), stride=4), torch.randn(1, 2, 16, 8)
    >>> sparse(x, x, x).shape, sparse.plan(x, x).dense()[0, -1].int().tolist()
    (torch.Size([1, 2, 16, 8]), [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1])
    """

    spec = Spec(
        id="sparse_transformer",
        name="Sparse Transformer",
        title="Generating Long Sequences with Sparse Transformers",
        paper="1904.10509",
        year=2019,
        family="static_sparse",
        uses=(
            "attend",
            "attend_heads",
            "merge",
            "Window",
            "Strided",
            "Blocks",
            "Columns",
            "PerHead",
            "Band",
            "BlockBand",
        ),
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        kind: str = "strided",
        heads: str = "merged",
        stride: int = 128,
        columns: int | None = None,
        subblocks: int = 1,
    ) -> None:
        super().__init__(dims)
        self.kind, self.heads = known("kind", kind, ("strided", "fixed")), known("heads", heads, ("merged", "split"))
        self.stride = positive("stride", stride)
        self.columns = positive("columns", 32 if columns is None else columns)
        self.subblocks = positive("subblocks", subblocks)
        self.per_head = heads == "split" or subblocks > 1
        # Heads from near_heads on read A2; when they are merged, all heads read both.
        self.near_heads = 0 if heads == "merged" else dims.num_heads // 2
        far_heads = dims.num_heads - self.near_heads
        if heads == "split" and dims.num_heads == 1:
            raise ValueError("heads: got 'split' for one head; pass 'merged', or two heads at least")
        if kind == "strided":
            if columns is not None:
                raise ValueError(f"columns: got {columns} with kind 'strided', which has none; leave it out")
            if subblocks != 1:
                raise ValueError(f"subblocks: got {subblocks} with kind 'strided', which has none; leave it out")
        elif stride % self.columns:
            raise ValueError(f"columns: got {self.columns} for stride {stride}; pass a divisor of the stride")
        elif self.columns * subblocks > stride or far_heads % subblocks:
            most = f"at most {stride // self.columns}, a divisor of the {far_heads} heads that read them"
            raise ValueError(f"subblocks: got {subblocks} of {self.columns} columns for stride {stride}; pass {most}")

    def factors(self, *, apart: bool = False) -> tuple[list[Pattern], list[Pattern]]:
        """A1 and A2 of every query head; apart: A2 without what A1 holds already."""
        heads, size = range(self.dims.num_heads), self.stride
        if self.kind == "strided":
            before: Pattern = Band(None, -size) if apart else Causal()
            return [Window(size) for _ in heads], [Strided(size) & before for _ in heads]
        before, last = BlockBand(size, None, -1) if apart else Causal(), size // self.columns - 1
        turns = [(h - self.near_heads) % self.subblocks for h in heads]
        far = [Columns(self.columns, last + 1, last - turn) & before for turn in turns]
        return [Blocks(size) & Causal() for _ in heads], far

    def pattern(self) -> Pattern:
        """What each query head sees."""
        near, far = self.factors()
        if self.heads == "merged":
            return PerHead([one | two for one, two in zip(near, far, strict=True)])
        return PerHead(near[: self.near_heads] + far[self.near_heads :])

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return self.pattern().plan(q.shape[2], k.shape[2], q.shape[1], block=(64, 64), device=q.device)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near, far = self.factors(apart=self.heads == "merged")
        if self.heads == "merged":
            stripes = self.stripes(q, k, v, PerHead(far))
            parts = [attend(q, k, v, near[0], return_lse=True), stripes]
            parts = [(o.view(stripes[0].shape), lse.view(stripes[1].shape)) for o, lse in parts]
            return merge(parts)[0].reshape(*q.shape[:3], -1)
        half = self.near_heads
        groups = [(range(half), near[:half]), (range(half, self.dims.num_heads), far[half:])]
        return attend_heads(q, k, v, [(heads, PerHead(where), None) for heads, where in groups])

    def stripes(self, q: Tensor, k: Tensor, v: Tensor, where: Pattern) -> tuple[Tensor, Tensor]:
        """(o, lse) of A2 without A1. Where residues modulo l fill the sequence they are batch entries, read where they
        lie, and the result is a view as well: o (B, H, N / l, l, Dv)."""
        (batch, _, n, _), size = q.shape, self.stride
        if self.kind != "strided" or n != k.shape[2] or n % size:
            return attend(q, k, v, where, return_lse=True)
        q, k, v = (x.unflatten(2, (-1, size)).permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (q, k, v))
        o, lse = attend(q, k, v, Band(None, -1), return_lse=True)
        o, lse = o.unflatten(0, (batch, size)), lse.unflatten(0, (batch, size))
        return o.permute(0, 2, 3, 1, 4), lse.permute(0, 2, 3, 1)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (heads, n), m, size = q.shape[1:3], k.shape[2], self.stride
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        for h in range(heads):
            half = heads // 2 if self.heads == "split" else 0
            end = size - (h - half) % self.subblocks * self.columns
            for row in range(n):
                i = row + m - n
                if self.kind == "strided":
                    near = [j for j in range(i + 1) if i - j < size]
                    far = [j for j in range(i + 1) if (i - j) % size == 0]
                else:
                    near = [j for j in range(i + 1) if j // size == i // size]
                    far = [j for j in range(i + 1) if end - self.columns <= j % size < end]
                seen = sorted({*near, *far}) if self.heads == "merged" else near if h < half else far
                shared = h // (heads // k.shape[1])
                scores = (q[:, h, row, None] * k[:, shared, seen]).sum(-1) / q.shape[3] ** 0.5
                out[:, h, row] = (scores.softmax(-1)[..., None] * v[:, shared, seen]).sum(1)
        return out

    @classmethod
    def cases(cls) -> list[Case]:
        fixed = {"kind": "fixed", "stride": 6, "columns": 2}
        return [
            Case(Dims(4, 8, 2), 53, {"stride": 7}),
            Case(Dims(4, 8, 2), 42, {"stride": 7}),
            Case(Dims(3, 8), 37, {"heads": "split", "stride": 5}),
            Case(Dims(4, 4, 2), 47, fixed | {"subblocks": 2}),
            Case(Dims(6, 8, 3), 41, fixed | {"heads": "split", "subblocks": 3}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"stride": length}

    @claim(
        "Two layers reach every earlier position: strided in either order of its factors, fixed only by their union."
    )
    def two_layers(cls) -> Finding:
        n, pairs = 127, 127 * 128 // 2

        def reached(one: Tensor, two: Tensor) -> float:
            return int(((one.double() @ two.double()) > 0).sum()) / pairs

        found = {}
        for kind, columns in (("strided", None), ("fixed", 3)):
            module = cls(Dims(2, 8), kind=kind, heads="split", stride=12, columns=columns)
            near, far = module.pattern().dense(n, heads=2)
            union = cls(Dims(1, 8), kind=kind, stride=12, columns=columns).pattern().dense(n)[0]
            found[kind] = [reached(far, near), reached(near, far), reached(union, union)]
        # Of the sub-blocks, only the union of all heads, which the next layer mixes, holds the end of every block.
        shards = cls(Dims(4, 8), kind="fixed", stride=12, columns=3, subblocks=4).pattern().dense(n, heads=4).any(0)
        found["fixed"].append(reached(shards, shards))
        holds = found["strided"] == [1, 1, 1] and max(found["fixed"][:2]) < 1 and found["fixed"][2:] == [1, 1]
        figure = "; ".join(f"{kind} {', '.join(f'{share:.1%}' for share in shares)}" for kind, shares in found.items())
        return Finding(holds, f"reached by A2 A1, A1 A2, union twice (and with 4 sub-blocks): {figure}")

    @claim("At stride sqrt(N) a late query reads 2 sqrt(N) - 1 keys, and the pairs grow as N^1.5.")
    def budget(cls) -> Finding:
        late, shares, attended = [], [], []
        for root in (16, 32, 64):
            n = root * root
            counts = cls(Dims(1, 8), stride=root).pattern().dense(n)[0].sum(-1)
            late.append(int(counts[-1]))
            shares.append(late[-1] / n * root)
            attended.append(int(counts.sum()))
        power = torch.tensor(attended[-1] / attended[0]).log2().item() / 4
        density = attended[-1] / (4096 * 4097 / 2) * 64
        figure = (
            f"{', '.join(map(str, late))} keys at N = 256, 1024, 4096 ({shares[-1]:.2f} / sqrt(N) of them all; of the "
            f"causal pairs {density:.2f} / sqrt(N)), pairs grow as N^{power:.2f}"
        )
        return Finding(late == [31, 63, 127] and abs(power - 1.5) < 0.03 and density < 3.1, figure)

    @claim("Laid out one after the other, the stripes become blocks: few tiles instead of half of them or all.")
    def blocks(cls) -> Finding:
        n, size = 16384, 128
        shares = {}
        for kind, columns in (("strided", None), ("fixed", 8)):
            module = cls(Dims(1, 8), kind=kind, stride=size, columns=columns)
            parts = *(factor[0] for factor in module.factors(apart=True)), module.pattern()
            near, far, both = (part.plan(n, block=(64, 64)).num_tiles / (n / 64) ** 2 * 2 for part in parts)
            shares[kind] = near + far, both
        words = (f"{kind} {done:.1%} (as they stand {both:.1%})" for kind, (done, both) in shares.items())
        holds = all(done < both / 5 for done, both in shares.values())
        return Finding(holds, f"of the causal tiles of 64 at N = {n}, stride {size}: {', '.join(words)}")

    @claim("With a stride that holds the sequence, or every column a summary, it is full causal attention.")
    def limit(cls) -> Finding:
        q, k, v = (torch.randn(1, 2, 61, 8, dtype=torch.float64) for _ in range(3))
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        sizes = [("strided", 61, None), ("strided", 1, None), ("fixed", 64, None), ("fixed", 8, 8)]
        modules = [cls(Dims(2, 8), kind=kind, stride=stride, columns=columns) for kind, stride, columns in sizes]
        errors = [float((module(q, k, v) - dense).abs().max()) for module in modules]
        small = 64 * torch.finfo(torch.float64).eps * float(dense.abs().max())
        return Finding(max(errors) < small, f"largest difference {max(errors):.1e} in {len(sizes)} such settings")
