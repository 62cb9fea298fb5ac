"""A few fixed problems, one for each way in which a plan is cut and each kind of option."""

from __future__ import annotations

import oracle
import torch
from cases import Case

from saccade.softmax import Entmax, RelativeTable
from saccade.where import Causal, Full, Neighborhood, PerHead, Plan, Sinks, Strided, Window, plan_chosen

B, H, KV, N, D, DV = 2, 4, 2, 24, 5, 3


def routed(block):
    """Tiles and weighted single keys, another choice for every (batch, head)."""
    rows, cols = -(-N // block[0]), -(-N // block[1])
    chosen, tokens = torch.randint(-1, cols, (B * H, rows, 2)), torch.randint(-1, N, (B * H, rows, 3))
    tokens[:, -1, 0] = 11  # some row sees the key that will be spoiled
    weights, group_of = torch.randn(tokens.shape), torch.arange(B * H).view(B, H)
    plan = plan_chosen(Causal(), chosen, group_of, N, N, block, tokens=tokens, token_log_weights=weights)
    mask = Causal().dense(N)[0]
    return plan, oracle.entries_chosen(mask, chosen, group_of, block, tokens, weights)


def static(pattern, block=None):
    entries = oracle.entries_of(pattern.dense(N, N, H))
    return (pattern if block is None else pattern.plan(N, N, H, block)), entries


WHERE = {
    "full": lambda: static(Full()),
    "causal": lambda: static(Causal()),
    "window by row": lambda: static((Window(3) | Sinks(1)) & Causal(), (16, 4)),
    "window by column": lambda: static((Window(3) | Sinks(1)) & Causal(), (4, 4)),
    "heads": lambda: static(PerHead([Causal(), Window(2), Strided(3), Full()]), (5, 7)),
    "grid": lambda: static(Neighborhood((4, 6), 3), (6, 6)),
    "bits": lambda: (Plan.from_mask(Strided(3).dense(N, N, H), (5, 3)), oracle.entries_of(Strided(3).dense(N, N, H))),
    "routed by row": lambda: routed((16, 3)),
    "routed by column": lambda: routed((4, 3)),
}


def bias():
    table = RelativeTable(H, (4,)).double()
    torch.nn.init.normal_(table.table)
    return table


OPTIONS = {
    "plain": dict,
    "all": lambda: {"bias": bias(), "softcap": 2.0, "sink": torch.randn(H, dtype=torch.float64)},
    "sigmoid": lambda: {"normalizer": "sigmoid", "bias": bias()},
    "entmax": lambda: {"normalizer": "entmax"},
    "sparsemax": lambda: {"normalizer": Entmax(2.0), "bias": bias()},
}


def problem(where, options, dv=DV):
    where, entries = WHERE[where]()
    q, k, v = (torch.randn(s, dtype=torch.float64) for s in ((B, H, N, D), (B, KV, N, D), (B, KV, N, dv)))
    return Case(q, k, v, where, entries, OPTIONS[options]())
