"""The plug-in for vLLM against dense attention, a request at a time, in float64; vLLM itself is a stub."""

import importlib
import sys

import pytest
import torch
import vllm_stub

from saccade.testing.budget import compare

H, HKV, D, PAGE, PAGES = 4, 2, 16, 16, 40
SCALE = D**-0.5


@pytest.fixture
def plugin(monkeypatch):
    for name, module in vllm_stub.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "saccade.vllm.backend", raising=False)
    monkeypatch.setattr(vllm_stub.CONFIG, "additional_config", {})
    yield importlib.import_module("saccade.vllm.backend")
    sys.modules.pop("saccade.vllm.backend", None)


class Server:
    """A scheduler that gives pages out at random, and what every request has had so far."""

    def __init__(self, plugin, **options):
        self.backend = plugin.Backend
        self.impl = self.backend.get_impl_cls()(H, D, SCALE, HKV, **options)
        self.builder = self.backend.get_builder_cls()(None, ["layer"], None, torch.device("cpu"))
        shape = self.backend.get_kv_cache_shape(PAGES, PAGE, HKV, D)
        self.cache = torch.full(shape, torch.nan)  # what nobody wrote must reach nobody
        self.random = torch.Generator().manual_seed(0)
        self.free = torch.randperm(PAGES, generator=self.random).tolist()
        self.pages, self.k, self.v = {}, {}, {}

    def end(self, request):
        self.free += self.pages.pop(request)
        del self.k[request], self.v[request]

    def step(self, **tokens):
        """Tokens of every request that takes part, decodes first -> request -> (q, o), both (H, n, D)."""
        q, k, v = (torch.randn(sum(tokens.values()), heads, D, generator=self.random) for heads in (H, HKV, HKV))
        slots, at = [], 0
        for request, count in tokens.items():
            mine = self.pages.setdefault(request, [])
            had = self.k[request].shape[1] if request in self.k else 0
            while len(mine) * PAGE < had + count:
                mine.append(self.free.pop())
            slots += [mine[t // PAGE] * PAGE + t % PAGE for t in range(had, had + count)]
            for store, x in ((self.k, k), (self.v, v)):
                new = x[at : at + count].transpose(0, 1)
                store[request] = torch.cat([store[request], new], 1) if request in store else new
            at += count
        starts = torch.tensor([0, *torch.tensor(list(tokens.values())).cumsum(0).tolist()], dtype=torch.int32)
        width = max(len(self.pages[r]) for r in tokens)
        table = torch.tensor([self.pages[r] + [0] * (width - len(self.pages[r])) for r in tokens], dtype=torch.int32)
        lengths = torch.tensor([self.k[r].shape[1] for r in tokens], dtype=torch.int32)
        common = vllm_stub.CommonAttentionMetadata(
            starts, starts, lengths, len(tokens), at, max(tokens.values()), int(lengths.max()), table,
            torch.tensor(slots),
        )  # fmt: skip
        out = torch.full((at + 3, H * D), 7.0)  # vLLM pads batches
        padded = [torch.cat([x, torch.full_like(x[:3], torch.nan)]) for x in (q, k, v)]
        found = self.impl.forward(None, *padded, self.cache, self.builder.build(0, common), out)
        assert bool((out[at:] == 7).all())
        parts = found[:at].view(at, H, D).split(list(tokens.values()))
        return {r: (a.transpose(0, 1), b.transpose(0, 1)) for r, a, b in zip(tokens, q.split(list(tokens.values())),
                                                                             parts, strict=True)}  # fmt: skip

    def whole(self, request, q, dtype, seen=None, softcap=None, sink=None):
        """(H, n, D) from the equations; seen: bool (Hkv, M), the keys that may be read."""
        k, v = (x[request].to(dtype).repeat_interleave(H // HKV, 0) for x in (self.k, self.v))
        n, m = q.shape[1], k.shape[1]
        scores = SCALE * q.to(dtype) @ k.mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n).expand(H, n, m)
        if seen is not None:
            mask = mask & seen.repeat_interleave(H // HKV, 0)[:, None]
        weights = scores.masked_fill(~mask, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if sink is not None:
            total = total + sink.to(dtype).exp()[:, None, None]
        return weights / total @ v

    def agrees(self, found, **options):
        """Whether all outputs of a step are what the equations give."""
        return all(
            compare(
                o, *(self.whole(r, q, kind, **options) for kind in (torch.float64, torch.float32)), terms=D * 200
            ).ok
            for r, (q, o) in found.items()
        )


def traffic(server, **options):
    """Prompts, prompts in pieces, decodes of any number, requests that end and whose pages are used again."""
    assert server.agrees(server.step(a=37, b=16), **options)
    assert server.agrees(server.step(a=1, b=1, c=50), **options)
    assert server.agrees(server.step(b=1, a=1, c=14), **options)
    server.end("a")
    assert server.agrees(server.step(b=1, c=1, d=90), **options)
    for _ in range(20):
        assert server.agrees(server.step(b=1, c=1, d=1), **options)


def test_every_page_is_dense_attention(plugin):
    traffic(Server(plugin))


def test_caps_and_sinks(plugin):
    sink = torch.randn(H, generator=torch.Generator().manual_seed(3))
    traffic(Server(plugin, logits_soft_cap=2.0, sinks=sink), softcap=2.0, sink=sink)


def test_dense_attention_is_judged(plugin):
    server = Server(plugin)
    assert not server.agrees(server.step(a=20), softcap=2.0)


@pytest.mark.parametrize("select", ["quest", "paged_eviction"])
def test_a_budget_for_all_is_dense_attention(plugin, monkeypatch, select):
    monkeypatch.setattr(vllm_stub.CONFIG, "additional_config", {"saccade": {"select": select, "budget": 640}})
    traffic(Server(plugin))


def bounds(server, request, q):
    """Pages by Quest's bound, from the keys themselves."""
    scores = []
    for start in range(0, server.k[request].shape[1], PAGE):
        keys = server.k[request][:, start : start + PAGE].double()
        low, high = (x.repeat_interleave(H // HKV, 0) for x in (keys.amin(1), keys.amax(1)))
        scores.append(torch.maximum(q[:, 0].double() * low, q[:, 0].double() * high).sum(-1).view(HKV, -1).amax(1))
    return torch.stack(scores, 1)


def seen_by(scores, length, count):
    """bool (Hkv, M): the tokens of the newest page and of the best others."""
    kept = torch.zeros(HKV, length, dtype=torch.bool)
    for head, row in enumerate(scores.expand(HKV, -1).tolist()):
        others = sorted(range(len(row) - 1), key=lambda p: -row[p])[: count - 1]
        for page in [*others, len(row) - 1]:
            kept[head, page * PAGE : (page + 1) * PAGE] = True
    return kept


def decoded(server, rank):
    """Whether 40 decoding steps of two requests, after others that used the pages before, read what `rank` says."""
    server.step(old=300)
    server.end("old")
    server.step(a=70, b=33)
    for _ in range(40):
        found = server.step(a=1, b=1)
        for request, (q, o) in found.items():
            seen = seen_by(rank(server, request, q), server.k[request].shape[1], 3)
            truth, rough = (server.whole(request, q, kind, seen=seen) for kind in (torch.float64, torch.float32))
            if not compare(o, truth, rough, terms=D * 200).ok:
                return False
    return True


def test_quest_reads_the_pages_of_the_largest_bounds(plugin, monkeypatch):
    monkeypatch.setattr(vllm_stub.CONFIG, "additional_config", {"saccade": {"select": "quest", "budget": 48}})
    assert decoded(Server(plugin), bounds)


def test_bounds_of_an_earlier_owner_would_be_seen(plugin, monkeypatch):
    """The twin: pages are not forgotten when they begin anew."""
    monkeypatch.setattr(vllm_stub.CONFIG, "additional_config", {"saccade": {"select": "quest", "budget": 48}})
    server = Server(plugin)
    wrote = server.impl.choice.wrote
    server.impl.choice.wrote = lambda pages, at, offsets, k, v: wrote(pages, at, offsets + PAGE, k, v)
    assert not decoded(server, bounds)


class Evicted:
    """PagedEviction by the book: once a page is one too many, the least important of the full ones is gone for good."""

    def __init__(self):
        self.gone = {}

    def __call__(self, server, request, q):
        k, v = server.k[request], server.v[request]
        worth = (v.norm(dim=-1) / k.norm(dim=-1)).mean(0)
        pages = worth.split(PAGE)
        gone = self.gone.setdefault(request, set())
        alive = [p for p in range(len(pages)) if p not in gone]
        while len(alive) > 3:
            least = min(alive[:-1], key=lambda p: float(pages[p].mean()))
            gone.add(least)
            alive.remove(least)
        return torch.tensor([[-1.0 if p in gone else 1.0 for p in range(len(pages))]])


def test_paged_eviction_never_reads_a_page_again(plugin, monkeypatch):
    monkeypatch.setattr(vllm_stub.CONFIG, "additional_config", {"saccade": {"select": "paged_eviction", "budget": 48}})
    assert decoded(Server(plugin), Evicted())


def test_a_profiling_run_gives_zeros(plugin):
    out = torch.full((5, H * D), torch.nan)
    assert not Server(plugin).impl.forward(None, out, out, out, None, None, out).any()


def test_register_names_a_class_that_is_there(plugin):
    from saccade.vllm import register

    register()
    module, _, name = vllm_stub.REGISTERED[vllm_stub.AttentionBackendEnum.CUSTOM].rpartition(".")
    assert getattr(importlib.import_module(module), name) is plugin.Backend


def test_the_entry_point_is_the_plugin():
    from importlib.metadata import entry_points

    from saccade.vllm import register

    (mine,) = (each for each in entry_points(group="vllm.general_plugins") if each.name == "saccade")
    assert mine.load() is register


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"alibi_slopes": [0.5] * H}, "alibi_slopes"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"attn_type": "encoder"}, "attn_type"),
        ({"kv_sharing_target_layer_name": "layer"}, "kv_sharing_target_layer_name"),
    ],
)
def test_what_it_does_not_do(plugin, options, name):
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        plugin.Impl(H, D, SCALE, HKV, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "quest"}, "^budget: "),
        ({"select": "quest", "budget": 0}, "^budget: "),
        ({"select": "best", "budget": 64}, "^select: "),
        ({"budget": 64}, "^budget: got 64 without select"),
        ({"top_k": 3}, "no option 'top_k'"),
    ],
)
def test_bad_options(plugin, monkeypatch, options, message):
    monkeypatch.setattr(vllm_stub.CONFIG, "additional_config", {"saccade": options})
    with pytest.raises(ValueError, match=message):
        plugin.Impl(H, D, SCALE, HKV)
