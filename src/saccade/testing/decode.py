"""Is one token at a time, or many sequences in one row, the same as the whole?"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.contract import Attention, CachePolicy, Mechanism
from saccade.testing.budget import assert_close, same_bits
from saccade.testing.gradients import gradients_agree
from saccade.testing.registry import named
from saccade.testing.rounding import Eager
from saccade.testing.subject import Subject, outputs


def decode(
    module: Mechanism, inputs: Sequence[Tensor], state: Any = None, *, first: int = 0, last: int | None = None
) -> tuple[Tensor, Any]:
    """The outputs of tokens `first` .. `last` - 1 (default: to the end), one `step` each, and the state after them."""
    rows = []
    with torch.no_grad():
        for t in range(inputs[0].shape[-2])[first:last]:
            row, state = module.step(*(x[..., t : t + 1, :] for x in inputs), state=state)
            rows.append(row)
    return torch.cat(rows, -2), state


def _stops(subject: Subject) -> list[int]:
    """After how many tokens to look at the state: one, half and all but one."""
    length = subject.case.length
    return sorted({1, length // 2, length - 1} & set(range(1, length)))


@named(applies=lambda subject: subject.cls.can_step())
def step_equals_whole(subject: Subject) -> None:
    """Decoding token by token from nothing gives every row of the whole; what is not causal refuses, and says so."""
    if not subject.module.causal:
        refusal = "none"
        try:
            decode(subject.module, subject.inputs(), last=1)
        except ValueError as error:
            refusal = str(error)
        assert refusal.startswith("causal: "), f"refusal: got {refusal!r}; raise a ValueError that names causal first"
        return
    rows, _ = decode(subject.module, subject.inputs())
    subject.agrees(rows, "output of step")


@named(applies=lambda subject: issubclass(subject.cls, Attention))
def value_width(subject: Subject) -> None:
    """Wider values than keys come out right, whole and token by token, or a ValueError that names v refuses them."""
    q, k, v = subject.drawn
    drawn = q, k, torch.cat([v, v[..., :1] - v[..., -1:]], -1)
    module, wide = subject.module, tuple(x.double() for x in drawn)
    refusal = None
    with torch.no_grad():
        try:
            out = module(*wide)
        except ValueError as error:
            refusal = str(error)
    if refusal is not None:
        assert refusal.startswith("v: "), f"values of {drawn[2].shape[3]} channels: got {refusal!r}; name v first"
        return
    eager = Eager(outputs, subject.master, drawn, torch.float64)
    truth = eager.truth["output"]
    assert_close(out, truth, eager.beside("output"), name="output of wide values", terms=subject.case.length)
    if subject.cls.can_step() and module.causal:
        rows, _ = decode(module, wide)
        name = "output of step with wide values"
        assert_close(rows, truth, eager.beside("output"), name=name, terms=subject.case.length)


@named(applies=lambda subject: subject.cls.can_step() and subject.module.causal)
def state_round_trip(subject: Subject) -> None:
    """A state that was pickled and read back goes on exactly as the one that stayed."""
    module, inputs = subject.module, subject.inputs()
    for count in _stops(subject):
        _, state = decode(module, inputs, last=count)
        stored = pickle.dumps(state)
        stayed, _ = decode(module, inputs, state, first=count)
        back, _ = decode(module, inputs, pickle.loads(stored), first=count)
        assert same_bits(stayed, back), f"a state stored after {count} tokens does not carry on as the live one"


class _Tensors(pickle.Pickler):
    """Finds the tensors in an object, however deep, wherever a pickle would find them."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: dict[int, Tensor] = {}

    def persistent_id(self, value: Any) -> str | None:
        if not isinstance(value, Tensor):
            return None
        self.found[id(value)] = value
        return "tensor"


def size_of(state: Any) -> int:
    """Bytes of the tensors in a state."""
    search = _Tensors()
    search.dump(state)
    return sum(tensor.nbytes for tensor in search.found.values())


@named(applies=lambda subject: issubclass(subject.cls, CachePolicy) and subject.cls.can_tell())
def kept_keys(subject: Subject) -> None:
    """A key that `kept` says is dropped no longer matters to `step`, and the state holds no more than the kept rows."""
    module, (q, k, v), heads = subject.module, subject.inputs(), subject.case.dims.num_kv_heads
    assert isinstance(module, CachePolicy)
    whole, _ = decode(module, (q, k, v))
    _, state = decode(module, (q, k, v), last=1)
    row = size_of(state) / heads  # what a single key costs, with all that is held beside it
    before = torch.ones(heads, 0, dtype=torch.bool)
    for count in _stops(subject):
        kept = module.kept(count)
        got, want = f"{kept.dtype} of shape {tuple(kept.shape)}", (heads, count)
        assert (kept.dtype, kept.shape) == (torch.bool, want), f"kept({count}): got {got}; give bool of shape {want}"
        again = kept[:, : before.shape[1]] & ~before
        assert not again.any(), f"kept({count}): {_keys(again)} were dropped, and are kept again"
        before = kept

        spoilt = [x.clone() for x in (k, v)]
        for x in spoilt:
            x[:, :, :count].masked_fill_(~kept[..., None], torch.nan)
        rest, _ = decode(module, (q, *spoilt))
        same = same_bits(rest[..., count:, :], whole[..., count:, :])
        assert same, f"kept({count}): {_keys(~kept)} count as dropped, but a later step depends on them"

        _, state = decode(module, (q, k, v), last=count)
        size, rows = size_of(state), int(kept.sum())
        most = f"{rows} rows of {row:.0f} bytes"
        assert size <= row * rows, f"kept({count}): the state holds {size} bytes, more than {most}"


def _keys(marks: Tensor) -> str:
    return f"the (head, key) pairs {marks.nonzero()[:4].tolist()}"


@named(applies=lambda subject: subject.cls.can_varlen())
def varlen_equals_loop(subject: Subject) -> None:
    """Sequences packed into one row by cu_seqlens give what each gives alone, values and gradients."""
    length = subject.case.length
    ends = torch.tensor([0, length, 1, length // 2 + 1, length // 3 + 1]).cumsum(0)
    packed = subject.variant(batch=1, length=int(ends[-1]))
    module, cu_seqlens = packed.module, ends.int()

    def fast(*inputs: Tensor) -> Tensor:
        return module(*inputs, cu_seqlens=cu_seqlens)

    def loop(alone: Mechanism) -> Callable[..., Tensor]:
        spans = list(itertools.pairwise(ends))
        return lambda *inputs: torch.cat([alone.oracle(*(x[..., a:b, :] for x in inputs)) for a, b in spans], -2)

    eager = packed.eager(lambda alone, inputs: {"output": loop(alone)(*inputs)})
    truth = eager.truth["output"]
    with torch.no_grad():
        actual = fast(*packed.inputs())
    assert_close(actual, truth, eager.beside("output"), name="packed output", terms=length)
    gradients_agree(packed, fast, loop, shape=truth.shape, terms=length, what="packed gradient")
