"""NAtS in a pretrained layer: its oracle, what it decodes, and that it is the mechanism with other projections."""

import pytest
import torch

from saccade.cache import Rotation, Session
from saccade.catalogue import mechanism
from saccade.contract import Dims
from saccade.hf.tuned import serves
from saccade.mix import rotary_rates
from saccade.testing.budget import assert_close, compare

CASES = serves("nats").cases()


def layer(case, **changed):
    made = serves("nats")(case.dims, **case.params | changed).double().eval()
    torch.nn.init.normal_(made.kind, std=0.3, generator=torch.Generator().manual_seed(1))
    return made, serves("nats").inputs(case, torch.Generator().manual_seed(0))


def decoded(made, q, k, v, *cuts):
    """Read in pieces and steps that end at these places."""
    session, parts = Session(made.policy), []
    for start, stop in zip([0, *cuts], cuts, strict=False):
        parts.append(session.attend(0, *(x[:, :, start:stop] for x in (q, k, v))))
    return torch.cat(parts, 2), session


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_and_decoded_are_the_oracle(case):
    made, (q, k, v) = layer(case)
    n = q.shape[2]
    with torch.no_grad():
        truth = made.oracle(q, k, v)
        kinds = made.types(q, k, v, torch.arange(n)).argmax(-1)
        assert {0, 1, 2} <= set(kinds.flatten().tolist())
        assert_close(made(q, k, v), truth, truth, terms=n)
        for cuts in ([*range(1, n + 1)], [n - 6, *range(n - 5, n + 1)]):
            found, session = decoded(made, q, k, v, *cuts)
            assert_close(found, truth, truth, terms=n)
    assert int(session.store(0).counts.max()) < n


def test_a_token_more_or_less_is_noticed():
    case = CASES[0]
    made, (q, k, v) = layer(case)
    twin, _ = layer(case, window=4)
    keeps = type(made.policy).piece

    def forgetful(view):
        """Drops the newest global too."""
        kept = keeps(made.policy, view)
        newest = view.positions.masked_fill(view.columns[..., 0] != 0, -1)
        return kept & (newest != newest.amax(-1, keepdim=True))

    with torch.no_grad():
        truth = made.oracle(q, k, v)
        assert not compare(twin(q, k, v), truth, truth, terms=29).ok
        made.policy.piece = forgetful
        found, _ = decoded(made, q, k, v, *range(1, 30))
    assert not compare(found, truth, truth, terms=29).ok


def test_later_pieces_keep_what_lives():
    made, (q, k, v) = layer(CASES[0])
    kinds = made.types(q, k, v, torch.arange(29)).argmax(-1)
    with torch.no_grad():
        _, session = decoded(made, q, k, v, 9, 17, 18, 19)
    at = torch.arange(19)
    past = kinds[:, :, :19]
    newest = torch.where(past == 0, at, -1).amax(-1, keepdim=True)
    lives = (past == 0) | (past == 1) & (at > newest) | (past == 2) & (at > 18 - made.window)
    assert torch.equal(session.held(0), lives)


def test_it_is_the_mechanism_with_its_projections_handed_in():
    """Types read from q, k and v are those read from x, and so are outputs and gradients."""
    dims = Dims(4, 6, 2)
    torch.manual_seed(0)
    whole = mechanism("nats")(dims, window=3, detach=True).double().eval()
    torch.nn.init.normal_(whole.kind.weight, std=0.5)
    back = torch.linalg.pinv(whole.qkv.weight.detach())  # of [q; k; v] to x
    made = serves("nats")(dims, window=3, rotation=Rotation(rotary_rates(3))).double().eval()
    made.kind.data = whole.kind.weight.detach() @ back
    x, aim = torch.randn(2, 2, 31, 24, dtype=torch.float64)
    o = made(*(y.detach() for y in whole.heads(x)))
    out = whole.out(o.transpose(1, 2).flatten(2))
    expected = whole(x)
    assert_close(out.detach(), expected.detach(), expected.detach(), terms=31 * 24)
    (mine,) = torch.autograd.grad((out * aim).sum(), made.kind)
    (its,) = torch.autograd.grad((expected * aim).sum(), whole.kind.weight)
    assert its.abs().max() > 0
    assert_close(mine @ back.mT, its, its, terms=31 * 24)
    assert not compare(mine.flip(0) @ back.mT, its, its, terms=31 * 24).ok
