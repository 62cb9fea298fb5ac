"""A view knows the ids of its tokens, wherever they lie and whoever was dropped before them."""

import pytest
import torch

from saccade.cache import Policy, Session, View

PROMPT, TOKENS = 9, 14
IDS = torch.randint(100, (3, TOKENS), generator=torch.Generator().manual_seed(0))


class Thins(Policy):
    """Drops tokens of a prompt, others in each key head and sequence, and notes what each view said of the rest."""

    def __init__(self):
        self.said = []

    def look(self, view):
        self.said.append((view.ids, view.positions.clone(), view.there.clone(), view.rows))

    def piece(self, view):
        self.look(view)
        start = torch.arange(len(view.q))[:, None] + torch.arange(view.k.shape[1])
        return view.there & (view.positions % 3 != start[..., None] % 3)

    def after(self, step):
        self.look(step)


def read(rows, told=True):
    """A prompt and then single tokens, of these of three sequences."""
    policy = Thins()
    session, x = Session(policy), torch.randn(3, 2, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    for start, stop in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, TOKENS))):
        if told:
            session.tell(IDS[rows, start:stop], rows=rows, batch=3)
        session.open(0)
        session.read(0, *(x[rows, :, start:stop],) * 3, rows=rows, batch=3)
        session.close(0)
    return policy.said


@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [0, 2]], ids=str)
def test_a_view_knows_the_ids_of_its_tokens(rows):
    said = read(rows)
    assert len(said) == 1 + TOKENS - PROMPT
    for ids, positions, there, of in said:
        assert of == rows
        for b, row in enumerate(rows):
            for head in range(2):
                at = positions[b, head][there[b, head]]
                assert torch.equal(ids[b, head][there[b, head]], IDS[row, at])
        assert (ids[~there] == -1).all()
    ids, positions, there, _ = said[-1]
    assert there.sum() < len(rows) * 2 * TOKENS  # some were dropped, so that places are no positions
    assert not torch.equal(ids[..., :PROMPT], IDS[rows, None, :PROMPT].expand(-1, 2, -1))


def test_a_whole_batch_needs_no_rows():
    x = torch.randn(3, 2, PROMPT, 4)
    policy = Thins()
    session = Session(policy)
    session.tell(IDS[:, :PROMPT])
    session.attend(0, x, x, x)
    assert torch.equal(policy.said[0][0], IDS[:, None, :PROMPT].expand(-1, 2, -1))
    assert policy.said[0][3] is None


def test_nothing_is_known_of_tokens_that_were_not_told():
    assert all(ids is None for ids, *_ in read([0, 1, 2], told=False))


def test_ids_by_place_in_the_place_of_ids_by_position_are_noticed(monkeypatch):
    def by_place(view):
        told = view.shared["token_ids"][list(view.rows)][:, None, : view.positions.shape[2]]
        return told.expand(view.there.shape).masked_fill(~view.there, -1)

    monkeypatch.setattr(View, "ids", property(by_place))
    with pytest.raises(AssertionError):
        test_a_view_knows_the_ids_of_its_tokens([0, 1, 2])
