"""attend: softmax attention over the keys that a pattern, a plan or a router admits."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from saccade.softmax.backends import ORDER, Choice, choose, reasons
from saccade.softmax.normalizers import Normalizer
from saccade.softmax.problem import Bias, Problem
from saccade.where import Pattern, Plan, Router


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Pattern | Plan | Router | None = None,
    *,
    scale: float | None = None,
    bias: Bias | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    normalizer: str | Normalizer = "softmax",
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Pattern | Plan | Router | None = None,
    *,
    scale: float | None = None,
    bias: Bias | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    normalizer: str | Normalizer = "softmax",
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Pattern | Plan | Router | None = None,
    *,
    scale: float | None = None,
    bias: Bias | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    normalizer: str | Normalizer = "softmax",
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the keys that `where` admits.

        o_i = sum_j p_ij v_j,   p_i = normalizer(s_i) over the j that i may see,
        s_ij = c tanh(scale q_i . k_j / c) + bias_ij

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) -> o (B, H, N, Dv), in q's dtype. Query head h reads key head h
    // (H // Hkv); queries are the last N of M positions. Scores are formed in float32 at least. A row that sees nothing
    gives zeros. The result is exact whatever the tiles of the backend; NaN and infinity reach only the rows that see
    them, on the tiles and reference backends.

    where: a pattern, a Plan or a Router (default: every key). scale: factor of the scores (default D**-0.5). bias: (q
    positions, k positions) -> (H or 1, n, m), see `RelativeTable`, `Alibi`, `FromCoordinates`. sink: (H,), a logit a
    head that takes its share of the softmax and has no value. softcap: c (default: no cap). normalizer: "softmax",
    "entmax", "sigmoid" or an object (`Entmax(2.0)`). cu_seqlens: int32 (S + 1,), packs S sequences into B = 1; `where`
    is then meant inside each. return_lse: also return lse (B, H, N), float32 at least: log sum_j exp(s_ij), sink
    included, -inf for a row that sees nothing. backend: "auto", or one of "reference", "tiles", "sdpa", "flex", "fa4",
    "triton", "hopper", which runs or says why it cannot, and never falls back; `explain` tells what each says.

    Cost: the pairs that `where` lists, in tiles, times D + Dv; memory of one piece of them, no N x M tensor (reference
    alone forms it). Differentiable in q, k, v, sink and the parameters of bias. Errors: ValueError or TypeError that
    names the argument.

    >>> import torch
    >>> from saccade.where import Causal, Sinks, Window
    >>> q, k, v = torch.randn(3, 1, 2, 100, 16)
    >>> attend(q, k, v, Causal() & (Window(16) | Sinks(4))).shape
    torch.Size([1, 2, 100, 16])
    """
    problem = Problem.of(
        q,
        k,
        v,
        where,
        scale=scale,
        bias=bias,
        sink=sink,
        softcap=softcap,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        return_lse=return_lse,
    )
    if torch.compiler.is_compiling():
        from saccade.softmax import traced

        o, lse = traced.run(problem, backend)
    else:
        o, lse = choose(backend, problem).run(problem)
    if not return_lse:
        return o
    assert lse is not None
    return o, lse


def explain(
    q: Tensor, k: Tensor, v: Tensor, where: Pattern | Plan | Router | None = None, **options: Any
) -> dict[str, list[str]]:
    """Every backend's answer to a call of `attend`: an empty list when it can run it, else its reasons.

    Takes what `attend` takes, without `backend`. See also `which` and `why`.

    >>> import torch
    >>> from saccade.where import Causal, Window
    >>> x = torch.randn(1, 1, 8, 4)
    >>> explain(x, x, x, Causal() & Window(2))["tiles"]
    []
    """
    problem = Problem.of(q, k, v, where, **options)
    return {name: reasons(name, problem) for name in ORDER}


def which(q: Tensor, k: Tensor, v: Tensor, where: Pattern | Plan | Router | None = None, **options: Any) -> str:
    """The name of the backend that `auto` takes for a call of `attend`.

    >>> import torch
    >>> x = torch.randn(1, 1, 8, 4)
    >>> which(x, x, x)
    'sdpa'
    """
    return choose("auto", Problem.of(q, k, v, where, **options)).name


def why(q: Tensor, k: Tensor, v: Tensor, where: Pattern | Plan | Router | None = None, **options: Any) -> str:
    """Which backend `auto` takes for a call of `attend`, and why, in words.

    On a GPU whose compute capability has a table of measured rates (`saccade.softmax.measure`): the estimated time of
    every backend that can run the call, and that of attention to all keys; else the first backend that can. Then the
    reasons of those that cannot.

    >>> import torch
    >>> x = torch.randn(1, 1, 8, 4)
    >>> print(why(x, x, x, softcap=3.0))
    tiles, the first of the order that can; no rates were measured for a cpu
    not sdpa: it knows no softcap
    """
    problem = Problem.of(q, k, v, where, **options)
    return Choice.of(problem).explained(problem)
