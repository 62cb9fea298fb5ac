"""`attend` inside a graph that is being captured by torch.compile or torch.export.

What no value decides, the choice of the backend and the plan, is settled while the graph is traced and stands in it as
constants: the graph is specialised to the sizes and to the pattern. What is left is one operator (`kernels.ops`,
`kernels.hopper_ops`) or PyTorch's own attention; on a GPU "auto" chooses among these, if one of them can. A pattern may
be made inside the graph; a plan comes from outside of it.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.compiler import assume_constant_result
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from saccade.softmax.backends import Choice, choose, reasons
from saccade.softmax.backends import backend as named
from saccade.softmax.bias import RelativeTable
from saccade.softmax.normalizers import Softmax
from saccade.softmax.problem import Bias, Problem
from saccade.where import Plan

Facts = tuple[Any, ...]
WHOLE = ("sdpa", "triton", "hopper")  # what a graph can hold, the first without lse


def run(problem: Problem, backend: str) -> tuple[Tensor, Tensor | None]:
    """(o, lse) of a problem whose q, k and v stand for values; the graph ends where another backend is called."""
    where = problem.where if isinstance(problem.where, Plan) else key_of(problem.where)
    facts = _facts(problem)
    name = _choice(where, facts, backend)
    if name == "triton" and isinstance(problem.normalizer, Softmax):
        from saccade.softmax import triton

        return triton.call(problem, triton.Settled(*_settled(name, where, facts)))
    if name == "hopper":
        from saccade.softmax import hopper

        return hopper.call(problem, hopper.Settled(*_settled(name, where, facts)))
    if name == "sdpa" and not problem.needs_lse:
        grouped = problem.q.shape[1] != problem.k.shape[1]
        causal = problem.is_causal and problem.q.shape[2] > 1
        o = torch.nn.functional.scaled_dot_product_attention(
            problem.q, problem.k, problem.v, is_causal=causal, scale=problem.scale, enable_gqa=grouped
        )
        return o, None
    return _outside(problem, name)


@torch.compiler.disable
def _outside(problem: Problem, name: str) -> tuple[Tensor, Tensor | None]:
    """The other backends read plans on the host, so the graph ends before them and goes on after."""
    return choose(name, problem).run(problem)


def _facts(problem: Problem) -> Facts:
    """Constants that the choice and the plan follow from; tensors stand for their shape, type and need of gradients."""
    sizes = tuple([tuple([operator.index(size) for size in x.shape]) for x in (problem.q, problem.k, problem.v)])
    grads = tuple([x.requires_grad for x in (problem.q, problem.k, problem.v)])
    sink = None if problem.sink is None else problem.sink.requires_grad
    normalizer = key_of(problem.normalizer)
    options = (problem.scale, _kind(problem.bias), sink, problem.softcap, normalizer, problem.needs_lse)
    return (sizes, grads, torch.is_grad_enabled(), problem.q.dtype, str(problem.q.device), *options)


def _kind(bias: Bias | None) -> Any:
    """What the plan and the choice need of a bias: its class, and of a table the arguments that it was made from."""
    if isinstance(bias, RelativeTable):
        sizes = (operator.index(bias.table.shape[0]), bias.extents, bias.grid, bias.step)
        return (RelativeTable, sizes, bias.table.requires_grad)
    return None if bias is None else (type(bias), (), False)


def _like(kind: Any) -> Bias | None:
    """A bias of that kind, whose values are not its own."""
    if kind is None:
        return None
    made, sizes, grad = kind
    return made(*sizes[:3], step=sizes[3]).requires_grad_(grad) if sizes else object.__new__(made)


def key_of(value: Any) -> Any:
    """A pattern, or another frozen dataclass, as nested tuples of its class and its fields: a tracer that builds one
    inside a graph knows these, not the object.
    """
    if hasattr(type(value), "__dataclass_fields__"):
        fields = [key_of(getattr(value, name)) for name in type(value).__dataclass_fields__]
        return (type(value), tuple(fields))
    return tuple([key_of(item) for item in value]) if isinstance(value, tuple) else value


def object_of(key: Any) -> Any:
    """What `key_of` has taken apart.

    >>> from saccade.where import Causal, Window
    >>> object_of(key_of(Causal() & Window(3))) == Causal() & Window(3)
    True
    """
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], type):
        kind: Any = key[0]
        made: Any = object.__new__(kind)
        for name, value in zip(kind.__dataclass_fields__, key[1], strict=True):
            object.__setattr__(made, name, object_of(value))
        return made
    return tuple([object_of(item) for item in key]) if isinstance(key, tuple) else key


def _problem(where: Any, facts: Facts) -> Problem:
    """A problem of these facts, whose tensors hold a single zero each."""
    sizes, grads, _, dtype, device, scale, bias, sink, softcap, normalizer, needs_lse = facts

    def stand_in(size: tuple[int, ...], grad: bool) -> Tensor:
        return torch.zeros((), dtype=dtype, device=device).expand(size).requires_grad_(grad)

    q, k, v = (stand_in(size, grad) for size, grad in zip(sizes, grads, strict=True))
    own = None if sink is None else torch.zeros(sizes[0][1], device=device, requires_grad=sink)
    where = where if isinstance(where, Plan) else object_of(where)
    return Problem(q, k, v, where, scale, _like(bias), own, softcap, object_of(normalizer), needs_lse)


@assume_constant_result
def _choice(where: Any, facts: Facts, backend: str) -> str:
    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch.set_grad_enabled(facts[2]):
        problem = _problem(where, facts)
        whole = WHOLE[problem.needs_lse :] if backend == "auto" and problem.q.device.type == "cuda" else ()
        able = [name for name in whole if not reasons(name, problem)]
        return Choice.of(problem, able).name if able else choose(backend, problem).name


@assume_constant_result
def _settled(name: str, where: Any, facts: Facts) -> tuple[Any, ...]:
    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch.set_grad_enabled(facts[2]):
        return tuple(cast(Any, named(name)).settle(_problem(where, facts)))
