"""A recording of what a function tells PyTorch, for devices that have no graphs: what a CUDA graph goes by, it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Tape(TorchDispatchMode):
    """Every operation that `run` calls, with the very tensors it was given; `replay` calls them again.

    Results go where they went, as with a CUDA graph: what Python decided in between stays decided, numbers that it read
    stay what they were, and a tensor that was rebound since is not found. Unlike there, operations take effect while
    they are recorded, so that the first replay is left out.

    >>> import torch
    >>> x = torch.zeros(3)
    >>> tape = Tape(lambda: x.add_(1).sum())
    >>> tape.replay(), tape.replay(), x.tolist(), tape.result.item()
    (None, None, [2.0, 2.0, 2.0], 6.0)
    """

    records = True  # what the host reads meanwhile would be read once for all

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self.fresh = True
        with self:
            self.result = run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tree_flatten(found)[0]))
        return found

    def replay(self) -> None:
        if self.fresh:
            self.fresh = False
            return
        for func, args, kwargs, results in self.calls:
            given = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
            found = tree_flatten(func(*args, **kwargs))[0]
            for x, new in zip(results, found, strict=True):
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                    # Neither a view nor a result in place. Of another size is what counts: a CPU's checks do.
                    (x if x.shape == new.shape else x.resize_(new.shape)).copy_(new)
