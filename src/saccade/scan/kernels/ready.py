"""What Triton makes before its first kernel, begun before the kernels are imported, which takes about as long."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from threading import Thread


@functools.cache
def begun() -> tuple[Thread, ...]:
    """A key of all of its files, and beside it the C of its driver: threads, which began with the first call.

    What cannot be made says so when it is wanted.
    """
    from triton.runtime import cache, driver

    def build() -> None:
        driver.active  # noqa: B018 - looking at it builds it

    def run(make: Callable[[], object]) -> None:
        with suppress(Exception):
            make()

    threads = tuple(Thread(target=run, args=(make,)) for make in (getattr(cache, "triton_key", str), build))
    for thread in threads:
        thread.start()
    return threads
