"""Triton kernels of the scans: linear attention with any gate, the delta rule, the selective scan; and their gradients.

Linear attention: one walk over the tokens, state in registers, computes it, and with other operands each of the three
gradients (`walk`). Before, a decay a channel is put into queries and keys (`prepare`); afterwards what flowed past each
token becomes the gradient of the gate (`flows`). Where sequences and heads are too few for the GPU, sequences are cut
into stretches, whose states a walk without outputs finds first (`join`). With D = Dv channels of e bytes a token costs
4 e D forward and 12 e D backward, half as much more in stretches; a decay a channel 8 e D more and its own bytes, and
the gradient of one a state every 256 tokens.

The delta rule (`delta`) solves the system of each chunk beforehand and walks likewise, also in stretches; the selective
scan (`selective`) goes from token to token, a warp for 32 channels. One token, as a decoder has it, is a kernel of its
own for each state (`step`). No sum depends on the order of programs, so equal inputs give equal bits. The
kernels of a first call are compiled side by side (`abreast`, `ready`).
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_CHANNELS = 256
INSTALLED = importlib.util.find_spec("triton") is not None


def unable(x: Tensor) -> list[str]:
    """Why no kernel runs on what x is."""
    found = []
    if not INSTALLED:
        found.append("triton is missing; pip install triton")
    if x.device.type != "cuda" and not interpreted():
        found.append(f"its kernels are compiled for CUDA, not for {x.device.type}")
    if x.dtype == torch.float64:
        found.append("it computes in at most float32")
    return found


def reasons(v: Tensor, features: int, causal: bool) -> list[str]:
    """Why the kernels cannot run a problem with so many features a key; empty when they can."""
    found = unable(v)
    if v.device.type != "cuda" and v.dtype == torch.bfloat16:
        found.append("the interpreter of triton forms no products in bfloat16")
    if not causal:
        found.append("without a causal order there is nothing to scan, and two matrix products do")
    if max(features, v.shape[3]) > MOST_CHANNELS:
        found.append(f"more than {MOST_CHANNELS} channels do not fit its tiles, got {features} and {v.shape[3]}")
    return found


def delta_reasons(v: Tensor, features: int, log_decay: Tensor | None) -> list[str]:
    """Likewise for the delta rule."""
    found = reasons(v, features, True)
    if log_decay is not None and log_decay.ndim == 4:
        found.append("a decay a channel of keys has no place in its triangular system; pass one decay a token")
    return found


def selective_reasons(x: Tensor, complex_states: bool) -> list[str]:
    """Likewise for the selective scan."""
    return unable(x) + (["its states are real"] if complex_states else [])


def takes(backend: str, x: Tensor, why: list[str], widest: int = 2) -> bool:
    """Whether the kernels run a problem: they are named, which raises for `why` they cannot, or "auto" takes them.

    "auto" takes them on a GPU, for x of at most `widest` bytes a number.
    """
    if backend == "triton" and why:
        raise ValueError(f"backend: got 'triton', which cannot run this: {'; '.join(why)}. Pass 'auto'")
    return not why and (backend == "triton" or (backend == "auto" and x.is_cuda and x.dtype.itemsize <= widest))


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def make_ready() -> None:
    """Before kernels are imported to be compiled."""
    if not interpreted() and not torch.compiler.is_compiling():  # whose tracer follows no thread
        from saccade.scan.kernels.ready import begun

        begun()


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    strength: Tensor | None,
    memory: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    mass: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What queries read (B, H, N, Dv), the mass (B, H, N, 1) that they read with it or None, and the last memory.

    v may have more heads than k, and then q as many as k or as v. q and k are taken in the dtype of v; where they come
    in another, or with mass, what they read is float32. g: None, (1, heads, 1), (B, heads, N) or (B, heads, N, D).
    strength: (B, heads of v, N) or None. memory (sequences, heads, D, Dv), float32, with mass one column more, the sum
    of keys.
    """
    make_ready()
    from saccade.scan.kernels import ops

    wide = mass or q.dtype != v.dtype
    if strength is not None and (g is None or g.ndim == 4):  # no factor a token is there that it could go into
        k, strength = k.repeat_interleave(v.shape[1] // k.shape[1], 1) * strength.unsqueeze(-1), None
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v))
    if g is not None:
        g = g if g.dtype != torch.float64 else g.float()
        if g.ndim == 3:
            g = g.expand(q.shape[0], -1, q.shape[2])
        elif g.stride(3) != 1:
            g = g.contiguous()
    if strength is not None:
        strength = strength if strength.dtype != torch.float64 else strength.float()
    sums = None
    if mass:
        memory, sums = memory[..., :-1], memory[..., -1].contiguous()
    o, found, memory, sums, _, _ = ops.linear_scan(
        q, k, v, g, strength, memory.contiguous(), sums, cu_seqlens, scale, mass, wide
    )
    if not mass:
        return o, None, memory
    return o, found.unsqueeze(-1), torch.cat([memory, sums.unsqueeze(-1)], -1)


def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What queries read of a memory under the delta rule, (B, H, N, Dv), and the last memory.

    beta (B, heads, N), g None, (1, heads, 1) or (B, heads, N), memory (sequences, heads, D, >= Dv), float32: columns
    beyond Dv are written with zeros.
    """
    make_ready()
    from saccade.scan.kernels import delta_ops

    width, carried = v.shape[3], memory.shape[3] - v.shape[3]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v))
    if carried:
        v = F.pad(v, (0, carried))
    beta = beta if beta.dtype != torch.float64 else beta.float()
    if g is not None:
        g = (g if g.dtype != torch.float64 else g.float()).expand(q.shape[0], -1, q.shape[2])
    o, memory, _ = delta_ops.delta_scan(q, k, v, beta, g, memory.contiguous(), cu_seqlens, scale)
    return o[..., :width], memory
