"""What a view says of its sequences and queries, for all of a batch and for some of it, before and after tokens go."""

import pytest
import torch

from saccade.cache import Policy, Session, Stored, View

BATCH, STEPS = 3, 4


class Looks(Policy):
    """Drops every third token of a prompt, and compares each view with what is known of it."""

    def __init__(self):
        self.met = 0

    def look(self, view):
        rows = range(BATCH) if view.rows is None else view.rows
        n = view.q.shape[2]
        ends = torch.tensor([end_of(view, row) for row in range(len(rows))])
        assert view.at.tolist() == [[*range(end - n, end)] for end in ends.tolist()]
        assert view.mine(torch.arange(BATCH)).tolist() == [*rows]
        assert view.by_seen(lambda seen: [seen, 2 * seen]).tolist() == [[e, 2 * e] for e in ends.tolist()]
        x = torch.randn(len(rows), 4, 5)
        assert torch.equal(view.grouped(x), x.view(len(rows), 2, 2, 5))
        assert torch.equal(view.pooled(x), (x[:, ::2] + x[:, 1::2]) / 2)
        self.met += 1

    def piece(self, view):
        self.look(view)
        return view.there & (view.positions % 3 != 0)

    def after(self, step):
        self.look(step)
        assert step.lengths.tolist() == step.counts.tolist()
        late = step.positions > 6
        for marked in (None, late):
            slots = step.only(marked)
            assert torch.equal(slots >= 0, step.there if marked is None else step.there & late)
            assert torch.equal(slots[slots >= 0], step.slots[slots >= 0])
        assert step.lengths.shape == (len(step.q), 2)


def end_of(view, row):
    """The position behind the newest token of a sequence, from what it holds."""
    return int(view.positions[row][view.there[row]].max()) + 1


def read(rows):
    policy = Looks()
    session, x = Session(policy), torch.randn(BATCH, 4, 20, 8)
    groups = [rows] if rows is not None else [None]
    for start, stop in ((0, 8), *((at, at + 1) for at in range(8, 8 + STEPS))):
        session.open(0)
        for group in groups:
            new = x[:, :, start:stop] if group is None else x[group, :, start:stop]
            session.read(0, new, new[:, ::2], new[:, ::2], rows=group, batch=BATCH)
        session.close(0)
    assert policy.met == 1 + STEPS


@pytest.mark.parametrize("rows", [None, [0, 1, 2], [2], [0, 2]], ids=str)
def test_a_view_says_where_its_queries_stand_and_whose_they_are(rows):
    read(rows)


@pytest.mark.parametrize(
    ("of", "name", "wrong"),
    [
        (View, "at", lambda view: torch.arange(view.q.shape[2]).expand(len(view.q), -1)),
        (Stored, "lengths", lambda step: step.stored.lengths.view(step.stored.counts.shape)),
        (Stored, "only", lambda step: lambda marked=None: step.slots),
        (View, "mine", lambda view: lambda x: x),
        (View, "grouped", lambda view: lambda x: x.unflatten(1, (view.group, -1)).transpose(1, 2)),
    ],
    ids=["at", "lengths", "only", "mine", "grouped"],
)
def test_what_is_of_others_is_noticed(of, name, wrong, monkeypatch):
    monkeypatch.setattr(of, name, property(wrong))
    with pytest.raises((AssertionError, RuntimeError)):
        read([0, 2])
