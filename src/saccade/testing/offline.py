"""Compiling Triton kernels for compute capability 9.0 without a GPU.

The interpreter runs kernels as Python and is blind to what the compiler refuses: names that change their type, branches
that leave other types behind, what is None in one variant alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class NoGpu:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_only(seen: Callable[[str, Any], None]) -> None:
    """From now on, and for the whole process, kernels are compiled in place of a launch: `seen(name, compiled)`."""

    def compiled(kernel: Any, grid: object) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            found = kernel.warmup(*args, grid=grid, **options)
            seen(kernel.fn.__name__, found.result() if hasattr(found, "result") else found)  # of one that is under way

        return run

    triton.runtime.driver.set_active(NoGpu())
    JITFunction.__getitem__ = compiled
