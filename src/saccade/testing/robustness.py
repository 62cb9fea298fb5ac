"""Does it hold in a hostile place? Poisoned memory, odd strides, NaN, and callers who err."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.contract import Attention
from saccade.testing.ambient import poisoned, restore, seeded, settings
from saccade.testing.budget import same_bits
from saccade.testing.gradients import differentiate
from saccade.testing.registry import named
from saccade.testing.subject import Subject


@named()
def poisoned_buffers(subject: Subject) -> None:
    """Nothing is read before it is written: with memory full of NaN the output is right and the gradients finite."""
    truth = subject.truth
    with poisoned():
        module, inputs = subject.build(), subject.inputs()
        with torch.no_grad():
            subject.agrees(module(*inputs), "output in poisoned memory")
        found = differentiate(module, inputs, subject.names, module, torch.ones_like(truth))
    bad = [name for name, gradient in found.items() if not gradient.isfinite().all()]
    assert not bad, f"in poisoned memory the gradients of {', '.join(bad)} are not finite"


@named()
def non_contiguous(subject: Subject) -> None:
    """Strided and transposed views of the inputs give the same output."""

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)

    with torch.no_grad():
        for view in (strided, transposed):
            subject.agrees(subject.module(*map(view, subject.inputs())), f"output of {view.__name__} inputs")


@named()
def determinism(subject: Subject) -> None:
    """In evaluation mode two calls agree bitwise, whatever the global random numbers are."""
    module, inputs, found = subject.build(torch.float32), subject.inputs(torch.float32), []
    for seed in (1, 2):
        with seeded(seed), torch.no_grad():
            found.append(module(*inputs))
    assert same_bits(*found), "two calls with the same inputs differ; in evaluation mode nothing may be drawn or kept"


@named()
def no_mutation(subject: Subject) -> None:
    """A call changes neither its inputs, nor parameters and buffers, nor the global torch settings."""
    module, inputs = subject.build(), subject.inputs()
    tensors = {
        **dict(zip(subject.names, inputs, strict=True)),
        **dict(module.named_parameters()),
        **dict(module.named_buffers()),
    }
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    around = settings()
    module(*inputs)
    disturbed = restore(around)
    assert not disturbed, f"a call changed the global torch settings: {', '.join(disturbed)}"
    after = {**tensors, **dict(module.named_parameters()), **dict(module.named_buffers())}
    changed = [name for name, tensor in after.items() if name not in before or not same_bits(tensor, before[name])]
    assert not changed, f"a call changed or added {', '.join(changed)}"


@named(applies=lambda subject: issubclass(subject.cls, Attention))
def nan_spread(subject: Subject) -> None:
    """A NaN in one value row is neither swallowed by a query that reads it nor carried further than by the oracle."""
    module, (q, k, v) = subject.module, subject.inputs()
    for j in sorted({0, subject.case.length // 2, subject.case.length - 1}):
        moved, spoilt = v.clone(), v.clone()
        moved[0, 0, j] += 2.0**64  # large enough to show through the smallest weight
        spoilt[0, 0, j] = torch.nan
        with torch.no_grad():
            reads = (module.oracle(q, k, moved) != subject.truth).any(-1)  # (B, H, N)
            carried = module.oracle(q, k, spoilt).isnan().any(-1)
            found = module(q, k, spoilt).isnan().any(-1)
        swallowed, leaked = reads & carried & ~found, found & ~reads & ~carried
        for rows, what in ((swallowed, "swallowed"), (leaked, "carried too far")):
            assert not rows.any(), (
                f"a NaN in v[0, 0, {j}] is {what} at (batch, head, token) {rows.nonzero()[:4].tolist()}"
            )


def _refuses(argument: str, what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except (ValueError, TypeError) as error:
        message = str(error)
        assert re.search(rf"\b{re.escape(argument)}\b", message), (
            f"{what}: the error does not name {argument}: {message}"
        )
        return
    except Exception as error:
        raise AssertionError(
            f"{what}: got {type(error).__name__} ({error}); raise a ValueError or TypeError that names {argument}"
        ) from error
    raise AssertionError(f"{what}: accepted in silence; raise a ValueError or TypeError that names {argument}")


@named()
def bad_input(subject: Subject) -> None:
    """Wrong shapes, dtypes, devices, grids, cu_seqlens and parameters meet one clear error that names the argument."""
    for argument, what, call in (*_wrong_inputs(subject), *_wrong_parameters(subject)):
        _refuses(argument, what, call)


Wrong = Iterator[tuple[str, str, Callable[[], Any]]]


def _wrong_inputs(subject: Subject) -> Wrong:
    """(argument at fault, what is wrong with it, the call) for each way to hand in bad tensors."""
    module, inputs, names = subject.module, subject.inputs(), subject.names

    def spoil(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: module(*(change(x) if i == index else x for i, x in enumerate(inputs)))

    for index, name in enumerate(names):
        yield name, f"{name} of rank {inputs[index].ndim - 1}", spoil(index, lambda x: x[0])
        yield name, f"{name} of integers", spoil(index, lambda x: x.long())
    yield names[0], "inputs without a token", lambda: module(*(x[..., :0, :] for x in inputs))
    for index, name in enumerate(names[:2]):  # values may have a width of their own
        yield name, f"{name} with a channel more", spoil(index, lambda x: torch.cat([x, x[..., :1]], -1))
    for index, name in enumerate(names[1:], 1):
        yield name, f"{name} of another dtype", spoil(index, lambda x: x.float())
        yield name, f"{name} on another device", spoil(index, lambda x: x.to("meta"))
        yield name, f"{name} of another batch", spoil(index, lambda x: torch.cat([x, x]))
        yield name, f"{name} with a head more", spoil(index, lambda x: torch.cat([x, x[:, :1]], 1))
    if subject.case.dims.grid is not None:
        longer = [torch.cat([x, x[..., :1, :]], -2) for x in inputs]
        yield names[0], "a token more than the grid has", lambda: module(*longer)
    if subject.cls.can_varlen():
        n = subject.case.length
        for what, ends in (("beyond the last token", [0, n + 1]), ("with an empty sequence", [0, 0, n])):
            cu_seqlens = torch.tensor(ends, dtype=torch.int32)
            yield "cu_seqlens", f"cu_seqlens {what}", partial(module, *(x[:1] for x in inputs), cu_seqlens=cu_seqlens)


def _wrong_parameters(subject: Subject) -> Wrong:
    """Likewise a fraction for each integer parameter, and an unknown name for each textual one."""
    for name, default in subject.cls.params().items():
        if isinstance(default, int | str) and not isinstance(default, bool):
            wrong: Any = "no such thing" if isinstance(default, str) else 2.5
            params = {**subject.case.params, name: wrong}
            yield name, f"{name}={wrong!r}", partial(subject.cls, subject.case.dims, **params)
