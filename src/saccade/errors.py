"""Checks of arguments that every public call shares: one clear error names the argument, what it got, what would do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def positive(name: str, value: Any, *, least: int = 1) -> int:
    """Return `value` as an int >= `least`; bools, floats and strings are refused.

    >>> positive("size", 4)
    4
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}); pass an integer >= {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}; pass an integer >= {least}")
    return value


def part(name: str, value: Any, what: str = "", *, zero: bool = True, most: float = 1) -> float:
    """Return `value` when it is a number from 0 to `most`, 0 itself only if `zero`. what: it is, in words.

    >>> part("ratio", 0.75, "the part of the budget that heads choose", zero=False)
    0.75
    """
    wanted = f"pass a number {'from 0 to' if zero else 'above 0 and up to'} {most}{what and ', '}{what}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}); {wanted}")
    if not (0 <= value <= most) or (value == 0 and not zero):
        raise ValueError(f"{name}: got {value}; {wanted}")
    return value


def per_axis(name: str, value: Any, axes: int, *, least: int = 1) -> tuple[int, ...]:
    """Return `value`, one integer >= `least` or one an axis, as one an axis.

    >>> per_axis("size", 4, 2), per_axis("size", (4, 3), 2)
    ((4, 4), (4, 3))
    """
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name}: got {values} for {axes} {'axis' if axes == 1 else 'axes'}; pass one, or one an axis")
    return tuple(positive(name, each, least=least) for each in values)


def known(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return `value` when it is one of `choices`; otherwise say which there are."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; choose one of {', '.join(choices)}")
    return value


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, head ratio, dtypes and devices of q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}; pass a tensor (batch, heads, tokens, channels)")
        if tensor.ndim != 4:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; pass (batch, heads, tokens, channels)")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got dtype {tensor.dtype}; pass a floating-point tensor")
        if 0 in tensor.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, which is empty; every size must be at least 1")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype} beside q of {q.dtype}; cast them to one dtype")
        if tensor.device != q.device:
            raise ValueError(f"{name}: got device {tensor.device} beside q on {q.device}; move them to one device")
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name}: got batch {tensor.shape[0]} beside q's {q.shape[0]}; expand it to the same batch"
            )
    if k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k: got {k.shape[3]} channels beside q's {q.shape[3]}; queries and keys need the same head_dim"
        )
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(
            f"v: got (heads, tokens) {tuple(v.shape[1:3])} beside k's {tuple(k.shape[1:3])}; they must agree"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: got {k.shape[1]} heads beside q's {q.shape[1]}; query heads must be a multiple of key heads"
        )


def check_cu_seqlens(cu_seqlens: Any, total: int, batch: int) -> Tensor:
    """Return `cu_seqlens` int32 (S + 1,): 0 first, strictly increasing, `total` last; needs batch 1."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{cu_seqlens.dtype}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: got {got}; pass an int32 tensor of cumulative lengths, 0 first")
    if batch != 1:
        raise ValueError(f"cu_seqlens: got batch {batch}; ragged sequences are packed into batch 1")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
        raise ValueError(f"cu_seqlens: got {cu_seqlens.tolist()}; it must run from 0 to the number of tokens, {total}")
    if bool((cu_seqlens.diff() <= 0).any()):
        raise ValueError(f"cu_seqlens: got {cu_seqlens.tolist()}; it must increase strictly (no empty sequences)")
    return cu_seqlens.int()
