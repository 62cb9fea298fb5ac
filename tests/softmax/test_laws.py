"""What must be the same is the same, and each law catches an engine that breaks it."""

import pytest
from laws import LAWS, Engine


@pytest.mark.parametrize("backend", ["tiles", "reference"])
@pytest.mark.parametrize("name", LAWS)
def test_law(name, backend):
    holds, _ = LAWS[name]
    holds(Engine(backend=backend))


@pytest.mark.parametrize("name", LAWS)
def test_broken_twin_is_caught(name):
    holds, broken = LAWS[name]
    with pytest.raises(AssertionError, match="error"):
        holds(broken)
