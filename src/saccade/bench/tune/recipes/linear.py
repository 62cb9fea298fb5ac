"""Linear: features elu(W x) + 1, with W of each head taught to give the outputs of softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.bench.tune.linearized import Linearized, softmax
from saccade.contract import Dims, Spec
from saccade.scan.features import Map, elu1


class LinearFit(Linearized):
    """phi(x) = elu(W x) + 1, fitted by the mean square error of its outputs over that of zeros.

    W (H, D, D) for queries, another (Hkv, D, D) for keys, both the identity at first: then it is the linear attention
    of arXiv 2006.16236.

    >>> LinearFit(Dims(2, 4)).feature_map()[0](torch.ones(1, 2, 3, 4)).flatten()[:2].tolist()
    [2.0, 2.0]
    """

    spec = Spec(
        id="linear",
        name="Linear attention",
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        paper="2006.16236",
        year=2020,
        family="linear",
        uses=("linear_attention", "Sum"),
    )
    rate = 1e-2

    def start(self, dims: Dims) -> None:
        heads = dims.num_heads, dims.num_kv_heads
        self.query, self.key = (nn.Parameter(torch.eye(dims.head_dim).repeat(h, 1, 1)) for h in heads)

    def feature_map(self) -> tuple[Map, Map]:
        # Features are computed in float32 whatever the model's dtype.
        return lambda q: elu1(q @ self.query.to(q.dtype).mT), lambda k: elu1(k @ self.key.to(k.dtype).mT)

    def objective(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        exact = softmax(q, k, v)
        return (self(q, k, v) - exact).square().mean() / exact.square().mean()

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w, rows, group = self.state_dict(keep_vars=True), [], q.shape[1] // k.shape[1]
        for h in range(q.shape[1]):
            g = h // group
            query, key = (
                torch.where(y > 0, y + 1, y.clamp_max(0).exp())
                for y in (q[:, h] @ w["query"][h].T, k[:, g] @ w["key"][g].T)
            )
            for i in range(q.shape[2]):
                a = (query[:, i, None] * key[:, : i + 1]).sum(-1, keepdim=True)
                rows.append((a * v[:, g, : i + 1]).sum(1) / a.sum(1))
        return torch.stack(rows, 1).unflatten(1, q.shape[1:3])
