"""The steps as operators of PyTorch, opaque to compilers and traceable by their shapes; sizes and grids.

    saccade::linear_step(q, k, v, g, before, old, scale, mass, wide, track, ratio, least) -> (o, after, grown)
    saccade::delta_step(q, k, v, beta, g, before, old, scale, track) -> (o, after, product)
    saccade::selective_step(x, delta, a, b, c, bias, softplus, direct, z, before, old, track) -> (y, after, grown)

The third result is empty without `track`; `step_kernels` has the shapes. wide: o in float32. A memory with a mass has
its columns one after another, each from a multiple of 16 numbers on, so that the mass is a line of its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saccade.operators import operator
from saccade.scan.kernels import interpreted
from saccade.scan.kernels.delta_launch import delta_heads
from saccade.scan.kernels.launch import padded, state_heads
from saccade.scan.kernels.step_kernels import delta_step as delta_kernel
from saccade.scan.kernels.step_kernels import linear_step as linear_kernel
from saccade.scan.kernels.step_kernels import selective_step as selective_kernel
from saccade.scan.kernels.tiles import Heads

COLUMNS = 64  # of a memory that a program takes at most
ENTRIES = 16384  # of it that a program holds
PER_THREAD = 64  # of those
ROWS = 256  # of a memory with that many features at a time
FEW = 1024  # entries of a program of many small states
PER_WARP = 256  # of those, for two sequences; half as many for one
LONG = 128  # states from which on it is half as many too: as measured, three quarters of the time
RUN = 2  # sequences of such a program, which reads A once, and has asked for both states before it uses one
REGISTERS = 64  # or the assembler makes do with fewer, and puts the loads of some after what it makes of others
MANY = 1024  # programs, of which there are so many, or each takes fewer sequences
EVEN = 16  # numbers, a multiple of which a column begins at: the compiler tells no smaller one from an odd number


class Band(NamedTuple):
    """Columns and warps of a program that holds so many rows at once, a power of two.

    A thread has 64 entries of a memory, and so 16 loads under way: with fewer, more of a program's time is spent on
    sums across its warps, while nothing of the state is on its way; with more, too few programs fit.
    """

    columns: int
    warps: int

    @classmethod
    def of(cls, high: int, columns: int, warps: int = 8) -> Band:
        """warps: at most."""
        wide = min(padded(columns), max(16, min(COLUMNS, ENTRIES // high)))
        return cls(wide, max(1, min(warps, high * wide // (32 * PER_THREAD))))


class Plan(NamedTuple):
    """Programs a memory, or a state, and what the compiler is told."""

    programs: int
    options: dict[str, Any]


@lru_cache
def early(device: torch.device) -> dict[str, Any]:
    """A step is launched while the kernel before it ends, where the device can: short ones mostly wait for launches."""
    if interpreted():
        return {"EARLY": False}
    target = triton.runtime.driver.active.get_current_target()
    able = target.backend == "cuda" and target.arch >= 90
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}


def gate_of(g: Tensor | None) -> int:
    return 0 if g is None else g.ndim - 2


def heads(x: Tensor | None, count: int) -> Heads | None:
    """For programs of `count` memories each sequence; a tensor with more heads tells them apart itself."""
    if x is None:
        return None
    batch, head, token = x.stride()[:3]
    return Heads(x, batch, head, token, max(1, count // x.shape[1]))


def lines(x: Tensor | None, count: int, turned: bool) -> Heads | None:
    """A memory by its columns (turned) or rows."""
    return heads(x.mT if turned and x is not None else x, count)


def is_turned(memory: Tensor | None) -> bool:
    return memory is not None and memory.stride(-1) != 1


def up_to(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@lru_cache
def linear_plan(features: int, dv: int, mass: bool, ratio: int, gate: int, fan: int, turned: bool) -> Plan:
    at_once = min(ROWS, 1 << (features.bit_length() - 1))
    room, band = up_to(features, EVEN) if mass else features, Band.of(at_once, dv)
    rest = room - features // at_once * at_once
    return Plan(
        triton.cdiv(dv, band.columns),
        {
            "K": features, "V": dv, "MASS": mass, "PAD": room, "BK": at_once,
            "REST": triton.next_power_of_2(rest) if rest else 0, "BV": band.columns, "GATE": gate, "FAN": fan,
            "RATIO": ratio, "TURNED": turned, "num_warps": band.warps,
            # As many programs as if there were one query, for a few values that are put aside.
            **({"maxnreg": 128} if 2 < fan <= 4 else {}),
        },
    )  # fmt: skip


def _linear_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    scale: float,
    mass: bool,
    wide: bool,
    track: bool,
    ratio: int,
    least: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the results go."""
    (batch, count, _, features), dv, kept = q.shape, v.shape[3], state_heads(v, g)
    o = q.new_empty(batch, count, 1, dv + (mass and not ratio), dtype=torch.float32 if wide else v.dtype)
    if mass:
        room = q.new_empty(batch, kept, dv + 1, up_to(features, EVEN), dtype=torch.float32)
        after = (room if room.shape[3] == features else room[..., :features]).mT
    else:
        after = q.new_empty(batch, kept, features, dv, dtype=torch.float32)
    total = (batch, kept, features if gate_of(g) == 2 else 1, 1) if track else (0,)
    return o, after, q.new_empty(total, dtype=torch.float32)


@operator("saccade::linear_step")
def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    scale: float,
    mass: bool,
    wide: bool,
    track: bool,
    ratio: int,
    least: float,
) -> tuple[Tensor, Tensor, Tensor]:
    o, after, grown = _linear_results(q, k, v, g, before, old, scale, mass, wide, track, ratio, least)
    (batch, kept, features, _), turned = after.shape, is_turned(before)
    programs, options = linear_plan(features, v.shape[3], mass, ratio, gate_of(g), q.shape[1] // kept, turned)
    linear_kernel[(programs * batch, kept)](
        heads(q, kept), heads(k, kept), heads(v, kept), heads(g, kept), lines(before, kept, turned),
        lines(after, kept, mass), heads(o, kept), old, grown if track else None, scale, least, **options,
        **early(q.device),
    )  # fmt: skip
    return o, after, grown


linear_step.register_fake(_linear_results)


@lru_cache
def delta_plan(dim: int, dv: int, track: bool, gate: int, fan: int) -> Plan:
    high = padded(dim)
    band = Band.of(high, dv, warps=8 if fan > 1 else 4)  # one after another, two sums are waited for
    return Plan(
        triton.cdiv(dv, band.columns) + (triton.cdiv(dim, band.columns) if track else 0),
        {
            "K": dim, "V": dv, "BK": high, "BV": band.columns, "GATE": gate, "FAN": fan, "num_warps": band.warps,
        },
    )  # fmt: skip


def _delta_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    scale: float,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the results go."""
    (batch, count, _, dim), width, kept = q.shape, v.shape[3], delta_heads(k, beta, g)
    after = q.new_empty(batch, kept, dim, width, dtype=torch.float32)
    product = q.new_empty((batch, kept, dim, dim) if track else (0,), dtype=torch.float32)
    return q.new_empty(batch, count, 1, width), after, product


@operator("saccade::delta_step")
def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    scale: float,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o, after, product = _delta_results(q, k, v, beta, g, before, old, scale, track)
    batch, kept, dim, width = after.shape
    programs, options = delta_plan(dim, width, track, gate_of(g), q.shape[1] // kept)
    delta_kernel[(programs * batch, kept)](
        heads(q, kept), heads(k, kept), heads(v, kept), heads(beta, kept), heads(g, kept), heads(before, kept),
        heads(after, kept), heads(o, kept), heads(old, kept), heads(product, kept) if track else None, scale,
        **options, **early(q.device),
    )  # fmt: skip
    return o, after, product


delta_step.register_fake(_delta_results)


@lru_cache
def selective_plan(batch: int, width: int, states: int, groups: int, softplus: bool, track: bool) -> Plan:
    """Where transitions are tracked a sequence has twice as much to ask for: one a program, as was measured."""
    wide = triton.next_power_of_2(states)
    block = min(triton.next_power_of_2(width), max(1, FEW // wide))
    several = not track and batch % RUN == 0 and triton.cdiv(width, block) * batch >= RUN * MANY
    per_warp = PER_WARP if several and wide < LONG else PER_WARP // 2
    return Plan(
        triton.cdiv(width, block),
        {
            "S": states, "BC": block, "BS": wide, "SOFTPLUS": softplus, "RUN": RUN if several else 1,
            "ALIKE": width // groups % block == 0,
            "num_warps": max(1, min(8, block * wide // per_warp)), "maxnreg": REGISTERS,
        },
    )  # fmt: skip


def _selective_results(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    softplus: bool,
    direct: Tensor | None,
    z: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the results go."""
    batch, _, width = x.shape
    after = x.new_empty(batch, width, a.shape[1], dtype=torch.float32)
    grown = x.new_empty((batch, width, a.shape[1]) if track else (0,), dtype=torch.float32)
    return x.new_empty(batch, 1, width), after, grown


@operator("saccade::selective_step")
def selective_step(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    softplus: bool,
    direct: Tensor | None,
    z: Tensor | None,
    before: Tensor | None,
    old: Tensor | None,
    track: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, after, grown = _selective_results(x, delta, a, b, c, bias, softplus, direct, z, before, old, track)
    batch, width, states = after.shape
    programs, options = selective_plan(batch, width, states, b.shape[2], softplus, track)
    selective_kernel[(programs, batch // options["RUN"])](
        x, delta, bias, a, b, c, direct, z, before, after, y, old, grown if track else None, width,
        width // b.shape[2], x.stride(0), delta.stride(0), 0 if z is None else z.stride(0), b.stride(0), c.stride(0),
        **options, **early(x.device),
    )  # fmt: skip
    return y, after, grown


selective_step.register_fake(_selective_results)
