"""Attention, state space models and gated recurrent networks as one linear system whose matrices vary in time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Case, Dims, Finding, Mixer, Spec, apart, claim, sample
from saccade.errors import positive
from saccade.hosts.constant import Constant
from saccade.scan import affine, associative_scan, linear_attention, selective_scan
from saccade.scan.features import elu1


class System(NamedTuple):
    """A, B, C, D and the input u of every token; n states for each of the D channels of a head.

    a, b, c broadcast to (B, N, H, n, D), and so does d to u (B, N, H, D). carry: what the next token's matrices take
    from those so far.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    u: Tensor
    carry: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class DSFState:
    """What a decoder keeps: h (B, 1, H, n, D), and what the next matrices need."""

    h: Tensor
    carry: tuple[Tensor, ...]


class Form(nn.Module):
    """A mixer as a system: x (B, N, C), in float32 at least, and what the tokens before left -> its matrices."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims

    def project(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """(B, N, heads, channels)."""
        return F.linear(x, layer.weight.to(x.dtype)).unflatten(2, (-1, self.dims.head_dim))

    def forward(self, x: Tensor, carry: tuple[Tensor, ...] = ()) -> System:
        raise NotImplementedError(f"{type(self).__name__}.forward")


class LinearForm(Form):
    """Linear attention: A_t = eta_{t-1} / eta_t, B_t = phi(k_t) / eta_t, C_t = phi(q_t), u_t = v_t.

    eta_t = phi(q_t) . sum_{j <= t} phi(k_j), so that weights add up to 1; n = the number of features of phi.
    """

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        kv = dims.num_kv_heads * dims.head_dim
        self.query, self.key, self.value = (nn.Linear(dims.dim, width, bias=False) for width in (dims.dim, kv, kv))

    def features(self, x: Tensor) -> Tensor:
        """phi: elu(x) + 1."""
        return elu1(x)

    def forward(self, x: Tensor, carry: tuple[Tensor, ...] = ()) -> System:
        q, k = (self.features(self.project(x, layer)) for layer in (self.query, self.key))
        k, v = (y.repeat_interleave(self.dims.group, 2) for y in (k, self.project(x, self.value)))
        total = k.cumsum(1)
        if carry:
            total = total + carry[0]
        eta = (q * total).sum(-1)
        # Before the first token there is nothing that A could scale.
        before = torch.cat([carry[1] if carry else eta[:, :1], eta[:, :-1]], 1)
        a, b = (before / eta)[..., None, None], (k / eta[..., None])[..., None]
        return System(a, b, q[..., None], v.new_zeros(()), v, (total[:, -1:], eta[:, -1:]))


class TaylorForm(LinearForm):
    """Softmax attention cut off: phi(q) . phi(k) = sum_{m <= order} (q . k / sqrt(D))^m / m!.

    n = binomial(order + D, D) features. Of even order, which is positive everywhere; the infinite order is softmax
    attention itself.
    """

    def __init__(self, dims: Dims, order: int) -> None:
        super().__init__(dims)
        size, self.order = dims.head_dim, order
        combinations = (itertools.combinations_with_replacement(range(size), degree) for degree in range(order + 1))
        powers = [[chosen.count(c) for c in range(size)] for each in combinations for chosen in each]
        weights = [math.prod(map(math.factorial, each)) ** -0.5 for each in powers]
        self.powers, self.weights = Constant(torch.tensor(powers)), Constant(torch.tensor(weights, dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        """phi: every product x^p of powers p that add up to `order` at most, over sqrt(p!)."""
        x = x * x.shape[-1] ** -0.25
        ladder = [torch.ones_like(x)]
        for _ in range(self.order):
            ladder.append(ladder[-1] * x)
        steps = torch.stack(ladder, -1)  # (..., D, order + 1)
        at = self.powers.value.T.expand(*x.shape, -1)
        return steps.gather(-1, at).prod(-2) * self.weights.value.to(x.dtype)


class S6Form(Form):
    """Mamba's recurrence: A_t = exp(-delta_t * exp(A_log)), B_t = delta_t b_t, C_t = c_t, u_t = x_t.

    delta_t = softplus(W x_t + w) of each channel, b_t and c_t (n) shared by all.
    """

    def __init__(self, dims: Dims, states: int) -> None:
        super().__init__(dims)
        c = dims.dim
        self.step = nn.Linear(c, c)
        self.write, self.read = nn.Linear(c, states, bias=False), nn.Linear(c, states, bias=False)
        self.rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(c, 1))
        self.direct = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor, carry: tuple[Tensor, ...] = ()) -> System:
        size = self.dims.head_dim
        delta = F.softplus(self.project(x, self.step) + self.step.bias.to(x.dtype).unflatten(0, (-1, size)))
        rate = self.rate.to(x.dtype).exp().unflatten(0, (-1, size)).mT  # (H, n, D)
        a = (-delta[..., None, :] * rate).exp()
        write, read = (F.linear(x, layer.weight.to(x.dtype))[:, :, None, :, None] for layer in (self.write, self.read))
        direct = self.direct.to(x.dtype).unflatten(0, (-1, size))
        return System(a, delta[..., None, :] * write, read, direct, x.unflatten(2, (-1, size)))


class GatedForm(Form):
    """A gated recurrent network (qLSTM): A_t = f_t, B_t = i_t, C_t = o_t, each sigmoid(W x_t + w); n = 1, u_t = x_t."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.gates = nn.Linear(dims.dim, 3 * dims.dim)

    def forward(self, x: Tensor, carry: tuple[Tensor, ...] = ()) -> System:
        gates = (F.linear(x, self.gates.weight.to(x.dtype), self.gates.bias.to(x.dtype))).sigmoid()
        a, b, c = (y[..., None, :] for y in gates.unflatten(2, (3, -1, self.dims.head_dim)).unbind(2))
        return System(a, b, c, x.new_zeros(()), x.unflatten(2, (-1, self.dims.head_dim)))


@dataclass(frozen=True)
class LinearAttention:
    """Normalised linear attention, phi(x) = elu(x) + 1."""

    def build(self, dims: Dims) -> Form:
        return LinearForm(dims)


@dataclass(frozen=True)
class Taylor:
    """Softmax attention by its Taylor polynomial of an even `order` (2)."""

    order: int = 2

    def __post_init__(self) -> None:
        if positive("order", self.order, least=0) % 2:
            raise ValueError(f"order: got {self.order}; pass an even number, of which weights stay positive")

    def build(self, dims: Dims) -> Form:
        return TaylorForm(dims, self.order)


@dataclass(frozen=True)
class S6:
    """Mamba's recurrence with `states` n for each channel (16)."""

    states: int = 16

    def __post_init__(self) -> None:
        positive("states", self.states)

    def build(self, dims: Dims) -> Form:
        return S6Form(dims, self.states)


@dataclass(frozen=True)
class QLSTM:
    """A gated recurrent network, one state for each channel."""

    def build(self, dims: Dims) -> Form:
        return GatedForm(dims)


Kind = LinearAttention | Taylor | S6 | QLSTM


class DSF(Mixer):
    """Any of several mixers, written as a linear system with matrices that vary in time and run by one scan.

        h_t = A_t h_{t-1} + B_t u_t,   y_t = W_o (C_t h_t + D_t u_t),   h_0 = 0
        linear attention: A_t = eta_{t-1} / eta_t,  B_t = phi(k_t) / eta_t,  C_t = phi(q_t),  D_t = 0,  u_t = v_t
        softmax attention: the same with infinitely many features, here cut off at a degree
        S6:    A_t = exp(-delta_t exp(A_log)),  B_t = delta_t b_t,  C_t = c_t,  D_t = D,  u_t = x_t
        qLSTM: A_t = f_t,  B_t = i_t,  C_t = o_t,  D_t = 0,  u_t = x_t

    x, y (B, N, C); h (B, N, H, n, D): n states for each channel, all of A diagonal. Paper: arXiv 2405.15731; the maps
    of linear attention and of the qLSTM follow the authors' code (dsf-mqar, with elu + 1 and plain sigmoid gates), that
    of S6 Mamba. Deviations: only what mixes tokens; convolutions and gates around it belong to the host. Query heads
    may share keys and values, where there are any.
    form: `LinearAttention()`, `Taylor(order)`, `S6(states)` or `QLSTM()` (default LinearAttention()).
    Costs about 6 N n multiplications a channel in 2 log2 N + 1 rounds at most, and N n numbers a channel of memory; n D
    numbers a head to decode. Errors: TypeError for another form, ValueError for an odd order.

    >>> DSF(Dims(num_heads=2, head_dim=4), form=S6(3))(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="dsf",
        name="Dynamical Systems Framework",
        title="Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
        "Networks",
        paper="2405.15731",
        year=2024,
        family="recurrent",
        uses=("associative_scan", "affine"),
    )
    causal = True

    def __init__(self, dims: Dims, *, form: Kind | None = None) -> None:
        super().__init__(dims)
        kind = LinearAttention() if form is None else form
        if not isinstance(kind, Kind):
            raise TypeError(f"form: got {form!r}; pass LinearAttention(), Taylor(), S6() or QLSTM()")
        self.kind, self.form = kind, kind.build(dims)
        self.out = nn.Linear(dims.dim, dims.dim, bias=False)

    def run(self, x: Tensor, state: DSFState | None = None) -> tuple[Tensor, DSFState]:
        """C h + D u (B, N, C), in float32 at least, and the state after the last token."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        system = self.form(x, () if state is None else state.carry)
        push = system.b * system.u[..., None, :]
        a = system.a.expand_as(push)
        before = None if state is None else (torch.ones_like(state.h), state.h)
        _, h = associative_scan(affine, (a, push), dim=1, initial=before)
        y = (system.c * h).sum(-2) + system.d * system.u
        return y.flatten(2), DSFState(h[:, -1:], system.carry)

    def compute(self, x: Tensor) -> Tensor:
        return self.out(self.run(x)[0].to(x.dtype))

    def step(self, x: Tensor, *, state: DSFState | None = None) -> tuple[Tensor, DSFState]:
        y, state = self.run(x, state)
        return self.out(y.to(x.dtype)), state

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []
        if "form.query.weight" in w:
            projected = [(x @ w[f"form.{name}.weight"].T).split(d.head_dim, -1) for name in ("query", "key", "value")]
            for h in range(d.num_heads):
                q, k, v = projected[0][h], *(each[h // (d.num_heads // d.num_kv_heads)] for each in projected[1:])
                if isinstance(self.kind, Taylor):
                    scores, order = torch.einsum("bic,bjc->bij", q, k) / d.head_dim**0.5, self.kind.order
                    terms = [scores**m / math.factorial(m) for m in range(order + 1)]
                    weights = torch.stack(terms).sum(0)
                else:
                    q, k = (torch.where(y > 0, y + 1, torch.exp(y.clamp(max=0))) for y in (q, k))
                    weights = torch.einsum("bic,bjc->bij", q, k)
                weights = weights.tril()
                rows.append((weights @ v) / weights.sum(-1, keepdim=True))
            return torch.cat(rows, -1) @ w["out.weight"].T
        state = torch.zeros((), dtype=x.dtype)
        for token in x.unbind(1):
            if "form.rate" in w:
                delta = torch.log(1 + torch.exp(token @ w["form.step.weight"].T + w["form.step.bias"]))
                b, c = (token @ w[f"form.{name}.weight"].T for name in ("write", "read"))
                left = torch.exp(-delta[..., None] * torch.exp(w["form.rate"]))
                state = left * state + (delta * token)[..., None] * b[:, None]
                y = (state * c[:, None]).sum(-1) + w["form.direct"] * token
            else:
                gates = 1 / (1 + torch.exp(-token @ w["form.gates.weight"].T - w["form.gates.bias"]))
                forget, enter, leave = gates.chunk(3, -1)
                state = forget * state + enter * token
                y = leave * state
            rows.append(y @ w["out.weight"].T)
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 5), 23),
            Case(Dims(4, 3, num_kv_heads=2), 13, {"form": Taylor(4)}, batch=1),
            Case(Dims(2, 3), 19, {"form": S6(5)}),
            Case(Dims(1, 5), 17, {"form": QLSTM()}),
        ]

    @claim("Its scan gives linear attention and Mamba's recurrence as their own primitives do.")
    def instances(cls) -> Finding:
        off = []
        layer, x = cls._sample()
        form = cast(LinearForm, layer.form)
        q, k, v = (f(x).unflatten(2, (2, -1)).transpose(1, 2) for f in (form.query, form.key, form.value))
        exact = cast(Tensor, linear_attention(q, k, v, feature_map="elu1", normalizer="sum"))
        off.append(apart(layer.run(x)[0], exact.transpose(1, 2).flatten(2)))
        layer, x = cls._sample(form=S6(4))
        s6 = cast(S6Form, layer.form)
        delta, b, c = F.softplus(s6.step(x)), s6.write(x), s6.read(x)
        off.append(apart(layer.run(x)[0], cast(Tensor, selective_scan(x, delta, -s6.rate.exp(), b, c, D=s6.direct))))
        holds = max(off) < 200 * torch.finfo(x.dtype).eps
        return Finding(holds, f"largest differences {off[0]:.1e} and {off[1]:.1e} of the output, of 200 tokens")

    @claim("A selective state space model whose channels share one decay is linear attention with that decay.")
    def ssm_is_attention(cls) -> Finding:
        layer, x = cls._sample(form=S6(4))
        s6 = cast(S6Form, layer.form)
        s6.rate.copy_(torch.randn(()).expand_as(s6.rate))
        s6.direct.zero_()
        s6.step.weight.copy_(s6.step.weight[:1].expand_as(s6.step.weight))
        s6.step.bias.copy_(s6.step.bias[:1].expand_as(s6.step.bias))
        delta = F.softplus(s6.step(x))
        decay = (-delta[:, :, 0] * s6.rate[0, 0].exp())[:, None]
        q, k = s6.read(x)[:, None], s6.write(x)[:, None]
        exact = cast(Tensor, linear_attention(q, k, x[:, None], strength=delta[:, None, :, 0], log_decay=decay))
        off = apart(layer.run(x)[0], exact[:, 0])
        return Finding(off < 200 * torch.finfo(x.dtype).eps, f"largest difference {off:.1e} of the output")

    @claim("Without forgetting and unnormalised, the gated network is attention of one feature: y = o sum_j i_j x_j.")
    def gated_is_attention(cls) -> Finding:
        layer, x = cls._sample(form=QLSTM())
        form = cast(GatedForm, layer.form)
        form.gates.weight[:16].zero_()
        form.gates.bias[:16].fill_(torch.inf)
        _, enter, leave = form.gates(x).sigmoid().chunk(3, -1)
        q, k, v = (y.transpose(1, 2)[..., None] for y in (leave, enter, x))
        exact = cast(Tensor, linear_attention(q, k, v))
        off = apart(layer.run(x)[0], exact[..., 0].transpose(1, 2))
        return Finding(off < 200 * torch.finfo(x.dtype).eps, f"largest difference {off:.1e} of the output")

    @claim("Softmax attention is the limit of more and more features: the error falls with the order, to rounding.")
    def softmax_limit(cls) -> Finding:
        errors, sizes = [], []
        for order in (0, 2, 4, 8, 20):
            layer, x = sample(partial(cls, Dims(2, 2), form=Taylor(order)), 1, 60, 4)
            form = cast(TaylorForm, layer.form)
            q, k, v = (f(x).unflatten(2, (2, 2)).transpose(1, 2) for f in (form.query, form.key, form.value))
            exact = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            errors.append(apart(layer.run(x)[0], exact))
            sizes.append(len(form.powers.value))
        falls = all(later < sooner for sooner, later in itertools.pairwise(errors))
        figure = ", ".join(f"{error:.1e} with {size}" for error, size in zip(errors, sizes, strict=True))
        return Finding(falls and errors[-1] < 231 * torch.finfo(x.dtype).eps, f"off by {figure} features")

    @classmethod
    def _sample(cls, **params: Any) -> tuple[DSF, Tensor]:
        return sample(lambda: cls(Dims(2, 8), **params), 1, 200, 16)
