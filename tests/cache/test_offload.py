"""Pages in the host's memory: nothing changes but where they lie, and the device holds no more than it is told."""

import pools
import pytest
import torch
from test_policies import ALL, OWN, drawn, run

from saccade.cache import HostedPool, Offloaded, Policy, Quest, Session
from saccade.cache.hosted import Hosted, StreamLane
from saccade.testing.budget import assert_close
from saccade.testing.oracles import dense_attention


class Late(Hosted):
    """A storage whose pool copies as late as it may; `lane` makes its lane."""

    def __init__(self, pages, lane):
        super().__init__(pages)
        object.__setattr__(self, "lane", lane)

    def pool(self, dim, value_dim, **options):
        return pools.hosted(self.lane, self.pages)(dim, value_dim, **options)


def offloaded(policy, pages, lane=pools.LateLane, **options):
    wrapped = Offloaded(policy, pages, **options)
    wrapped.storage = Late(pages, lane)
    return wrapped


def read_alike(policy, wrapped, layers=2):
    """(session, its pools): what the wrapped policy gives is what the policy gives, to the last bit."""
    q, k, v = drawn()
    truth, plain = run(policy, q, k, v, num_layers=layers)
    found, session = run(wrapped, q, k, v, num_layers=layers)
    assert torch.equal(found, truth)
    for index in range(layers):
        assert torch.equal(session.held(index), plain.held(index))
    return session, [store.pool for store in session.stores]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ahead", [False, True])
def test_any_policy_gives_the_same_bits(name, ahead):
    policy = ALL[name](12, **OWN.get(name, {}))
    policy.page = 4
    pages = 20 if name == "quest" else 48  # what a step reads of 4 rows, and its newest pages
    session, found = read_alike(policy, offloaded(policy, pages, ahead=ahead))
    for pool in found:
        assert pool.num_hot <= pages
        if name == "quest":
            assert pool.in_use > pages  # some are away
            assert pool.spilled + pool.fetched > 0
    session.free()
    for pool in found:
        assert pool.in_use == pools.num_held(pool) == 0
        assert pool.taken == pool.returned


class Early(pools.LateLane):
    """What is computed does not wait for copies, which are done when the host asks for them."""

    def join(self):
        pass


def test_a_step_that_does_not_wait_for_its_pages_is_noticed():
    policy = Quest(12, page=4)
    with pytest.raises(AssertionError):
        read_alike(policy, offloaded(policy, 20, Early))


def test_bytes_of_the_device_do_not_grow_with_what_is_held():
    x = torch.randn(1, 2, 4096, 32)
    sizes = {}
    for tokens in (1024, 4096):
        session = Session(Offloaded(Quest(64), pages=16))
        session.attend(0, *[x[:, :, : tokens - 1]] * 3)
        session.attend(0, *[x[:, :, tokens - 1 : tokens]] * 3)
        pool = session.store(0).pool
        assert pool.hot.nbytes - pool.hot.free.nbytes == (16 + 1) * 16 * 32 * 2 * 4
        assert pool.num_hot == 8
        sizes[tokens] = pool.nbytes - pool.frames.nbytes, pool.host_nbytes
    assert sizes[1024][0] == sizes[4096][0]
    assert sizes[4096][1] > 3 * sizes[1024][1]
    plain = Session(Quest(64))
    plain.attend(0, x, x, x)
    assert 20 * sizes[4096][0] < plain.nbytes


def counted(ahead):
    """Pages that layer 1 was missing when it read, and all that were brought to it, of two layers that read alike."""
    q, k, v = drawn(n=80)
    policy, missing = Quest(12, page=4), 0
    session = Session(Offloaded(policy, 24, ahead=ahead), 2)
    for index in (0, 1):
        session.attend(index, *(x[:, :, :60] for x in (q, k, v)))
    for t in range(60, 80):
        now = [x[:, :, t : t + 1] for x in (q, k, v)]
        session.attend(0, *now)
        pool = session.store(1).pool
        before = pool.fetched
        session.attend(1, *now)
        missing += pool.fetched - before
    return missing, session.store(1).pool.fetched


def test_what_one_layer_reads_is_brought_for_the_next():
    (without, _), (missing, brought) = counted(False), counted(True)
    assert without > 0
    assert brought > 0
    assert missing == 0  # layers that read alike wait for nothing


def test_the_pages_read_last_stay():
    pool = HostedPool(4, page=4, most=3)
    ids = pool.take(3)
    pool.write("k", ids[:, None], torch.arange(4), torch.arange(12.0).view(3, 4, 1).expand(3, 4, 4))
    pool.bring(ids[[0, 2]])
    other = pool.take(1)
    assert pool.known["hot"].tolist()[int(ids[1])] == 0
    assert all(pool.known["hot"][[int(ids[0]), int(ids[2]), int(other)]] > 0)
    assert torch.equal(pool.read("k", ids, torch.zeros(3, dtype=torch.int64))[:, 0], torch.tensor([0.0, 4.0, 8.0]))


def test_pieces_that_read_more_than_fits_are_read_in_parts():
    q, k, v = drawn()
    policy = Policy()
    policy.page = 4
    found, session = run(offloaded(policy, 8), q, k, v, (10, 5, 14))
    truth = dense_attention(q, k, v, causal=True)
    assert_close(found, truth, truth, name="output", terms=41)
    assert session.store(0).pool.num_hot <= 8


def test_what_is_refused():
    with pytest.raises(ValueError, match="pages: got 0"):
        Offloaded(Policy(), 0)
    with pytest.raises(ValueError, match=r"policy: got .* which says itself how its pages are kept"):
        Offloaded(Offloaded(Policy(), 4), 4)
    session, x = Session(Offloaded(Policy(), 2)), torch.randn(3, 2, 8, 4)
    session.attend(0, x, x, x)
    with pytest.raises(ValueError, match="pages: got 2 on the device, where a step reads a page of 6 rows at once"):
        session.attend(0, *[x[:, :, :1]] * 3)


@pytest.mark.gpu
def test_copies_beside_the_computation_change_nothing():
    device = torch.device("cuda")
    q, k, v = (x.to(device, torch.bfloat16) for x in drawn(heads=8, kv_heads=4, n=700))
    for pages in (40, 200):
        policy = Quest(64)
        wrapped = Offloaded(policy, pages)
        truth, _ = run(policy, q, k, v, (500,), num_layers=3)
        found, session = run(wrapped, q, k, v, (500,), num_layers=3)
        assert torch.equal(found, truth)
        for store in session.stores:
            assert store.pool.cold["k"].is_pinned()
            assert store.pool.fetched > 0
            assert store.pool.num_hot <= pages
            assert isinstance(store.pool.lane, StreamLane)
