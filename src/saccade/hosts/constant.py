"""Numbers that a module holds and never learns."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Constant(nn.Module):
    """A tensor that goes where its module goes, and stays in its own precision.

    A buffer would be rounded with a model in half precision, and with it the slowest decays to none at all; a tensor
    that lies on the host is copied, and waited for, at every call. In no state dict.
    value: any shape, the attribute of the same name.

    >>> nn.Sequential(Constant(torch.ones(2))).half()[0].value.dtype
    torch.float32
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constant:
        super()._apply(fn, recurse)
        self.value = self.value.to(fn(self.value).device)
        return self
