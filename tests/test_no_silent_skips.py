"""The suite's own surroundings can fail a test: each hostile habit, tried in a session of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent

SESSION = {
    "test_good.py": "def test_passes():\n    pass\n",
    "test_skip.py": "import pytest\n@pytest.mark.skip\ndef test_marked():\n    pass\n"
    "def test_within():\n    pytest.skip('later')\n",
    "test_xfail.py": "import pytest\n@pytest.mark.xfail\ndef test_expected():\n    assert False\n"
    "@pytest.mark.xfail\ndef test_unexpected():\n    pass\n",
    "test_settings.py": "import torch\ndef test_threads():\n    torch.set_num_threads(torch.get_num_threads() + 1)\n"
    "def test_dtype():\n    torch.set_default_dtype(torch.float64)\n",
    "test_network.py": "import socket\n"
    "def test_reaches_out():\n    socket.create_connection(('192.0.2.1', 80), timeout=1)\n",
    "test_warns.py": "import warnings\ndef test_warns():\n    warnings.warn('careful')\n",
}


def run(folder, *arguments):
    for path in (ROOT / "conftest.py", ROOT / "spared.py", ROOT.parent / "pyproject.toml"):
        shutil.copy(path, folder)
    for name, text in SESSION.items():
        (folder / name).write_text(text)
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", "--rootdir", str(folder)]
    return subprocess.run([*pytest, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def test_hostile_habits_fail(tmp_path):
    done = run(tmp_path, *SESSION)
    lines = [line.split() for line in done.stdout.splitlines()]
    verdicts = {line[1]: line[0] for line in lines if line and line[0] in ("PASSED", "FAILED", "ERROR")}
    assert verdicts.pop("test_good.py::test_passes") == "PASSED", done.stdout
    expected = {
        "test_skip.py::test_marked",
        "test_skip.py::test_within",
        "test_xfail.py::test_expected",
        "test_xfail.py::test_unexpected",
        "test_settings.py::test_threads",
        "test_settings.py::test_dtype",
        "test_network.py::test_reaches_out",
        "test_warns.py::test_warns",
    }
    bad = {name for name, verdict in verdicts.items() if verdict in ("FAILED", "ERROR")}
    assert bad == expected, done.stdout
    assert done.returncode == 1


def test_a_file_that_skips_itself_fails(tmp_path):
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    done = run(tmp_path, "test_module.py")
    assert done.returncode not in (0, 5), done.stdout
    assert "neither skipped" in done.stdout
