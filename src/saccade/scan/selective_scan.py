"""The selective state-space recurrence of Mamba, one small state a channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import known, positive
from saccade.scan import kernels
from saccade.scan.kernels import step as one_step
from saccade.scan.linear_attention import full_precision
from saccade.scan.state import UNTRACKED, State, Untracked, begun, chain

BACKENDS = ("auto", "chunked", "triton")


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: State | Untracked | None = None,
    return_state: bool = False,
    chunk: int = 64,
    backend: str = "auto",
) -> Any:
    """Mamba's recurrence with input-dependent steps, readings and writings (arXiv 2312.00752, eq. 2a, 2b and 4).

        h_t = exp(delta_t A) * h_{t-1} + delta_t x_t B_t         h_0 = 0, or the state given
        y_t = Re(C_t . h_t) + D x_t                              and y_t silu(z_t) where z is given

    A is discretised exactly (zero-order hold), B by the Euler step delta B that Mamba's code takes in place of the
    paper's (exp(delta A) - 1) / A * B. A complex A gives the plain real part; to stand for conjugate pairs, as Mamba's
    code does, pass 2 C. Tokens come before channels, as everywhere in this package; Mamba's code has channels first.

    x: (batch, N, channels). delta: like x, >= 0 after bias and softplus. A: (channels, S), real part <= 0, real or
    complex. B, C: (batch, N, S), or (batch, N, G, S) in G groups, channel c reading group c // (channels // G); real or
    complex. D: (channels,), the direct term (default None). z: like x, a gate (default None). delta_bias: (channels,),
    added to delta (default None). delta_softplus: delta becomes softplus(delta) (default False). state: what earlier
    tokens left, memory (batch, channels, S, 1) (default None: zero); `UNTRACKED` is zero too, and then, as from any
    untracked state, the one that is returned has no transition, which is as large as the memory: so a decoder begins.
    return_state: also return the `State` after the last token (default False). chunk: tokens expanded at a time
    (default 64); changes cost, not values. backend: "chunked", "triton" (one kernel that expands nothing, real states,
    differentiable once), or "auto": triton on a GPU where it can, otherwise chunked. One token of which no gradient is
    asked has a kernel of its own in "triton", real states too, which "auto" takes on a GPU: it reads memory and, where
    it is tracked, transition once and writes them once.

    Returns y like x, or (y, state). Half precision is computed in float32, and the state is kept there. Costs
    N channels S steps; expands to (batch, chunk, channels, S) at most, in the backward pass too, which recomputes each
    chunk from the state at its start. No exponent is positive, so nothing overflows however strong the decay.
    Errors: TypeError for other than floating-point tensors; ValueError for shapes that do not fit, a named backend that
    cannot run this, or, on a CPU alone, an A that grows: a GPU is not waited for.

    >>> x, A = torch.ones(1, 3, 1), torch.full((1, 1), -0.5)
    >>> y, state = selective_scan(x, x, A, x, x, return_state=True)
    >>> [round(v, 3) for v in y.flatten().tolist()], tuple(state.memory.shape)
    ([1.0, 1.607, 1.974], (1, 1, 1, 1))
    """
    state, tracks = begun(state)
    groups = _check(x, delta, A, B, C, D, z, delta_bias, state)
    positive("chunk", chunk)
    known("backend", backend, BACKENDS)
    batch, length, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    for tensor in (A, B, C) if state is None else (A, B, C, state.memory):
        wide = torch.promote_types(wide, tensor.dtype)
    real = torch.float64 if wide in (torch.float64, torch.complex128) else torch.float32
    before = None if state is None else _memory(state)
    if wide == torch.float32 and one_step.takes(backend, length, state, x, delta, A, B, C, D, z, delta_bias):
        given = x, delta, A, B, C, D, z, delta_bias
        y, after = _once(*given, delta_softplus, state, before, return_state and tracks)
        return (y, after) if return_state else y
    rate = A.to(torch.promote_types(A.dtype, real))
    write, read = (t if t.ndim == 4 else t.unsqueeze(2) for t in (B, C))
    memory = None if before is None else before.to(wide).squeeze(-1)
    step = None
    if kernels.takes(backend, x, kernels.selective_reasons(x, wide.is_complex), widest=4):
        y, h = _walked(x, delta, rate, write, read, memory, delta_bias, D, z, delta_softplus)
    else:
        step = _steps(delta, delta_bias, delta_softplus, real)

        def grouped(tensor: Tensor) -> Tensor:
            return tensor.to(real).unflatten(-1, (groups, -1))

        tokens = grouped(x), grouped(step), write.to(wide), read.to(wide)
        h = torch.zeros(batch, channels, A.shape[1], dtype=wide, device=x.device) if memory is None else memory
        y, h = _in_chunks(h.unflatten(1, (groups, -1)), rate.unflatten(0, (groups, -1)), tokens, chunk)
        h = h.flatten(1, 2)
        if D is not None:
            y = y + D.to(real) * x
        if z is not None:
            y = y * F.silu(z.to(real))
        y = y.to(x.dtype)
    if not return_state:
        return y
    if not tracks:
        return y, State(h.unsqueeze(-1), UNTRACKED)
    step = _steps(delta, delta_bias, delta_softplus, real) if step is None else step
    decay = (step.sum(1, dtype=real).unsqueeze(-1) * rate).unsqueeze(-1)
    return y, State(h.unsqueeze(-1), chain(None if state is None else state.transition, decay))


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool, real: torch.dtype) -> Tensor:
    """What the states move by: delta after bias and softplus, in `real` where there is either."""
    if bias is not None:
        delta = delta.to(real) + bias.to(real)
    return F.softplus(delta.to(real)) if softplus else delta


def _once(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    state: State | None,
    before: Tensor | None,
    track: bool,
) -> tuple[Tensor, State]:
    """`selective_scan` of one token by its kernel, which adds up decays itself where they are what it keeps."""
    memory = None if before is None else before.squeeze(-1)
    past = state.transition if state is not None and track else None
    adds = past is None or (isinstance(past, Tensor) and before is not None and past.shape == before.shape)
    old = past.squeeze(-1) if isinstance(past, Tensor) and adds else None
    write, read = (t if t.ndim == 4 else t.unsqueeze(2) for t in (B, C))
    y, h, decay = one_step.selective(x, delta, A, write, read, bias, softplus, D, z, memory, old, track)
    moved = UNTRACKED if decay is None else decay.unsqueeze(-1)
    return y, State(h.unsqueeze(-1), moved if adds else chain(past, moved))


def _walked(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    memory: Tensor | None,
    bias: Tensor | None,
    direct: Tensor | None,
    z: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y and the last state by the kernels, which take everything but rates and states in any dtype up to float32."""
    kernels.make_ready()
    from saccade.scan.kernels.selective_ops import selective

    def whole(tensor: Tensor) -> Tensor:
        return (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()

    x, delta, write, read = (whole(t) for t in (x, delta, write, read))
    more = [None if t is None else whole(t) for t in (bias, direct, z)]
    memory = None if memory is None else memory.float()
    y, after, _ = selective(x, delta, rate.float(), write, read, memory, *more, softplus)
    return y, after


def _in_chunks(h: Tensor, rates: Tensor, given: tuple[Tensor, ...], chunk: int) -> tuple[Tensor, Tensor]:
    """y (batch, N, channels) and the last state, one chunk expanded at a time; h, rates and `given` as for `Chunk`."""
    parts = []
    # Split, not sliced: the gradient of a slice is a tensor of all tokens, zero but for its own.
    for piece in zip(*(t.split(chunk, 1) for t in given), strict=True):
        y, h = _chunk(h, rates, *piece)
        parts.append(y)
    return torch.cat(parts, 1).flatten(2), h


def _chunk(h: Tensor, rates: Tensor, x: Tensor, step: Tensor, write: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and last state of a `Chunk`."""
    y, after = Chunk.apply(h, rates, x, step, write, read)
    return y, after


class Chunk(torch.autograd.Function):
    """Outputs and last state h (batch, G, c, S) of L tokens: x, step (batch, L, G, c); write, read (batch, L, G, S).

    It keeps what it is given and nothing that is expanded: its gradient makes the states again, and then, with p_t the
    gradient of h_t and a_t = exp(step_t rates),

        p_t = gy_t conj(read_t) + conj(a_(t+1)) p_(t+1),   e_t = p_t conj(a_t h_(t-1)), the gradient of step_t rates,

    of which the others are sums. Those over channels and over S are products of matrices. All of it is made of
    differentiable operations, so that it can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, rates: Tensor, x: Tensor, step: Tensor, write: Tensor, read: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, rates, x, step, write, read)
        with full_precision(x):
            _, states = _states(h, rates, x, step, write)
            y = (states[:, 1:] @ read.unsqueeze(-1)).squeeze(-1)
        # Views would keep the states of the whole chunk alive.
        return y.real.clone() if y.is_complex() else y, states[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        h, rates, x, step, write, read = ctx.saved_tensors
        gy, after = gradients
        with full_precision(x):
            decay, states = _states(h, rates, x, step, write)
            wide = gy.to(h.dtype).unsqueeze(-2)
            to_read = (wide @ states[:, 1:].conj()).squeeze(-2)
            own = gy.unsqueeze(-1) * read.conj().unsqueeze(-2)
            decay = decay.conj()
            pull = Recurrence.apply(decay[:, 1:], own[:, :-1], own[:, -1] + after, True)
            to_write = ((step * x).to(h.dtype).unsqueeze(-2) @ pull).squeeze(-2)
            pushed = (pull @ write.conj().unsqueeze(-1)).squeeze(-1)
            pull = pull * decay
            to_h, e = pull[:, 0], pull * states[:, :-1].conj()
            if not rates.is_complex():
                e = e.real
            to_rates = (e * step.unsqueeze(-1)).sum((0, 1))
            to_step = ((e * rates.conj()) @ torch.ones_like(rates[0, 0]).unsqueeze(-1)).squeeze(-1)
        pushed, to_step = (t.real if t.is_complex() else t for t in (pushed, to_step))
        return to_h, to_rates, step * pushed, to_step + x * pushed, to_write, to_read


def _states(h: Tensor, rates: Tensor, x: Tensor, step: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """Decays (batch, L, G, c, S) and states (batch, L + 1, G, c, S), h the first of these; arguments as for `Chunk`."""
    decay = (step.unsqueeze(-1) * rates).exp_().to(h.dtype)
    return decay, Recurrence.apply(decay, (step * x).unsqueeze(-1) * write.unsqueeze(-2), h, False)


class Recurrence(torch.autograd.Function):
    """h_0 = before, h_(t+1) = a_t * h_t + b_t along dimension 1; in reverse, h_L = before, h_t = a_t * h_(t+1) + b_t.

    a, b: L entries; returns all L + 1 states, one fused step a token. The gradient is the other way's recurrence of the
    gradients, run by the same function, so that it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, before: Tensor, reverse: bool) -> Tensor:
        states = b.new_empty(b.shape[0], b.shape[1] + 1, *b.shape[2:])
        h, *after = reversed(states.unbind(1)) if reverse else states.unbind(1)
        h.copy_(before)
        tokens = zip(a.unbind(1), b.unbind(1), strict=True)
        for (decay, push), following in zip(reversed(list(tokens)) if reverse else tokens, after, strict=True):
            h = torch.addcmul(push, decay, h, out=following)
        ctx.save_for_backward(a, states)
        ctx.reverse = reverse
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, states = ctx.saved_tensors
        (g,), reverse = gradients, ctx.reverse
        early, late = slice(None, -1), slice(1, None)
        first, last = (0, -1) if reverse else (-1, 0)
        before, at = (states[:, late], early) if reverse else (states[:, early], late)
        pull = Recurrence.apply(a.conj(), g[:, late] if reverse else g[:, early], g[:, first], not reverse)
        return pull[:, at] * before.conj(), pull[:, at], pull[:, last], None


def _memory(state: State) -> Tensor:
    return state.memory if state.shift is None else state.memory * state.shift.exp()


def _check(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: State | None,
) -> int:
    """Returns the number of groups."""
    for name, tensor in {
        "x": x,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
    }.items():
        if tensor is None and name in ("D", "z", "delta_bias"):
            continue
        may = name in ("A", "B", "C")
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or (may and tensor.is_complex())):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {got}; pass a floating-point{' or complex' if may else ''} tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device} beside x on {x.device}; move them to one device")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x: got shape {tuple(x.shape)}; pass (batch, tokens, channels), no size zero")
    batch, length, channels = x.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A: got shape {tuple(A.shape)}; pass ({channels}, S), one row for each channel of x")
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; pass that of x, {tuple(x.shape)}")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; pass ({channels},), one number a channel")
    groups = B.shape[2] if B.ndim == 4 else 1
    for name, tensor in (("B", B), ("C", C)):
        want = (batch, length, *([groups] if B.ndim == 4 else []), A.shape[1])
        if tensor.ndim not in (3, 4) or tensor.shape != want:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; pass {want}, or groups for both B and C")
    if not groups or channels % groups:
        raise ValueError(f"B: got {groups} groups for {channels} channels; pass a divisor")
    if state is not None and tuple(state.memory.shape) != (batch, channels, A.shape[1], 1):
        want = (batch, channels, A.shape[1], 1)
        raise ValueError(f"state: got a memory {tuple(state.memory.shape)}; pass {want}")
    on_host = A.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere the host would have to wait
    if on_host and bool((A.real > 0).any()):
        raise ValueError(f"A: got a real part of {float(A.real.max()):.3g}; states must decay, so pass -exp(A_log)")
    return groups
