"""The model of a scheduler in benchmarks/schedule.py: what holds an instruction back, in programs of a few."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NONE = 7  # no counter


@pytest.fixture
def schedule(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("schedule")
    sys.modules.pop("schedule")


def coded(holds=1, result=NONE, operands=NONE, waits=0):
    return holds << 41 | result << 46 | operands << 49 | waits << 52


def test_instructions_hold_the_next_one(schedule):
    loop = [schedule.Instruction("FADD R0, R0, R1", coded(holds=4)), schedule.Instruction("FMUL R2, R2, R3", coded())]
    assert schedule.simulate(loop, 500)[0] == 5


@pytest.mark.parametrize("latency", [100, 300])
def test_who_waits_for_a_load_waits_that_long(schedule, latency):
    """But not one that waits for another counter."""
    load = schedule.Instruction("LDG.E R0, desc[UR4][R2.64]", coded(result=3))
    use, other = (schedule.Instruction("FADD R1, R0, R1", coded(waits=1 << number)) for number in (3, 2))
    cycles, waited = schedule.simulate([load, use], latency)
    assert cycles == latency + 1
    assert waited["FADD"] == latency - 1
    assert schedule.simulate([load, other], latency)[0] == 2


def test_exponentials_share_a_unit(schedule):
    loop = [schedule.Instruction("MUFU.EX2 R0, R1", coded())] * 4
    for warps in (1, 2):
        cycles, _ = schedule.simulate(loop, 500, warps)
        busy = warps * len(loop) * schedule.UNITS["exponentials"]
        assert busy * (schedule.ROUNDS - 1) < cycles * schedule.ROUNDS <= busy * schedule.ROUNDS


def test_the_longest_loop_is_found(schedule):
    def line(text, code=0):
        return [f"        /*0010*/                   {text} ;    /* 0x0000000000000001 */", f"    /* {code:#018x} */"]

    lines = [
        *line("MOV R1, c[0x0][0x28]"), ".L_x_1:", *line("FADD R0, R0, R1", coded(holds=2)), ".L_x_2:",
        *line("FMUL R0, R0, R1"), *line("@P0 BRA `(.L_x_2)"), *line("@P1 BRA `(.L_x_1)"), *line("EXIT"),
    ]  # fmt: skip
    found = schedule.longest_loop(lines)
    assert [instruction.name for instruction in found] == ["FADD", "FMUL", "BRA", "BRA"]
    assert found[0].holds == 2
