"""Published systems that are a primitive under another name, at float64 rounding, each with a wrong reading as a twin.

Others stand in tests/scan: gates of every shape, elu + 1, cosFormer, Taylor-2, both Hedgehogs, random features, the
normalisers, the delta rule with every gate, Aaren's monoid, Titans' 2 x 2 scan, fast weights. Cottention, InLine, MALA
and the Fourier form of relative positions stand in the claims of their mechanisms.
"""

import pytest
import torch

from saccade import attend
from saccade.scan import linear_attention, selective_scan
from saccade.testing.budget import assert_close
from saccade.where import Causal

B, H, N, D, E = 2, 3, 37, 5, 4


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ssd(wrong=False):
    """Mamba-2: h_t = exp(delta_t a_h) h_(t-1) + b_t (delta_t x_t)^T, y_t = c_t^T h_t. arXiv 2405.21060."""
    x, b, c = draw(B, H, N, E, seed=1), draw(B, 1, N, D, seed=2), draw(B, H, N, D, seed=3)
    delta, a = draw(B, H, N, seed=4).exp(), -draw(H, seed=5).exp()
    h, rows = torch.zeros(B, H, D, E, dtype=x.dtype), []
    for t in range(N):
        keep = (delta[:, :, t] * a).exp()[..., None, None]
        h = keep * h + b[:, :, t, :, None] * (delta[:, :, t, None] * x[:, :, t])[:, :, None]
        rows.append((c[:, :, t, None] @ h)[:, :, 0])
    strength = None if wrong else delta
    y = linear_attention(c, b, x, strength=strength, log_decay=delta * a[:, None])
    return y, torch.stack(rows, 2)


def hgrn2(wrong=False):
    """HGRN2: S_t = Diag(f_t) S_(t-1) + (1 - f_t) v_t^T, o_t = S_t^T q_t. arXiv 2404.07904."""
    q, v, f = draw(B, H, N, D, seed=1), draw(B, H, N, E, seed=2), torch.sigmoid(draw(B, H, N, D, seed=3))
    s, rows = torch.zeros(B, H, D, E, dtype=q.dtype), []
    for t in range(N):
        s = f[:, :, t, :, None] * s + (1 - f[:, :, t])[..., None] * v[:, :, t, None]
        rows.append((s * q[:, :, t, :, None]).sum(2))
    return linear_attention(q, f if wrong else 1 - f, v, log_decay=f.log()), torch.stack(rows, 2)


def lightnet(wrong=False):
    """LightNet: o_t = sum_c q_tc sum_(j <= t) softmax_(j <= t)(k_jc) v_j. arXiv 2405.21022.

    As a gate: with z the running logarithm of the sum of exp(k), keys exp(k - z) and decays z_(t-1) - z_t.
    """
    q, k, v = draw(B, H, N, D, seed=1), 3 * draw(B, H, N, D, seed=2), draw(B, H, N, E, seed=3)
    rows = [
        torch.einsum("bhc,bhjc,bhje->bhe", q[:, :, t], k[:, :, : t + 1].softmax(2), v[:, :, : t + 1]) for t in range(N)
    ]
    z = k.logcumsumexp(2)
    decay = torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, :-1] - z[:, :, 1:]], 2)
    if wrong:
        decay = decay.roll(1, 2)
    return linear_attention(q, (k - z).exp(), v, log_decay=decay), torch.stack(rows, 2)


def mamba(wrong=False):
    """Mamba's selective scan is linear attention with a head a channel, keys B_t and values of one number.

    arXiv 2312.00752: decays delta_tc A_cs of every state s, values delta_tc x_tc, queries C_t.
    """
    x, b, c = draw(B, N, E, seed=1), draw(B, N, D, seed=2), draw(B, N, D, seed=3)
    delta, a = draw(B, N, E, seed=4).exp(), -draw(E, D, seed=5).exp()
    q, k = (t[:, None].expand(-1, E, -1, -1) for t in (c, b))
    v = (delta * x).mT[..., None]
    decay = delta.mT[..., None] * a[:, None]
    if wrong:
        decay = decay.flip(-1)
    return linear_attention(q, k, v, log_decay=decay)[..., 0].mT, selective_scan(x, delta, a, b, c)


def moments(q, k, f):
    """sum_(j <= i) exp(q_i . k_j) f_j from `attend`, where f (B, H, N, F).

    A key of zeros before all others weighs exp(0) = 1; its share of the softmax turns shares into sums.
    """
    first = torch.zeros_like(k[:, :, :1])
    marked = torch.cat([torch.zeros_like(f), torch.ones_like(f[..., :1])], -1)[:, :, :1]
    values = torch.cat([marked, torch.cat([f, torch.zeros_like(f[..., :1])], -1)], 2)
    read = attend(q, torch.cat([first, k], 2), values, Causal(), scale=1.0)
    return read[..., :-1] / read[..., -1:]


def parallax(wrong=False):
    """Parallax: o_i = sum_j p_ij (1 + r_i . (mean_i - k_j)) v_j, p softmax, mean_i = sum_j p_ij k_j, r_i given.

    As three reads of `attend`: of v, of k, and of k v^T.
    """
    q, k, v, r = draw(B, H, N, D, seed=1), draw(B, H, N, D, seed=2), draw(B, H, N, E, seed=3), draw(B, H, N, D, seed=4)
    rows = []
    for i in range(N):
        p = (k[:, :, : i + 1] @ q[:, :, i, :, None])[..., 0].softmax(-1)[..., None]
        mean = (p * k[:, :, : i + 1]).sum(2, keepdim=True)
        lever = 1 + ((mean - k[:, :, : i + 1]) * r[:, :, i, None]).sum(-1, keepdim=True)
        rows.append((p * lever * v[:, :, : i + 1]).sum(2))
    outer = (k[..., :, None] * v[..., None, :]).flatten(3)
    o, mean, both = (attend(q, k, x, Causal(), scale=1.0) for x in (v, k, outer))
    tilt = (r[..., None, :] @ both.unflatten(3, (D, E)))[..., 0, :]
    return (1 + (r * mean).sum(-1, keepdim=True)) * o + (tilt if wrong else -tilt), torch.stack(rows, 2)


def local_linear(wrong=False, ridge=0.3):
    """LLA: the intercept of the ridge regression of v on k - q_i with weights exp(q_i . k_j), the slope penalised.

        o_i = sum_j w_ij (1 - z_ij . rho_i) v_j / (omega_i - mu_i . rho_i),   z_ij = k_j - q_i
        rho_i = (sum_j w_ij z_ij z_ij^T + ridge)^-1 mu_i,   omega_i, mu_i = sum_j w_ij (1, z_ij)

    The sums over z follow from those over k, which `attend` reads; the regression is solved by its normal equations.
    """
    q, k, v = draw(B, H, N, D, seed=1) / 2, draw(B, H, N, D, seed=2) / 2, draw(B, H, N, E, seed=3)
    penalty = torch.diag(torch.tensor([0.0] + [ridge] * D, dtype=q.dtype))
    rows = []
    for i in range(N):
        w = (k[:, :, : i + 1] @ q[:, :, i, :, None]).exp()
        design = torch.cat([torch.ones_like(w), k[:, :, : i + 1] - q[:, :, i, None]], -1)
        rows.append(torch.linalg.solve(design.mT @ (w * design) + penalty, design.mT @ (w * v[:, :, : i + 1]))[:, :, 0])
    outer = (k[..., :, None] * k[..., None, :]).flatten(3)
    levered = (k[..., :, None] * v[..., None, :]).flatten(3)
    sums = moments(q, k, torch.cat([torch.ones_like(k[..., :1]), k, v, outer, levered], -1))
    omega, first, total, second, both = sums.split([1, D, E, D * D, D * E], -1)
    second, both = second.unflatten(-1, (D, D)), both.unflatten(-1, (D, E))
    mu = first - omega * q
    cross = first[..., :, None] * q[..., None, :]
    spread = second - cross - cross.mT + omega[..., None] * q[..., :, None] * q[..., None, :]
    rho = torch.linalg.solve(spread + (-ridge if wrong else ridge) * torch.eye(D, dtype=q.dtype), mu[..., None])
    levered = (both - q[..., :, None] * total[..., None, :]).mT @ rho
    return (total - levered[..., 0]) / (omega - (mu[..., None, :] @ rho)[..., 0]), torch.stack(rows, 2)


REDUCTIONS = [ssd, hgrn2, lightnet, mamba, parallax, local_linear]


def judge(found, exact):
    # Powers of exp and a solve of D unknowns lie between the two sides.
    assert_close(found, exact, exact, terms=(N * D) ** 2)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda f: f.__name__)
def test_is_the_primitive(reduction):
    found, exact = reduction()
    assert found.shape == exact.shape
    judge(found, exact)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda f: f.__name__)
def test_a_wrong_reading_is_noticed(reduction):
    with pytest.raises(AssertionError, match="max error"):
        judge(*reduction(wrong=True))
