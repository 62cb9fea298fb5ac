"""Hostile surroundings for every test: seeded, settings checked, no network, no skips, all that is collected runs."""

import gc
import importlib.util
import os
import random
import socket
import zlib
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # more threads than cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import hypothesis
import numpy as np
import pytest
import torch

from spared import spare

if not torch.cuda.is_available():  # kernels run in the interpreter of Triton, which reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from saccade.testing import ambient


def declare_torchvision():
    """torchvision, which timm and transformers import, names operators of its extension when it is imported; built for
    CUDA, the extension does not load beside a torch without. Declare them then; nothing here calls one."""
    found = importlib.util.find_spec("torchvision")
    extension = found and next(Path(found.origin).parent.glob("_C.*"), None)
    if not extension:
        return None
    try:
        torch.ops.load_library(str(extension))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


TORCHVISION = declare_torchvision()  # a library lives as long as something holds it
LOOPBACK = ("127.", "::1", "localhost")
COLLECTED: set[str] = set()
RAN: set[str] = set()

# How long an example takes says more about the machine's other work than about the code. The same examples every
# time: what turns red has changed. To look further: --hypothesis-profile=explore.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("steady")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    unable = [item for item in items if item.get_closest_marker("gpu")]
    if unable:
        config.hook.pytest_deselected(items=unable)
        items[:] = [item for item in items if item not in unable]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    spare()


@pytest.fixture(autouse=True)
def hostile(request, monkeypatch):
    """Random numbers from the test's own name, no way out to the network, torch's settings found again as they were."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the global generator is the point
    torch.manual_seed(seed)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _local_only(getattr(socket.socket, name)))
    before = ambient.settings()
    yield
    changed = ambient.restore(before)
    assert not changed, f"the test left torch's settings changed: {', '.join(changed)}"


def _local_only(connect):
    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise RuntimeError(f"a test tried to reach {address}; tests use no network")
        return connect(self, address)

    return guarded


def _forbid(report, what):
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = (
            f"{what}: tests are neither skipped nor expected to fail; mark what needs a GPU with `gpu`, "
            "and write a known failure of a mechanism into the ledger"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    # An expected failure that passes is reported as passed, with wasxfail set.
    if hasattr(report, "wasxfail"):
        report.outcome = "skipped"
        del report.wasxfail
    _forbid(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _forbid(report, collector.nodeid)
    return report


def pytest_collection_finish(session):
    COLLECTED.update(item.nodeid for item in session.items)
    gc.freeze()  # a million objects that stay would be looked through again and again
    gc.set_threshold(10_000)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    COLLECTED.update(ids)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed:
        RAN.add(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    gc.unfreeze()
    stopped = session.shouldstop or session.shouldfail or session.config.option.collectonly
    if exitstatus == pytest.ExitCode.OK and not stopped and "PYTEST_XDIST_WORKER" not in os.environ and COLLECTED - RAN:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\ncollected, but never run: {', '.join(sorted(COLLECTED - RAN))}")


@pytest.fixture
def replays(monkeypatch):
    """Replays so far, one entry each, of all recordings of a model's steps."""
    from saccade.cache import Recorded

    found, call = [], Recorded.__call__

    def count(self, *inputs):
        before = self.replays
        out = call(self, *inputs)
        found.extend([1] * (self.replays - before))
        return out

    monkeypatch.setattr(Recorded, "__call__", count)
    return found
