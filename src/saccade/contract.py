"""The contract that every mechanism signs: what it declares, what it computes, how it is judged.

A mechanism is one class in one file: a frozen `Spec`, a constructor whose keyword arguments are the paper's parameters,
`compute` (the fast path, composed of primitives), `oracle` (the paper's equations, sharing no code with `compute`), and
its claims. Everything else, discovery, checks, benchmarks, pages of the gallery, is derived from these.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from saccade.errors import check_qkv, positive


@dataclass(frozen=True)
class Dims:
    """The shape of the model that a mechanism is built for.

    num_heads: query heads H. head_dim: channels D of one head. num_kv_heads: key heads Hkv, a divisor of H (default H).
    grid: (T, Y, X), (Y, X) or (X,) when the tokens are a grid, row-major (default None: a sequence).
    `dim` is the width of the residual stream, H * D.

    >>> Dims(num_heads=8, head_dim=64, num_kv_heads=2).dim
    512
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int = 0
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive("num_heads", self.num_heads)
        positive("head_dim", self.head_dim)
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        if self.num_heads % positive("num_kv_heads", self.num_kv_heads):
            raise ValueError(
                f"num_kv_heads: got {self.num_kv_heads} for num_heads {self.num_heads}; "
                "every key head serves the same number of query heads, so pass a divisor"
            )
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(positive("grid", size) for size in self.grid))

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads a key head serves."""
        return self.num_heads // self.num_kv_heads

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads of one projection: q (B, H, N, E), k and v (B, Hkv, N, E).

        y (B, N, (H + 2 Hkv) E): channels of the queries, then those of the keys, then those of the values, E a head.

        >>> [tuple(x.shape) for x in Dims(4, 8, num_kv_heads=2).split(torch.ones(1, 5, 64))]
        [(1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)]
        """
        sizes = self.num_heads, self.num_kv_heads, self.num_kv_heads
        q, k, v = y.unflatten(2, (sum(sizes), -1)).transpose(1, 2).split(sizes, 1)
        return q, k, v


@dataclass(frozen=True)
class Case:
    """One shape at which a mechanism is checked: N = `length` queries and keys, `params` for its constructor."""

    dims: Dims
    length: int
    params: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 2

    def __str__(self) -> str:
        d = self.dims
        inner = ",".join(f"{k}={v}" for k, v in self.params.items())
        grid = "x".join(map(str, d.grid)) if d.grid else str(self.length)
        return f"B{self.batch}H{d.num_heads}:{d.num_kv_heads}N{grid}D{d.head_dim}[{inner}]"


class Finding(NamedTuple):
    """What a claim found: does it hold here, and the measured figure in words."""

    holds: bool
    figure: str


def claim(sentence: str) -> Callable[[Callable[..., Finding]], Any]:
    """Mark a function `(cls) -> Finding` inside a mechanism as a named claim.

    sentence: the paper's headline in our words. Errors: ValueError when the function is named like something that
    every mechanism has, which it would take the place of (`parameters`, `step`).
    """

    def mark(function: Callable[..., Finding]) -> Any:
        name = function.__name__
        if any(hasattr(contract, name) for contract in (CachePolicy, Mixer)):
            raise ValueError(f"claim: got a function named {name!r}, which every mechanism has already; rename it")
        function.__claim__ = sentence  # type: ignore[attr-defined]
        return classmethod(function)  # type: ignore[arg-type]

    return mark


@dataclass(frozen=True)
class Spec:
    """What a mechanism declares about itself.

    id: file name and public name. name: the paper's own name. title: the paper's title. paper: arXiv id, or DOI. year:
    first appearance. family: the folder. grid: rank of the token grid it needs (0: a sequence), or several that it
    takes, the one to be compared and drawn on first. discrete: decisions (top-k, hashing) that have no gradient and may
    flip under rounding. waits: why a forward pass must ask the device for numbers (empty: the host runs ahead, and a
    pass can be recorded). uses: names of the primitives that it composes.
    """

    id: str
    name: str
    title: str
    paper: str
    year: int
    family: str
    uses: tuple[str, ...]
    grid: int | tuple[int, ...] = 0
    discrete: bool = False
    waits: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the grids that it takes, 0 for a sequence, the preferred one first."""
        return self.grid if isinstance(self.grid, tuple) else (self.grid,)

    @property
    def tokens(self) -> str:
        """What its tokens are, in words.

        >>> Spec("a", "A", "A", "0", 2025, "f", (), grid=(2, 1, 0)).tokens
        'a grid of 1 or 2 axes, or a sequence'
        """
        axes = sorted(rank for rank in self.ranks if rank)
        words = " or ".join(filter(None, [", ".join(map(str, axes[:-1])), *map(str, axes[-1:])]))
        kinds = [f"a grid of {words} {'axis' if axes == [1] else 'axes'}"] if axes else []
        return ", or ".join([*kinds, *(["a sequence"] if 0 in self.ranks else [])])


class Mechanism(nn.Module):
    """What all contracts share. Subclass `Attention` or `Mixer` (or `CachePolicy`), never this.

    Class attributes: `spec` (the declaration), `causal` (True when no output may depend on a later token; an instance
    may override it).
    """

    spec: ClassVar[Spec]
    causal: bool = False

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        rank = 0 if dims.grid is None else len(dims.grid)
        if self.spec.ranks != (0,) and rank not in self.spec.ranks:
            raise ValueError(f"dims.grid: {self.spec.id} works on {self.spec.tokens}, got {dims.grid}")
        self.dims = dims

    # Subclasses name their own inputs; `Any` throughout lets them.

    def compute(self, *inputs: Any, **options: Any) -> Tensor:
        """The fast path: a short composition of primitives."""
        raise NotImplementedError(f"{type(self).__name__}.compute")

    def oracle(self, *inputs: Any, **options: Any) -> Tensor:
        """The paper's equations, dense or looped, in the dtype of the inputs; shares no code with `compute`."""
        raise NotImplementedError(f"{type(self).__name__}.oracle")

    @classmethod
    def cases(cls) -> list[Case]:
        """Small shapes that exercise every parameter; sizes are odd or prime where the mechanism allows."""
        raise NotImplementedError(f"{cls.__name__}.cases")

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> Mapping[str, Any] | None:
        """Parameters at which the mechanism must equal dense attention; None where there are none."""
        return None

    def step(self, *inputs: Any, **options: Any) -> tuple[Tensor, Any]:
        """Decode one more token: inputs with N = 1, and `state`, None at first -> (row of the whole, next state)."""
        raise NotImplementedError(f"{type(self).__name__}.step")

    @classmethod
    def inputs(cls, case: Case, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Random inputs of a case, on the CPU."""
        raise NotImplementedError

    @classmethod
    def params(cls) -> dict[str, Any]:
        """The paper's parameters with their defaults, read off the constructor."""
        named = list(inspect.signature(cls.__init__).parameters.values())[2:]
        return {p.name: p.default for p in named}

    @classmethod
    def claims(cls) -> dict[str, tuple[str, Callable[[], Finding]]]:
        """Name of each claim -> (sentence, function)."""
        found = {}
        for name in dir(cls):
            member = inspect.getattr_static(cls, name)
            sentence = getattr(getattr(member, "__func__", None), "__claim__", None)
            if sentence:
                found[name] = (sentence, getattr(cls, name))
        return found

    @classmethod
    def can_step(cls) -> bool:
        return cls.step is not Mechanism.step

    @classmethod
    def can_varlen(cls) -> bool:
        return "cu_seqlens" in inspect.signature(cls.compute).parameters

    @classmethod
    def contract(cls) -> str:
        """The name of the contract signed: the first class above it that signs none itself."""
        return next(base.__name__ for base in cls.__mro__ if "spec" not in base.__dict__)

    def check_grid(self, name: str, num_tokens: int) -> None:
        """Raise unless the input `name` has as many tokens as the grid, where there is one."""
        grid = self.dims.grid
        if grid is not None and num_tokens != torch.Size(grid).numel():
            count = torch.Size(grid).numel()
            raise ValueError(
                f"{name}: got N = {num_tokens}, but the grid {grid} has {count} tokens; reshape, or rebuild"
            )

    def extra_repr(self) -> str:
        return str(self.dims)


class Attention(Mechanism):
    """q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv).

    Class attributes:
    per_head: True when heads differ by construction (parameters, slopes or patterns per head), so that permuting them
    means something.
    prefill: True when it reads the whole prompt to decide its pattern: causal in what is attended, but the choice
    depends on later tokens. Such a mechanism sets `causal` too, and is exempt from the check that a changed future
    leaves the past bitwise alone.
    """

    per_head: bool = False
    prefill: bool = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        check_qkv(q, k, v)
        d = self.dims
        if q.shape[1] != d.num_heads or k.shape[1] != d.num_kv_heads or q.shape[3] != d.head_dim:
            got = f"{q.shape[1]} query heads, {k.shape[1]} key heads, head_dim {q.shape[3]}"
            raise ValueError(f"q, k: got {got}; {self.spec.id} was built for {d}")
        self.check_grid("q", q.shape[2])
        return self.compute(q, k, v, **options)

    def plan(self, q: Tensor, k: Tensor) -> Any:
        """The `Plan` that it would follow for these inputs, or None when it weighs no single pairs (linear, pooled)."""
        return None

    @classmethod
    def inputs(cls, case: Case, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        d = case.dims
        shapes = [(case.batch, h, case.length, d.head_dim) for h in (d.num_heads, d.num_kv_heads, d.num_kv_heads)]
        return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


class CachePolicy(Attention):
    """An `Attention` that also says what a decoder keeps. There are two ways to say it.

    From the number of tokens alone: `step` holds a trimmed cache, and `kept` tells which keys. A key that is not kept
    is gone: no later step depends on it, it is never kept again, and the state grows no larger than the kept rows.

    From the data: `saccade.cache.Cached`, whose policy scores the tokens of a prompt, or picks what a step reads.
    """

    def kept(self, num_tokens: int) -> Tensor:
        """bool (Hkv, num_tokens): the keys still held per key head after `num_tokens` steps."""
        raise NotImplementedError(f"{type(self).__name__}.kept")

    @classmethod
    def can_tell(cls) -> bool:
        """Whether what is kept follows from the number of tokens alone."""
        return cls.kept is not CachePolicy.kept


Held = list[list[int]]
Layer = TypeVar("Layer", bound=nn.Module)


def replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: int,
    keep: Callable[[int, int, Held], Held],
    read: Callable[[int, int, Held], Held] | None = None,
) -> Tensor:
    """Decoding by the book, for oracles: `prompt` tokens in one piece, then one at a time, with sets of positions.

        o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j   over j <= i for the tokens of the prompt, then over a set

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, Dv). keep(b, t, held): positions that each key head of sequence b
    still holds once token t was read, given those that it held, t among them; first called for t = prompt - 1. read(b,
    t, held): positions that each *query* head of token t reads (default: all that its key head holds).

    >>> x = torch.randn(1, 2, 9, 4)
    >>> newest = replay(x, x, x, 6, lambda b, t, held: [row[-3:] for row in held])
    >>> newest.shape
    torch.Size([1, 2, 9, 4])
    """
    (batch, heads, n, d), kv_heads = q.shape, k.shape[1]
    group, sequences = heads // kv_heads, []
    for b in range(batch):
        held: Held = [list(range(prompt)) for _ in range(kv_heads)]
        rows = [[[list(range(i + 1))] * heads for i in range(prompt)]]
        held = keep(b, prompt - 1, held)
        rows.append([])
        for t in range(prompt, n):
            held = [[*row, t] for row in held]
            rows[1].append([held[h // group] for h in range(heads)] if read is None else read(b, t, held))
            held = keep(b, t, held)
        tokens = []
        for i, sets in enumerate([*rows[0], *rows[1]]):
            each = []
            for h, seen in enumerate(sets):
                scores = (k[b, h // group, seen] * q[b, h, i]).sum(-1) / d**0.5
                each.append((scores.softmax(-1)[:, None] * v[b, h // group, seen]).sum(0))
            tokens.append(torch.stack(each))
        sequences.append(torch.stack(tokens, 1))
    return torch.stack(sequences)


def tokens_of(budget: float | int, seen: int) -> int:
    """How many of `seen` tokens a budget is, by the book: a part of them, rounded up, or a number.

    >>> tokens_of(0.25, 9), tokens_of(4, 9)
    (3, 4)
    """
    return math.ceil(budget * seen) if isinstance(budget, float) else budget


def rotated(x: Tensor, at: Tensor, theta: float | Sequence[float], scale: float = 1.0) -> Tensor:
    """Rotary positions by the book, for oracles: channels i and i + D / 2 are turned by the angle t theta^(-2 i / D).

    x (..., N, D), D even; at: the positions t, (N,) or what broadcasts to (..., N). At least float32 in between. theta:
    the base; or P rates, channels i and i + P are then turned by t rate_i, and those from 2 P on stay. scale: of what
    is turned.

    >>> rotated(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([0.0, torch.pi / 2]), 100.0).round().tolist()
    [[1.0, 2.0], [-2.0, 1.0]]
    """
    rates = theta
    if isinstance(rates, float | int):
        rates = [theta ** (-2 * i / x.shape[-1]) for i in range(x.shape[-1] // 2)]  # type: ignore[operator]
    half, wide = len(rates), torch.promote_types(x.dtype, torch.float32)
    angles = at.to(x.device, torch.float64)[..., None] * torch.tensor(rates, dtype=torch.float64, device=x.device)
    cos, sin = scale * angles.cos().to(wide), scale * angles.sin().to(wide)
    one, two, rest = x[..., :half].to(wide), x[..., half : 2 * half].to(wide), x[..., 2 * half :].to(wide)
    return torch.cat([one * cos - two * sin, one * sin + two * cos, rest], -1).to(x.dtype)


class Weights(dict[str, Tensor]):
    """Layers by the book, for oracles: parameters and buffers of a module by name, and what layers do with them.

        linear   W x + b                                     norm   w (x - mean x) / sqrt(var x + eps) + b
        conv     y[p] = b + sum_t W[t] x[p + t - K // 2]     mlp    linear "2" of gelu(linear "0")

    x (..., C); for conv a map (B, *grid, C), zeros beyond the grid, K odd, every channel by itself where W has one
    input channel. Biases that are not there count as zero. prefix: in front of all names that the layers are given.

    >>> w, x = Weights(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))), torch.randn(2, 5, 4)
    >>> w.norm(w.linear(x, "0"), "1").shape, w["1.bias"].shape
    (torch.Size([2, 5, 3]), torch.Size([3]))
    """

    def __init__(self, module: nn.Module, prefix: str = "") -> None:
        super().__init__({**dict(module.named_buffers()), **dict(module.named_parameters())})
        self.prefix = prefix

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self[f"{self.prefix}{name}.weight"], self.get(f"{self.prefix}{name}.bias")
        y = x @ weight.flatten(1).T
        return y if bias is None else y + bias

    def norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        off = x - x.mean(-1, keepdim=True)
        y = off / (off.square().mean(-1, keepdim=True) + eps).sqrt() * self[f"{self.prefix}{name}.weight"]
        return y + self[f"{self.prefix}{name}.bias"]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        hidden = self.linear(x, f"{name}.0")
        return self.linear(hidden / 2 * (1 + torch.erf(hidden / 2**0.5)), f"{name}.2")

    def conv(self, x: Tensor, name: str) -> Tensor:
        weight, bias, grid = self[f"{self.prefix}{name}.weight"], self.get(f"{self.prefix}{name}.bias"), x.shape[1:-1]
        kernel = weight.shape[2:]
        edges = [edge for size in reversed(kernel) for edge in (size // 2, size // 2)]
        around, alone = nn.functional.pad(x, [0, 0, *edges]), weight.shape[1] == 1
        total, taps = x.new_zeros(*x.shape[:-1], len(weight)), weight.flatten(2).unbind(2)
        for tap, start in zip(taps, itertools.product(*map(range, kernel)), strict=True):
            seen = around
            for axis, (at, length) in enumerate(zip(start, grid, strict=True), 1):
                seen = seen.narrow(axis, at, length)
            total = total + (seen * tap[:, 0] if alone else seen @ tap.T)
        return total if bias is None else total + bias


def weighed(
    q: Tensor, k: Tensor, v: Tensor, head_dim: int, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention by the book, for oracles, head after head and heads side by side as projections leave them.

        o_h = softmax(scale q_h k_g^T + bias_h) v_g,   g = h // (H / Hkv)

    q (B, N, H D), k, v (B, M, Hkv D) -> (B, N, H D). head_dim: D. bias: (H or 1, N, M), -inf where a query may not look
    (default None: none). scale: default 1 / sqrt(D).

    >>> x = torch.randn(2, 5, 8)
    >>> weighed(x, x[..., :4], x[..., 4:], 2, torch.zeros(5, 5).log()[None]).isnan().all()
    tensor(True)
    """
    queries, keys, values = (x.split(head_dim, -1) for x in (q, k, v))
    factor, found = head_dim**-0.5 if scale is None else scale, []
    for h, query in enumerate(queries):
        g = h // (len(queries) // len(keys))
        scores = factor * torch.einsum("bnd,bmd->bnm", query, keys[g])
        scores = scores if bias is None else scores + bias[h % len(bias)]
        found.append(torch.einsum("bnm,bmd->bnd", scores.softmax(-1), values[g]))
    return torch.cat(found, -1)


def apart(found: Tensor, exact: Tensor) -> float:
    """How far a result is off, for claims: the largest difference, as a part of the largest number of the exact one.

    >>> apart(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
    0.25
    """
    return float((found - exact).detach().abs().max() / exact.detach().abs().max())


def sample(make: Callable[[], Layer], *shape: int) -> tuple[Layer, Tensor]:
    """A module and random inputs for claims, the same ones at each call: in double, to be read and not trained.

    >>> layer, x = sample(lambda: nn.Linear(3, 4), 2, 3)
    >>> layer.weight.dtype, x.shape, layer.training
    (torch.float64, torch.Size([2, 3]), False)
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double().eval().requires_grad_(False), torch.randn(*shape, dtype=torch.float64)


def reached(function: Callable[[Tensor], Tensor], x: Tensor, at: Any = ...) -> Tensor:
    """Which tokens a result depends on, for claims: where the sum of function(x)[at] has a gradient that is not zero.

    x (..., C) -> bool (...). at: an index (default: all). The sum of what a layer norm leaves is constant: square it.

    >>> reached(lambda x: x.cumsum(1), torch.ones(1, 5, 4), (0, 2)).tolist()
    [[True, True, True, False, False]]
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(function(x)[at].sum(), x)
    return gradient.ne(0).any(-1)


class Work(NamedTuple):
    """Operations of a call, a multiplication and an addition being two: in `all` products, of which in those of `fused`
    attention, and in `batched` ones, such as those of attention that is not fused."""

    all: int
    fused: int
    batched: int


def work(call: Callable[[], Any]) -> Work:
    """Counts the operations of a call on a CPU, for claims, those of fused attention as well.

    >>> q = torch.randn(1, 2, 8, 4)
    >>> work(lambda: nn.functional.scaled_dot_product_attention(q, q, q) @ torch.ones(4, 3))
    Work(all=2432, fused=2048, batched=0)
    """
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    fused = aten._scaled_dot_product_flash_attention_for_cpu  # which the counter does not know by itself
    rules = {fused: lambda q, k, v, *_, **__: 2 * q[:3].numel() * k[2] * (q[3] + v[3])}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=rules) as counter:
        call()
    found = counter.get_flop_counts().get("Global", {})
    batched = found.get(aten.bmm, 0) + found.get(aten.baddbmm, 0)
    return Work(counter.get_total_flops(), found.get(fused, 0), batched)


class Mixer(Mechanism):
    """x (B, N, C) -> y (B, N, C), C = dims.dim: a layer with its own projections."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        if x.ndim != 3 or x.shape[2] != self.dims.dim:
            raise ValueError(f"x: got shape {tuple(x.shape)}; {self.spec.id} takes (B, N, {self.dims.dim})")
        if x.shape[1] == 0:
            raise ValueError("x: got an empty sequence (N = 0); pass at least one token")
        if not x.is_floating_point():
            raise TypeError(f"x: got dtype {x.dtype}; pass a floating-point tensor")
        self.check_grid("x", x.shape[1])
        return self.compute(x, **options)

    @classmethod
    def inputs(cls, case: Case, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        return (torch.randn(case.batch, case.length, case.dims.dim, generator=generator, dtype=dtype),)
