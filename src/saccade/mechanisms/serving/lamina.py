"""Lamina: attention offloaded to devices that hold the keys and values; queries go ahead, the new token follows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from saccade import attend
from saccade.contract import Attention, Case, Dims, Finding, Spec, claim, replay
from saccade.errors import positive
from saccade.softmax import Pages, attend_pages, merge
from saccade.where import Causal


class Worker:
    """Holds keys and values of some heads on a device (None: the sender's), in a thread that does errands in order."""

    def __init__(self, device: torch.device | str | None, events: list[tuple[str, int]]) -> None:
        self.device, self.events, self.thread = device, events, ThreadPoolExecutor(1)
        self.pages: dict[int, Pages] = {}
        self.asked: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def errand(self, job: Callable[..., Any], batch: int, *tensors: Tensor) -> Future[Any]:
        """Let the thread do `job` on this device, in the sender's stream and with its choice about gradients."""
        stream = torch.cuda.current_stream(tensors[0].device) if tensors[0].is_cuda else None
        graph = torch.is_grad_enabled()

        def run() -> Any:
            with torch.set_grad_enabled(graph), torch.cuda.stream(stream):  # type: ignore[arg-type]
                return job(self, batch, *(x if self.device is None else x.to(self.device) for x in tensors))

        return self.thread.submit(run)

    def load(self, batch: int, k: Tensor, v: Tensor, room: int) -> None:
        """The first piece of a batch of requests, with room for `room` tokens more."""
        self.pages[batch] = Pages.of(k, v, room=room)

    def old(self, batch: int, q: Tensor) -> None:
        """Attention of the new token to the keys that are here already; q (B, H, 1, D)."""
        self.asked[batch] = q, attend_pages(q, self.pages[batch], return_lse=True)
        self.events.append(("old", batch))

    def new(self, batch: int, k: Tensor, v: Tensor) -> Tensor:
        """Its attention to itself, k (B, Hkv, 1, D), v (B, Hkv, 1, Dv), merged with that -> o (B, H, 1, Dv)."""
        q, old = self.asked.pop(batch)
        self.pages[batch] = self.pages[batch].append(k, v)
        group, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        s = (q.to(wide) * k.to(wide).repeat_interleave(group, 1)).sum(-1) / q.shape[3] ** 0.5
        self.events.append(("new", batch))
        return merge([old, (v.repeat_interleave(group, 1), s)])[0]


class Pool(contextlib.ExitStack):
    """Workers that share the heads, and the link to them, open inside `with`; counts what steps `sent` and `returned`.

    events: (what, batch) in the order of time, "query", "token" and "collect" here, "old" and "new" by each worker.
    """

    def __init__(self, workers: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.sent = self.returned = 0
        self.events: list[tuple[str, int]] = []
        self.workers = [Worker(device, self.events) for _ in range(workers)]
        self.flying: dict[int, list[Future[Any]]] = {}
        for worker in self.workers:
            self.enter_context(worker.thread)

    def hand(self, job: Callable[..., Any], batch: int, kv_heads: int, *tensors: Tensor) -> list[Future[Any]]:
        """An errand for every worker, with the tensors' part for its key heads."""
        split = [x.unflatten(1, (kv_heads, -1)).tensor_split(len(self.workers), 1) for x in tensors]
        parts = zip(self.workers, *split, strict=True)
        return [worker.errand(job, batch, *(x.flatten(1, 2) for x in heads)) for worker, *heads in parts]

    def load(self, batch: int, k: Tensor, v: Tensor, room: int) -> None:
        """The first piece of a batch of requests; the wait raises what goes wrong."""
        for future in self.hand(functools.partial(Worker.load, room=room), batch, k.shape[1], k, v):
            future.result()

    def query(self, batch: int, q: Tensor, kv_heads: int) -> None:
        """Send the queries of a step ahead; attention to the old keys begins."""
        self.sent += q.numel()
        self.events.append(("query", batch))
        self.flying[batch] = self.hand(Worker.old, batch, kv_heads, q)

    def token(self, batch: int, k: Tensor, v: Tensor) -> None:
        """Send the new keys and values after them."""
        self.sent += k.numel() + v.numel()
        self.events.append(("token", batch))
        self.flying[batch] += self.hand(Worker.new, batch, k.shape[1], k, v)

    def collect(self, batch: int, device: torch.device) -> Tensor:
        """The output of the step, once it is there; the first error of a worker, if there was one."""
        found = [future.result() for future in self.flying.pop(batch)]
        o = torch.cat([heads.to(device) for heads in found[-len(self.workers) :]], 1)
        self.returned += o.numel()
        self.events.append(("collect", batch))
        return o


class Lamina(Attention):
    """Causal attention of B requests, decoded where their keys and values lie, away from the rest of the model.

        (o_i, s_i) = old(q_i; k_j, v_j for j < i) + (v_i, q_i . k_i / sqrt(D)),   + as in `merge`

    q (B, H, N, D), k, v (B, Hkv, N, D) -> o (B, H, N, D): dense attention. Every worker holds some key heads of every
    request. In a step q_i goes out first and the attention to the old keys begins; k_i and v_i follow and are merged in
    by the log-sum-exp where the keys lie, and o_i comes back: H D (2 + 2 / G) numbers a token and layer, G = H / Hkv,
    whatever N. The requests are in `batches` parts that take turns: while one is at the workers, the model has another.
    Paper: arXiv 2405.01814, read in the abstracts of its two versions and in what others tell of its method; no code of
    the authors was found. Deviations: the workers are threads on a device of torch, not machines, and the link copies
    between devices and counts; the first piece is read by `attend` here and loaded then; batches take turns with one
    model, there is no rotation over several; tensors of a layer arrive whole, so that nothing is computed between q_i
    and k_i, which are sent in this order all the same.

    workers: at most Hkv (2); the first ones have a key head more where they do not divide. batches: parts that take
    turns (2), fewer where there are fewer requests. decoded: tokens that are decoded (16). device: of the workers
    (None: that of q). Costs N^2 / 2 pairs. Errors: ValueError for more workers than key heads.

    >>> layer, x = Lamina(Dims(4, 8), workers=2), torch.randn(3, 4, 40, 8)
    >>> layer(x, x, x).shape
    torch.Size([3, 4, 40, 8])
    """

    spec = Spec(
        id="lamina",
        name="Lamina (attention offloading)",
        title="Efficient and Economic Large Language Model Inference with Attention Offloading",
        paper="2405.01814",
        year=2024,
        family="serving",
        uses=("attend", "attend_pages", "merge", "Pages", "Causal"),
        waits="workers may be on other devices, whose results travel",
    )
    causal = True

    def __init__(
        self,
        dims: Dims,
        *,
        workers: int = 2,
        batches: int = 2,
        decoded: int = 16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dims)
        self.workers, self.batches = positive("workers", workers), positive("batches", batches)
        self.decoded, self.device = positive("decoded", decoded, least=0), device
        if workers > dims.num_kv_heads:
            raise ValueError(f"workers: got {workers} for {dims.num_kv_heads} key heads; each needs one at least")

    @torch.compiler.disable  # what the threads change meanwhile is nothing that a tracer could guard
    def decode(self, pool: Pool, first: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The outputs of the tokens from `first` on, whose predecessors are loaded."""
        n, count = q.shape[2], min(self.batches, len(q))
        parts = list(zip(*(x.tensor_split(count) for x in (q, k, v)), strict=True))
        found: list[list[Tensor]] = [[] for _ in parts]
        for batch, (_, keys, values) in enumerate(parts):
            pool.load(batch, keys[:, :, :first], values[:, :, :first], n - first)
        for t in range(first, n):
            for batch, tensors in enumerate(parts):
                if batch in pool.flying:  # a token needs the output of the one before it
                    found[batch].append(pool.collect(batch, q.device))
                new_q, new_k, new_v = (x[:, :, t : t + 1] for x in tensors)
                pool.query(batch, new_q, k.shape[1])
                pool.token(batch, new_k, new_v)
        for batch in list(pool.flying):
            found[batch].append(pool.collect(batch, q.device))
        return torch.cat([torch.cat(outputs, 2) for outputs in found])

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        if k.shape[2] != n:
            raise ValueError(f"k: got {k.shape[2]} keys for {n} queries; lamina reads both from the first on")
        first = max(1, n - self.decoded)
        found = [attend(q[:, :, :first], k[:, :, :first], v[:, :, :first], Causal())]
        if first < n:
            with Pool(self.workers, self.device) as pool:
                found.append(self.decode(pool, first, q, k, v))
        return torch.cat(found, 2)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return replay(q, k, v, q.shape[2], lambda b, t, held: held)

    @classmethod
    def cases(cls) -> list[Case]:
        return [
            Case(Dims(6, 8, 3), 37, {"workers": 2, "batches": 2, "decoded": 11}, batch=3),
            Case(Dims(3, 5), 23, {"workers": 3, "batches": 3, "decoded": 22}),
            Case(Dims(4, 4, 1), 19, {"workers": 1, "batches": 1, "decoded": 5, "device": "cpu"}, batch=1),
        ]

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, int]:
        return {"workers": 1}

    @claim("Attention to old keys, done before k and v are sent, merged with that to the new one is attention to all.")
    def goes_ahead(cls) -> Finding:
        (q, k, v), early, apart = torch.randn(3, 2, 8, 65, 16, dtype=torch.float64), 0, 0.0
        k, v = k[:, :4], v[:, :4]
        with Pool(3) as pool:
            pool.load(0, k[:, :, :40], v[:, :, :40], 25)
            for t in range(40, 65):
                new, before = slice(t, t + 1), len(pool.events)
                pool.query(0, q[:, :, new], 4)
                for future in pool.flying[0]:
                    future.result()
                pool.token(0, k[:, :, new], v[:, :, new])
                o = pool.collect(0, q.device)
                names = [what for what, _ in pool.events[before:]]
                early += names == ["query", *["old"] * 3, "token", *["new"] * 3, "collect"]
                apart = max(apart, float((o - attend(q[:, :, new], k[:, :, : t + 1], v[:, :, : t + 1])).abs().max()))
        heads, near = [one.pages[0].k.shape[1] for one in pool.workers], 65 * torch.finfo(q.dtype).eps * v.abs().max()
        return Finding(
            early == 25 and heads == [2, 1, 1] and apart < float(near),
            f"workers with {heads} key heads had read the old ones in {early} of 25 steps, outputs {apart:.1e} apart",
        )

    @claim("A token sends and gets (2 + 2 / G) d numbers a layer, whatever the length of the context.")
    def traffic(cls) -> Finding:
        counts: dict[int, set[float]] = {1: set(), 4: set(), 8: set()}
        for group, found in counts.items():
            for length in (20, 200, 1000):
                q, (k, v) = torch.randn(2, 8, length, 16), torch.randn(2, 2, 8 // group, length, 16)
                with Pool(1) as pool:
                    cls(Dims(8, 16, 8 // group), workers=1).decode(pool, length - 4, q, k, v)
                found.add((pool.sent + pool.returned) / (2 * 4))
        same = all(found == {(2 + 2 / group) * 128} for group, found in counts.items())
        return Finding(same, f"numbers with contexts of 20, 200 and 1000 tokens, d = 128, by G: {counts}")

    @claim("While the model has one of two batches, the other is at the workers; with a single batch none is.")
    def takes_turns(cls) -> Finding:
        busy = []
        for batches in (1, 2):
            q, k, v = torch.randn(3, 4, 4, 40, 16)
            with Pool(2) as pool:
                cls(Dims(4, 16), batches=batches).decode(pool, 20, q, k, v)
            ours = [what for what, _ in pool.events if what in ("query", "token", "collect")]
            earlier = [ours[:at] for at, what in enumerate(ours) if what == "query"]
            away = [before.count("token") - before.count("collect") for before in earlier]
            busy.append((sum(away), len(away)))
        (alone, steps), (both, turns) = busy
        return Finding(
            alone == 0 and both == turns - 1,
            f"another batch was away in {both} of {turns} turns of two batches, in {alone} of {steps} of one",
        )
