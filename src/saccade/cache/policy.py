"""What a decoder keeps and what it reads: the hooks of a policy, and eviction by score and budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.cache.budgets import AcrossLayers, Uniform, top
from saccade.cache.pool import Storage
from saccade.cache.scorers import Scorer
from saccade.cache.store import Tokens
from saccade.cache.view import Stored, View
from saccade.errors import positive
from saccade.softmax import attend
from saccade.where import Causal

if TYPE_CHECKING:
    from saccade.cache.session import Session


class Policy:
    """Keeps everything and reads everything; a policy overrides what it does otherwise.

    A *piece* is a run of tokens that come at once (a prompt, or a part of one): its queries see all that is held and
    the piece itself, causally. A *step* is one token after a piece. For every layer, `index` 0, 1, ... of those that
    share the policy, a `Session` calls

        begin(session)                          once before the first layer
        attend(index, q, k, v, scale) -> o      of a piece before which there was nothing: causal attention
        project(index, q, k, v) -> q, k, v      as they are stored, and met by later queries
        restore(index, o) -> o                  what later queries found in what was projected, as it was before
        piece(view) -> keep                     which tokens stay: bool (G, Hkv, M), or None for all
        select(step) -> chosen                  what a step reads: see `Store.attend`; its own token is stored already
        after(step)                             may drop tokens of step.store, or note what it saw
        settle(session)                         once after the last layer, of a piece

    A policy holds parameters, never state. That is in `session.shared` (`view.shared`) for all layers, and in the notes
    of each layer's store (`view.note`, `view.notes`): tensors with the batch as their first axis; and in `columns`
    numbers a token (`view.columns`), which move as it moves. A step's `steps` counts those since the piece, from 0.

    page: tokens a page. columns: numbers a token. periodic: what it does depends on `steps`, so that sequences whose
    pieces ended at different times are not decoded as one batch. storage: how its pages are kept.
    """

    page = 16
    columns = 0
    periodic = False
    storage = Storage()

    def begin(self, session: Session) -> None:
        """Before the first layer of a piece or a step."""

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """o (G, H, N, Dv) of the first piece: dense, unless a policy says otherwise."""
        return attend(q, k, v, Causal(), scale=scale)

    def project(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored for k and v, and the q that fits: q (G, H, N, D), k, v (G, Hkv, N, ...)."""
        return q, k, v

    def restore(self, index: int, o: Tensor) -> Tensor:
        """o (G, H, N, ...) of stored values, as (G, H, N, Dv)."""
        return o

    def piece(self, view: View) -> Tensor | None:
        """After the attention of a piece: what stays of `view`, of new tokens and those that were held before it."""
        return None

    def counts(self, view: View) -> Tensor | None:
        """How many tokens `piece` leaves each row, (G, Hkv) on the host; None asks the device, once a piece."""
        return None

    def settle(self, session: Session) -> None:
        """After the last layer of a piece: for decisions that need all layers."""

    def select(self, step: Stored) -> Tensor | Tokens | None:
        """What a step reads."""
        return None

    def after(self, step: Stored) -> None:
        """After the attention of a step."""

    @property
    def idle(self) -> bool:
        """Whether steps ask nothing of it: neither `select` nor `after` says anything, so that no view is made."""
        return (type(self).select, type(self).after) == (Policy.select, Policy.after)

    def steady(self, session: Session) -> bool:
        """Whether steps from now on tell a device the same again and again, so that one can be recorded for all.

        Then `select` and `after` ask the device for nothing, decide nothing by what the host counts, make shapes by
        `horizon` and by the views, keep what they keep in notes, and drop nothing from pages that several sequences
        share. By default a policy does that which has neither.
        """
        cls = type(self)
        return (cls.begin, cls.select, cls.after) == (Policy.begin, Policy.select, Policy.after)

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1) -> int | None:
        """Tokens a key head that are left after a piece, on average over heads; None when that is not a number."""
        return seen

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Evict(Policy):
    """Keep the tokens of the largest scores, sinks and recent ones always; the others are gone.

    scorer: `saccade.cache.scorers`, view -> scores. budget: `Uniform`, `Pyramid`, `AcrossHeads`, `AcrossLayers`, or a
    share or number of tokens, uniform. sinks: first tokens of a sequence that stay (0). recent: last ones (0). every:
    None evicts after each piece only, and what is decoded stays; n also every n steps, down to the budget.

    After a piece of a sequence that has had M tokens, a key head holds round(share M) of them, and a step attends to
    those, to later ones that are held, and to itself. A share is one of the tokens seen so far, decoded ones too, so
    that 1.0 is dense attention, with any `every`; a number of tokens stays what it is. Errors: ValueError for a budget
    of 0 or above 1, and for one that does not hold sinks and recent tokens.

    >>> from saccade.cache import Observed, Session
    >>> session = Session(Evict(Observed(window=8), 0.25, recent=8))
    >>> q, k, v = torch.randn(1, 4, 64, 8), *torch.randn(2, 1, 2, 64, 8)
    >>> o = session.attend(0, q, k, v)
    >>> session.stores[0].counts
    tensor([[16, 16]])
    """

    def __init__(
        self,
        scorer: Scorer,
        budget: Uniform | float | int,
        *,
        sinks: int = 0,
        recent: int = 0,
        every: int | None = None,
    ) -> None:
        self.scorer = scorer
        self.budget = budget if isinstance(budget, Uniform) else Uniform(budget)
        self.sinks, self.recent = positive("sinks", sinks, least=0), positive("recent", recent, least=0)
        self.every = every if every is None else positive("every", every)
        self.columns = int(scorer.accumulates or self.budget.over_layers)
        share = self.budget.share
        if isinstance(share, int) and share < sinks + recent:
            raise self._short(f"{share} tokens", share)

    def _short(self, got: str, tokens: int) -> ValueError:
        return ValueError(
            f"budget: got {got}, which does not hold {self.sinks} sinks and {self.recent} recent tokens; pass at least "
            f"{self.sinks + self.recent}, or fewer of those"
        )

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1) -> int:
        found = self.budget.tokens(seen, index, num_layers, self.sinks + self.recent)
        if found < min(seen, self.sinks + self.recent):
            raise self._short(f"{self.budget.share} of {seen} tokens, {found} in layer {index}", found)
        return found

    def scores(self, view: View) -> Tensor:
        """(G, Hkv, M): infinite for what always stays, -inf for what is not there."""
        found = view.columns[..., 0] if self.columns else self._score(view)
        ends = view.ends[:, None, None]
        always = (view.positions < self.sinks) | (view.positions >= ends - self.recent)
        return found.masked_fill(always, torch.inf).masked_fill(~view.there, -torch.inf)

    def _score(self, view: View) -> Tensor:
        # Choices have no gradients; what is moved because of them has.
        with torch.no_grad():
            return self.scorer(view)

    def _count(self, view: View) -> None:
        """Bring the column of scores up to the newest queries."""
        if self.columns:
            found = self._score(view).to(view.columns.dtype)
            view.columns[..., 0] = view.columns[..., 0] + found if self.scorer.accumulates else found

    def piece(self, view: View) -> Tensor | None:
        self._count(view)
        if self.budget.over_layers:
            return None
        return self.budget.keep(self.scores(view), self.tokens(view.num_seen, view.index, view.num_layers))

    def counts(self, view: View) -> Tensor | None:
        if self.budget.over_layers:
            return view.counts
        return self.budget.counts(view.counts, self.tokens(view.num_seen, view.index, view.num_layers))

    def settle(self, session: Session) -> None:
        if not isinstance(self.budget, AcrossLayers):
            return
        views = [session.view(index) for index in range(session.num_layers)]
        tokens = torch.tensor([self.tokens(seen) for seen in views[0].seen.tolist()])
        kept = self.budget.keep_all([self.scores(view) for view in views], tokens)
        for view, keep in zip(views, kept, strict=True):
            view.stored.keep(keep)
            view.stored.aim()

    def _targets(self, step: Stored) -> Tensor:
        """(G, Hkv): what the piece left each row, and what its budget has grown by since."""
        store = step.stored
        targets, then = store.targets, store.aimed
        if step.rows is not None:
            targets, then = targets[list(step.rows)], then[list(step.rows)]
        pairs = list(zip(step.seen.tolist(), then.tolist(), strict=True))
        grown = {
            pair: self.tokens(pair[0], step.index, step.num_layers) - self.tokens(pair[1], step.index, step.num_layers)
            for pair in set(pairs)
        }
        return targets + torch.tensor([[grown[pair]] for pair in pairs])

    def after(self, step: Stored) -> None:
        store = step.stored
        if self.every is None:
            return
        targets = self._targets(step)
        over = step.counts - targets
        most = int(over.max())
        if not self.scorer.accumulates and most < self.every:
            return
        self._count(step)
        if self.columns:
            step.put_columns()
        if most < self.every:
            return
        scores = self.scores(step)
        over = over * (over.amax(1, keepdim=True) >= self.every)  # a sequence is cut when it is its own turn
        if most == 1:
            least = scores.masked_fill(~step.there, torch.inf).argmin(-1, keepdim=True)
            store.drop(step.slots.gather(2, least), step.rows, None if int(over.min()) == 1 else over > 0)
        else:
            left = step.counts - over.clamp(min=0)
            store.keep(top(scores, left), step.rows, counts=left)

    @property
    def idle(self) -> bool:
        return self.every is None and (type(self).select, type(self).after) == (Policy.select, Evict.after)

    def steady(self, session: Session) -> bool:
        return self.every is None

    def __repr__(self) -> str:
        return f"Evict({self.scorer}, {self.budget}, sinks={self.sinks}, recent={self.recent}, every={self.every})"
