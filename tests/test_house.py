"""The house itself: doors open downward only, importing is light, discovery finds every mechanism."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saccade
from saccade.catalogue import mechanism
from saccade.contract import Attention, Case, Dims, Finding, Mixer, claim

SOURCE = Path(saccade.__file__).parent
FOUNDATION = {"errors", "operators"}
PRIMITIVES = {"where", "scan", "mix"}
MAY_OPEN = {
    "errors": set(),
    "operators": set(),
    "where": FOUNDATION,
    "scan": FOUNDATION,
    "mix": FOUNDATION,
    "softmax": FOUNDATION | {"where"},
    "contract": FOUNDATION,
    "cache": FOUNDATION | {"where", "softmax", "contract"},
    "hosts": FOUNDATION | PRIMITIVES | {"softmax", "contract"},
    "tasks": FOUNDATION | {"hosts"},
    "mechanisms": FOUNDATION | PRIMITIVES | {"softmax", "cache", "contract", "hosts", "catalogue"},
    "catalogue": FOUNDATION | {"contract", "mechanisms"},
    "testing": FOUNDATION | PRIMITIVES | {"softmax", "cache", "contract", "catalogue"},
    "hf": FOUNDATION | {"where", "softmax", "cache", "contract", "catalogue", "testing"},
    "serve": FOUNDATION | {"cache", "hf", "hosts", "tasks"},
    "vllm": FOUNDATION | {"where", "softmax"},
    "bench": FOUNDATION | PRIMITIVES | {"softmax", "cache", "contract", "catalogue", "hosts", "tasks", "testing", "hf"},
    "cli": FOUNDATION | PRIMITIVES | {"softmax", "contract", "catalogue", "testing", "bench", "serve"},
}
AT_THE_DOOR = {"attend": "softmax", "merge": "softmax", "explain": "softmax", "mechanism": "catalogue"}


def opened(tree, room):
    """Rooms that a syntax tree imports from."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "saccade":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [AT_THE_DOOR.get(a.name, a.name) for a in node.names]
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("saccade."))
    return found - {room, "__version__"}


def forbidden(tree, room):
    return opened(tree, room) - MAY_OPEN[room]


FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.stem in MAY_OPEN)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_doors_open_downward_only(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert room in MAY_OPEN, f"{room} is a new room: say in MAY_OPEN which doors it has"
    assert not forbidden(ast.parse(path.read_text()), room)


@pytest.mark.parametrize(
    "line", ["from saccade.bench import x", "import saccade.testing", "from saccade import attend"]
)
def test_an_upward_door_is_noticed(line):
    assert forbidden(ast.parse(line), "where")


@pytest.mark.parametrize("path", sorted((SOURCE / "mechanisms").rglob("*.py")), ids=lambda p: p.stem)
def test_no_file_outside_names_a_mechanism_of_its_own_room(path):
    siblings = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    assert not any(str(name).startswith("saccade.mechanisms.") for name in siblings)


def loaded(code):
    run = [sys.executable, "-c", f"{code}; import sys; print(*sorted(sys.modules))"]
    return set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())


HEAVY = {"torch", "triton", "transformers", "flash_attn", "matplotlib", "plotly", "numpy"}


def test_import_is_inert_and_light():
    assert not loaded("import saccade") & HEAVY


def test_the_engine_imports_no_plotting_and_no_models():
    assert not loaded("from saccade import attend") & {
        "transformers",
        "flash_attn",
        "matplotlib",
        "plotly",
        "saccade.bench",
    }


def test_the_catalogue_is_sorted_and_named_after_its_files():
    specs = saccade.mechanisms()
    assert [s.id for s in specs] == sorted({s.id for s in specs})
    for spec in specs:
        home = mechanism(spec.id).__module__.split(".")
        assert home[-2:] == [spec.family, spec.id]


def test_every_mechanism_file_holds_one():
    files = {p.stem for p in (SOURCE / "mechanisms").rglob("*.py")} - {"__init__"}
    assert files == {s.id for s in saccade.mechanisms()}


def test_an_unknown_id_names_the_known_ones():
    first = saccade.mechanisms()[0].id
    with pytest.raises(ValueError, match=rf"id: got 'nta'; choose one of {first}, .*nat"):
        mechanism("nta")


def test_an_unknown_name_of_the_package_names_the_known_ones():
    with pytest.raises(AttributeError, match=r"saccade has no 'atend'; it has attend"):
        saccade.atend  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 8), ValueError, "num_heads: got 0; pass an integer >= 1"),
        ((4, 2.0), TypeError, r"head_dim: got 2.0 \(float\)"),
        ((4, 8, 3), ValueError, "num_kv_heads: got 3 for num_heads 4"),
        ((4, 8, 2, (3, 0)), ValueError, "grid: got 0"),
    ],
)
def test_dims_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        Dims(*arguments)


def test_a_case_says_its_shape():
    assert str(Case(Dims(4, 8, 2), 13, {"size": 3})) == "B2H4:2N13D8[size=3]"
    assert str(Case(Dims(1, 8, grid=(3, 5)), 15, batch=1)) == "B1H1:1N3x5D8[]"


@pytest.mark.parametrize("name", ["parameters", "forward", "compute", "step", "plan", "claims"])
def test_a_claim_takes_nobodys_place(name):
    def found(cls):
        return Finding(True, "1")

    assert callable(claim("It is there.")(found).__func__)
    found.__name__ = name
    with pytest.raises(ValueError, match=f"claim: got a function named '{name}', which every mechanism has already"):
        claim("It is there.")(found)


@pytest.mark.parametrize("contract", [Attention, Mixer])
def test_a_contract_does_nothing_by_itself(contract):
    with pytest.raises(AttributeError, match="spec"):
        contract(Dims(1, 8))
