"""Miras: memories trained on the tokens that pass; Moneta, Yaad and Memora are choices of loss and retention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.contract import Case, Dims, Finding, Mixer, Spec, apart, claim, sample
from saccade.errors import positive
from saccade.hosts.short_conv import short_conv, short_taps
from saccade.scan import (
    L2,
    Decay,
    FastState,
    KLSoftmax,
    LinearMemory,
    Loss,
    Lp,
    LqNorm,
    Memory,
    MLPMemory,
    SwitchedHuber,
    delta_rule,
    fast_weights,
)
from saccade.scan.decays import gate_logsigmoid


class Variant:
    """What the memory is asked for and what holds its weights.

    gates: the numbers that a token computes for each key head. start: makes the initial parameters. loss, retention:
    the parts of `fast_weights`. pull, weights: the same as equations, for the oracle.
    """

    gates: ClassVar[tuple[str, ...]] = ("decay", "eta")

    def start(self, weights: Tensor) -> Tensor:
        """The accumulator to learn from, made of random weights (1, Hkv, in, out) of variance 1 / in."""
        return weights

    def loss(self, delta: Tensor | None) -> Loss:
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def retention(self) -> Decay:
        raise NotImplementedError(f"{type(self).__name__}.retention")

    def pull(self, e: Tensor, delta: Tensor | None) -> Tensor:
        """Gradient of the loss with respect to the output, from the error e (..., D)."""
        raise NotImplementedError(f"{type(self).__name__}.pull")

    def weights(self, a: Tensor) -> tuple[Tensor, Tensor | float]:
        """W of the accumulator (..., in, out), and the factor of the steps until the chunk ends."""
        raise NotImplementedError(f"{type(self).__name__}.weights")


@dataclass(frozen=True)
class Moneta(Variant):
    """l_p loss, l_q retention:  A_t = a_t A_{t-1} - eta_t grad |e|_p^p / p,  W_t = A_t / |A_t|_q^(q-2).

    p (3.0), q (4.0): the paper's best. As printed, W grows as A shrinks for q > 3; `MirrorMoneta` does not.
    """

    p: float = 3.0
    q: float = 4.0

    def __post_init__(self) -> None:
        self.loss(None), self.retention()  # they check p and q

    def loss(self, delta: Tensor | None) -> Loss:
        return Lp(self.p)

    def retention(self) -> Decay:
        return LqNorm(self.q)

    def pull(self, e: Tensor, delta: Tensor | None) -> Tensor:
        return e * (e * e + 1e-6) ** (self.p / 2 - 1)

    def weights(self, a: Tensor) -> tuple[Tensor, Tensor | float]:
        gain = (a.abs() ** self.q).sum((-2, -1), keepdim=True) ** ((2 - self.q) / self.q)
        return a * gain, gain


class MirrorNorm(Decay):
    """W = sign(A) |A|^(q-1) / |A|_q^(q-2), the gradient of |A|_q^2 / 2; inside a chunk steps are added to W."""

    linear = False

    def __init__(self, q: float) -> None:
        if not q > 1:
            raise ValueError(f"q: got {q}; pass a number > 1")
        self.q = q

    def open(self, accumulator: Tensor) -> tuple[Tensor, None]:
        largest = accumulator.detach().abs().amax((-2, -1), keepdim=True)
        part = accumulator / largest
        norm = part.abs().pow(self.q).sum((-2, -1), keepdim=True).pow(1 / self.q)
        return largest * part.sign() * part.abs().pow(self.q - 1) / norm.pow(self.q - 2), None


class MirrorMoneta(Moneta):
    """Moneta with the exact mirror map of the l_q retention, which keeps the scale of A."""

    def retention(self) -> Decay:
        return MirrorNorm(self.q)

    def weights(self, a: Tensor) -> tuple[Tensor, Tensor | float]:
        norm = (a.abs() ** self.q).sum((-2, -1), keepdim=True) ** (1 / self.q)
        return a.sign() * a.abs() ** (self.q - 1) / norm ** (self.q - 2), 1.0


@dataclass(frozen=True)
class Yaad(Variant):
    """Huber loss, l_2 retention.

    W_t = a_t W_{t-1} - eta_t (grad |e|^2 / 2 where |e| <= delta_t, else delta_t grad |e|_1)
    """

    gates = ("decay", "eta", "delta")

    def loss(self, delta: Tensor | None) -> Loss:
        assert delta is not None
        return SwitchedHuber(delta)

    def retention(self) -> Decay:
        return Decay()

    def pull(self, e: Tensor, delta: Tensor | None) -> Tensor:
        assert delta is not None
        far = (e * e).sum(-1, keepdim=True) > delta[..., None] ** 2
        return torch.where(far, delta[..., None] * e.sign(), e)

    def weights(self, a: Tensor) -> tuple[Tensor, Tensor | float]:
        return a, 1.0


@dataclass(frozen=True)
class Memora(Variant):
    """l_2 loss, KL retention:  W_t = scale softmax(a_t log W_{t-1} - eta_t grad |e|^2 / 2).

    The softmax runs over the inputs of an output. scale: c, the sum of an output's weights (1.0).
    """

    scale: float = 1.0

    def start(self, weights: Tensor) -> Tensor:
        # Log-weights of variance 1: from equal weights all outputs would be equal, which the norm then blows up.
        return weights * weights.shape[-2] ** 0.5

    def loss(self, delta: Tensor | None) -> Loss:
        return L2()

    def retention(self) -> Decay:
        return KLSoftmax(scale=self.scale)

    def pull(self, e: Tensor, delta: Tensor | None) -> Tensor:
        return e

    def weights(self, a: Tensor) -> tuple[Tensor, Tensor | float]:
        share = (a - a.detach().amax(-2, keepdim=True)).exp()
        return self.scale * share / share.sum(-2, keepdim=True), 1.0


@dataclass(frozen=True)
class MirasState:
    """What a decoder keeps: the last projections, which the convolution needs, (B, conv - 1, channels); the weights."""

    recent: Tensor
    memory: FastState


class Miras(Mixer):
    """A layer whose memory M takes one gradient step a token, by one of three rules.

        q, k, v = conv(W_p x), q and k of length 1;   a_t = sigmoid(w_a x_t)^(1/16), eta_t = max_eta sigmoid(w_e x_t),
        delta_t = softplus(w_d x_t) of each key head;   o_t = M(W_t; q_t) with W_t of the `variant`
        y_t = W_o (LN(o_t) * sigmoid(W_g x_t)),         M(W; x) = x + LN(gelu(x W_1) W_2)

    x, y (B, N, C); q, o (B, H, N, D), k, v (B, Hkv, N, D); W_1 (D, 4 D), W_2 (4 D, D) of each key head; LN has no
    weights; conv: causal, depthwise. The gradients of a chunk are taken at its start, and the part of the retention
    that is not linear is taken when it ends, so that `chunk` belongs to the model; see `fast_weights`. Paper: arXiv
    2504.13173, equations 24-32 and section 5; no code by the authors was found, and the equations were read in a
    transcription (aryateja2106/neural-memory-reproduction), not in the paper itself. Deviations: eta, a and delta are
    numbers a head, not a channel, so without the low rank; the temperature of a, the range of eta, the first biases of
    a and delta and the sigmoid gate are choices of ours where the transcription gives none: delta begins at 2 D^1/2,
    which no error reaches, for beyond it the length of an error is lost, and a memory that never sees it hardly learns
    to recall; |e| is smoothed inside the power and gives its own sign, not tanh; the exact softmax of Memora falls on
    the last token of a chunk, not the first.
    variant: `Moneta`, `MirrorMoneta`, `Yaad` or `Memora` (default Yaad()). memory: head_dim -> `Memory` (MLPMemory).
    chunk: 16 (the paper: 16 or 64). conv: taps (4). max_eta: largest step (0.1).
    Costs about 20 D^2 multiply-adds a token and key head for the steps, 8 D^2 + 10 chunk D a query head for the reads;
    a state of 16 D^2 numbers a key head for Yaad, of 24 D^2 for the others.
    Errors: TypeError for another variant, ValueError for max_eta <= 0.

    >>> Miras(Dims(num_heads=2, head_dim=4), variant=Memora(), chunk=4)(torch.randn(1, 9, 8)).shape
    torch.Size([1, 9, 8])
    """

    spec = Spec(
        id="miras",
        name="Miras (Moneta, Yaad, Memora)",
        title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online "
        "Optimization",
        paper="2504.13173",
        year=2025,
        family="recurrent",
        uses=("fast_weights",),
        discrete=True,
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        variant: Variant = Yaad(),
        memory: Callable[[int], Memory] = MLPMemory,
        chunk: int = 16,
        conv: int = 4,
        max_eta: float = 0.1,
    ) -> None:
        super().__init__(dims)
        if not isinstance(variant, Variant):
            raise TypeError(f"variant: got {variant!r}; pass Moneta(), MirrorMoneta(), Yaad() or Memora()")
        if not max_eta > 0:
            raise ValueError(f"max_eta: got {max_eta}; pass a step size > 0")
        c, kv, d = dims.dim, dims.num_kv_heads, dims.head_dim
        self.variant, self.memory, self.max_eta = variant, memory(d), max_eta
        self.chunk, taps = positive("chunk", chunk), positive("conv", conv)
        self.project = nn.Linear(c, c + 2 * kv * d, bias=False)
        self.conv = short_taps(c + 2 * kv * d, taps)
        self.gates = nn.ModuleDict({name: nn.Linear(c, kv) for name in variant.gates})
        firsts = {"decay": 4.0, "delta": 2 * d**0.5}  # begin by keeping most of the memory, and with the squared loss
        for name in firsts.keys() & variant.gates:
            nn.init.constant_(cast(nn.Linear, self.gates[name]).bias, firsts[name])
        # A linear memory would begin at zero, where Moneta's map has no value.
        self.weights = nn.ParameterList(variant.start(w) for w in Memory.init(self.memory, 1, kv))
        self.gate, self.out = nn.Linear(c, c), nn.Linear(c, c, bias=False)

    def recall(self, x: Tensor, state: MirasState | None = None) -> tuple[Tensor, MirasState]:
        """o (B, H, N, D) and the state after the last token."""
        y, recent = short_conv(self.project(x), self.conv, None if state is None else state.recent)
        q, k, v = self.dims.split(y)
        logits = {name: gate(x).mT for name, gate in self.gates.items()}
        o, memory = fast_weights(
            self.memory,
            list(self.weights) if state is None else None,
            F.normalize(k, dim=-1),
            v,
            q=F.normalize(q, dim=-1),
            eta=self.max_eta * logits["eta"].sigmoid(),
            chunk=self.chunk,
            loss=self.variant.loss(F.softplus(logits["delta"]) if "delta" in logits else None),
            retention=self.variant.retention(),
            log_decay=gate_logsigmoid(logits["decay"]),
            state=None if state is None else state.memory,
            return_state=True,
        )
        return o, MirasState(recent, memory)

    def mix(self, x: Tensor, o: Tensor) -> Tensor:
        normed = F.layer_norm(o, o.shape[-1:]).transpose(1, 2).flatten(2)
        return self.out(normed * self.gate(x).sigmoid())

    def compute(self, x: Tensor) -> Tensor:
        return self.mix(x, self.recall(x)[0])

    def step(self, x: Tensor, *, state: MirasState | None = None) -> tuple[Tensor, MirasState]:
        o, state = self.recall(x, state)
        return self.mix(x, o), state

    def oracle(self, x: Tensor) -> Tensor:
        w, d, rows = dict(self.named_parameters()), self.dims, []
        taps, group = w["conv"].shape[-1], d.num_heads // d.num_kv_heads
        projected = [token @ w["project.weight"].T for token in x.unbind(1)]
        names = sorted(name for name in w if name.startswith("weights."))
        a = [w[name].expand(len(x), -1, -1, -1) for name in names]
        start, now, gains = a, a, [torch.ones(())] * len(a)

        def norm(z: Tensor) -> Tensor:
            z = z - z.mean(-1, keepdim=True)
            return z / ((z * z).mean(-1, keepdim=True) + 1e-5) ** 0.5

        def product(z: Tensor, weights: Tensor) -> Tensor:
            return (z[..., None, :] @ weights).squeeze(-2)

        def read(weights: list[Tensor], z: Tensor) -> Tensor:
            h = product(z, weights[0])
            return h if len(weights) == 1 else z + norm(product(h * (1 + torch.erf(h / 2**0.5)) / 2, weights[1]))

        def pulled(weights: list[Tensor], z: Tensor, r: Tensor) -> Tensor:
            """Its gradient is that of the loss, r being that with respect to the output."""
            return (read(weights, z) * r).sum()  # each sequence and head has weights of its own

        for t, token in enumerate(x.unbind(1)):
            seen = [(j, t - taps + 1 + j) for j in range(taps) if t - taps + 1 + j >= 0]
            mixed = sum((w["conv"][:, 0, j] * projected[i] for j, i in seen), torch.zeros(()).to(x))
            q, k, v = mixed.view(len(x), -1, d.head_dim).split([d.num_heads, d.num_kv_heads, d.num_kv_heads], 1)
            q, k = (z / (z * z).sum(-1, keepdim=True) ** 0.5 for z in (q, k))
            gate = {name: token @ w[f"gates.{name}.weight"].T + w[f"gates.{name}.bias"] for name in self.variant.gates}
            alpha = (1 / (1 + torch.exp(-gate["decay"]))) ** (1 / 16)
            eta = self.max_eta / (1 + torch.exp(-gate["eta"]))
            delta = torch.log(1 + torch.exp(gate["delta"])) if "delta" in gate else None
            if t % self.chunk == 0:
                start, gains = (list(part) for part in zip(*(self.variant.weights(z) for z in a), strict=True))
                now = start
            steps = torch.func.grad(pulled)(start, k, self.variant.pull(read(start, k) - v, delta))
            steps = [eta[..., None, None] * g for g in steps]
            a = [alpha[..., None, None] * z - g for z, g in zip(a, steps, strict=True)]
            now = [alpha[..., None, None] * z - f * g for z, g, f in zip(now, steps, gains, strict=True)]
            if (t + 1) % self.chunk == 0:
                now = [self.variant.weights(z)[0] for z in a]
            o = read([z.repeat_interleave(group, 1) for z in now], q)
            out = norm(o).flatten(1) / (1 + torch.exp(-(token @ w["gate.weight"].T + w["gate.bias"])))
            rows.append(out @ w["out.weight"].T)
        return torch.stack(rows, 1)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(2, 7), 19, {"chunk": 5}),
            Case(Dims(4, 6, num_kv_heads=2), 11, {"variant": Moneta(), "chunk": 4, "max_eta": 0.02}),
            Case(Dims(1, 9), 11, {"variant": MirrorMoneta(3.0, 2.5), "chunk": 3, "conv": 2, "max_eta": 0.02}),
            Case(Dims(2, 8), 11, {"variant": Memora(0.5), "chunk": 4, "max_eta": 0.02}),
            Case(Dims(1, 5), 7, {"memory": LinearMemory, "chunk": 1, "conv": 1, "max_eta": 1.0}, batch=1),
        ]

    @claim("Yaad with a linear memory, delta infinite, no decay and a chunk of 1 is the delta rule.")
    def is_delta_rule(cls) -> Finding:
        layer, x = cls._sample(memory=LinearMemory, chunk=1, max_eta=1.0)
        w = dict(layer.named_parameters())
        w["weights.0"].zero_()
        w["gates.decay.bias"].fill_(torch.inf)
        y = F.conv1d(F.pad(layer.project(x).mT, (3, 0)), layer.conv, groups=48).mT
        q, k, v = y.unflatten(2, (6, 8)).transpose(1, 2).split(2, 1)
        exact = delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, layer.gates["eta"](x).sigmoid().mT)
        off = apart(layer.recall(x)[0], cast(Tensor, exact))
        return Finding(off < x.shape[1] * torch.finfo(x.dtype).eps, f"largest difference {off:.1e} of the output")

    @claim("Yaad with delta infinite and Moneta with p = q = 2 are the same: l2 with decay.")
    def meet_at_l2(cls) -> Finding:
        yaad, x = cls._sample()
        o, off = yaad.recall(x)[0], []
        for variant in (Moneta(2, 2), MirrorMoneta(2, 2)):
            layer, _ = cls._sample(variant=variant)
            layer.load_state_dict(yaad.state_dict(), strict=False)
            off.append(apart(layer.recall(x)[0], o))
        figure = f"largest differences {off[0]:.1e} and {off[1]:.1e} of the output"
        return Finding(max(off) < x.shape[1] * torch.finfo(x.dtype).eps, figure)

    @claim("Yaad's memory keeps its recall where some values are outliers; l2 loses it, and p = 3 is worse still.")
    def outliers(cls) -> Finding:
        random = torch.Generator().manual_seed(0)
        rates = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.5, 1.0])  # one a head
        k, v = torch.randn(2, 8, 1, 200, 16, generator=random, dtype=torch.float64)
        k, wanted = F.normalize(k, dim=-1), torch.randn(8, 1, 16, 16, generator=random, dtype=torch.float64)
        clean = k @ wanted
        v = torch.where(torch.rand(8, 1, 200, 1, generator=random) < 0.1, 20 * v, clean)
        k, v = (x.expand(-1, len(rates), -1, -1) for x in (k, v))

        def error(loss: Loss) -> float:
            """Of the recall of all keys at the end, at the best rate."""
            start = [torch.zeros(16, 16, dtype=k.dtype)]
            _, state = fast_weights(
                LinearMemory(16), start, k, v, q=k, eta=rates, chunk=1, loss=loss, return_state=True
            )
            wrong = (k @ state.layers[0].memory - clean).square().mean((0, 2, 3)) / clean.square().mean()
            return float(wrong[wrong.isfinite()].min()) ** 0.5

        delta = torch.full(k.shape[:3], 1.0, dtype=k.dtype)
        huber, l2, cubic = (error(loss) for loss in (Yaad().loss(delta), Yaad().loss(cls.FAR * delta), Lp(3.0)))
        figure = f"error {huber:.2f} with delta = 1, {l2:.2f} with l2, {cubic:.2f} with p = 3, each at its best rate"
        return Finding(huber < l2 / 2 and l2 < cubic, figure)

    @claim("Memora's weights stay on the simplex at the end of every chunk.")
    def simplex(cls) -> Finding:
        layer, x = cls._sample(variant=Memora(), chunk=5, max_eta=1.0)
        state, off, least, moved, before = None, 0.0, 1.0, 0.0, layer.weights[0].softmax(-2)
        for part in x.split(5, 1):
            _, state = layer.recall(part, state)
            for matrix in (part_.memory for part_ in state.memory.layers):
                off = max(off, float((matrix.sum(-2) - 1).abs().max()))
                least = min(least, float(matrix.min()))
            moved = max(moved, apart(state.memory.layers[0].memory, before))
        figure = f"sums within {off:.1e} of 1, least weight {least:.1e}, weights moved by up to {moved:.0%}"
        return Finding(off < 32 * torch.finfo(x.dtype).eps and least >= 0 and moved > 0.01, figure)

    @claim("The state that a decoder keeps does not grow.")
    def constant_state(cls) -> Finding:
        layer, x = cls._sample()
        sizes = [sum(part.memory.numel() for part in layer.recall(x[:, :n])[1].memory.layers) for n in (1, 40)]
        return Finding(sizes[0] == sizes[1] == 2 * 8 * 8**2, f"{sizes[0]} weights after 1 token, {sizes[1]} after 40")

    # Infinite for any error, and yet 0 times it is 0.
    FAR = 1e30

    @classmethod
    @torch.no_grad()
    def _sample(cls, **params: Any) -> tuple[Miras, Tensor]:
        """A layer whose Huber loss, if it has one, never leaves the square; and x (1, 40, 16)."""
        layer, x = sample(lambda: cls(Dims(2, 8), **params), 1, 40, 16)
        if "delta" in layer.gates:
            dict(layer.named_parameters())["gates.delta.bias"].fill_(cls.FAR)
        return layer, x
