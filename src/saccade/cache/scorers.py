"""What a token is worth: (tokens, newest queries) -> a score for each; the largest stay."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.cache.view import View
from saccade.errors import positive


class Scorer:
    """view -> (G, Hkv, M). accumulates: scores add up over all queries that a token has met, each handed in once."""

    accumulates = False

    def __call__(self, view: View) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.__call__")

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({inner})"


class Recency(Scorer):
    """s_j = j: StreamingLLM (arXiv 2309.17453), once sinks are kept too."""

    def __call__(self, view: View) -> Tensor:
        return view.positions.double()


class Received(Scorer):
    """s_j = sum_i p_ij over all queries since j came, the mean over a group: heavy hitters, H2O (arXiv 2306.14048,
    algorithm 1). p is the attention to what was held when query i came.
    """

    accumulates = True

    def __call__(self, view: View) -> Tensor:
        return view.pooled(view.received())


class Observed(Scorer):
    """s_j = mean over the last `window` queries of p_ij, a mean over `pool` neighbours, the mean over a group: SnapKV
    (arXiv 2404.14469, section 4.1).

    The authors' code sums over the queries, which ranks alike, and takes average or maximum pooling; the mean here, of
    those neighbours that exist. Only tokens before the window are voted for, and are neighbours; the keys of the window
    are to be kept (`Evict(recent=window)`). Of a step there is one query, which is its window. window: 32. pool: 5,
    odd.
    """

    def __init__(self, window: int = 32, pool: int = 5) -> None:
        self.window, self.pool = positive("window", window), positive("pool", pool)
        if pool % 2 == 0:
            raise ValueError(f"pool: got {pool}; pass an odd number, so that a token is the middle of its neighbours")

    def __call__(self, view: View) -> Tensor:
        window = min(self.window, view.q.shape[2])
        scores = view.pooled(view.received(window)) / window
        half = self.pool // 2
        before = view.there & (view.positions < view.ends[:, None, None] - window)
        # Divided by those that exist, or the ends of what is voted for would count for less.
        both = torch.stack([scores * before, before.to(scores)]).flatten(0, 2)
        mean, count = F.avg_pool1d(both[:, None], self.pool, 1, half).view(2, *scores.shape)
        return mean / count.clamp(min=torch.finfo(count.dtype).tiny)


class LastQuery(Scorer):
    """s_j = p_nj of the newest query n, the mean over all heads, one ranking for all of them: TOVA (arXiv 2401.06104,
    section 4).
    """

    def __call__(self, view: View) -> Tensor:
        scores = view.grouped(view.weights(1)[:, :, 0])
        if bool((view.counts == view.counts[:, :1]).all()):
            return scores.mean((1, 2))[:, None].expand(view.there.shape)
        return scores.mean(2)


class KeyNorm(Scorer):
    """s_j = -||k_j||: keys of a small norm draw attention (arXiv 2406.11430)."""

    def __call__(self, view: View) -> Tensor:
        return -view.k.float().norm(dim=-1)


class KeyDifference(Scorer):
    """s_j = -cos(k_j, mean_i k_i / ||k_i||): unlike keys stay, KeyDiff (arXiv 2504.15364)."""

    def __call__(self, view: View) -> Tensor:
        k = F.normalize(view.k.to(torch.promote_types(view.k.dtype, torch.float32)), dim=-1)
        k = k.masked_fill(~view.there[..., None], 0)
        mean = k.sum(2) / view.there.sum(2, keepdim=True)
        return -F.cosine_similarity(k, mean[:, :, None], dim=-1)


class Expected(Scorer):
    """What future queries will give a token, taken as Gaussian: Expected Attention (arXiv 2510.00636).

        s_j = (softmax_j(mu . k_j / sqrt(D) + k_j' Sigma k_j / (2 D)) + eps) ||v_j||,   the mean over a group
        mu = R m,   Sigma = R C R',   R = mean of R_t over the next `ahead` positions t

    m (D,), C (D, D): mean and covariance of a head's queries before their rotary turn R_t. As in the authors' code,
    neither counts the first `sinks` tokens, nor are these among the tokens j: they are to be kept (`Evict(sinks=4)`).
    Where no rotation is known (`View.rotation`), R_t is taken for 1: right for a host that turns nothing, while of
    another's the queries count as they came. The queries are those of the newest piece. Checked against the authors'
    code (kvpress), which scales by ||v_j|| as is done here; their paper's abstract speaks of what a token adds to the
    residual stream. sinks: 4. ahead: 512. eps: 0. Costs D^2 a query and a key, for each query head.
    """

    def __init__(self, sinks: int = 4, ahead: int = 512, eps: float = 0.0) -> None:
        self.sinks, self.ahead = positive("sinks", sinks, least=0), positive("ahead", ahead)
        self.eps = eps

    def __call__(self, view: View) -> Tensor:
        dtype = torch.promote_types(view.q.dtype, torch.float32)
        there = view.there & (view.positions >= self.sinks)
        q, k = view.q.to(dtype), view.k.to(dtype).masked_fill(~there[..., None], 0)
        at = view.at
        if view.rotation is not None:
            ahead = view.ends[:, None] + torch.arange(self.ahead, device=q.device)
            q = view.rotation.mean(view.rotation.back(q, at[:, None]), ahead[:, None])
        counted = (at >= self.sinks)[:, None, :, None].to(dtype)
        number = counted.sum(2, keepdim=True).clamp(min=1)  # a prompt of sinks alone has no scores to tell apart
        mu = (q * counted).sum(2, keepdim=True) / number
        off = (q - mu) * counted
        spread = torch.einsum("bhnd,bhne->bhde", off, off) / number
        mu, spread = (view.grouped(x) for x in (mu[:, :, 0], spread))
        z = torch.einsum("bhgd,bhmd->bhgm", mu, k) * view.scale
        z = z + torch.einsum("bhmd,bhgde,bhme->bhgm", k, spread, k) * view.scale**2 / 2
        share = z.masked_fill(~there[:, :, None], -torch.inf).softmax(-1).nan_to_num(0).mean(2)
        return (share + self.eps) * view.v.to(dtype).norm(dim=-1)
