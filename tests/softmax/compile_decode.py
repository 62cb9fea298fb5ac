"""Compile the decode kernels for compute capability 9.0, without a GPU: python compile_decode.py.

Pages in full precision and in codes of 8 and 4 bits, read whole and token by token. Prints a line a compiled kernel:
its name, the case, and the bytes of shared memory, which must not be more than a program may have.
"""

from typing import Any

import torch

from saccade.softmax import Pages
from saccade.softmax.kernels import decode
from saccade.softmax.page_rows import Found
from saccade.softmax.paged import FULL, SOFTMAX, CodedFrames, Codes
from saccade.softmax.problem import Problem
from saccade.testing.offline import compile_only

FRAMES, DIM, ROWS = 2, 128, 4


def seen(name: str, kernel: Any) -> None:
    if name == "attend_split":
        assert kernel.metadata.shared <= decode.SHARED, kernel.metadata.shared
        print(name, *case, kernel.metadata.shared, flush=True)


def pages(bits: int, along: str, frame: int, page: int) -> Pages:
    def codes() -> Codes:
        shape = (FRAMES, 1, DIM) if along == "channel" else (FRAMES, frame, DIM // 32)
        beside = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
        packed = torch.zeros(FRAMES, frame, DIM * bits // 8, dtype=torch.uint8)
        return Codes(packed, *beside, bits, 0 if along == "channel" else 32)

    k, v = (torch.zeros(FRAMES * frame // page, 1, page, DIM, dtype=torch.bfloat16) for _ in range(2))
    at = torch.zeros(FRAMES, dtype=torch.int64)
    coded = CodedFrames(codes(), codes(), at, at) if bits else None
    table = torch.zeros(ROWS, 8, dtype=torch.int32)
    return Pages.trusted(k, v, table, table[:, 0].contiguous(), Found(), coded)


compile_only(seen)
CASES = [
    (0, "channel", 16, 16, 4),
    *((bits, along, 16, page, 4) for bits in (8, 4) for along in ("channel", "token") for page in (16, 1)),
    *((bits, "channel", 64, 64, group) for bits in (8, 4) for group in (16, 128)),
]
for case in CASES:
    of, group = pages(*case[:4]), case[4]
    q = torch.zeros(ROWS, group, 1, DIM, dtype=torch.bfloat16)
    problem = Problem(q, of.k, of.v, FULL, 0.1, None, None, None, SOFTMAX, False)
    decode.attend(problem, of, torch.zeros(ROWS, 1, 5, dtype=torch.int32))
