"""Pages in few bits: no further off than half a step, in the bytes that they say, under any policy."""

import pytest
import torch
from test_policies import ALL, OWN, drawn, run

from saccade import cache
from saccade.cache import Evict, Grid, Policy, Quantized, Quest, Session, Tokens
from saccade.cache.coded import CodedPool
from saccade.softmax import attend_pages
from saccade.testing.budget import assert_close
from saccade.testing.oracles import dense_attention

GRIDS = [Grid(bits, along, group) for bits in (4, 8) for along, group in (("channel", 32), ("token", 32), ("token", 5))]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def half_a_step(grid, x):
    """Raise unless every number comes back within half a step, and the rounding of what comes back."""
    codes, zero, step = grid.encode(x)
    back = grid.decode(codes, zero, step, x.shape[2]).double()
    if grid.along == "token":
        step = step.repeat_interleave(grid.group, 2)[..., : x.shape[2]]
    wide = torch.promote_types(x.dtype, torch.float32)
    of_x, of_codes = torch.finfo(x.dtype), torch.finfo(wide)
    rounding = of_x.eps * x.double().abs().amax() + of_x.eps * of_x.tiny
    rounding = rounding + 2 ** (grid.bits + 1) * of_codes.eps * step.double().amax()
    assert bool(((back - x.double()).abs() <= step.double() / 2 + rounding).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6, 100.0])
def test_codes_are_within_half_a_step(grid, dtype, size):
    x = torch.randn(5, 16, 33) * size + torch.randn(5, 1, 33) * 3 * size
    half_a_step(grid, x.to(dtype))


class Nearest(Grid):
    """Takes the next code below, not the nearest one."""

    def encode(self, x):
        codes, zero, step = super().encode(x)
        return (codes.int() - 1).clamp(min=0).to(torch.uint8), zero, step


def test_a_grid_that_rounds_down_is_noticed():
    with pytest.raises(AssertionError):
        half_a_step(Nearest(8, "token", 32), torch.randn(5, 16, 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_lies_on_the_grid_comes_back(grid, dtype):
    levels = 2**grid.bits - 1
    x = torch.randint(0, levels + 1, (5, 16, 33))
    if grid.along == "token":
        for first in range(0, 33, grid.group):
            x[:, :, first], x[:, :, min(first + 1, 32)] = 0, levels  # or one number, in a group of its own
    else:
        x[:, 3], x[:, 9] = 0, levels
    x = ((x - 8) / 4).to(dtype)
    assert torch.equal(grid.decode(*grid.encode(x), 33), x)
    same = torch.full_like(x, 0.1)
    assert torch.equal(grid.decode(*grid.encode(same), 33), same)


def test_bytes_are_those_of_the_codes():
    for bits, keys in ((4, "channel"), (8, "channel"), (4, "token")):
        x = torch.randn(1, 2, 512, 64, dtype=torch.bfloat16)
        session = Session(Quantized(Policy(), bits, residual=0, keys=keys))
        session.attend(0, x, x, x)
        pool = session.store(0).pool
        assert pool.num_coded == pool.in_use == 2 * 32
        a_channel, a_token = 64 * (2 + 2), 16 * 2 * (2 + 2)  # bytes of zero and step in a page of 16 tokens
        codes = 2 * 16 * 64 * bits // 8 + (a_channel if keys == "channel" else a_token) + a_token
        assert len(pool.cold) == 1 + 64
        assert sum(t.nbytes for t in pool.cold.tensors.values()) == 65 * codes
        assert len(pool.hot) == 1  # nobody's
        assert session.nbytes == session.store(0).nbytes
        plain = Session(Policy())
        plain.attend(0, x, x, x)
        of_keys = 2 * 64 * 16 * 64 * 2
        assert plain.nbytes - session.nbytes > of_keys - 66 * codes - 2 * 16 * 64 * 2 - 2 * 8 * 64 - 3 * 8


def coded(store):
    """bool (B Hkv, max_pages): which pages are codes."""
    used = torch.arange(store.table.shape[1]) < -(-store.lengths[:, None] // store.page)
    return (store.pool.cold_at[store.table.long()] > 0) & used


@pytest.mark.parametrize("residual", [0, 7, 20])
def test_recent_tokens_are_as_they_came(residual):
    q, k, v = drawn()
    policy = Policy()
    policy.page = 4
    wrapped = Quantized(policy, residual=residual)
    session = Session(wrapped)
    session.attend(0, *(x[:, :, :29] for x in (q, k, v)))
    for t in range(29, 41):
        session.attend(0, *(x[:, :, t : t + 1] for x in (q, k, v)))
        store = session.store(0)
        old = (t + 1 - residual) // 4
        assert bool((coded(store) == (torch.arange(store.table.shape[1]) < old)).all())
        slots, _ = store.order()
        for x, whole in ((store.pool.k, k), (store.pool.v, v)):
            found = store.read(x, slots)
            assert torch.equal(found[:, :, old * 4 :], whole[:, :, old * 4 : t + 1])
            assert not torch.equal(found[:, :, : old * 4], whole[:, :, : old * 4])


@pytest.mark.parametrize("scratch", [1, 400, 1 << 24])
@pytest.mark.parametrize("chosen", ["all", "pages", "tokens"])
@pytest.mark.parametrize("n", [1, 3])
def test_attention_is_that_to_what_the_codes_stand_for(scratch, chosen, n, monkeypatch):
    if chosen == "tokens" and n > 1:
        return
    monkeypatch.setattr("saccade.cache.coded.SCRATCH", scratch)
    q, k, v = drawn()
    policy = Policy()
    policy.page = 4
    session = Session(Quantized(policy, residual=6))
    session.attend(0, q, k, v)
    store = session.store(0)
    slots, _ = store.order()
    keys, values = (store.read(x, slots) for x in (store.pool.k, store.pool.v))
    mask, asked = torch.ones(2, 2, 41, dtype=torch.bool), None
    if chosen == "pages":
        asked = torch.stack([torch.randperm(11)[:5] for _ in range(4)]).view(2, 2, 5)
        asked[1, 0, 2] = -1
        mask = (torch.arange(41) // 4 == asked[..., None]).any(2)
    elif chosen == "tokens":
        picked = torch.stack([torch.randperm(41)[:5] for _ in range(4)]).view(2, 2, 5)
        mask, asked = (torch.arange(41) == picked[..., None]).any(2), Tokens(picked)
    mask = mask.repeat_interleave(2, 1)[:, :, None] & (torch.arange(41) <= torch.arange(41 - n, 41)[:, None])
    truth = dense_attention(q[:, :, -n:], keys, values, mask=mask)
    found = store.attend(q[:, :, -n:], asked)
    assert_close(found, truth, truth, name="attention", terms=41, scale=float(v.abs().max()))


def by_kernels(q, pages, chosen, scale, needs_lse):
    return attend_pages(q, pages, chosen, scale=scale, return_lse=True, backend="triton")


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("chosen", ["all", "pages", "tokens"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("keys", ["channel", "token"])
def test_kernels_read_codes_where_they_lie(chosen, bits, keys, monkeypatch):
    monkeypatch.setattr("saccade.cache.coded.has_kernels", lambda device: True)
    monkeypatch.setattr("saccade.cache.store.read_pages", by_kernels)
    monkeypatch.setattr(CodedPool, "_decoded", None)
    q, k, v = (torch.randn(2, heads, 53, 32) for heads in (4, 2, 2))
    policy = Evict(cache.KeyNorm(), cache.AcrossHeads(36))  # rows of unlike lengths
    session = Session(Quantized(policy, bits, residual=6, keys=keys))
    with torch.no_grad():
        session.attend(0, q, k, v)
        store = session.store(0)
        slots, there = store.order()
        keys, values = (store.read(x, slots) for x in (store.pool.k, store.pool.v))
        mask, asked = there.clone(), None
        if chosen == "pages":
            asked = torch.stack([torch.randperm(2) for _ in range(4)]).view(2, 2, 2)
            asked[1, 0, 1] = -1
            mask &= (torch.arange(there.shape[2]) // 16 == asked[..., None]).any(2)
        elif chosen == "tokens":
            picked = torch.stack([torch.randperm(int(n))[:9] for n in store.counts.flatten()]).view(2, 2, 9)
            mask, asked = (torch.arange(there.shape[2]) == picked[..., None]).any(2), Tokens(picked)
        assert 0 < store.pool.num_coded < store.pool.in_use
        found = store.attend(q[:, :, -1:], asked)
    mask = mask.repeat_interleave(2, 1)[:, :, None]
    wide = [x.double().masked_fill(~there[..., None], 0) for x in (keys, values)]
    truth = dense_attention(q[:, :, -1:].double(), *wide, mask=mask)
    eager = dense_attention(q[:, :, -1:], *(x.float() for x in wide), mask=mask)
    assert_close(found, truth, eager, name="attention", terms=53, scale=float(v.abs().max()))


def test_only_the_chosen_pages_are_decoded(monkeypatch):
    session, x = Session(Quantized(Policy(), residual=0)), torch.randn(1, 2, 320, 8)
    session.attend(0, x, x, x)
    seen = []
    pages = CodedPool.pages
    monkeypatch.setattr(CodedPool, "pages", lambda self, name, ids: seen.append(len(ids)) or pages(self, name, ids))
    session.store(0).attend(x[:, :, -1:], torch.tensor([[[3, 7], [0, -1]]]))
    assert seen == [4, 4]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("keys", ["channel", "token"])
def test_any_policy_may_be_wrapped(name, keys):
    """Of numbers that lie on the grid nothing is lost, so that the policy decides and gives what it does without."""
    levels = torch.randint(0, 16, (3, 2, 2, 41, 8)).double()
    levels[..., 0], levels[..., 1] = 0, 15  # both ends in every token
    k, v, q = levels[0], levels[1], drawn()[0]
    if keys == "channel":  # whose ends may be dropped: a step of 0
        k = k[:, :, :1].expand_as(k).clone()
    policy = ALL[name](12, **OWN.get(name, {}))
    policy.page = 4
    found, session = run(Quantized(policy, residual=3, keys=keys), q, k / 8, v / 8, num_layers=2)
    truth, plain = run(policy, q, k / 8, v / 8, num_layers=2)
    assert session.store(1).pool.num_coded > 0
    assert torch.equal(session.held(1), plain.held(1))
    assert_close(found, truth, truth, name="output", terms=41, scale=float(v.abs().max()))
    for store in session.stores:
        store.free()
        assert store.pool.in_use == store.pool.num_coded == store.pool.hot.in_use - 1 == 0


def test_sequences_that_change_places_take_their_codes_with_them():
    q, k, v = drawn(batch=3)
    policy = Quantized(Quest(12, page=4), residual=5)
    _, moved = run(policy, *(x[:, :, :33] for x in (q, k, v)))
    moved.reorder([2, 2, 0], 0)
    _, alone = run(policy, *(x[[2, 2, 0]][:, :, :33] for x in (q, k, v)))
    for t in range(33, 41):
        now = [x[[2, 2, 0]][:, :, t : t + 1] for x in (q, k, v)]
        assert torch.equal(moved.attend(0, *now), alone.attend(0, *now))
    assert torch.equal(coded(moved.store(0)), coded(alone.store(0)))


def test_what_is_refused():
    for make, message in (
        (lambda: Quantized(Policy(), 2), "bits: got 2; pass 8 or 4"),
        (lambda: Quantized(Policy(), keys="page"), "keys: got 'page'"),
        (lambda: Quantized(Policy(), residual=-1), "residual: got -1"),
        (lambda: Quantized(Policy(), group=0), "group: got 0"),
        (lambda: Quantized(Quantized(Policy())), "policy: got .* which says itself how its pages are kept"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="policy: got Uniform; pass a Policy"):
        Quantized(cache.Uniform(4))


def test_nothing_is_asked_of_the_device_between_pages(monkeypatch):
    session, x = Session(Quantized(Policy(), residual=5)), torch.randn(1, 2, 64, 8)
    session.attend(0, *[x[:, :, :38]] * 3)
    for name in ("seal", "opened"):
        monkeypatch.setattr(CodedPool, name, None)
    for t in range(38, 38 + 14):
        session.attend(0, *[x[:, :, t : t + 1]] * 3)
    with pytest.raises(TypeError, match="not callable"):
        session.attend(0, *[x[:, :, 52:53]] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [True, False])  # with them codes are decoded, else kernels read them
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_on_a_gpu_are_those_on_a_cpu(bits, gradients):
    q, k, v = drawn(heads=8, kv_heads=4, n=300, dtype=torch.bfloat16)
    sessions = [Session(Quantized(Quest(64), bits, residual=20)) for _ in range(2)]
    outputs = []
    for session, device in zip(sessions, ("cpu", "cuda"), strict=True):
        now = [x.to(device) for x in (q, k, v)]
        session.attend(0, *(x[:, :, :299] for x in now))
        session.attend(0, *(x[:, :, 299:] for x in now))
        store = session.store(0)
        slots, _ = store.order()
        outputs.append([store.read(x, slots).cpu() for x in (store.pool.k, store.pool.v)])
        with torch.set_grad_enabled(gradients):
            outputs[-1].append(store.attend(now[0][:, :, 299:]).cpu())
        assert store.pool.num_coded == 8 * (280 // 16)
    (keys, values, o), (on_gpu, values_on_gpu, found) = outputs
    for mine, other in ((on_gpu, keys), (values_on_gpu, values)):
        assert_close(mine, other.double(), other, name="what the codes stand for")
    truth = dense_attention(q[:, :, 299:].double(), keys.double(), values.double())
    assert_close(found, truth, o, name="attention", terms=300)
