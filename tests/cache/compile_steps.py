"""Compile the kernels of a step for compute capability 9.0, without a GPU: python compile_steps.py.

Prints a line a compiled kernel: its name and the case. In `put` all is read before the counts change, which others of
its threads read too.
"""

from typing import Any

import torch

from saccade.cache.kernels import steps
from saccade.cache.steps import Ring
from saccade.testing.offline import compile_only


def seen(name: str, kernel: Any) -> None:
    if name == "put":
        before, _, after = kernel.asm["ptx"].partition("bar.sync")
        assert "ld.global" in before, "no barrier"
        assert (after.count("ld.global"), after.count("st.global")) == (0, 2)
    print(name, *case, flush=True)


compile_only(seen)
# Key heads, D, Dv, page, columns, dtype.
CASES = [
    (8, 128, 128, 16, 0, torch.bfloat16),
    (1, 64, 64, 1, 0, torch.float16),
    (6, 80, 48, 16, 3, torch.float32),
    (32, 256, 256, 16, 1, torch.bfloat16),
    (2, 8, 8, 4, 1, torch.float64),
]
for case in CASES:
    heads, d, dv, page, columns, dtype = case
    k, v = (torch.zeros(40, 1, page, x, dtype=dtype) for x in (d, dv))
    into = k, v, torch.zeros(40, page, dtype=torch.int32), torch.zeros(40, page, columns)
    table, ends = torch.zeros(2 * heads, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    rows = table, table[:, 0].contiguous(), ends
    new_k, new_v = (torch.zeros(2, heads, 1, x, dtype=dtype) for x in (d, dv))
    steps.launch_put(new_k, new_v, into, rows)
    which = torch.arange(2 * heads)
    for slots in (which, Ring(0, 1, ends), Ring(64, 256, ends)):
        steps.launch_drop(into, rows, which, slots)
    slots = torch.zeros(2, heads, 77, dtype=torch.int64)
    for each in (slots, slots.int(), slots[:, :1].expand(-1, heads, -1), slots.repeat_interleave(4, 1)):
        steps.launch_find(table, each, page)
    values = torch.zeros(2, heads, 77, dtype=dtype if dtype != torch.bfloat16 else torch.float32)
    for budget, unit in ((77, 1), (0.1, 1), (0.3, 16), (1.0, 16)):
        steps.launch_best(values, slots, ends, budget, unit)
    steps.launch_raise(values, rows[1].view(2, heads), page)
