"""What the loop of a kernel waits for, by a model of one scheduler of a Hopper GPU; no GPU is needed.

    python benchmarks/schedule.py [--batch B] [--block] [--gradients] [--latency CYCLES ...]

The kernels of the selective scan (bfloat16, 32,768 tokens in all, 2,048 channels, 16 states) are compiled for compute
capability 9.0. The assembler decides beforehand how long each instruction of a warp holds back the next one, and which
of six counters an instruction of unknown length raises until it has its result, or until it has read its operands, and
another one waits for: all of it stands in the upper bits of the instruction. The model issues one instruction a cycle,
of the warp that is ready first; exponentials and the like occupy their unit for 8 cycles, integer operations theirs for
2; a load takes `--latency`. A row: cycles that a round of the kernel's longest loop takes, for one warp and, a warp,
for two that share the scheduler, and what the one waits at most of the time, with the cycles.

How far it holds: a round of four tokens took 920 cycles on one H200 (1.98 GHz) with one warp a scheduler, where it says
890 for loads of 500. By how much two versions differ it foretold within a few per cent. Of bandwidth it knows nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from common import show

from saccade.scan.kernels import selective_ops
from saccade.testing.offline import compile_only

MULTIPROCESSORS = 132
TOKENS, CHANNELS, STATES = 32768, 2048, 16
COUNTERS = 6
UNITS = {"exponentials": 8, "integers": 2}  # cycles that an instruction occupies
EXPONENTIALS = ("MUFU",)
INTEGERS = ("LOP3", "SHF", "PRMT", "ISETP", "FSETP", "SEL", "FSEL", "FMNMX", "IMNMX", "LEA", "MOV", "IADD3")
LATENCY = {"MUFU": 24, "SHFL": 25}  # cycles to a result, of what raises a counter; of others:
USUAL = 12
READ = {"LDG": 20, "STG": 20}  # cycles until operands have been read, of others as many
ROUNDS = 30


class Instruction(NamedTuple):
    """text: as the disassembler writes it; code: the upper 64 of its 128 bits."""

    text: str
    code: int

    @property
    def name(self) -> str:
        found = re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9]+)", self.text)
        return found[1] if found else ""

    @property
    def holds(self) -> int:
        """Cycles until the next one may be issued."""
        return max(1, self.code >> 41 & 15)

    @property
    def result(self) -> int:
        """The counter that is up until its result is there, COUNTERS or more for none."""
        return self.code >> 46 & 7

    @property
    def operands(self) -> int:
        """The counter that is up until it has read its operands."""
        return self.code >> 49 & 7

    @property
    def waits(self) -> list[int]:
        """Counters that must be down."""
        return [number for number in range(COUNTERS) if self.code >> 52 + number & 1]

    @property
    def unit(self) -> str | None:
        return "exponentials" if self.name in EXPONENTIALS else "integers" if self.name in INTEGERS else None


def disassembled(cubin: bytes) -> list[str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run([tool, "-c", "-hex", file.name], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


def longest_loop(lines: list[str]) -> list[Instruction]:
    """From the label that is farthest before a branch to it, to that branch."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    text = ""
    for line in lines:
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif first := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);\s*/\* 0x[0-9a-f]+ \*/", line):
            text = first[1].strip()
        elif text and (second := re.match(r"\s+/\* (0x[0-9a-f]+) \*/", line)):
            found.append(Instruction(text, int(second[1], 16)))
            text = ""
    loops = [
        (at - labels[target[1]], labels[target[1]], at + 1)
        for at, instruction in enumerate(found)
        if (target := re.search(r"BRA.*`\((\.L_\w+)\)", instruction.text)) and target[1] in labels
    ]
    _, start, end = max(loops)
    return found[start:end]


def simulate(loop: list[Instruction], latency: int, warps: int = 1) -> tuple[float, Counter[str]]:
    """Cycles a round, and how many of them instructions of the first warp waited for counters and units, by name."""
    ready = [0] * warps
    counters = [[0] * COUNTERS for _ in range(warps)]
    done = [0] * warps
    free = dict.fromkeys(UNITS, 0)
    issued, waited = 0, Counter[str]()
    end = ROUNDS * len(loop)
    while min(done) < end:
        starts = {}
        for warp in range(warps):
            if done[warp] < end:
                instruction = loop[done[warp] % len(loop)]
                start = max([ready[warp], *(counters[warp][number] for number in instruction.waits)])
                # A unit takes one instruction more than it works at.
                queue = UNITS["exponentials"] if instruction.unit == "exponentials" else 0
                starts[warp] = max(start, free[instruction.unit] - queue) if instruction.unit else start
        warp = min(starts, key=starts.__getitem__)
        instruction, start = loop[done[warp] % len(loop)], max(starts[warp], issued)
        if warp == 0:
            waited[instruction.name] += start - ready[warp]
        finished = start + (latency if instruction.name == "LDG" else LATENCY.get(instruction.name, USUAL))
        if instruction.unit:
            busy = max(start, free[instruction.unit])
            free[instruction.unit] = busy + UNITS[instruction.unit]
            finished += busy - start
        read = start + READ.get(instruction.name, USUAL)
        for number, until in ((instruction.result, finished), (instruction.operands, read)):
            if number < COUNTERS:
                counters[warp][number] = max(counters[warp][number], until)
        issued, ready[warp] = start + 1, start + instruction.holds
        done[warp] += 1
    return max(ready) / ROUNDS, Counter({name: cycles // ROUNDS for name, cycles in waited.items()})


def launch(batch: int, block: bool, gradients: bool) -> None:
    """The operators, whose kernels are compiled in place of a launch."""
    selective_ops.multiprocessors = lambda device: MULTIPROCESSORS
    x, single = torch.zeros(batch, TOKENS // batch, CHANNELS, dtype=torch.bfloat16), torch.zeros(CHANNELS)
    rates = torch.zeros(CHANNELS, STATES)
    b, c = torch.zeros(2, batch, TOKENS // batch, 1, STATES, dtype=torch.bfloat16)
    more = (single, single, x.clone(), True) if block else (None, None, None, False)
    given = x, x.clone(), rates, b, c, None, *more
    y, after, starts = selective_ops.selective(*given)
    if gradients:
        selective_ops.selective_backward(y, after, *given, starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="sequences (8)")
    parser.add_argument("--block", action="store_true", help="with all that a block of Mamba fuses")
    parser.add_argument("--gradients", action="store_true", help="also the kernels of the gradients")
    parser.add_argument("--latency", type=int, nargs="+", default=[300, 500], help="cycles that a load takes (300 500)")
    options = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    rows = []

    def seen(name: str, compiled: object) -> None:
        loop = longest_loop(disassembled(compiled.asm["cubin"]))
        for latency in options.latency:
            one, waited = simulate(loop, latency)
            two, _ = simulate(loop, latency, warps=2)
            most = ", ".join(f"{name} {cycles}" for name, cycles in waited.most_common(3) if cycles)
            rows.append(
                {
                    "kernel": name,
                    "instructions a round": len(loop),
                    "latency": latency,
                    "cycles, one warp": round(one),
                    "each of two": round(two / 2),
                    "one warp waits at": most,
                }
            )

    compile_only(seen)
    launch(options.batch, options.block, options.gradients)
    show("selective scan", rows)


if __name__ == "__main__":
    main()
