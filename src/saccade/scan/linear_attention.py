"""Linear attention: softmax's exp(q . k) replaced by phi(q) . phi(k), so that all past keys fit one matrix."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import check_cu_seqlens, check_qkv, known, positive
from saccade.scan import kernels
from saccade.scan.chunks import Stretch, each_chunk, grouped, weigh
from saccade.scan.features import LogFeatures, Map, feature_map_of
from saccade.scan.kernels import step
from saccade.scan.normalizers import Normalizer, Read, normalizer_of
from saccade.scan.state import UNTRACKED, State, Transition, Untracked, begun, chain


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    strength: Tensor | None = None,
    feature_map: str | Map | tuple[Map, Map] | LogFeatures | None = None,
    normalizer: str | Normalizer | None = None,
    causal: bool = True,
    scale: float | None = None,
    state: State | Untracked | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Attention by a memory that every key is added to and every query reads.

        S_t = exp(g_t) S_(t-1) + s_t phi(k_t) v_t^T,   o_t = scale phi(q_t)^T S_t        (causal)
        S = sum_j s_j phi(k_j) v_j^T,                  o_i = scale phi(q_i)^T S          (not causal)

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv) in q's dtype; causal needs M = N. Query head
    h reads key head h // (H // Hkv). arXiv 2006.16236 (no decay), 2307.08621 (constant), 2312.06635 (vector gate),
    2405.21060 (Mamba-2: q = C, k = B, v = x, s = Delta, g = Delta A). v may have more heads than k, a multiple; then q
    has as many as k or as v, every head of v its own memory, and Hkv below is the number of those.

    log_decay: g <= 0, down to -inf (forget everything); (heads,) constant, (B, heads, N), or (B, heads, N, F) with one
        decay a channel of phi(k); heads is Hkv or H, and H costs one memory a query head (default None: none).
    strength: s (B, Hkv, M), of any sign: how much a token writes (default None: 1). It weighs all that the token adds,
        also to the sum and the number of keys that a normalizer divides by: 2 is as the key twice, 0 as none. "triton"
        takes it up inside under a constant decay or one a token; otherwise it multiplies the keys beforehand, a head of
        v each.
    feature_map: phi: a callable, a pair (queries, keys), a `LogFeatures`, or a name from `features.FEATURE_MAPS`
        (default None: the identity). It sees float32, or float64 for float64.
    normalizer: a `Normalizer` or its name (default None: o as above).
    scale: default None: 1.
    state: what earlier tokens left, as an earlier call returned it (default None: nothing). `UNTRACKED` is nothing too,
        and then, as from any untracked state, the one that is returned has no transition.
    return_state: also return the `State` after the last token. Its memory is (B, heads, F, Dv), with a last column for
        the sum of phi(k) under any normalizer and a last row for sums over v under those that count; its transition
        is the sum of the decays. Under cu_seqlens B is the number of sequences, here and in `state`.
    cu_seqlens: int32, sequences packed into batch 1, each with a memory of its own.
    chunk: tokens handled at once by matrix products; changes the speed, and no result beyond rounding. "triton" has
        sizes of its own.
    backend: "reference" (token by token), "chunked", "triton" (kernels, causal, at most 256 channels, differentiable
        once), or "auto": triton on a GPU in 16 bits where it can, otherwise chunked. One token of which no gradient is
        asked has a kernel of its own in "triton", for any number of channels, and "auto" takes it on a GPU in float32
        too: it reads the state once and writes it once. On a CPU "auto" takes one token by itself.

    Computed in float32 (float64 for float64), whatever autocast says; "triton" rounds the factors of matrix products,
    features among them, to the dtype of q, as dense attention does, and sums in float32. A vector gate is split at the
    middle of ever smaller blocks, so that no factor is ever above 1; on a CPU, rows before which a chunk decays by no
    more than exp(-80) take one product with decays and their inverses. Costs N F Dv + N chunk (F + Dv) multiply-adds;
    memory N (F + Dv + chunk) + N / chunk F Dv with gradients, less without.
    Errors: ValueError and TypeError name the argument; a decay without `causal` is refused, for nothing says which
    token is the older one; a named backend that cannot run says why.

    >>> o = linear_attention(torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1))
    >>> o.flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    _check_heads(q, k, v)
    positive("chunk", chunk)
    known("backend", backend, BACKENDS)
    phi, policy = feature_map_of(feature_map), normalizer_of(normalizer)
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k: got {k.shape[2]} tokens beside q's {q.shape[2]}; causal pairs them one to one, "
            "so pass what came earlier as `state`"
        )
    if log_decay is not None and not causal:
        raise ValueError("log_decay: got one with causal=False; a decay needs an order in time, so drop one of the two")
    _check_policy(policy, phi, log_decay)
    if strength is not None:
        _check_strength(strength, (v.shape[0], v.shape[1], v.shape[2]))
    if cu_seqlens is not None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"cu_seqlens: got q with {q.shape[2]} tokens and k with {k.shape[2]}; they share it")
        cu_seqlens = check_cu_seqlens(cu_seqlens, q.shape[2], q.shape[0])

    state, tracks = begun(state)
    with full_precision(q):
        dtype, logs = q.dtype, isinstance(phi, LogFeatures)
        q, k = _featured(q, k, phi, cu_seqlens)
        once = causal and cu_seqlens is None and step.takes(backend, v.shape[2], state, v, q, k, log_decay, strength)
        fast = once or kernels.takes(backend, v, kernels.reasons(v, k.shape[-1], causal))
        if v.shape[1] > k.shape[1] and (once or logs or not fast):
            q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
        scan = None if once else kernels.scan if fast else _in_products(backend, chunk)
        # The kernels round values themselves.
        v = v if fast else v.to(working_dtype(v))

        def one(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor | None,
            strength: Tensor | None,
            state: State | None,
            cu: Tensor | None = None,
        ) -> tuple[Tensor, State]:
            track = return_state and tracks
            o, after = _dense(q, k, v, g, strength, state, logs, policy, causal, scale, scan, track, cu)
            return o.to(dtype), after

        # The scale of logarithmic features runs on over the sequences, so those are taken one by one.
        if cu_seqlens is None or (fast and not logs):
            o, after = one(q, k, v, log_decay, strength, state, cu_seqlens)
        else:
            o, after = each_sequence(one, q, (k, v), (log_decay, strength), state, cu_seqlens)
    return (o, after) if return_state else o


def _featured(
    q: Tensor, k: Tensor, phi: tuple[Map, Map] | LogFeatures, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Features of q and k, or their logarithms, in the working dtype; where they are q and k themselves, those."""
    if phi != feature_map_of(None):
        maps = (phi.log_query, phi.log_key) if isinstance(phi, LogFeatures) else phi
        # A map may ask where in its sequence a token stands.
        lengths = [q.shape[2]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        q, k = (
            torch.cat([f(part) for part in x.to(working_dtype(x)).split(lengths, 2)], 2)
            if len(lengths) > 1
            else f(x.to(working_dtype(x)))
            for f, x in zip(maps, (q, k), strict=True)
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"feature_map: got {q.shape[-1]} features for queries and {k.shape[-1]} for keys; "
            "a query reads what a key writes"
        )
    return q, k


def full_precision(like: Tensor) -> contextlib.AbstractContextManager:
    """A context in which autocast leaves matrix products on the device of `like` alone."""
    device = like.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def working_dtype(like: Tensor) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.promote_types(like.dtype, torch.float32)


def each_sequence(
    one: Callable[..., tuple[Tensor, State]],
    q: Tensor,
    tokens: tuple[Tensor, ...],
    gates: tuple[Tensor | None, ...],
    state: State | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, State]:
    """`one(q, *tokens, *gates, state)` of every packed sequence; outputs joined by token, states by batch.

    All tensors have their tokens at dim 2; a gate of one dim is a constant and passed on whole.
    """
    ends = check_cu_seqlens(cu_seqlens, q.shape[2], q.shape[0]).tolist()
    if state is not None and state.memory.shape[0] != len(ends) - 1:
        raise ValueError(f"state: got {state.memory.shape[0]} memories for {len(ends) - 1} sequences; pass one each")
    states = [None] * (len(ends) - 1) if state is None else list(state.unbind())
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    cut = [[t] * len(lengths) if t is None or t.ndim == 1 else t.split(lengths, 2) for t in (q, *tokens, *gates)]
    outputs, after = [], []
    for before, *parts in zip(states, *cut, strict=True):
        o, left = one(*parts, before)
        outputs.append(o)
        after.append(left)
    return torch.cat(outputs, 2), State.cat(after)


def check_log_decay(log_decay: Tensor, rows: tuple[int, int, int], groups: int, features: int) -> None:
    """Refuse a decay unless (heads,), (B, heads, N) or (B, heads, N, features); rows (B, H, N), heads groups or H."""
    if not isinstance(log_decay, Tensor) or not log_decay.is_floating_point():
        got = log_decay.dtype if isinstance(log_decay, Tensor) else type(log_decay).__name__
        raise TypeError(f"log_decay: got {got}; pass a floating-point tensor of natural logs <= 0")
    batch, heads, tokens = rows
    for count in (groups, heads):
        if tuple(log_decay.shape) in ((count,), (batch, count, tokens), (batch, count, tokens, features)):
            return
    each = f"{heads}" if heads == groups else f"{groups} or {heads}"
    raise ValueError(
        f"log_decay: got shape {tuple(log_decay.shape)}; pass (heads,), ({batch}, heads, {tokens}) or "
        f"({batch}, heads, {tokens}, {features}) with {each} heads"
    )


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """`check_qkv`, but that v may have more heads than k."""
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k, v)) or v.shape[1] <= k.shape[1]:
        return check_qkv(q, k, v)
    check_qkv(q[:, :1], k[:, :1], v[:, :1])
    heads = q.shape[1], k.shape[1], v.shape[1]
    if v.shape[1] % k.shape[1] or q.shape[1] not in heads[1:]:
        raise ValueError(
            f"v: got {heads[2]} heads beside q's {heads[0]} and k's {heads[1]}; more than k's must be a multiple of "
            "them, and then q needs as many as k or as v"
        )


def _check_strength(strength: Tensor, shape: tuple[int, int, int]) -> None:
    if not isinstance(strength, Tensor) or not strength.is_floating_point():
        got = strength.dtype if isinstance(strength, Tensor) else type(strength).__name__
        raise TypeError(f"strength: got {got}; pass a floating-point tensor, a factor a token")
    if tuple(strength.shape) != shape:
        raise ValueError(f"strength: got shape {tuple(strength.shape)}; pass one factor a key, {shape}")


def initial_memory(state: State | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The memory of `state` in the working dtype of `like` after a check of its shape; zeros when there is none."""
    dtype = working_dtype(like)
    if state is None:
        return like.new_zeros(shape, dtype=dtype)
    if tuple(state.memory.shape) != shape:
        raise ValueError(
            f"state: got a memory {tuple(state.memory.shape)}, these inputs and options keep one of {shape}; "
            "pass a state that a call with the same options returned"
        )
    return state.memory.to(dtype)


def _check_policy(policy: Normalizer | None, phi: tuple[Map, Map] | LogFeatures, log_decay: Tensor | None) -> None:
    if policy is None or not policy.counts:
        return
    name = type(policy).__name__
    if isinstance(phi, LogFeatures):
        raise ValueError(
            f"normalizer: {name} weighs keys against their number, which has no log scale; pass plain features"
        )
    if isinstance(log_decay, Tensor) and log_decay.ndim == 4:
        raise ValueError(
            f"normalizer: {name} counts tokens, and a decay a channel counts them differently; pass (B, H, N)"
        )


def scan_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, memory: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Outputs and last memory of the recurrence, chunk by chunk; shapes as for `scan_tokens`."""
    groups, outputs = k.shape[1], []
    memory = memory.unflatten(1, (groups, -1))
    for stretch, *parts in Stretch.cover((q, k, v, g), chunk, groups):
        queries, keys, values = (stretch.cut(x) for x in parts[:3])
        decay = stretch.decay(parts[3])
        added = decay.to_end(keys).mT @ values
        before = []
        for left, more in zip(each_chunk(decay.total, added.shape[2]), added.unbind(2), strict=True):
            before.append(memory)
            memory = (memory if left is None else left * memory) + more
        o = weigh(decay.scores(queries, keys), values)
        outputs.append(stretch.join(o + grouped(decay.from_start(queries), torch.stack(before, 2))))
    return torch.cat(outputs, 2), memory.flatten(1, 2)


def scan_tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, memory: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The recurrence itself, one token after another.

    q (B, H, N, F), k (B, Hkv, N, F), v (B, Hkv, N, Dv), g None, (1, heads, 1), (B, heads, N) or (B, heads, N, F),
    memory (B, heads, F, Dv) with heads Hkv or H -> o (B, H, N, Dv) and the last memory. `chunk` is ignored.
    """
    heads, outputs = memory.shape[1], []
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    if g is not None:
        g = g.exp().expand(-1, -1, q.shape[2], *g.shape[3:])
    for t in range(q.shape[2]):
        if g is not None:
            memory = memory * (g[:, :, t, :, None] if g.ndim == 4 else g[:, :, t, None, None])
        memory = memory + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t].unflatten(1, (heads, -1)) @ memory).flatten(1, 2))
    return torch.stack(outputs, 2), memory


def scan_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, memory: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """One token, the least work there is; shapes as for `scan_tokens`.

    It reads itself by q . k, as in a chunk: a normalizer then finds that number in its mass too, and it cancels.
    """
    heads = memory.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    if g is not None:
        memory = memory * (g.mT if g.ndim == 4 else g[..., None]).exp()
    queries = q.squeeze(2).unflatten(1, (heads, -1))
    o = torch.addcmul(queries @ memory, queries @ k.mT, v)
    return o.flatten(1, 2).unsqueeze(2), torch.addcmul(memory, k.mT, v)


Scan = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Tensor, int], tuple[Tensor, Tensor]]
SCANS: dict[str, Scan] = {"auto": scan_chunks, "reference": scan_tokens, "chunked": scan_chunks}
BACKENDS = (*SCANS, "triton")
# As `kernels.scan`: of q, k, v, g, strength, memory, bounds of packed sequences, scale, whether to read the sum of keys
# too.
Pass = Callable[
    [Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", Tensor, "Tensor | None", float, bool],
    "tuple[Tensor, Tensor | None, Tensor]",
]


def _in_products(backend: str, chunk: int) -> Pass:
    """A scan of plain tensors, in which the sum of keys is what values of 1 add up to."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        strength: Tensor | None,
        memory: Tensor,
        cu: Tensor | None,
        scale: float,
        mass: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        q, k, g = q.to(v.dtype), k.to(v.dtype), None if g is None else g.to(v.dtype)
        q = q if scale == 1 else q * scale
        scan = scan_token if backend == "auto" and q.shape[2] == 1 else SCANS[backend]
        written = _written(v, strength, mass)
        o, memory = scan(q, k, written, g, memory, chunk)
        if not mass:
            return o, None, memory
        return *o.split([v.shape[-1], 1], -1), memory

    return run


def _written(v: Tensor, strength: Tensor | None, mass: bool) -> Tensor:
    """What tokens write beside a key: values, with `mass` a 1 for the sum of keys, times their strength."""
    if mass:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return v if strength is None else v * strength.to(v.dtype).unsqueeze(-1)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    strength: Tensor | None,
    state: State | None,
    logs: bool,
    policy: Normalizer | None,
    causal: bool,
    scale: float | None,
    scan: Pass | None,
    track: bool,
    cu: Tensor | None,
) -> tuple[Tensor, State]:
    """`linear_attention` of features, or their logarithms, of sequences of one length or of packed ones.

    scan: None for the kernel of one token. track: the transition after the last token is wanted.
    """
    batch, heads, groups, features = q.shape[0], max(q.shape[1], v.shape[1]), v.shape[1], k.shape[-1]
    real, sequences = working_dtype(v), batch if cu is None else cu.shape[0] - 1
    scale = 1.0 if scale is None else scale
    if not logs and state is not None and state.shift is not None:
        raise ValueError(
            "state: got one with a log scale, which plain features have not; pass the feature_map that made it"
        )
    g = None
    if log_decay is not None:
        check_log_decay(log_decay, (batch, heads, q.shape[2]), groups, features)
        g = log_decay[None, :, None] if log_decay.ndim == 1 else log_decay
    kept = groups if g is None else g.shape[1]
    mass, counts = policy is not None, policy is not None and policy.counts
    shape = (sequences, kept, features + counts, v.shape[-1] + mass)
    nothing = scan is None and state is None  # which that kernel need not read
    given = None if nothing else initial_memory(state, shape, v)
    past: Transition = UNTRACKED if not track else None if state is None else state.transition
    kind = (batch, kept, features if log_decay is not None and log_decay.ndim == 4 else 1, 1)
    # The kernel of one token adds up decays of one shape itself, but for those of a log scale.
    adds = scan is None and track and g is not None and not logs and (past is None or _is_decay(past, kind))
    if track and g is not None and not adds:
        past = chain(past, _total(g.to(real), batch, q.shape[2], cu))

    undo, shift = None, None
    if logs:
        ceiling = q.detach().amax(-1, keepdim=True)
        q = (q - ceiling).exp()
        running, rise = _running_scale(k, state, causal)
        k = (k - running).exp()
        if causal:
            # The scale rises with the keys, which is one more decay of the memory.
            rise = rise.repeat_interleave(kept // groups, 1)
            g = rise if g is None else g + (rise[..., None] if g.ndim == 4 else rise)
        undo = ceiling + running.repeat_interleave(heads // groups, 1)
        shift = running[:, :, -1:].repeat_interleave(kept // groups, 1)

    total: Tensor | None = None
    found: Tensor | None = None
    if causal:
        together = counts and q.shape[2] == 1
        if together:
            # One more channel, which every key writes and no query reads, sums up the values.
            q, k = F.pad(q, (0, 1)), F.pad(k, (0, 1), value=1.0)
        if scan is None:
            k = k if strength is None else k * strength.unsqueeze(-1)
            old = cast("Tensor | None", past) if adds else None
            ratio = step.Ratio.of(policy if undo is None or (policy is not None and policy.scale_free) else None)
            divided = ratio.kind > 0
            wide = undo is not None or (policy is not None and not divided)
            o, found, memory, added = step.linear(q, k, v, g, given, old, scale, mass, wide, adds, ratio)
            past = added if adds else past
            if divided:
                return o, State(memory, past, shift)
        else:
            begin = cast(Tensor, given)
            o, found, memory = scan(q, k, v, g, strength, begin[:, :, : k.shape[3]], cu, scale, mass)
            if counts and not together:
                ones = torch.ones_like(v[..., :1])
                every = ones.repeat_interleave(kept // groups, 1)
                read, counted, last = scan(every, ones, v, g, strength, begin[:, :, features:], cu, 1.0, True)
                total = torch.cat([read, cast(Tensor, counted)], -1)
                memory = torch.cat([memory, last], 2)
        if together:
            total = memory[:, :, features:]
        after = State(memory, past, shift)
    else:
        q, k = q.to(real), k.to(real)
        written = _written(v, strength, mass)
        memory = k.mT @ written
        if counts:
            memory = torch.cat([memory, written.sum(2, keepdim=True)], 2)
        after = State(memory, None, shift)
        if state is not None:
            after = State(cast(Tensor, given), state.transition, state.shift).compose(after)
        after = after if track else after.untracked()
        q = q if scale == 1 else q * scale
        o = grouped(q.unflatten(1, (groups, -1)), after.memory[:, :, None, :features]).flatten(1, 2)
        o, found = o.split([v.shape[-1], 1], -1) if mass else (o, None)
        total = after.memory[:, :, features:] if counts else None
    if undo is not None and (policy is None or not policy.scale_free):
        o, found = o * undo.exp(), None if found is None else found * undo.exp()
    if policy is not None:
        if total is not None:
            total = total.repeat_interleave(heads // kept, 1)
        sums = () if total is None else total.split([total.shape[-1] - 1, 1], -1)
        o = policy(Read(o, cast(Tensor, found), *sums))
    return o, after


def _is_decay(transition: Transition, shape: tuple[int, ...]) -> bool:
    """Whether it is one log decay a state, or one a row of it, as `shape` says."""
    return isinstance(transition, Tensor) and transition.dtype == torch.float32 and tuple(transition.shape) == shape


def _total(g: Tensor, batch: int, tokens: int, cu: Tensor | None) -> Tensor:
    """The sum of the decays as a transition, (B, heads, 1, 1) or (B, heads, F, 1); B sequences, if packed."""
    if cu is not None:
        lengths = cu.diff().tolist()
        parts = g.expand(-1, -1, tokens, *g.shape[3:]).split(lengths, 2)
        return torch.cat([_total(part, batch, n, None) for part, n in zip(parts, lengths, strict=True)])
    total = g * tokens if g.shape[2] == 1 else g.sum(2, keepdim=True)
    return total.mT.expand(batch, -1, -1, -1) if g.ndim == 4 else total[..., None].expand(batch, -1, -1, -1)


def _running_scale(f: Tensor, before: State | None, causal: bool) -> tuple[Tensor, Tensor]:
    """The scale of every key, (B, Hkv, N, 1), or one for all, (B, Hkv, 1, 1); and the rise before it as a decay.

    f (B, Hkv, N, F): logarithms of features. The scale is a constant to autograd, for it cancels.
    """
    peak = f.detach().amax(-1)
    if before is None:
        prior = peak[:, :, :1]
    elif before.shift is None:
        prior = torch.zeros_like(peak[:, :, :1])
    else:
        prior = before.shift.detach().unflatten(1, (f.shape[1], -1))[:, :, 0, :, 0]
    if not causal:
        return torch.maximum(prior, peak.amax(2, keepdim=True))[..., None], prior
    running = torch.maximum(prior, peak.cummax(2).values)
    return running[..., None], torch.cat([prior, running[:, :, :-1]], 2) - running
