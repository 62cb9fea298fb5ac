"""Choosing, running and reporting checks; the ledger, strict both ways."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from saccade import catalogue
from saccade.contract import Attention, Case, Dims, Mechanism
from saccade.testing import Ledger, Waiver, check, check_names, checks, cli_table, parametrize_with_checks
from saccade.testing.healthy import Decayed, Sliding, Thrifty
from saccade.testing.twins import OffByOne

BROKEN = replace(Sliding.spec, id="off_by_one")


class Off(OffByOne):
    """A stranger's mechanism with a wrong window."""

    spec = BROKEN


def names(cls, **options):
    return {one.name for one in checks(cls, **options)}


def test_three_lines_are_enough_to_be_told():
    report = check(Off, ledger=Ledger())
    assert not report.ok
    with pytest.raises(AssertionError, match=r"off_by_one\[B2H2:2N23D8\[\]\]-value: FAILED: output: max error"):
        report.raise_for_failures()


def test_a_healthy_mechanism_raises_nothing():
    check(Sliding, only=["value", "gradients"], ledger=Ledger()).raise_for_failures()


def test_a_report_without_rows_is_not_a_pass():
    assert not check(Decayed, only="saves_work", ledger=Ledger()).ok


def test_capabilities_choose_the_checks():
    class Bare(Sliding):
        step = Attention.step
        plan = Attention.plan
        full_budget = Attention.full_budget
        causal = False
        per_head = True

        def compute(self, q, k, v):  # type: ignore[override]
            return super().compute(q, k, v)

    lost = {"step_equals_whole", "state_round_trip", "saves_work", "full_budget", "causality", "head_equivariance"}
    assert names(Sliding) - names(Bare) == lost | {"varlen_equals_loop"}
    of_attention = {"full_budget", "head_equivariance", "nan_spread", "saves_work", "value_width"}
    assert names(Sliding) - names(Decayed) == of_attention | {"kept_keys"}
    here = torch.cuda.is_available()
    of_cached = {"held_bytes", "held_tokens", "places_change", "prompt_in_pieces", "recorded_steps"}
    assert names(Thrifty) - names(Sliding) == of_cached
    assert names(Sliding) | of_cached == {name for name in check_names() if here or not name.startswith("gpu_")}


def test_a_prefill_is_not_asked_to_decide_in_time():
    class Prefill(Sliding):
        prefill = True

    assert names(Sliding) - names(Prefill) == {"causality"}


def test_only_chooses_and_knows_the_names():
    assert names(Sliding, only="value") == {"value"}
    assert names(Sliding, only=["value", "claim"]) == {"value", "claim"}
    with pytest.raises(ValueError, match=r"only: got 'valeu'; choose one of .*value"):
        checks(Sliding, only="valeu")
    with pytest.raises(TypeError, match="cls: got 3; pass a mechanism class"):
        checks(3)  # type: ignore[arg-type]


def test_ids_name_mechanism_case_and_check():
    ids = [one.id for one in checks(Sliding)]
    assert "sliding[B1H4:2N31D4[size=7]]-value" in ids
    assert "sliding[linear_work]-claim" in ids
    assert len(ids) == len(set(ids))


def test_pytest_gets_one_test_a_check():
    mark = parametrize_with_checks(Sliding, Decayed).mark
    assert mark.name == "parametrize"
    assert list(mark.kwargs["ids"]) == [one.id for cls in (Sliding, Decayed) for one in checks(cls)]


def test_a_mechanism_that_cannot_be_built_fails_every_check_of_its_cases():
    class Unbuilt(Sliding):
        def __init__(self, dims, *, size=5):
            raise RuntimeError("no")

    report = check(Unbuilt, only=["value", "causality", "full_budget"], ledger=Ledger())
    assert [row.status for row in report.outcomes] == ["FAILED"] * 6
    assert all("RuntimeError: no" in row.message for row in report.outcomes)


def test_a_mechanism_whose_cases_break_fails_its_declaration():
    class Caseless(Sliding):
        """arXiv 2004.05150, (B, H, N, D), size."""

        @classmethod
        def cases(cls):
            raise RuntimeError("nothing to try")

    report = check(Caseless, ledger=Ledger())
    assert any(row.check == "declaration" and "nothing to try" in row.message for row in report.failures)


def test_a_check_leaves_the_surroundings_alone():
    state = torch.get_rng_state()
    check(Sliding, only=["value", "poisoned_buffers", "determinism"], ledger=Ledger()).raise_for_failures()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_are_json_and_the_table_prints():
    report = check(Off, only=["value", "example"], ledger=Ledger())
    rows = json.loads(json.dumps(report.rows()))
    assert set(rows[0]) == {"mechanism", "check", "case", "status", "seconds", "message"}
    printed = io.StringIO()
    Console(width=200, file=printed).print(report)
    text = printed.getvalue()
    assert "FAILED" in text
    assert "B1H4:2N31D4[size=7]" in text


def test_a_claim_that_holds_tells_what_it_found():
    report = check(Sliding, only="claim", ledger=Ledger())
    (row,) = [row for row in report.outcomes if row.case == "linear_work"]
    sentence, function = Sliding.claims()["linear_work"]
    assert row.message == f"{sentence} Found: {function().figure}"
    printed = io.StringIO()
    Console(width=400, file=printed).print(report)
    assert f"OK sliding claim linear_work\n  {row.message}" in printed.getvalue()
    assert "linear_work" not in str(report)  # failures alone


def waived(*entries):
    return Ledger.parse({"waiver": list(entries)})


KNOWN = {"mechanism": "off_by_one", "check": "value", "reason": "the window is one too wide"}


def test_a_waived_failure_is_no_failure():
    report = check(Off, only="value", ledger=waived(KNOWN))
    assert report.ok
    assert {(row.status, row.message) for row in report.outcomes} == {("WAIVED", KNOWN["reason"])}


def test_a_waived_check_that_passes_is_a_failure():
    report = check(Off, only="no_mutation", ledger=waived({**KNOWN, "check": "no_mutation"}))
    assert not report.ok
    assert {row.status for row in report.outcomes} == {"XPASS"}
    assert "delete the entry" in str(report)


def test_a_waiver_may_be_narrowed_to_a_case():
    report = check(Off, only="value", ledger=waived({**KNOWN, "case": "B2H2:2N23D8[]"}))
    assert [row.status for row in report.outcomes] == ["WAIVED", "FAILED"]


def test_stale_waivers_are_found():
    there = [("off_by_one", "value", "a case")]
    assert waived(KNOWN).stale(iter(there)) == []
    for wrong in ({"mechanism": "gone"}, {"check": "no_such_check"}, {"case": "no such case"}):
        entry = {**KNOWN, **wrong}
        assert waived(entry).stale(there) == [Waiver(**entry)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"waver": []}, r"got \['waver'\]"),
        ({"waiver": [{"mechanism": "a", "check": "value"}]}, "needs mechanism, check, reason"),
        ({"waiver": [{**KNOWN, "until": "later"}]}, "'until'"),
        ({"waiver": [{**KNOWN, "reason": "  "}]}, "must be a text that says something"),
    ],
)
def test_a_malformed_ledger_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        Ledger.parse(data)


def test_the_shipped_ledger_loads(tmp_path):
    Ledger.load()
    path = tmp_path / "ledger.toml"
    path.write_text('[[waiver]]\nmechanism = "a"\ncheck = "value"\nreason = "because"\n')
    assert Ledger.load(path).waivers == (Waiver("a", "value", "because"),)


def test_cases_are_named_so_that_they_can_be_waived():
    assert str(Case(Dims(2, 8, grid=(3, 5)), 15, {"size": 3}, batch=1)) == "B1H2:2N3x5D8[size=3]"


def test_the_command_line_asks_for_some_or_for_all(monkeypatch):
    known: dict[str, type[Mechanism]] = {"sliding": Sliding, "decayed": Decayed}
    monkeypatch.setattr(catalogue, "mechanism", known.__getitem__)
    monkeypatch.setattr(catalogue, "mechanisms", lambda: [cls.spec for cls in known.values()])
    assert {row.mechanism for row in cli_table(["decayed"], "value").outcomes} == {"decayed"}
    assert {row.mechanism for row in cli_table(only="value").outcomes} == set(known)


def test_importing_the_checks_is_light():
    heavy = {"pytest", "triton", "transformers", "plotly"}
    code = f"import sys, saccade.testing; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
