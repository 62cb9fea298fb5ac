"""Linear attention in the place of a trained model's softmax attention: what every conversion recipe fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from saccade.contract import Attention, Dims, Spec
from saccade.hosts.lm import dense
from saccade.scan import LogFeatures, State, Sum, linear_attention
from saccade.scan.features import Map

LEAST = 1e-12  # of a weight whose logarithm is taken: features that underflow give 0
softmax = partial(dense, layer=0)  # the teacher, which treats all layers alike


class Maps(Protocol):
    """What a fit trains in a layer, a module: feature maps and decays, the equations, and `rate`, Adam's at first."""

    rate: float
    log_decay: Tensor | None

    def feature_map(self) -> tuple[Map, Map] | LogFeatures:
        """phi for queries and phi' for keys."""
        ...

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The outputs of the layer, by the equations alone."""
        ...


@runtime_checkable
class Convertible(Protocol):
    """What a mechanism class offers so that softmax attention can be converted to it."""

    spec: Spec

    def to_fit(self, dims: Dims) -> Maps:
        """The maps of a layer as they are before a fit, the same every time; a classmethod."""
        ...


class Linearized(Attention):
    """Causal linear attention whose feature maps are fitted to the softmax attention that it replaces.

        o_i = sum_{j <= i} w_ij v_j,   w_ij = a_ij / sum_{j <= i} a_ij
        a_ij = exp((i - j) g_h) phi(q_i) . phi'(k_j)

    q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv) -> o (B, H, N, Dv). A recipe is a subclass: `start` makes the
    maps, `feature_map` and `log_decay` say phi, phi' and g, `oracle` the equations, `objective` what is minimised, by
    Adam from the learning rate `rate`. tensors: fitted values of all parameters (None: those that a fit starts from).
    Errors: ValueError for tensors that another recipe or other dims made.
    """

    causal = True
    per_head = True
    rate: float

    def __init__(self, dims: Dims, *, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(dims)
        self.start(dims)
        if tensors is None:
            return
        got, need = ({name: tuple(x.shape) for name, x in each.items()} for each in (tensors, self.state_dict()))
        if got != need:
            raise ValueError(f"tensors: got {got}; {type(self).__name__} for {dims} has {need}")
        self.load_state_dict(dict(tensors))

    @classmethod
    def contract(cls) -> str:
        return Attention.__name__

    def start(self, dims: Dims) -> None:
        """Make the maps as they are before a fit; the same every time."""
        raise NotImplementedError(f"{type(self).__name__}.start")

    def feature_map(self) -> tuple[Map, Map] | LogFeatures:
        """phi for queries and phi' for keys."""
        raise NotImplementedError(f"{type(self).__name__}.feature_map")

    def log_decay(self) -> Tensor | None:
        """g (H,) <= 0; None: nothing decays."""
        return None

    def objective(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What a fit of this layer minimises: how far its weights are from those of softmax, a number.

        It is the cross-entropy of the weights, less what no map can take away.
        """
        return divergence(weights(self, q, k), weights(softmax, q, k))

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.step(q, k, v)[0]

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, state: State | None = None) -> tuple[Tensor, State]:
        after = linear_attention(
            q,
            k,
            v,
            log_decay=self.log_decay(),
            feature_map=self.feature_map(),
            normalizer=Sum(),
            state=state,
            return_state=True,
        )
        return cast(tuple[Tensor, State], after)


class OfMechanism(Linearized):
    """A recipe whose maps and equations are those that a mechanism of the catalogue offers to be fitted."""

    offer: ClassVar[Any]

    def start(self, dims: Dims) -> None:
        self.maps = self.offer.to_fit(dims)
        self.rate = self.maps.rate

    def feature_map(self) -> tuple[Map, Map] | LogFeatures:
        return cast("tuple[Map, Map] | LogFeatures", self.maps.feature_map())

    def log_decay(self) -> Tensor | None:
        return cast("Tensor | None", self.maps.log_decay)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cast(Tensor, self.maps.oracle(q, k, v))


@cache
def of_mechanism(offer: type[Attention]) -> type[Linearized]:
    """The recipe of a mechanism that is `Convertible`."""
    said = {"offer": offer, "spec": offer.spec, "__doc__": offer.__doc__, "__module__": __name__}
    return type(f"{offer.__name__}Fit", (OfMechanism,), said)


def weights(attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
    """The weights of all pairs, (B, H, N, N), of an attention that is linear in v: its output for v = identity.

    >>> q, k = torch.zeros(2, 1, 1, 2, 4)
    >>> weights(softmax, q, k).flatten().tolist()
    [1.0, 0.0, 0.5, 0.5]
    """
    one_hot = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    return attention(q, k, one_hot.expand(*k.shape[:2], -1, -1))


def divergence(w: Tensor, p: Tensor) -> Tensor:
    """KL(p | w) = sum_j p_ij log(p_ij / w_ij) in nats, the mean over rows; w, p (..., N) add up to 1."""
    return (torch.special.xlogy(p, p) - p * w.clamp_min(LEAST).log()).sum(-1).mean()
