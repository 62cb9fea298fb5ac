"""A policy that passes on what another one decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from saccade.cache.policy import Policy
from saccade.cache.store import Tokens
from saccade.cache.view import Stored, View

if TYPE_CHECKING:
    from saccade.cache.session import Session


class Wrapped(Policy):
    """Decides as `policy` does; a subclass keeps what is left in a storage of its own.

    Errors: TypeError for what is no policy; ValueError for one that has such a storage already.
    """

    def __init__(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy: got {type(policy).__name__}; pass a Policy")
        if policy.storage != Policy.storage:
            raise ValueError(
                f"policy: got {policy}, which says itself how its pages are kept; pass the policy that it wraps"
            )
        self.policy = policy
        self.page, self.columns, self.periodic = policy.page, policy.columns, policy.periodic

    def begin(self, session: Session) -> None:
        self.policy.begin(session)

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return self.policy.attend(index, q, k, v, scale)

    def project(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.policy.project(index, q, k, v)

    def piece(self, view: View) -> Tensor | None:
        return self.policy.piece(view)

    def counts(self, view: View) -> Tensor | None:
        return self.policy.counts(view)

    def settle(self, session: Session) -> None:
        self.policy.settle(session)

    def select(self, step: Stored) -> Tensor | Tokens | None:
        return self.policy.select(step)

    def after(self, step: Stored) -> None:
        self.policy.after(step)

    def tokens(self, seen: int, index: int = 0, num_layers: int = 1) -> int | None:
        return self.policy.tokens(seen, index, num_layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy})"
