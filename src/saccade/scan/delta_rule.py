"""The delta rule: a linear memory that first takes away what a key returned, then writes what it should return."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import check_cu_seqlens, check_qkv, known, positive
from saccade.scan import kernels
from saccade.scan.chunks import Stretch, each_chunk, grouped, weigh
from saccade.scan.kernels import step
from saccade.scan.linear_attention import (
    check_log_decay,
    each_sequence,
    full_precision,
    initial_memory,
    working_dtype,
)
from saccade.scan.state import UNTRACKED, Matrix, State, Untracked, begun


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    state: State | Untracked | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Causal attention by a memory in which every key overwrites its own value.

        S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T,   o_t = scale S_t^T q_t

    The memory decays first and is erased then; for a scalar gate the order is of no consequence. q (B, H, N, D),
    k (B, Hkv, N, D), v (B, Hkv, N, Dv) -> o (B, H, N, Dv) in q's dtype. Query head h reads key head h // (H // Hkv).
    arXiv 2406.06484 (no decay), 2412.06464, eq. 10 (Gated DeltaNet: scalar gate), 2510.26692 (Kimi Delta Attention:
    vector gate).

    beta: the share of the old value to replace, (B, heads, N); heads is Hkv or H, here and below, and H costs one
        memory a query head. The memory is stable while beta |k|^2 <= 2, which unit keys and beta in [0, 2] give; keys
        are taken as they are.
    log_decay: g <= 0, down to -inf (forget everything); (heads,), (B, heads, N) or (B, heads, N, D) (default None).
    scale: default None: 1.
    state: what earlier tokens left, as an earlier call returned it (default None: nothing). `UNTRACKED` is nothing too,
        and then, as from any untracked state, the one that is returned has no transition.
    return_state: also return the `State` after the last token: memory (B, heads, D, Dv), and as transition the `Matrix`
        (B, heads, D, D) of all products of decay and erasure, which costs about D / Dv times the scan once more. A
        decoder, which does without it, begins with `UNTRACKED`. Under cu_seqlens B is the number of sequences, here and
        in `state`.
    cu_seqlens: int32, sequences packed into batch 1, each with a memory of its own.
    chunk: tokens handled at once; changes the speed, and no result beyond rounding. "triton" has sizes of its own.
    backend: "reference" (token by token), "chunked", "triton" (kernels; no vector gate, at most 256 channels,
        differentiable once), or "auto": triton on a GPU in 16 bits where it can, otherwise chunked. One token of which
        no gradient is asked has a kernel of its own in "triton", with a vector gate too and for any number of channels,
        which "auto" takes on a GPU: it reads memory and transition, if tracked, once and writes them once. On a CPU
        "auto" takes one token by itself.

    Within a chunk the values actually written, u_t = beta_t (v_t - what k_t finds), solve one triangular system (the WY
    form): (I + diag(beta) L) U = diag(beta) (V - K' S), with L the decayed key-key products below the diagonal and K'
    the keys decayed from the chunk's start. Computed in float32 (float64 for float64), whatever autocast says; "triton"
    rounds the factors of matrix products, the inverse of the system among them, to the dtype of q where that is
    bfloat16, and sums in float32.
    Costs N chunk (D + Dv) + N D Dv multiply-adds; memory N (D + Dv + chunk) + N / chunk D Dv with gradients.
    Errors: ValueError and TypeError name the argument; "triton", where it cannot run, says why.

    >>> key = torch.ones(1, 1, 2, 1)
    >>> delta_rule(key, key, torch.tensor([[[[3.0], [5.0]]]]), torch.tensor([[[1.0, 0.5]]])).flatten().tolist()
    [3.0, 4.0]
    """
    check_qkv(q, k, v)
    positive("chunk", chunk)
    known("backend", backend, BACKENDS)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k: got {k.shape[2]} tokens beside q's {q.shape[2]}; every query has its own key, "
            "so pass what came earlier as `state`"
        )
    _check_beta(beta, q, k)
    state, tracks = begun(state)
    once = cu_seqlens is None and step.takes(backend, q.shape[2], state, q, k, v, beta, log_decay)
    fast = not once and kernels.takes(backend, v, kernels.delta_reasons(v, q.shape[3], log_decay))
    scan = None if once else kernels.delta_scan if fast else _in_products(backend, chunk)

    def one(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        state: State | None,
        cu: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        return _dense(q, k, v, beta, log_decay, state, scale, return_state and tracks, scan, cu)

    with full_precision(q):
        if cu_seqlens is None:
            o, after = one(q, k, v, beta, log_decay, state)
        elif fast:
            cu_seqlens = check_cu_seqlens(cu_seqlens, q.shape[2], q.shape[0])
            o, after = one(q, k, v, beta, log_decay, state, cu_seqlens)
        else:
            o, after = each_sequence(one, q, (k, v), (beta, log_decay), state, cu_seqlens)
    return (o, after) if return_state else o


def _check_beta(beta: Tensor, q: Tensor, k: Tensor) -> None:
    if not isinstance(beta, Tensor) or not beta.is_floating_point():
        got = beta.dtype if isinstance(beta, Tensor) else type(beta).__name__
        raise TypeError(f"beta: got {got}; pass a floating-point tensor (B, heads, N)")
    batch, heads, tokens = q.shape[:3]
    if tuple(beta.shape) not in ((batch, heads, tokens), (batch, k.shape[1], tokens)):
        each = f"{heads}" if heads == k.shape[1] else f"{k.shape[1]} or {heads}"
        raise ValueError(
            f"beta: got shape {tuple(beta.shape)}; pass ({batch}, heads, {tokens}) with {each} heads, a number a token"
        )


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: State | None,
    scale: float | None,
    track: bool,
    scan: Pass | None,
    cu: Tensor | None,
) -> tuple[Tensor, State]:
    """`delta_rule` of sequences of one length or of packed ones; track: the transition after the last token is wanted.

    scan: None for the kernel of one token.
    """
    dtype, (batch, heads, tokens, dim), groups = q.dtype, q.shape, k.shape[1]
    g = None
    if log_decay is not None:
        check_log_decay(log_decay, (batch, heads, tokens), groups, dim)
        g = log_decay[None, :, None] if log_decay.ndim == 1 else log_decay
    kept = max(beta.shape[1], groups if g is None else g.shape[1])
    sequences = batch if cu is None else cu.shape[0] - 1
    shape = (sequences, kept, dim, v.shape[-1])
    scale = 1.0 if scale is None else scale
    if scan is None:
        before = None if state is None else initial_memory(state, shape, v)
        known = track and state is not None and state.transition is not None
        old = _as_matrix(state, cast(Tensor, before)) if known else None
        o, memory, moved = step.delta(q, k, v, beta, g, before, old, scale, track)
        return o, State(memory, UNTRACKED if moved is None else Matrix(moved))
    memory = initial_memory(state, shape, v)
    if track:
        # The transition is what becomes of the columns of a memory to which nothing is added.
        memory = torch.cat([memory, _as_matrix(state, memory)], -1)
    o, memory = scan(q, k, v, beta, g, memory, cu, scale)
    memory, product = memory.tensor_split([v.shape[-1]], -1)
    return o.to(dtype), State(memory, Matrix(product) if track else UNTRACKED)


def _as_matrix(state: State | None, memory: Tensor) -> Tensor:
    """The transition of `state` as (B, heads, D, D) beside `memory`."""
    eye = torch.eye(memory.shape[-2], dtype=memory.dtype, device=memory.device)
    transition = None if state is None else state.transition
    if isinstance(transition, Matrix):
        matrix = transition.value.to(memory.dtype)
    elif isinstance(transition, Tensor):
        matrix = transition.to(memory.dtype).exp() * eye
    else:
        matrix = eye
    return matrix.expand(*memory.shape[:2], *eye.shape)


def scan_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, memory: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Outputs and last memory of the recurrence, chunk by chunk; shapes as for `scan_tokens`."""
    groups, width, outputs = k.shape[1], v.shape[-1], []
    # Columns beyond the values' are carried along and never written.
    carried = memory.shape[-1] - width
    memory = memory.unflatten(1, (groups, -1))
    for stretch, *parts in Stretch.cover((q, k, v, beta, g), chunk, groups):
        queries, keys, values, share = (stretch.cut(x) for x in parts[:4])
        share, decay = share[..., None], stretch.decay(parts[4])
        system = share * decay.scores(keys, keys).tril(-1)
        # A NaN in a value must reach no earlier one, so the solver never sees it.
        spoilt = (values.detach() * 0).cumsum(-2)
        right = _beside(values.nan_to_num(0.0, 0.0, 0.0), decay.from_start(keys)) * share
        own, found = _solve(system, right).tensor_split([width], -1)
        own = own + spoilt
        last = decay.to_end(keys).mT
        own = F.pad(own, (0, carried))
        before, written = [], []
        kept = each_chunk(decay.total, own.shape[2])
        for left, more, erased, write in zip(kept, own.unbind(2), found.unbind(2), last.unbind(2), strict=True):
            before.append(memory)
            written.append(more - erased @ memory)
            memory = (memory if left is None else left * memory) + write @ written[-1]
        start, own = (torch.stack(x, 2)[..., :width] for x in (before, written))
        o = weigh(decay.scores(queries, keys), own)
        outputs.append(stretch.join(o + grouped(decay.from_start(queries), start)))
    return torch.cat(outputs, 2), memory.flatten(1, 2)


def _beside(x: Tensor, y: Tensor) -> Tensor:
    """[x, y] along the channels; the heads of either may be 1."""
    heads = max(x.shape[3], y.shape[3])
    return torch.cat([z.expand(*z.shape[:3], heads, *z.shape[4:]) for z in (x, y)], -1)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """(I + system)^-1 right for a strictly lower triangular system; the heads of either may be 1."""
    heads = max(system.shape[3], right.shape[3])
    system, right = (x.expand(*x.shape[:3], heads, *x.shape[4:]) for x in (system, right))
    return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


def scan_tokens(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, memory: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, one token after another.

    q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv), beta (B, heads, N), g None, (1, heads, 1), (B, heads, N) or
    (B, heads, N, D), memory (B, heads, D, >= Dv), heads each Hkv or H -> o (B, H, N, Dv) and the last memory. Columns
    of the memory beyond Dv are written with zeros. `chunk` is ignored.
    """
    heads, width, outputs = memory.shape[1], v.shape[-1], []
    k, v, beta = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v, beta))
    v = F.pad(v, (0, memory.shape[-1] - width))
    if g is not None:
        g = g.exp().expand(-1, -1, q.shape[2], *g.shape[3:]).repeat_interleave(heads // g.shape[1], 1)
    for t in range(q.shape[2]):
        if g is not None:
            memory = memory * (g[:, :, t, :, None] if g.ndim == 4 else g[:, :, t, None, None])
        key = k[:, :, t, :, None]
        memory = memory + key * (beta[:, :, t, None, None] * (v[:, :, t, None, :] - key.mT @ memory))
        outputs.append((q[:, :, t].unflatten(1, (heads, -1)) @ memory[..., :width]).flatten(1, 2))
    return torch.stack(outputs, 2), memory


Scan = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", Tensor, int], tuple[Tensor, Tensor]]
SCANS: dict[str, Scan] = {"auto": scan_chunks, "reference": scan_tokens, "chunked": scan_chunks}
BACKENDS = (*SCANS, "triton")
# As `kernels.delta_scan`: of q, k, v, beta, g, memory, bounds of packed sequences, scale.
Pass = Callable[
    [Tensor, Tensor, Tensor, Tensor, "Tensor | None", Tensor, "Tensor | None", float], "tuple[Tensor, Tensor]"
]


def _in_products(backend: str, chunk: int) -> Pass:
    """A scan of plain tensors in the working dtype, of sequences of one length."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, memory: Tensor, cu: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        real = working_dtype(q)
        q, k, v, beta = (x.to(real) for x in (q, k, v, beta))
        q = q if scale == 1 else q * scale
        # One token by itself is the least work.
        scan = scan_tokens if backend == "auto" and q.shape[2] == 1 else SCANS[backend]
        return scan(q, k, v, beta, None if g is None else g.to(real), memory, chunk)

    return run
