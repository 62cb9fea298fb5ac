"""Memories that learn while they read: chunk-frozen gradient steps on the weights of a small network.

Four parts make a model, each an object: the memory (what network), the loss (what it is asked to remember), the
optimiser (how a gradient becomes a step) and the retention (what holds its weights). Titans (arXiv 2501.00663), TTT
(arXiv 2407.04620), LaCT (arXiv 2505.23884) and Moneta, Yaad and Memora (Miras, arXiv 2504.13173) are choices of the
four. Equations of Miras are numbered as in its version 1 and were read in a transcription, not in the paper itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import check_qkv, positive
from saccade.scan.linear_attention import full_precision

Linear = Callable[[int, Tensor], Tensor]


class Memory:
    """A network with fast weights, token by token: x (..., N, dim) -> y (..., N, dim_v).

    shapes: (in, out) of each weight matrix; a subclass gives it, and `forward(linear, x)`, which must call
    `linear(i, x)` for the product of x with matrix i exactly once a matrix and may do anything else that keeps tokens
    apart. That is all the scan needs: the gradient of a matrix is then a sum of outer products, never formed for a
    single token. `pull`, which goes with a `forward`, saves autograd the finding of these gradients.
    """

    def __init_subclass__(cls) -> None:
        if "forward" in vars(cls) and "pull" not in vars(cls):
            cls.pull = Memory.pull  # type: ignore[method-assign]

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self.shapes = tuple((positive("dim", a), positive("dim", b)) for a, b in shapes)
        self.dim, self.dim_v = self.shapes[0][0], self.shapes[-1][1]

    def forward(self, linear: Linear, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def pull(self, weights: Sequence[Tensor], products: Sequence[Tensor], slope: Tensor) -> tuple[Tensor, ...]:
        """The gradient of each of the `products`, what `linear` gave, from that of y, `slope`."""
        raise NotImplementedError(f"{type(self).__name__}.pull")

    def __call__(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.forward(lambda i, x: x @ params[i], x)

    def init(self, batch: int, heads: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Weights (batch, heads, in, out), normal of variance 1 / in, float32 on the CPU."""
        return tuple(torch.randn(batch, heads, a, b, generator=generator) * a**-0.5 for a, b in self.shapes)


class LinearMemory(Memory):
    """y = x W. dim: D. dim_v: Dv (default D). Starts at zero, as linear attention does.

    >>> LinearMemory(2)(LinearMemory(2).init(1, 1), torch.ones(1, 1, 3, 2)).shape
    torch.Size([1, 1, 3, 2])
    """

    def __init__(self, dim: int, dim_v: int | None = None) -> None:
        super().__init__([(dim, dim if dim_v is None else dim_v)])

    def forward(self, linear: Linear, x: Tensor) -> Tensor:
        return linear(0, x)

    def pull(self, weights: Sequence[Tensor], products: Sequence[Tensor], slope: Tensor) -> tuple[Tensor, ...]:
        return (slope,)

    def init(self, batch: int, heads: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """A matrix of zeros (batch, heads, D, Dv), float32 on the CPU."""
        return (torch.zeros(batch, heads, *self.shapes[0]),)


class MLPMemory(Memory):
    """y = x + LN(W_depth gelu(... gelu(W_1 x))), the memory of Miras' models; or without x and LN.

    dim: D, of keys and values alike. hidden: channels between (default 4 D). depth: matrices (default 2). residual: add
    x to the layer-normalised output (default True). The norm has no weights of its own.
    """

    def __init__(self, dim: int, hidden: int | None = None, *, depth: int = 2, residual: bool = True) -> None:
        inner = [4 * dim if hidden is None else hidden] * (positive("depth", depth) - 1)
        super().__init__(list(zip([dim, *inner], [*inner, dim], strict=True)))
        self.residual = residual

    def forward(self, linear: Linear, x: Tensor) -> Tensor:
        y = linear(0, x)
        for i in range(1, len(self.shapes)):
            y = linear(i, F.gelu(y))
        return x + F.layer_norm(y, y.shape[-1:]) if self.residual else y

    def pull(self, weights: Sequence[Tensor], products: Sequence[Tensor], slope: Tensor) -> tuple[Tensor, ...]:
        *inner, y = products
        if self.residual:
            normed, of_y = y.shape[-1:], [True, False, False]
            _, mean, rstd = torch.native_layer_norm(y, normed, None, None, 1e-5)
            slope = torch.ops.aten.native_layer_norm_backward(slope, y, normed, mean, rstd, None, None, of_y)[0]
        found = [slope]
        for x, w in zip(reversed(inner), reversed(weights), strict=False):
            found.append(torch.ops.aten.gelu_backward(found[-1] @ w.mT, x))
        return tuple(reversed(found))


class SwiGLUMemory(Memory):
    """y = (silu(x W_0) * (x W_1)) W_2 (LaCT). dim: D. hidden: channels between. dim_v: Dv (default D)."""

    def __init__(self, dim: int, hidden: int, dim_v: int | None = None) -> None:
        super().__init__([(dim, hidden), (dim, hidden), (hidden, dim if dim_v is None else dim_v)])

    def forward(self, linear: Linear, x: Tensor) -> Tensor:
        return linear(2, F.silu(linear(0, x)) * linear(1, x))


class Loss:
    """What the memory is asked for, Miras' attentional bias: y, v (..., Dv) -> (...), summed over tokens.

    `slope`, which goes with a `__call__`, saves autograd the finding of its gradient in y.
    """

    def __init_subclass__(cls) -> None:
        if "__call__" in vars(cls) and "slope" not in vars(cls):
            cls.slope = Loss.slope  # type: ignore[method-assign]

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.__call__")

    def slope(self, y: Tensor, v: Tensor) -> Tensor:
        """The gradient in y, (..., Dv)."""
        raise NotImplementedError(f"{type(self).__name__}.slope")

    def span(self, start: int, stop: int) -> Loss:
        """The loss of tokens start .. stop - 1, for a loss with parameters of its own for each token."""
        return self


class Dot(Loss):
    """-y . v: Hebbian, the loss behind linear attention."""

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return -(y * v).sum(-1)

    def slope(self, y: Tensor, v: Tensor) -> Tensor:
        return -v


class L2(Loss):
    """|y - v|^2 / 2: the loss behind the delta rule, Titans and Memora. (Papers that drop the 1/2 double eta.)"""

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return (y - v).square().sum(-1) / 2

    def slope(self, y: Tensor, v: Tensor) -> Tensor:
        return y - v


class Lp(Loss):
    """sum_c |y_c - v_c|^p / p, with |e| smoothed to sqrt(e^2 + eps) (Moneta, Miras eq. 10 and 11, without their p).

    p: exponent >= 1 (the paper's best: 3). eps: smoothing (default 1e-6, the paper's), which smooths the sign as well.
    """

    def __init__(self, p: float, *, eps: float = 1e-6) -> None:
        self.p, self.eps = _at_least("p", p, 1.0), _above_zero("eps", eps)

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return ((y - v).square() + self.eps).pow(self.p / 2).sum(-1) / self.p


class Huber(Loss):
    """Quadratic for small errors, linear beyond delta, channel by channel (Miras eq. 14).

        sum_c  e_c^2 / 2  where |e_c| <= delta,  delta (|e_c| - delta / 2)  elsewhere

    delta: a number > 0, or one for each token, (B, Hkv, N).
    """

    def __init__(self, delta: float | Tensor) -> None:
        self.delta = delta if isinstance(delta, Tensor) else _above_zero("delta", delta)

    def span(self, start: int, stop: int) -> Loss:
        return type(self)(self.delta[..., start:stop]) if isinstance(self.delta, Tensor) else self

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        e, delta = y - v, self.delta.unsqueeze(-1) if isinstance(self.delta, Tensor) else self.delta
        return torch.where(e.abs() <= delta, e.square() / 2, delta * (e.abs() - delta / 2)).sum(-1)


class NormHuber(Huber):
    """`Huber` of the length of the whole error: |e|^2 / 2 or delta (|e| - delta / 2) (Miras eq. 15)."""

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        square = (y - v).square().sum(-1)
        far = square > self.delta**2
        length = torch.where(far, square, 1.0).sqrt()
        return torch.where(far, self.delta * (length - self.delta / 2), square / 2)


class SwitchedHuber(Huber):
    """|e|^2 / 2 where |e| <= delta, else delta |e|_1: the gradients that Yaad switches between (Miras eq. 16 and 26).

    Its gradient is that of the branch taken, so that it jumps at |e| = delta, as the paper's does.
    """

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        e = y - v
        square = e.square().sum(-1)
        return torch.where(square > self.delta**2, self.delta * e.abs().sum(-1), square / 2)


@dataclass(frozen=True)
class GradientDescent:
    """A_t = alpha_t A_{t-1} - eta_t g_t.

    step: a map of the gradients that a chunk summed up, applied when it ends (`NewtonSchulz`: Muon); default None.
    """

    step: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Momentum:
    """S_t = beta_t S_{t-1} - eta_t g_t,  A_t = alpha_t A_{t-1} + S_t (Titans, eq. 13 and 14).

    step: when given, A takes step(S) once, at the end of a chunk, in place of every S_t (default None).
    """

    step: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class NewtonSchulz:
    """Singular values pulled towards 1 by a quintic iteration (Muon, arXiv 2502.16982).

        X <- a X + (b X X^T + c (X X^T)^2) X,   X_0 = G / |G|_F,   (a, b, c) = (3.4445, -4.7750, 2.0315)

    steps: iterations (default 5), which leave singular values between about 0.7 and 1.2.
    """

    steps: int = 5

    def __call__(self, g: Tensor) -> Tensor:
        tall = g.shape[-2] > g.shape[-1]
        x = g.mT if tall else g
        x = x / (x.square().sum((-2, -1), keepdim=True) + torch.finfo(x.dtype).eps ** 2).sqrt()
        for _ in range(self.steps):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if tall else x


class Decay:
    """The weights are what the steps sum up to: W = A. Forgetting is `log_decay` (l2 retention; Titans, Yaad)."""

    linear = True

    def open(self, accumulator: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights that A stands for, and the factor that A's later steps carry inside the chunk (None: 1)."""
        return accumulator, None

    def settle(self, accumulator: Tensor, start: Tensor) -> Tensor:
        """What A goes on as after a chunk that began with weights `start`."""
        return accumulator


class LqNorm(Decay):
    """W = A / |A|_q^{q - 2}, a norm for each matrix (Moneta, Miras eq. 24). q: >= 2 (the paper's best: 4).

    A may not be zero, and for q > 3 W grows as A shrinks. The norm is taken relative to the largest entry, so that a
    small A does not underflow.
    """

    linear = False

    def __init__(self, q: float) -> None:
        self.q = _at_least("q", q, 2.0)

    def open(self, accumulator: Tensor) -> tuple[Tensor, Tensor | None]:
        largest = accumulator.detach().abs().amax((-2, -1), keepdim=True)
        norm = largest * (accumulator / largest).abs().pow(self.q).sum((-2, -1), keepdim=True).pow(1 / self.q)
        gain = norm.pow(2 - self.q)
        return accumulator * gain, gain


class KLSoftmax(Decay):
    """W = scale softmax(A): A holds log-weights up to a constant (Memora, Miras eq. 21 and 27).

    scale: the sum c of each slice (default 1). dim: -2, each output's weights over the inputs (default), -1, or None
    for one softmax over the matrix.
    """

    linear = False

    def __init__(self, *, scale: float = 1.0, dim: int | None = -2) -> None:
        if dim not in (-2, -1, None):
            raise ValueError(f"dim: got {dim!r}; pass -2 (over inputs), -1 (over outputs) or None (over both)")
        self.scale, self.dim = _above_zero("scale", scale), dim

    def open(self, accumulator: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.dim is None:
            return self.scale * accumulator.flatten(-2).softmax(-1).view_as(accumulator), None
        return self.scale * accumulator.softmax(self.dim), None


class RowNorm(Decay):
    """After each chunk every output's weights get back the length they began with: W = A |W_0| / |A| (LaCT)."""

    linear = False

    def settle(self, accumulator: Tensor, start: Tensor) -> Tensor:
        before, after = (torch.linalg.vector_norm(x, dim=-2, keepdim=True) for x in (start, accumulator))
        return accumulator * (before / after.clamp_min(torch.finfo(after.dtype).tiny))


class Layer(NamedTuple):
    """One matrix of a memory at some token. All (B, Hkv, in, out) but gain.

    start: weights at the start of the chunk, where its gradients are taken. memory: weights now. accumulator: A.
    velocity: S, or the gradients that wait for the end of the chunk (None: neither). gain: factor of steps inside the
    chunk, (B, Hkv, 1, 1) (None: 1).
    """

    start: Tensor
    memory: Tensor
    accumulator: Tensor
    velocity: Tensor | None
    gain: Tensor | None


@dataclass(frozen=True)
class FastState:
    """What `fast_weights` keeps between calls: a `Layer` for each matrix, and how many tokens of the chunk are read.

    Steps depend on the weights they start from, so that two states do not compose; a sequence is read in order.
    """

    layers: tuple[Layer, ...]
    position: int

    def detach(self) -> FastState:
        """The same state, cut off from the graph that made it."""
        return self._map(lambda tensor: tensor.detach())

    def to(self, *args: Any, **kwargs: Any) -> FastState:
        """The state on another device or in another dtype; arguments as for `Tensor.to`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def _map(self, function: Callable[[Tensor], Tensor]) -> FastState:
        layers = (Layer(*(None if x is None else function(x) for x in layer)) for layer in self.layers)  # type: ignore[arg-type]
        return replace(self, layers=tuple(layers))


def fast_weights(
    memory: Memory,
    params: Sequence[Tensor] | None,
    k: Tensor,
    v: Tensor,
    *,
    q: Tensor,
    eta: float | Tensor,
    chunk: int,
    loss: Loss | None = None,
    optimizer: GradientDescent | Momentum | None = None,
    retention: Decay | None = None,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
    inclusive: bool = True,
    state: FastState | None = None,
    return_state: bool = False,
) -> Any:
    """A memory whose weights take one gradient step a token, with the gradients of a chunk taken at its start.

        g_t = grad_W loss(M(W_0; k_t), v_t)           W_0: the weights at the start of the chunk of token t
        A_t = alpha_t A_{t-1} - eta_t g_t             alpha_t = exp(log_decay_t); or by `Momentum`
        o_t = M(W_t; q_t)

    At the end of a chunk W_t = retention(A_t). Before it, W_t is that map with its non-linear part held as it was at
    W_0, which makes it linear: W_t = A_t (`Decay`, `RowNorm`), A_t / |A_0|_q^{q-2} (`LqNorm`),
    A_t + alpha_1 ... alpha_t (W_0 - A_0) (`KLSoftmax`). With chunk = 1 this is each paper's recurrence token by token;
    beyond, the chunk is part of the model, not a setting of speed: another one is another function.

    memory: a `Memory`. params: the accumulators A before the first token, one for each matrix, broadcast to
    (B, Hkv, in, out): weights for `Decay`, log-weights for `KLSoftmax`; None when `state` goes on. k (B, Hkv, N, D),
    v (B, Hkv, N, Dv), q (B, H, N, D): query head h reads the memory of key head h // (H // Hkv). eta: step size, a
    number, (Hkv,) or (B, Hkv, N). chunk: tokens a chunk. loss: default `L2()`. optimizer: default
    `GradientDescent()`. retention: default `Decay()`. log_decay: <= 0, natural log, (Hkv,) or (B, Hkv, N), -inf forgets
    all (default None: no decay). log_momentum: likewise log beta_t, with `Momentum` only. inclusive: queries read the
    memory after their own token's step (default True); False: the one at the start of their chunk (LaCT), which an
    optimiser's `step` needs. state: the `FastState` of the tokens before (default None). return_state: also return the
    one after (default False).

    Returns o (B, H, N, Dv) in the dtype of q, or (o, state); computed in float32 or wider, and so is the state. A
    sequence may be cut anywhere, inside a chunk too. Differentiable in all tensors, through the inner gradients as
    well. Costs N in out for each matrix, as a gradient step does, and N chunk (in + out) for the reads; the gradient of
    a token exists only as an outer product. Autograd keeps N / chunk times the weights.

    Checked: token-by-token loops with autograd.grad in float64 for all parts, chunk 1 and above; equal to the delta
    rule (`LinearMemory`, `L2`, chunk 1) and to decayed linear attention (`Dot`, any chunk). Deviations from Miras: `L2`
    and `Lp` carry 1/2 and 1/p; eta, alpha and delta are numbers a head, not a channel; section 5.4 gives the linear
    part of a chunk for q = 2 only, of which `LqNorm` is the continuation; Memora takes its log after a linear chunk
    ("lag token"), which fails on weights that fell below zero, so that here the log-weights themselves are carried, and
    the exact step falls on the last token of a chunk instead of the first. Deviation from LaCT: decays and steps are
    per token.
    Errors: TypeError and ValueError for arguments that do not fit each other, naming them.

    >>> memory = MLPMemory(4)
    >>> k, v, q = torch.randn(3, 1, 2, 10, 4)
    >>> fast_weights(memory, memory.init(1, 2), k, v, q=q, eta=0.1, chunk=4).shape
    torch.Size([1, 2, 10, 4])
    """
    loss, optimizer, retention = loss or L2(), optimizer or GradientDescent(), retention or Decay()
    _check(memory, params, k, v, q, optimizer, log_momentum, inclusive, state, positive("chunk", chunk))
    batch, heads, length, _ = k.shape
    wide = torch.promote_types(k.dtype, torch.float32)
    for tensor in params if state is None else [layer.start for layer in state.layers]:  # type: ignore[union-attr]
        wide = torch.promote_types(wide, tensor.dtype)

    def per_token(name: str, value: float | Tensor) -> Tensor:
        value = torch.as_tensor(value, dtype=wide, device=k.device)
        if value.ndim not in (0, 1, 3) or value.shape not in ((), (heads,), (batch, heads, length)):
            raise ValueError(f"{name}: got shape {tuple(value.shape)}; pass ({heads},) or {(batch, heads, length)}")
        return (value.unsqueeze(-1) if value.ndim == 1 else value).expand(batch, heads, length)

    steps = {"eta": per_token("eta", eta)}
    if log_decay is not None:
        steps["log_decay"] = per_token("log_decay", log_decay)
    if log_momentum is not None:
        steps["log_momentum"] = per_token("log_momentum", log_momentum)
    if state is None:
        state = _begin(memory, params or (), optimizer, retention, (batch, heads), wide)
    else:
        state = state.to(wide)
        if type(retention).open is Decay.open:
            # The weights are A itself, which a copy of a state holds twice.
            state = replace(state, layers=tuple(layer._replace(memory=layer.accumulator) for layer in state.layers))
    first = min(length, chunk - state.position)
    sizes = [first, *(min(chunk, length - a) for a in range(first, length, chunk))]
    # Split, not sliced: the gradient of a slice is a tensor of all tokens, zero but for its own.
    parts = (x.to(wide).split(sizes, -2) for x in (k, v, q.unflatten(1, (heads, -1))))
    numbers = (x.split(sizes, -1) for x in steps.values())
    outputs, start = [], 0
    with full_precision(k):
        for size, key, value, query, *own in zip(sizes, *parts, *numbers, strict=True):
            stop = start + size
            advanced, read = _advance(
                memory,
                loss.span(start, stop),
                optimizer,
                state,
                key,
                value,
                **dict(zip(steps, own, strict=True)),
            )
            ends = advanced.position == chunk
            if ends:
                advanced = _close(advanced, optimizer, retention)
            if not inclusive:
                outputs.append(memory([layer.start.unsqueeze(2) for layer in state.layers], query))
            elif ends and not retention.linear:
                # The token that completes a chunk reads the exact map, which is there to be read anyway.
                outputs.append(memory.forward(read, query)[..., :-1, :])
                outputs.append(memory([layer.start.unsqueeze(2) for layer in advanced.layers], query[..., -1:, :]))
            else:
                outputs.append(memory.forward(read, query))
            state, start = advanced, stop
    o = torch.cat(outputs, -2).flatten(1, 2).to(q.dtype)
    return (o, state) if return_state else o


def _begin(
    memory: Memory,
    params: Sequence[Tensor],
    optimizer: GradientDescent | Momentum,
    retention: Decay,
    lead: tuple[int, int],
    dtype: torch.dtype,
) -> FastState:
    layers = []
    for param, shape in zip(params, memory.shapes, strict=True):
        accumulator = param.to(dtype).expand(*lead, *shape)
        weights, gain = retention.open(accumulator)
        waits = isinstance(optimizer, Momentum) or optimizer.step is not None
        layers.append(Layer(weights, weights, accumulator, torch.zeros_like(accumulator) if waits else None, gain))
    return FastState(tuple(layers), 0)


def _advance(
    memory: Memory,
    loss: Loss,
    optimizer: GradientDescent | Momentum,
    state: FastState,
    k: Tensor,
    v: Tensor,
    *,
    eta: Tensor,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
) -> tuple[FastState, Linear]:
    """The state n tokens on in the same chunk, and the product of query rows with the weights of their token."""
    inputs, steps = _steps(memory, [layer.start for layer in state.layers], loss, k, v, eta)
    # Row t of `mixed` weighs the steps in A_t, row t of `kept` those in S_t; None: all up to t alike.
    mixed, since = (None, None) if log_decay is None else (_products(log_decay), log_decay.cumsum(-1).exp())
    kept, kept_since, mixed_since = mixed, since, since
    if log_momentum is not None:
        kept, kept_since = _products(log_momentum), log_momentum.cumsum(-1).exp()
        decays = torch.ones_like(kept).tril() if mixed is None else mixed
        mixed, mixed_since = decays @ kept, (decays @ kept_since.unsqueeze(-1)).squeeze(-1)
    momentum, held = isinstance(optimizer, Momentum), optimizer.step is not None

    def left(number: Tensor | None, x: Tensor) -> Tensor:
        return x if number is None else number[..., -1, None, None] * x

    layers = []
    for layer, x, e in zip(state.layers, inputs, steps, strict=True):

        def summed(before: Tensor | None, weights: Tensor | None, x: Tensor = x, e: Tensor = e) -> Tensor:
            return _plus(before, x.mT, e if weights is None else weights[..., -1, :, None] * e)

        velocity, accumulator, now = layer.velocity, left(since, layer.accumulator), layer.memory
        old = left(mixed_since, velocity) if momentum and velocity is not None else None
        if layer.memory is layer.accumulator:
            accumulator = now = (
                accumulator if held else summed(accumulator if old is None else accumulator + old, mixed)
            )
        else:
            now = left(since, now)
            if not held:
                added = summed(old, mixed)
                accumulator, now = accumulator + added, now + (added if layer.gain is None else layer.gain * added)
        if velocity is not None:
            velocity = summed(left(kept_since, velocity), kept)
        layers.append(layer._replace(memory=now, accumulator=accumulator, velocity=velocity))

    def read(i: int, x: Tensor) -> Tensor:
        layer, rows = state.layers[i], x.flatten(2, 3)
        scores = (rows @ inputs[i].mT).unflatten(2, x.shape[2:4])
        scores = (scores.tril() if mixed is None else scores * mixed.unsqueeze(2)).flatten(2, 3)
        before = rows @ layer.memory
        if since is None and layer.velocity is None and layer.gain is None:
            return _plus(before, scores, steps[i]).unflatten(2, x.shape[2:4])
        before, step = (y.unflatten(2, x.shape[2:4]) for y in (before, scores @ steps[i]))
        if momentum and layer.velocity is not None and mixed_since is not None:
            step = step + mixed_since[:, :, None, :, None] * (x @ layer.velocity.unsqueeze(2))
        if layer.gain is not None:
            step = step * layer.gain.unsqueeze(2)
        return step + (before if since is None else since[:, :, None, :, None] * before)

    return FastState(tuple(layers), state.position + k.shape[-2]), read


def _plus(before: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """before + x @ y, which is one call."""
    if before is None:
        return x @ y
    lead = before.shape[:2]
    return torch.baddbmm(*(z.expand(*lead, -1, -1).flatten(0, 1) for z in (before, x, y))).unflatten(0, lead)


def _steps(
    memory: Memory, weights: list[Tensor], loss: Loss, k: Tensor, v: Tensor, eta: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """For each matrix x (B, Hkv, n, in) and e (B, Hkv, n, out), whose outer product is the step of a token, -eta g."""
    if type(memory).pull is not Memory.pull and type(loss).slope is not Loss.slope:
        given: dict[int, Tensor] = {}
        products: dict[int, Tensor] = {}

        def product(i: int, x: Tensor) -> Tensor:
            given[i], products[i] = x, x @ weights[i]
            return products[i]

        slope = -eta.unsqueeze(-1) * loss.slope(memory.forward(product, k), v)
        order = range(len(weights))
        return tuple(given[i] for i in order), memory.pull(weights, [products[i] for i in order], slope)

    def total(offsets: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs: dict[int, Tensor] = {}

        def linear(i: int, x: Tensor) -> Tensor:
            if i in inputs:
                raise ValueError(
                    f"memory: {type(memory).__name__}.forward uses matrix {i} twice; give each use its own"
                )
            inputs[i] = x
            return x @ weights[i] + offsets[i]

        lost = loss(memory.forward(linear, k), v)
        if lost.shape != k.shape[:-1]:
            raise ValueError(
                f"loss: gave shape {tuple(lost.shape)}; it must give one number a token, {tuple(k.shape[:-1])}"
            )
        if len(inputs) < len(weights):
            raise ValueError(f"memory: {type(memory).__name__}.forward uses {len(inputs)} of {len(weights)} matrices")
        # Weighed here, where it is a number a token, and not where it is a gradient.
        return -(lost * eta).sum(), tuple(inputs[i] for i in range(len(weights)))

    offsets = tuple(k.new_zeros(()).expand(*k.shape[:-1], w.shape[-1]) for w in weights)
    steps, inputs = torch.func.grad(total, has_aux=True)(offsets)
    return inputs, steps


def _products(log: Tensor) -> Tensor:
    """log (..., n) -> (..., n, n): exp(log_{i+1} + ... + log_t) in row t, column i <= t, else 0.

    Every entry has its own sum: a difference of two prefix sums would cancel, and be NaN after a log of -inf.
    """
    n = log.shape[-1]
    past = torch.ones(n, n, dtype=torch.bool, device=log.device).tril()
    sums = log.unsqueeze(-1).expand(*log.shape, n).masked_fill(~past.tril(-1), 0.0).cumsum(-2)
    return sums.masked_fill(~past, -torch.inf).exp()


def _close(state: FastState, optimizer: GradientDescent | Momentum, retention: Decay) -> FastState:
    """The end of a chunk: steps held back are taken, and the retention maps A to the weights of the next start."""
    layers = []
    for layer in state.layers:
        accumulator, velocity = layer.accumulator, layer.velocity
        if optimizer.step is not None and velocity is not None:
            accumulator = accumulator + optimizer.step(velocity)
            velocity = velocity if isinstance(optimizer, Momentum) else torch.zeros_like(velocity)
        accumulator = retention.settle(accumulator, layer.start)
        weights, gain = retention.open(accumulator)
        layers.append(Layer(weights, weights, accumulator, velocity, gain))
    return FastState(tuple(layers), 0)


def _check(
    memory: Memory,
    params: Sequence[Tensor] | None,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    optimizer: GradientDescent | Momentum,
    log_momentum: Tensor | None,
    inclusive: bool,
    state: FastState | None,
    chunk: int,
) -> None:
    check_qkv(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q: got {q.shape[2]} tokens beside k's {k.shape[2]}; every token writes and reads")
    if (k.shape[-1], v.shape[-1]) != (memory.dim, memory.dim_v):
        raise ValueError(
            f"memory: maps {memory.dim} channels to {memory.dim_v}; k has {k.shape[-1]} and v has {v.shape[-1]}"
        )
    if isinstance(optimizer, Momentum) != (log_momentum is not None):
        what = "nothing" if log_momentum is None else "a tensor"
        raise ValueError(f"log_momentum: got {what} for {optimizer}; pass it with Momentum, and only then")
    if optimizer.step is not None and inclusive:
        raise ValueError(f"inclusive: got True for {optimizer}, whose step comes at the end of a chunk; pass False")
    if (params is None) == (state is None):
        raise ValueError("params: pass either the parameters to start from, or the state to go on from, not both")
    lead = tuple(k.shape[:2])
    if params is not None:
        if len(params) != len(memory.shapes):
            raise ValueError(f"params: got {len(params)} for {len(memory.shapes)} matrices; pass one tensor each")
        for i, (param, shape) in enumerate(zip(params, memory.shapes, strict=True)):
            want = (*lead, *shape)
            fits = param.ndim <= 4 and all(a in (1, b) for a, b in zip(param.shape[::-1], want[::-1], strict=False))
            if not fits or param.shape[-2:] != shape:
                raise ValueError(f"params[{i}]: got shape {tuple(param.shape)}; pass one that broadcasts to {want}")
    if state is not None:
        got = [tuple(layer.start.shape) for layer in state.layers]
        want_all = [(*lead, *shape) for shape in memory.shapes]
        if got != want_all:
            raise ValueError(f"state: got weights {got}; pass those of this memory and batch, {want_all}")
        if state.position >= chunk:
            raise ValueError(
                f"state: got position {state.position} in a chunk of {chunk}; go on with the chunk it began with"
            )
        waits = isinstance(optimizer, Momentum) or optimizer.step is not None
        if any((layer.velocity is not None) != waits for layer in state.layers):
            raise ValueError(f"state: comes from another optimizer than {optimizer}; go on with the one it began with")


def _at_least(name: str, value: float, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise ValueError(f"{name}: got {value!r}; pass a number >= {least:g}")
    return float(value)


def _above_zero(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value!r}; pass a finite number > 0")
    return float(value)
