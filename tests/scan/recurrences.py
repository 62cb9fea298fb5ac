"""The recurrences token by token, as the papers write them, and how a fast path is judged by them."""

from __future__ import annotations

import torch

from saccade.testing.budget import assert_close

HEADS = [(2, 2), (4, 2)]
GATES = ["none", "constant", "scalar", "vector"]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_strength(heads, tokens, batch=2, seed=11):
    """Of either sign, and some of them 0."""
    found = draw(batch, heads, tokens, seed=seed)
    found[:, :, 2::5] = 0.0
    return found


def draw_gate(kind, heads, tokens, dim, batch=2, seed=7):
    """Decays from hardly any to nearly all."""
    shape = {
        "none": None,
        "constant": (heads,),
        "scalar": (batch, heads, tokens),
        "vector": (batch, heads, tokens, dim),
    }
    return None if shape[kind] is None else -draw(*shape[kind], seed=seed).exp()


def per_head(x, heads):
    """(B, Hkv, ...) -> (B, H, ...): query head h takes key head h // (H // Hkv)."""
    group = heads // x.shape[1]
    return torch.stack([x[:, h // group] for h in range(heads)], 1)


def gate_of(g, q, dim):
    """Any form of gate as (B, H, N, D)."""
    batch, heads, tokens = q.shape[:3]
    if g is None:
        return q.new_zeros(batch, heads, tokens, dim)
    if g.ndim == 1:
        g = g[None, :, None].expand(batch, -1, tokens)
    g = per_head(g, heads)
    return g if g.ndim == 4 else g[..., None].expand(*g.shape, dim)


def linear(q, k, v, g=None, memory=None):
    """S <- exp(g) S + k v^T, o = q^T S; returns o and the last S, one a query head."""
    heads, dim = q.shape[1], k.shape[-1]
    k, v, g = per_head(k, heads), per_head(v, heads), gate_of(g, q, dim)
    s = q.new_zeros(q.shape[0], heads, dim, v.shape[-1]) if memory is None else per_head(memory, heads)
    rows = []
    for t in range(q.shape[2]):
        s = torch.einsum("bhd,bhde->bhde", g[:, :, t].exp(), s) + torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(rows, 2), s


def valued(recurrence):
    """A recurrence of values with more heads than keys: head h of them goes with head h // (Hv // Hkv) of those."""

    def call(q, k, v, *rest):
        return recurrence(per_head(q, v.shape[1]), per_head(k, v.shape[1]), v, *rest)

    return call


def strong(recurrence):
    """A recurrence whose last argument is how much each token writes: it is a factor of the key."""

    def call(q, k, v, g, memory, strength):
        return recurrence(q, k * strength.unsqueeze(-1), v, g, memory)

    return call


def delta(q, k, v, beta, g=None, memory=None):
    """S <- (I - beta k k^T) Diag(exp(g)) S + beta k v^T, o = S^T q; returns o and the last S, one a query head."""
    heads, dim = q.shape[1], k.shape[-1]
    k, v, beta, g = per_head(k, heads), per_head(v, heads), per_head(beta, heads), gate_of(g, q, dim)
    s = q.new_zeros(q.shape[0], heads, dim, v.shape[-1]) if memory is None else per_head(memory, heads)
    rows = []
    for t in range(q.shape[2]):
        b, key = beta[:, :, t, None, None], k[:, :, t, :, None]
        s = g[:, :, t].exp()[..., None] * s
        s = s - b * key @ (key.mT @ s) + b * key @ v[:, :, t, None, :]
        rows.append((q[:, :, t, None, :] @ s)[:, :, 0])
    return torch.stack(rows, 2), s


def differentiate(function, tensors, dtype):
    """The outputs of `function` in `dtype`, and the gradient of every tensor under fixed random cotangents."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    outputs = [o for o in function(*leaves) if o is not None]
    cotangents = [draw(*o.shape, seed=100 + i).to(o.dtype) for i, o in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x is not None], cotangents)
    return [o.detach() for o in outputs], list(gradients)


def verify(fast, plain, tensors, *, terms, scale=0.0, dtypes=(torch.float64, torch.float32, torch.bfloat16)):
    """Values and gradients of `fast` against `plain` in float64, with the budget of `plain` in each dtype.

    Both map the tensors to a tuple of outputs, which may be wider than bfloat16. scale: magnitude of sums that cancel.
    """
    for dtype in dtypes:
        given = [None if x is None else x.to(dtype) for x in tensors]
        truth, eager, actual = (
            differentiate(function, given, kind)
            for function, kind in ((plain, torch.float64), (plain, dtype), (fast, dtype))
        )
        for what, exact, rough, found in zip(("output", "gradient"), truth, eager, actual, strict=True):
            largest = max(scale, *(float(x.abs().max()) for x in exact))
            for i, (t, e, a) in enumerate(zip(exact, rough, found, strict=True)):
                assert_close(a.to(dtype), t, e, name=f"{what} {i} in {dtype}", terms=terms, scale=largest)
