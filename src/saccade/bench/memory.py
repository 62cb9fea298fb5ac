"""Peak memory of a call: the most bytes alive at once above what was there before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operators return inside it: each once, from its first appearance until it is freed.

    Views share their storage and count nothing. What one operator allocates and frees inside itself (the scratch space
    of a fused kernel) is not seen; on the devices that keep allocator statistics those are used instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        """Storages that were there before count nothing."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ignore((args, kwargs))  # an input not met before was made outside
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._enter(tensor, tensor.untyped_storage().nbytes())
        return result

    def _enter(self, tensor: torch.Tensor, nbytes: int) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, nbytes)

    def _leave(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """Run `call` once and return its peak extra bytes, its result included, inputs and parameters not.

    On CUDA from the allocator's statistics; elsewhere the high-water mark of `LiveBytes`.

    >>> x = torch.ones(1000)
    >>> peak_bytes(lambda: (x + 1) * 2) // x.nbytes
    2
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as counter:
        result = call()
    del result
    return counter.peak


def available_bytes(device: str = "cpu") -> int:
    """Bytes that a call may still ask for on `device`."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**63 - 1
