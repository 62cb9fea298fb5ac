"""Policies by name, as a command line has them."""

from __future__ import annotations

import inspect

from saccade.cache import Policy, Quest, baselines
from saccade.errors import known

MAKERS = {"quest": Quest} | {
    name: make for name, make in vars(baselines).items() if inspect.isfunction(make) and not name.startswith("_")
}


def named(text: str) -> tuple[str, Policy]:
    """The name and the policy that a text means: `dense`, or a baseline of `saccade.cache` and its budget.

    A budget with a point is a part of the tokens, one without a number of them. Errors: ValueError for other texts.

    >>> named("snapkv=0.5")[0], named("quest=256")[1]
    ('snapkv', Quest(256, page=16))
    """
    name, equals, budget = text.partition("=")
    if known("policy", name, ["dense", *sorted(MAKERS)]) == "dense":
        if equals:
            raise ValueError(f"policy: got {text!r}; dense attention has no budget")
        return name, Policy()
    try:
        number = float(budget) if "." in budget else int(budget)
    except ValueError:
        raise ValueError(f"policy: got {text!r}; pass a budget, like {name}=0.25 or {name}=512") from None
    return name, MAKERS[name](number)
