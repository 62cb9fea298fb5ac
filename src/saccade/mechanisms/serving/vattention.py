"""vAttention: keys and values of a request contiguous in virtual memory, physical pages mapped as they are needed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor

from saccade import attend
from saccade.cache import Driver, SimulatedDriver, VirtualCache
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim
from saccade.errors import positive
from saccade.where import Causal


class VAttention(Attention):
    """Causal attention of B requests at once, each over keys and values that lie side by side.

        pages(n) = ceil(n Hkv D bytes / page),   a request of n tokens has pages(n) physical ones under each tensor

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D): dense attention, by the kernel that would run without pages.
    Every sequence is a request: its first tokens are read in one piece, `decoded` ones in steps, and all requests live
    in one `VirtualCache`, which is what the paper is about. Paper: arXiv 2405.04437, sections 5 and 6, and the authors'
    code. An engine serves what an attention computes, so that the contract is that of an attention; the claims are of
    its memory. Deviations: the best fit takes the least slot that is enough, where the authors' loop keeps the first
    free one unless a later one is enough and has fewer pages; `ahead` is called between steps, not by a thread; where
    pages run short for later steps it maps none. Values are as wide as keys, for their pages go in pairs.

    page: bytes (2 MiB; the authors' kernel module offers 64, 128 and 256 KiB too). decoded: tokens that are decoded
    (16). eager: unmap a request's pages when it ends (False: deferred). driver: what maps memory, (page, device) ->
    `Driver`; `SimulatedDriver` (default) has the calls and the addresses and all of the memory, `CudaDriver` maps it.
    Costs N^2 / 2 pairs; less than a page a request and tensor above what tokens take, and what is mapped ahead: pages
    of 10 tokens a request at most, and of requests that ended. Errors: ValueError for values of another width.

    >>> x = torch.randn(2, 2, 40, 8)
    >>> VAttention(Dims(2, 8), page=512)(x, x, x).shape
    torch.Size([2, 2, 40, 8])
    """

    spec = Spec(
        id="vattention",
        name="vAttention",
        title="vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention",
        paper="2405.04437",
        year=2024,
        family="serving",
        uses=("attend", "Causal", "VirtualCache"),
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        page: int = 2 << 20,
        decoded: int = 16,
        eager: bool = False,
        driver: Callable[[int, torch.device], Driver] = SimulatedDriver,
    ) -> None:
        super().__init__(dims)
        self.page, self.decoded = positive("page", page), positive("decoded", decoded, least=0)
        self.eager, self.driver = eager, driver

    def cache(self, slots: int, length: int, like: Tensor, num_layers: int = 1) -> VirtualCache:
        """Room for `slots` requests of up to `length` tokens, of the dtype and on the device of `like`."""
        return VirtualCache(
            self.driver(self.page, like.device),
            num_layers,
            self.dims.num_kv_heads,
            self.dims.head_dim,
            slots=slots,
            length=length,
            dtype=like.dtype,
            eager=self.eager,
        )

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, _, n, _), whole = q.shape, k.shape[2]
        if whole != n:
            raise ValueError(f"k: got {whole} keys for {n} queries; vattention reads both from the first on")
        if v.shape != k.shape:
            raise ValueError(f"v: got {v.shape[3]} channels beside k's {k.shape[3]}; their pages go in pairs")
        cache, first = self.cache(batch, n, k), max(1, n - self.decoded)
        slots, rows = [cache.open(first) for _ in range(batch)], []
        for start, stop in itertools.pairwise([0, *range(first, n + 1)]):
            parts = []
            for b, slot in enumerate(slots):
                cache.extend(slot, stop)
                cache.write(0, slot, start, k[b, :, start:stop], v[b, :, start:stop])
                keys, values = map(_lasting, cache.view(0, slot))
                parts.append(attend(q[b : b + 1, :, start:stop], keys, values, Causal()))
            rows.append(torch.cat(parts))
            cache.ahead()
        cache.release()
        return torch.cat(rows, 2)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (_, heads, n, d), group, rows = q.shape, self.dims.group, []
        for h in range(heads):
            for i in range(n):
                scores = (k[:, h // group, : i + 1] * q[:, h, i, None]).sum(-1) / d**0.5
                rows.append((scores.softmax(-1)[..., None] * v[:, h // group, : i + 1]).sum(1))
        return torch.stack(rows, 1).unflatten(1, (heads, n))

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(4, 8, 2), 37, {"page": 512, "decoded": 11}),
            Case(Dims(3, 5), 23, {"page": 720, "decoded": 5, "eager": True}),
            Case(Dims(2, 4), 19, {"page": 4096, "decoded": 0}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"page": 4096}

    @claim("The output is that of contiguous attention to the last bit, and keys and values have its strides.")
    def contiguous(cls) -> Finding:
        engine, (q, k, v) = cls(Dims(4, 16, 2), page=4096), torch.randn(3, 4, 4, 50, 16)
        k, v = k[:, :2], v[:, :2]
        cache = engine.cache(4, 50, k)
        same, strides = 0, set()
        for b in range(4):
            slot = cache.open(50)
            cache.write(0, slot, 0, k[b], v[b])
            paged, plain = (
                cache.view(0, slot),
                [x[b].transpose(0, 1).contiguous().transpose(0, 1)[None] for x in (k, v)],
            )
            found, truth = (attend(q[b : b + 1], keys, values, Causal()) for keys, values in (paged, plain))
            same += torch.equal(found, truth)
            strides |= {x.stride()[1:] == y.stride()[1:] for x, y in zip(paged, plain, strict=True)}
        return Finding(same == 4 and strides == {True}, f"{same} of 4 requests bit for bit, strides as they are")

    @claim("Mapped when needed and unmapped at once, less than a page a request, tensor and layer holds no token.")
    def wastes_less_than_a_page(cls) -> Finding:
        most, idle, moments = 0, 0, 0
        engine, draw = cls(Dims(4, 16), page=4096, eager=True), random.Random(0)
        cache, running = engine.cache(8, 600, torch.zeros(1), num_layers=3), list[int]()
        for _ in range(400):
            if len(running) < 8 and draw.random() < 0.2:
                running.append(cache.open(draw.randint(1, 400)))
            for slot in list(running):
                if cache.lengths[slot] == cache.length or draw.random() < 0.05:
                    running.remove(slot)
                    cache.close(slot)
                else:
                    cache.extend(slot, (cache.lengths[slot] or 0) + 1)
            most = max([most, *map(cache.waste, running)])
            idle += sum(cache.mapped[slot] for slot in range(8) if slot not in running)
            moments += len(running)
        return Finding(
            0 < most < 4096 and not idle, f"at most {most} of 4096 bytes in {moments} looks, {idle} idle pages"
        )

    @claim("A slot maps no new page for a request that is no longer than the one before it.")
    def reuses_slots(cls) -> Finding:
        driver = SimulatedDriver(4096)
        engine = cls(Dims(4, 16), page=4096, driver=lambda page, device: driver)
        cache = engine.cache(4, 400, torch.zeros(1), num_layers=2)
        for slot in [cache.open(length) for length in (40, 300, 120, 200)]:
            cache.close(slot)
        before = len(driver.calls)
        fits = [cache.open(length) for length in (190, 100, 16, 290)]
        reused = len(driver.calls) - before
        cache.close(fits[0])
        cache.open(220)
        longer = len(driver.calls) - before
        return Finding(
            reused == 0 and fits == [3, 2, 0, 1] and longer == 4 * (cache.pages(220) - cache.pages(200)),
            f"{reused} calls for 4 requests in slots {fits}, {longer} for one that is longer",
        )

    @claim("Pages for the next tokens are mapped before the step that writes there, at most those of 10 tokens.")
    def maps_ahead(cls) -> Finding:
        driver = SimulatedDriver(1024)
        engine = cls(Dims(2, 16), page=1024, driver=lambda page, device: driver)
        cache = engine.cache(5, 300, torch.zeros(1))
        slots, waited, most = [cache.open(17 * length) for length in range(1, 6)], 0, 0
        for _ in range(200):
            cache.ahead()
            most = max([most, *map(cache.waste, slots)])
            before = len(driver.calls)
            for slot in slots:
                cache.extend(slot, (cache.lengths[slot] or 0) + 1)
            waited += len(driver.calls) - before
        bound = 1024 + 10 * cache.token
        return Finding(waited == 0 and most < bound, f"{waited} calls in 1000 steps, {most} of {bound} bytes ahead")


def _lasting(x: Tensor) -> Tensor:
    """What autograd keeps; the memory of the cache is written to again by later tokens."""
    return x.clone() if torch.is_grad_enabled() and x.requires_grad else x
