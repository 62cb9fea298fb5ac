"""Pages of which the device holds a bounded number; the others lie in the host's memory until they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.cache.frames import Frames
from saccade.cache.layered import LayeredPool
from saccade.cache.policy import Policy
from saccade.cache.pool import PagePool, Reading, Storage
from saccade.cache.view import Stored
from saccade.cache.wrapped import Wrapped
from saccade.errors import positive
from saccade.softmax import Pages
from saccade.softmax.page_rows import Found


class Lane:
    """Where pages are copied between a device and the host. Here they are copied at once: a device without streams.

    run(copies): does, some time, what `copies` does, after all that the device was told before, and in order. join():
    what the device is told from now on comes after that. finish(): the host goes on after that.
    """

    def run(self, copies: Callable[[], None]) -> None:
        copies()

    def join(self) -> None:
        pass

    def finish(self) -> None:
        pass


class StreamLane(Lane):
    """A stream of a GPU, beside the one that computes. tensors: of the device, that it copies from and to."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.device = tensors[0].device
        self.stream = torch.cuda.Stream(self.device)
        for x in tensors:
            x.record_stream(self.stream)  # their memory is nobody else's before the last copy is done
        self.busy = False

    def run(self, copies: Callable[[], None]) -> None:
        self.stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.stream):
            copies()
        self.busy = True

    def join(self) -> None:
        if self.busy:
            torch.cuda.current_stream(self.device).wait_event(self.stream.record_event())
            self.busy = False

    def finish(self) -> None:
        self.stream.synchronize()


class HostedPool(LayeredPool):
    """A pool that has `most` pages on its device, those last read, and all others in the host's memory, pinned.

    A page lies in one of the two. A step's pages are brought to the device, and take the places of those that were not
    read for longest; the copies run beside the computation (`Lane`), which waits for them before it reads. Where each
    page lies is known on the host, so that the host waits for the device to know what is read, and what is written.

    most: pages on the device. lane: where pages are copied (default: a stream of its own on a GPU, else at once). The
    others are as in `PagePool`. Errors: ValueError where one page of every row at once is more than `most`.
    """

    def __init__(
        self, dim: int, value_dim: int | None = None, *, most: int, lane: Lane | None = None, **options: Any
    ) -> None:
        self.most = positive("most", most)
        super().__init__(dim, value_dim, **options)
        if lane is None:
            on_gpu = self.positions.device.type == "cuda"
            lane = StreamLane(list(self.hot.tensors.values())) if on_gpu else Lane()
        self.lane = lane
        self.clock = self.fetched = self.spilled = 0

    def _laid(self, pages: dict[str, Tensor]) -> dict[str, Tensor]:
        device = pages["k"].device
        self.hot = Frames(pages, on_host=True)
        self.hot.take(1)
        self.hot.grow(self.most)
        self.cold = Frames(
            {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in pages.items()}, pinned=device.type == "cuda"
        )
        self.cold.take(1)
        # Of every page, on the host: its hot frame and its cold one, 0 for none; when it was last read.
        self.known = {name: torch.zeros(0, dtype=torch.int64) for name in ("hot", "cold", "read")}
        return {"hot_at": torch.zeros(0, dtype=torch.int64, device=device)}

    def _on_device(self) -> tuple[Frames, ...]:
        return self.frames, self.hot

    @property
    def host_nbytes(self) -> int:
        """Bytes of the host's memory."""
        return self.cold.nbytes

    @property
    def num_hot(self) -> int:
        """Pages on the device."""
        return self.hot.in_use - 1

    # -- where pages lie -------------------------------------------------------------------------------------------

    def take(self, count: int) -> Tensor:
        ids = super().take(count)
        more = self.num_pages - len(self.known["hot"])
        self.known = {name: torch.nn.functional.pad(x, (0, more)) for name, x in self.known.items()}
        on_host = ids.cpu()
        self.known["read"][on_host] = self._now()
        if count <= self.most:
            self._make_room(count, on_host)
            self._warm(on_host)
        else:  # a prompt: what a step will read is not known yet
            self.known["cold"][on_host] = self._cold(count)
            self._place(on_host, torch.zeros(count, dtype=torch.int64))
        return ids

    def _now(self) -> int:
        self.clock += 1
        return self.clock

    def _place(self, ids: Tensor, frames: Tensor) -> None:
        """Say on both sides in which hot frames pages are."""
        self.known["hot"][ids] = frames
        device = self.hot_at.device
        self.hot_at[ids.to(device)] = frames.to(device)

    def _cold(self, count: int) -> Tensor:
        """Frames of the host."""
        if count > self.cold.num_free:
            self.lane.finish()  # memory that is copied to and from is about to move
        return self.cold.take(count)

    def _warm(self, ids: Tensor) -> Tensor:
        """Hot frames for pages; there are enough."""
        frames = self.hot.take(len(ids))
        self._place(ids, frames)
        return frames

    def _make_room(self, count: int, stay: Tensor) -> None:
        """`count` hot frames free, by moving pages to the host that are not among `stay`."""
        short = count - self.hot.num_free
        if short <= 0:
            return
        read = self.known["read"].clone()
        read[self.known["hot"] == 0] = self.clock + 1
        read[stay] = self.clock + 1
        ids = read.argsort(stable=True)[:short]
        hot, cold = self.known["hot"][ids], self._cold(short)
        self._copies("cold", cold.tolist(), "hot", hot.tolist())
        self.known["cold"][ids] = cold
        self._place(ids, torch.zeros_like(ids))
        self.hot.release(hot)
        self.spilled += short

    def _copies(self, to: str, places: list[int], source: str, taken: list[int]) -> None:
        """Copy pages from one memory to the other, in the lane."""
        memory = {"hot": self.hot, "cold": self.cold}
        pairs = [(memory[to][name], memory[source][name]) for name in ("k", "v")]

        def copies() -> None:
            for x, y in pairs:
                for i, j in zip(places, taken, strict=True):
                    x[i].copy_(y[j], non_blocking=True)

        self.lane.run(copies)

    def bring(self, ids: Tensor) -> None:
        """Pages on the host's list, each once and at most `most`, to the device; what reads them joins the lane."""
        self.known["read"][ids] = self._now()
        away = ids[self.known["hot"][ids] == 0]
        if not len(away):
            return
        self._make_room(len(away), ids)
        cold = self.known["cold"][away]
        self._copies("hot", self._warm(away).tolist(), "cold", cold.tolist())
        self.known["cold"][away] = 0
        self.cold.release(cold)
        self.fetched += len(away)

    def _forget(self, ids: Tensor) -> None:
        on_host = ids.cpu()
        hot, cold = self.known["hot"][on_host], self.known["cold"][on_host]
        self.hot.release(hot[hot > 0])
        self.cold.release(cold[cold > 0])
        self.known["cold"][on_host] = 0
        self._place(on_host, torch.zeros_like(on_host))

    def shrink(self, ids: Tensor) -> None:
        super().shrink(ids)
        self.known = {name: x[ids.cpu()] for name, x in self.known.items()}

    # -- reading and writing ---------------------------------------------------------------------------------------

    def reading(self, table: Tensor, lengths: Tensor, chosen: Tensor | None, found: Found) -> Reading:
        for part, ids in self._asked(table, lengths, chosen):
            self.bring(ids)
            self.lane.join()
            yield Pages(self.hot["k"], self.hot["v"], self.hot_at[table.long()].int(), lengths, found), part

    def prefetch(self, table: Tensor, lengths: Tensor, chosen: Tensor) -> None:
        for _, ids in self._asked(table, lengths, chosen)[:1]:
            self.bring(ids)

    def _asked(self, table: Tensor, lengths: Tensor, chosen: Tensor | None) -> list[tuple[Tensor | None, Tensor]]:
        """Parts of what is chosen, each with its pages, on the host, of which the device holds enough."""
        logical = torch.arange(table.shape[1], device=table.device)[None] if chosen is None else chosen[:, 0].long()
        logical = logical.expand(len(table), -1)
        there = (logical >= 0) & (logical * self.page < lengths[:, None])
        # A guess may name pages that a row is yet to get.
        ids = table.long().gather(1, logical.masked_fill(~there, 0)).masked_fill(~there, -1).cpu()
        whole = self._named(ids)
        if len(whole) <= self.most:
            return [(chosen, whole)]
        step, parts = max(1, self.most // len(table)), []
        for at, each in zip(logical.split(step, 1), ids.split(step, 1), strict=True):
            found = self._named(each)
            if len(found) > self.most:
                raise ValueError(
                    f"pages: got {self.most} on the device, where a step reads a page of {len(found)} rows at once; "
                    f"pass at least {len(found)}"
                )
            parts.append((at[:, None].int(), found))
        return parts

    def _named(self, ids: Tensor) -> Tensor:
        return ids[ids >= 0].unique()

    def read(self, name: str, page: Tensor, offset: Tensor) -> Tensor:
        self.lane.join()
        found = self.hot[name][self.hot_at[page], 0, offset]
        cold, away, at = self._away(page, offset)
        if len(cold):
            found[away] = self.cold[name][cold, 0, at].to(found.device)
        return found

    def write(self, name: str, page: Tensor, offset: Tensor, values: Any) -> None:
        self.lane.join()
        self.hot[name][self.hot_at[page], 0, offset] = values
        cold, away, at = self._away(page, offset)
        if len(cold):
            values = values[away].cpu() if isinstance(values, Tensor) and values.ndim else values
            self.cold[name][cold, 0, at] = values

    def _away(self, page: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens in the host's memory: their cold frames, which they are, and their places there."""
        page, offset = torch.broadcast_tensors(page, offset)
        if self.cold.in_use == 1:
            none = torch.zeros(0, dtype=torch.int64)
            return none, none, none
        cold = self.known["cold"][page.cpu()]
        away = cold > 0
        if bool(away.any()):
            self.lane.finish()
        return cold[away], away.to(page.device), offset.cpu()[away]


@dataclass(frozen=True)
class Hosted(Storage):
    """Pages of which the device holds at most `pages`, a pool."""

    pages: int

    def pool(self, dim: int, value_dim: int, **options: Any) -> PagePool:
        return HostedPool(dim, value_dim, most=self.pages, **options)


class Offloaded(Wrapped):
    """A policy of which the device holds the pages that were read last; the others wait in the host's memory.

    What is read is what the policy says, to the last bit, as long as the pages of one step are no more than `pages`;
    where they are more, as in a piece that follows another, they are read in parts, which merge, up to rounding. Worth
    its copies where a step reads few of many pages (`Quest`), and mostly those that the last ones read.

    policy: what is kept and read. pages: most pages on the device, each of `policy.page` tokens of one key head, in a
    pool: of a layer, or of all layers and sessions where those share one. ahead: once layer i reads its pages, the same
    ones of layer i + 1 are brought (True); a guess, right where layers read alike, and exact where the next one is told
    what to read by an earlier one.

    Costs: a page that is missing, one copy of its keys and one of its values, and the same for the one that makes room;
    on the device `pages` pages, and of every token its position. What a policy looks at itself, as `Quest` does at all
    keys of a prompt, is copied for it. The host waits for the device, to learn what was chosen, once a layer, and once
    more for what is written there.
    Errors: ValueError for a policy that has a storage of its own.

    >>> from saccade.cache import Quest, Session
    >>> session, x = Session(Offloaded(Quest(32), pages=8)), torch.randn(1, 2, 200, 8)
    >>> o = [session.attend(0, *[x[:, :, a:b]] * 3) for a, b in ((0, 199), (199, 200))]
    >>> session.store(0).pool.in_use, session.store(0).pool.num_hot
    (26, 4)
    """

    def __init__(self, policy: Policy, pages: int, *, ahead: bool = True) -> None:
        super().__init__(policy)
        self.pages, self.ahead = positive("pages", pages), ahead
        self.storage = Hosted(self.pages)

    def after(self, step: Stored) -> None:
        if self.ahead and step.later is not None and isinstance(step.chosen, Tensor):
            step.later.prefetch(step.chosen, step.rows)
        self.policy.after(step)

    def __repr__(self) -> str:
        return f"Offloaded({self.policy}, pages={self.pages})"
