"""TKL: a long document is read in short chunks that overlap a little, by one small Transformer encoder."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from saccade import attend
from saccade.contract import Case, Dims, Finding, Mixer, Spec, claim
from saccade.errors import check_cu_seqlens, positive
from saccade.hosts.block import AttentionMixer
from saccade.where import Documents

FIRST = 500  # where the sinusoids begin that positions start from; those of the query begin at 0


def sinusoids(length: int, dim: int) -> Tensor:
    """[sin(t r), cos(t r)] for t = FIRST, FIRST + 1, ..., dim // 2 rates r from 1 down to 1e-4: (length, dim)."""
    rates = 1e4 ** (-torch.arange(dim // 2, dtype=torch.float64) / max(1, dim // 2 - 1))
    angles = torch.arange(FIRST, FIRST + length, dtype=torch.float64)[:, None] * rates
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, dim % 2)).float()


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def chunked(
    starts: tuple[int, ...], chunk: int, overlap: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Documents]:
    """Of all that lies in the chunks of documents which begin at `starts`, the end behind: its token, its place in its
    chunk; which of it is a chunk's own; the chunks as sequences.

    >>> [x.tolist() for x in chunked((0, 5), 3, 1, torch.device("cpu"))[:3]]
    [[0, 1, 2, 3, 2, 3, 4], [1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 5, 6]]
    """
    place, tokens, places, ends = torch.arange(chunk + 2 * overlap), [], [], [0]
    for start, end in itertools.pairwise(starts):
        token = torch.arange(start, end, chunk)[:, None] + place - overlap
        inside = (token >= start) & (token < end)
        tokens.append(token[inside])
        places.append(place.expand_as(token)[inside])
        ends += [ends[-1] + count for count in inside.sum(1).cumsum(0).tolist()]
    token, place = torch.cat(tokens), torch.cat(places)
    own = ((place >= overlap) & (place < overlap + chunk)).nonzero()[:, 0]
    return token.to(device), place.to(device), own.to(device), Documents(ends)


class EncoderLayer(nn.Module):
    """Post-norm: h = LN(x + mixer(x)), y = LN(h + mlp(h)); x, y (B, N, C), N tokens of many sequences."""

    def __init__(self, dims: Dims, hidden: int) -> None:
        super().__init__()
        self.mixer = AttentionMixer(attend, dims=dims)
        self.mlp = nn.Sequential(nn.Linear(dims.dim, hidden), nn.ReLU(), nn.Linear(hidden, dims.dim))
        self.norm_mixer, self.norm_mlp = nn.LayerNorm(dims.dim), nn.LayerNorm(dims.dim)

    def forward(self, x: Tensor, sequences: Documents) -> Tensor:
        x = self.norm_mixer(x + self.mixer(x, where=sequences))
        return self.norm_mlp(x + self.mlp(x))


class Tkl(Mixer):
    """Local self-attention over a document: chunks with a margin on either side, encoded apart by one encoder.

        chunk c: tokens [c s - m, (c + 1) s + m) of the document, s = `chunk`, m = `overlap`
        y = a x + (1 - a) encoder(x + P)   of the chunk whose own tokens [c s, (c + 1) s) hold the token
        encoder, `depth` times:  h = LN(h + W_o MHSA(h)),  h = LN(h + W_2 relu(W_1 h))

    x, y (B, N, C); P (s + 2 m, C): learned positions, the same in every chunk, sinusoids at first; a: a learned number,
    0.5 at first. A chunk that reaches beyond the document is cut there. Paper: arXiv 2005.04908, local self-attention
    over chunks; the order of the norms and the start of P and a were read off the authors' code.
    Deviations: how the score of a document comes from cosine similarities with a query, by kernels and saturation, is
    left to the model around it; there is no dropout; heads may share keys.
    chunk: s (default 40). overlap: m (5). depth: layers (2). hidden: width of the MLP (100). cu_seqlens, int32 with
    B = 1, packs several documents: the chunks of all of them run in one call, without padding.
    Costs ceil(N / s) sequences of s + 2 m tokens. Errors: ValueError or TypeError for sizes that are no positive
    integers (overlap may be 0).

    >>> tkl = Tkl(Dims(2, 8), chunk=4, overlap=1)
    >>> tkl(torch.randn(3, 10, 16)).shape
    torch.Size([3, 10, 16])
    """

    spec = Spec(
        id="tkl",
        name="TKL",
        title="Local Self-Attention over Long Text for Efficient Document Retrieval",
        paper="2005.04908",
        year=2020,
        family="static_sparse",
        uses=("attend", "Documents"),
    )

    def __init__(self, dims: Dims, *, chunk: int = 40, overlap: int = 5, depth: int = 2, hidden: int = 100) -> None:
        super().__init__(dims)
        self.chunk, self.overlap = positive("chunk", chunk), positive("overlap", overlap, least=0)
        self.positions = nn.Parameter(sinusoids(chunk + 2 * overlap, dims.dim))
        self.mix = nn.Parameter(torch.tensor(0.5))
        positive("hidden", hidden)
        self.layers = nn.ModuleList(EncoderLayer(dims, hidden) for _ in range(positive("depth", depth)))

    def chunks(self, *starts: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Documents]:
        """See `chunked`."""
        return chunked(starts, self.chunk, self.overlap, torch.device(device))

    def compute(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        starts = (0, x.shape[1])
        if cu_seqlens is not None:
            starts = tuple(check_cu_seqlens(cu_seqlens, x.shape[1], len(x)).tolist())
        token, place, own, sequences = self.chunks(*starts, device=x.device)
        h = x[:, token] + self.positions[place]
        for layer in self.layers:
            h = layer(h, sequences)
        return self.mix * x + (1 - self.mix) * h[:, own]

    def oracle(self, x: Tensor) -> Tensor:
        w, d, s, m = dict(self.named_parameters()), self.dims, self.chunk, self.overlap

        def layer(t: Tensor, name: str) -> Tensor:
            return torch.einsum("bnc,dc->bnd", t, w[f"{name}.weight"]) + w[f"{name}.bias"]

        def normed(t: Tensor, name: str) -> Tensor:
            centred = t - t.mean(-1, keepdim=True)
            return (
                centred / (centred.square().mean(-1, keepdim=True) + 1e-5) ** 0.5 * w[f"{name}.weight"]
                + w[f"{name}.bias"]
            )

        out = []
        for start in range(0, x.shape[1], s):
            first, end = max(0, start - m), min(x.shape[1], start + s + m)
            h = x[:, first:end] + w["positions"][first - start + m : end - start + m]
            for name in (f"layers.{depth}" for depth in range(len(self.layers))):
                heads, mixed = layer(h, f"{name}.mixer.qkv").split(d.head_dim, -1), []
                for i in range(d.num_heads):
                    shared = d.num_heads + i // d.group
                    scores = torch.einsum("bnd,bmd->bnm", heads[i], heads[shared]) / d.head_dim**0.5
                    mixed.append(scores.softmax(-1) @ heads[shared + d.num_kv_heads])
                h = normed(h + layer(torch.cat(mixed, -1), f"{name}.mixer.out"), f"{name}.norm_mixer")
                hidden = layer(h, f"{name}.mlp.0").clamp(min=0)
                h = normed(h + layer(hidden, f"{name}.mlp.2"), f"{name}.norm_mlp")
            own = slice(start - first, min(start + s, x.shape[1]) - first)
            out.append(w["mix"] * x[:, start : start + s] + (1 - w["mix"]) * h[:, own])
        return torch.cat(out, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 4), 37, {"chunk": 8, "overlap": 3, "depth": 2, "hidden": 5}),
            Case(Dims(4, 3, 2), 23, {"chunk": 5, "overlap": 0, "depth": 1, "hidden": 7}),
            Case(Dims(3, 3), 12, {"chunk": 3, "overlap": 4, "depth": 1, "hidden": 9}, batch=1),
        ]

    @claim("Cost is linear: ceil(N / 40) sequences of 50 tokens, 62.5 keys a token instead of N.")
    def linear(cls) -> Finding:
        module, keys = cls(Dims(1, 4)), []
        for n in (500, 2000, 8000):
            token, _, _, sequences = module.chunks(0, n)
            pairs = sequences.plan(len(token), block=(64, 64)).num_attended
            keys.append((len(sequences.cu_seqlens) - 1, pairs / n))
        grown = keys[2][0] == 4 * keys[1][0] == 200
        figure = f"{[count for count, _ in keys]} sequences, {[round(k, 1) for _, k in keys]} keys a token at N = 500,"
        return Finding(grown and all(k < 62.5 for _, k in keys), f"{figure} 2000, 8000")

    @claim("Every token sees at least 5 tokens on either side, fewer only at the ends of the document, and 50 at most.")
    def margin(cls) -> Finding:
        n, module, sides = 131, cls(Dims(2, 4), hidden=8).double(), []
        x = torch.randn(1, n, 8, dtype=torch.float64, requires_grad=True)
        y, within = module(x), True
        for token in (0, 3, 39, 40, 60, 79, 80, 119, 120, 130):
            (grad,) = torch.autograd.grad(y[0, token].square().sum(), x, retain_graph=True)
            read = (grad[0].abs().sum(-1) > 0).nonzero().flatten()
            left, right = token - int(read[0]), int(read[-1]) - token
            within &= left >= min(5, token) and right >= min(5, n - 1 - token) and len(read) == left + right + 1 <= 50
            sides.append((left, right))
        figure = f"(left, right) of tokens 39, 40, 79 and 80: {sides[2:4] + sides[5:7]}; of 131 tokens, two layers"
        return Finding(within, figure)

    @claim(
        "Packed, documents take as many sequences as their lengths need, not as the longest does, and come out alike."
    )
    def packed(cls) -> Finding:
        lengths, module = [7, 131, 40, 260], cls(Dims(2, 4), chunk=40, hidden=8).double()
        x = torch.randn(1, sum(lengths), 8, dtype=torch.float64)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        with torch.no_grad():
            row = module(x, cu_seqlens=cu_seqlens)
            alone = torch.cat([module(part) for part in x.split(lengths, 1)], 1)
        error = float((row - alone).abs().max())
        # Two layers of sums of at most 50 terms, on tokens normed to a length of sqrt(C).
        rounding = 2 * 2 * 50 * torch.finfo(x.dtype).eps * float(alone.abs().max())
        need, filled = (sum(-(-n // 40) for n in sizes) for sizes in (lengths, [max(lengths)] * 4))
        figure = f"{need} sequences for {lengths} tokens, {filled} if filled up to the longest; within {error:.1e}"
        return Finding(error <= rounding and need < filled, figure)

    @claim("In one chunk it is a plain Transformer encoder, mixed with its input.")
    def encoder(cls) -> Finding:
        n, module = 29, cls(Dims(2, 4), chunk=64, hidden=12).double()
        plain = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True, dtype=torch.float64)
        x = torch.randn(2, n, 8, dtype=torch.float64)
        with torch.no_grad():
            h = x + module.positions[5 : 5 + n]
            for layer in module.layers:
                names = {"mixer.qkv.": "self_attn.in_proj_", "mixer.out.": "self_attn.out_proj."}
                names |= {"mlp.0.": "linear1.", "mlp.2.": "linear2.", "norm_mixer.": "norm1.", "norm_mlp.": "norm2."}
                weights = layer.state_dict()
                plain.load_state_dict(
                    {b + part: weights[a + part] for a, b in names.items() for part in ("weight", "bias")}
                )
                h = plain(h)
            error = float((module(x) - (module.mix * x + (1 - module.mix) * h)).abs().max())
        rounding = 2 * 2 * n * torch.finfo(x.dtype).eps * float(h.abs().max())
        return Finding(error <= rounding, f"differs from torch's encoder of 2 layers by {error:.1e} on {n} tokens")
