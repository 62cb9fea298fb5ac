"""A step that cannot be recorded: one error that names the policy, and everything as if nothing had been tried."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from saccade.cache import Policy, Recorded, Session
from saccade.cache.recorded import Kept
from saccade.testing.tape import Tape

PROMPT, TOKENS = 9, 40


class Asks(Policy):
    """Says that its steps are steady; in one layer they ask the device how long the sequences are."""

    page = 4

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def select(self, step):
        step.note("before", step.ends.clone())
        if step.index == self.layer:
            int(step.ends.max())

    def after(self, step):
        step.shared["steps"] = step.shared.get("steps", torch.zeros(len(step.q), dtype=torch.int64)) + 1

    def steady(self, session):
        return True


class Refusing(Tape):
    """A tape on which nobody may ask for a number that lies on the device, as on a GPU; here that of some stores."""

    def __init__(self, run, sessions):
        self.on_device = {x.untyped_storage().data_ptr() for s in sessions for store in s.stores for x in (store.ends,)}
        super().__init__(run)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        theirs = any(x.untyped_storage().data_ptr() in self.on_device for x in flat)
        if theirs and func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if theirs:
            self.on_device |= {x.untyped_storage().data_ptr() for x in tree_flatten(found)[0] if isinstance(x, Tensor)}
        return found


REFUSED = (
    r"^policy: a step of Asks\(\), which says that its steps are steady, cannot be recorded \(operation not permitted "
    r"when stream is capturing\); let its `steady` return False"
)


def read(layer, failures):
    """o of all steps of two layers, and what the session knows then; a step that fails is taken as it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, TOKENS, 8, dtype=torch.float64)
    session = Session(Asks(layer), 2)

    def run(new):
        return torch.cat([session.attend(index, new, new, new) for index in range(2)], 1)

    run(x[:, :, :PROMPT])
    steps = Recorded([session], run, room=16, graph=lambda run: Refusing(run, [session]))
    found = []
    for count, at in enumerate(range(PROMPT, TOKENS)):
        new = x[:, :, at : at + 1]
        if count >= 2 * failures:
            found.append(run(new))
        elif count % 2 == 0:
            found.append(steps(new).clone())  # as it is; the next one is to be recorded
        else:
            known = state(session)
            with pytest.raises(RuntimeError, match=REFUSED) as caught:
                steps(new)
            assert isinstance(caught.value.__cause__, RuntimeError)
            assert same(state(session), known), "what is known has changed"
            found.append(run(new))
    return torch.cat(found, 2), state(session)


def state(session):
    """All that a session knows, but what is reserved."""
    stores = [session.store(index) for index in range(2)]
    names = ("counts", "seen", "ends", "lengths")
    return {
        "shared": {name: x.clone() for name, x in session.shared.items()},
        "steps": session.steps,
        "stores": [{name: getattr(s, name).clone() for name in names} | {"notes": dict(s.notes)} for s in stores],
        "held": [session.held(index) for index in range(2)],
        "in_use": [s.pool.in_use if s.owned is None else None for s in stores],
    }


def same(one, other):
    a, b = (tree_flatten(x) for x in (one, other))
    return str(a[1]) == str(b[1]) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a[0], b[0], strict=True)
    )


@pytest.mark.parametrize("layer", [0, 1])
def test_a_step_that_cannot_be_recorded_changes_nothing(layer):
    truth, known = read(layer, 0)
    found, now = read(layer, 2)
    assert torch.equal(found, truth)
    assert same({**now, "in_use": None}, {**known, "in_use": None})


@pytest.mark.parametrize("layer", [0, 1])
def test_counts_that_run_ahead_are_noticed(layer, monkeypatch):
    monkeypatch.setattr(Kept, "put_back", lambda self: None)
    with pytest.raises(AssertionError, match="what is known has changed"):
        read(layer, 1)


def test_what_asks_nothing_is_recorded():
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        read(None, 1)
