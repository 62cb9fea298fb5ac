"""Kernels that run at the same time: they find what came before them, and what comes behind waits for both."""

import pytest
import torch

from saccade.scan.kernels.together import one_by_one, together

CYCLES = 50_000_000  # that a device sleeps, much longer than launches take


def test_where_there_are_no_streams_one_follows_another():
    done = []
    together(torch.device("cpu"), *(lambda name=name: done.append(name) for name in "abc"))
    assert done == ["a", "b", "c"]


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("slow", [0, 1])
def test_what_is_before_and_behind(slow, recorded):
    """x is 1 between two zeros that a launch which does not wait would copy."""
    x = torch.zeros(1, device="cuda")
    copies = [torch.full_like(x, -1) for _ in range(2)]

    def launch(which):
        if which == slow:
            torch.cuda._sleep(CYCLES)
        copies[which].copy_(x)

    def call():
        torch.cuda._sleep(CYCLES)
        x.fill_(1)
        together(x.device, lambda: launch(0), lambda: launch(1))
        x.zero_()

    call()
    if recorded:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for copy in copies:
            copy.fill_(-1)
        graph.replay()
    assert [float(copy) for copy in copies] == [1, 1]
    assert float(x) == 0


@pytest.mark.gpu
def test_those_within_others_have_streams_of_their_own():
    device = torch.device("cuda", torch.cuda.current_device())
    used = []

    def launch():
        used.append(torch.cuda.current_stream())

    pair = [lambda: together(device, launch, launch)] * 2
    together(device, *pair)
    assert len({stream.cuda_stream for stream in used}) == len(used) == 4


def test_one_by_one_leaves_out_what_is_none():
    done = []
    one_by_one(lambda: done.append(1), None, lambda: done.append(2))()
    assert done == [1, 2]
