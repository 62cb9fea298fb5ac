"""Prefix scans of a user's monoid, and the monoids that published mixers run on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Element = tuple[Tensor, ...]
Combine = Callable[[Element, Element], Element]
# Tokens of a chunk of `Chain`: that many steps of all chunks abreast leave a chain of that many times fewer tokens.
CHUNK = 16


def associative_scan(
    combine: Combine,
    elements: Sequence[Tensor],
    *,
    dim: int,
    reverse: bool = False,
    initial: Sequence[Tensor] | None = None,
) -> Element:
    """All prefixes of an associative product, in logarithmic depth.

        y_0 = e_0,    y_t = combine(y_{t-1}, e_t),    each e_t a tuple of tensors

    Pairs of neighbours are combined, the half as long sequence of pairs is scanned the same way, and every even
    position takes one more step from the odd one before it (Blelloch 1990). Any length; y_t never reads an e_s with
    s > t, so that a changed future leaves the past bitwise alone.

    combine: (a, b) -> tuple, a the earlier; associative, elementwise along `dim`, keeping every shape and dtype.
    elements: tensors that share the size N >= 1 of `dim`.
    dim: the scanned dimension of every tensor; a negative one counts from the end of each.
    reverse: scan from the last position to the first, "earlier" then meaning "of higher index" (default False).
    initial: an element of size 1 along `dim` that goes before all others and is not returned (default None).
    Returns a tuple like `elements`. Differentiable by autograd; of `affine` the gradient is one scan the other way, and
    nothing is kept for it but elements and results. Costs fewer than 2 N combinations in at most 2 log2(N) + 1 calls;
    `affine` goes through chunks of 16 abreast instead, and through what is left between them likewise.
    Errors: TypeError for what is not tensors; ValueError for sizes along `dim` that differ or are zero, an initial
    element that does not fit, or a `combine` that changes a shape or dtype.

    >>> a, b = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0])
    >>> associative_scan(affine, (a, b), dim=0)[1].tolist()
    [1.0, 1.5, 1.75]
    """
    whole = _check("elements", elements, dim)
    if initial is not None:
        before = _check("initial", initial, dim)
        got, want = ([_what(e) for e in x] for x in (before, [e.narrow(dim, 0, 1) for e in whole]))
        if got != want:
            raise ValueError(f"initial: got {got}; pass {want}, one position of elements")
    if reverse:
        whole = tuple(e.flip(dim) for e in whole)
    if initial is not None:
        led = _combined(combine, before, tuple(e.narrow(dim, 0, 1) for e in whole))
        rest = tuple(e.narrow(dim, 1, e.shape[dim] - 1) for e in whole)
        whole = tuple(torch.cat(both, dim) for both in zip(led, rest, strict=True))
    # Combinations of whole tensors are what a compiler melts into few kernels, and steps in place are not.
    by_hand = combine is affine and len(whole) == 2 and not torch.compiler.is_compiling()
    scanned = _affine(*whole, dim=dim) if by_hand else _scan(combine, whole, dim)
    return tuple(e.flip(dim) for e in scanned) if reverse else scanned


def _scan(combine: Combine, elements: Element, dim: int) -> Element:
    length = elements[0].shape[dim]
    if length == 1:
        return elements
    # Tensors are split, never sliced: the gradient of a slice is a whole tensor of zeros, to be written and added up.
    pairs, odd_length = divmod(length, 2)
    split = [e.split([2 * pairs, 1] if odd_length else length, dim) for e in elements]
    even, odd = zip(*(_unzip(whole, dim) for whole, *_ in split), strict=True)
    odd = _scan(combine, _combined(combine, even, odd), dim)
    first, rest = zip(*(e.split([1, pairs - 1], dim) for e in even), strict=True)
    if odd_length:
        earlier, rest = odd, tuple(torch.cat((e, end), dim) for e, (_, end) in zip(rest, split, strict=True))
    else:
        earlier = tuple(e.split([pairs - 1, 1], dim)[0] for e in odd)
    if length > 2:
        later = _combined(combine, earlier, rest)
        first = tuple(torch.cat(both, dim) for both in zip(first, later, strict=True))
    return tuple(_interleave(e, o, dim) for e, o in zip(first, odd, strict=True))


def _unzip(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Every even and every odd position; their number is even."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim % x.ndim + 1)
    return even, odd


def _interleave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    dim, pairs = dim % even.ndim, odd.shape[dim]
    if even.shape[dim] == pairs:
        return torch.stack((even, odd), dim + 1).flatten(dim, dim + 1)
    even, end = even.split([pairs, 1], dim)
    return torch.cat((torch.stack((even, odd), dim + 1).flatten(dim, dim + 1), end), dim)


def _affine(a: Tensor, b: Tensor, *, dim: int) -> Element:
    """The scan of `affine`, whose gradient is a scan of its own."""
    one = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
    _combined(affine, one, one)
    a, b = a.movedim(dim, 0), b.movedim(dim, 0)
    # Tokens are on the left now; what a is broadcast over stays on the right of them.
    wide = a.reshape(a.shape[0], *[1] * (b.ndim - a.ndim), *a.shape[1:])
    first, links = wide.split([1, wide.shape[0] - 1])
    decay, h = Chain.apply(links, first, b, False)
    return decay.reshape(a.shape).movedim(0, dim), h.movedim(0, dim)


class Chain(torch.autograd.Function):
    """h_0 = b_0, h_(t+1) = l_t h_t + b_(t+1); in reverse, h_N = b_N, h_t = l_t h_(t+1) + b_t. Tokens are dimension 0.

    links l: N. b: N + 1. first: a decay before l_0, or None, as it is in reverse. Returns first l_0 ... l_(t-1) at t,
    None without `first`, and h. The gradient p of b is the other way's chain of what is asked of h, with the same
    links, and that of l_t is p_(t+1) conj(h_t), in reverse p_t conj(h_(t+1)): so it can be differentiated again, and
    nothing is kept but links and outputs.
    """

    @staticmethod
    def forward(links: Tensor, first: Tensor | None, b: Tensor, reverse: bool) -> tuple[Tensor | None, Tensor]:
        return _chained(links, first, b, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.reverse = inputs[3]
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], links: Tensor, first: Tensor | None, b: Tensor, reverse: bool
    ) -> tuple[tuple[Tensor | None, Tensor], tuple[int | None, int]]:
        def beside(x: Tensor, at: int | None) -> Tensor:
            return x.expand(info.batch_size, *x.shape).transpose(0, 1) if at is None else x.movedim(at, 1)

        moved = (None if x is None else beside(x, at) for x, at in zip((links, first, b), in_dims, strict=False))
        return Chain.apply(*moved, reverse), (None if first is None else 1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        links, *outputs = ctx.saved_tensors
        after, before = _neighbours(ctx.reverse)
        pulls = [None if g is None else Chain.apply(links.conj(), None, g, not ctx.reverse)[1] for g in gradients]
        to_links = None
        for pull, output in zip(pulls, outputs, strict=True):
            if pull is not None:
                own = pull[after] * output[before].conj()
                own = (own.real if own.is_complex() and not links.is_complex() else own).sum_to_size(links.shape)
                to_links = own if to_links is None else to_links + own
        return to_links, None if pulls[0] is None else pulls[0][:1], pulls[1], None


def _neighbours(reverse: bool) -> tuple[slice, slice]:
    """Of every two neighbours the one that comes after, and the one before."""
    late, early = slice(1, None), slice(None, -1)
    return (early, late) if reverse else (late, early)


def _chained(links: Tensor, first: Tensor | None, b: Tensor, reverse: bool) -> tuple[Tensor | None, Tensor]:
    """`Chain` without a graph: all chunks abreast, each as if nothing came before it, and then what did."""
    h, nothing = b.clone(), links.new_zeros(1, *links.shape[1:]) if first is None else first
    # The link to every token, to become the decay since what came before its chunk, and then before all.
    decay = torch.cat([links, nothing] if reverse else [nothing, links])
    tokens, (after, before) = b.shape[0], _neighbours(reverse)
    chunks = tokens // CHUNK if tokens >= 2 * CHUNK else 0
    rest = tokens - chunks * CHUNK
    if chunks:
        x, w = ((t[rest:] if reverse else t[: tokens - rest]).unflatten(0, (chunks, CHUNK)) for t in (h, decay))
        steps = range(CHUNK - 1, -1, -1) if reverse else range(CHUNK)
        for old, new in itertools.pairwise(steps):
            x[:, new].addcmul_(w[:, new], x[:, old])
            w[:, new].mul_(w[:, old])
        ends = w[:, steps[-1]]
        since, past = _chained(ends[1:-1], None if first is None else ends[:1], x[before, steps[-1]], reverse)
        x[after].addcmul_(w[after], past.unsqueeze(1))
        if since is not None:
            w[after].mul_(since.unsqueeze(1))
    # A last chunk that is none comes token by token, and so does all that is shorter than two.
    left = range(tokens)[: rest + bool(chunks)][::-1] if reverse else range(tokens)[tokens - rest - bool(chunks) :]
    for old, new in itertools.pairwise(left):
        h[new].addcmul_(decay[new], h[old])
        decay[new].mul_(decay[old])
    return None if first is None else decay, h


def _combined(combine: Combine, earlier: Element, later: Element) -> Element:
    result = combine(earlier, later)
    same = isinstance(result, tuple) and [(r.shape, r.dtype) for r in result] == [(e.shape, e.dtype) for e in later]
    if not same:
        got = [_what(r) for r in result] if isinstance(result, tuple) else type(result).__name__
        raise ValueError(
            f"combine: gave {got} from {[_what(e) for e in later]}; it must return a tuple of the same shapes and "
            "dtypes, so expand broadcast elements beforehand"
        )
    return result


def _check(name: str, elements: Sequence[Tensor], dim: int) -> Element:
    if isinstance(elements, Tensor) or not all(isinstance(e, Tensor) for e in elements):
        raise TypeError(f"{name}: got {type(elements).__name__}; pass a tuple of tensors")
    elements = tuple(elements)
    if not elements:
        raise ValueError(f"{name}: got an empty tuple; pass at least one tensor")
    for i, e in enumerate(elements):
        if not -e.ndim <= dim < e.ndim:
            raise ValueError(f"dim: got {dim}, which {name}[{i}] of shape {tuple(e.shape)} has not")
    sizes = [e.shape[dim] for e in elements]
    if len(set(sizes)) > 1 or sizes[0] == 0:
        raise ValueError(f"{name}: got sizes {sizes} along dim {dim}; pass one size of at least 1")
    return elements


def _what(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def affine(earlier: Element, later: Element) -> Element:
    """Elements (a, b) of h_t = a_t * h_{t-1} + b_t, elementwise.

        (a1, b1), (a2, b2) -> (a1 a2, a2 b1 + b2)

    a: any shape that broadcasts to b's; b: the shape of h; both real or complex. The second tensor of the scan is h,
    from h = 0 before the first token; the first is the decay since then. With `initial=(ones, h0)` h starts at h0.
    S5 (arXiv 2208.04933), HGRN, RAT.
    """
    (a1, b1), (a2, b2) = earlier, later
    return a1 * a2, a2 * b1 + b2


def matrix_affine(earlier: Element, later: Element) -> Element:
    """Elements (A, b) of h_t = A_t h_{t-1} + b_t with small matrices.

        (A1, b1), (A2, b2) -> (A2 A1, A2 b1 + b2)

    A (..., S, S), b (..., S, E). Titans' momentum and memory (arXiv 2501.00663, eq. 13 and 14) are the rows of one h:
    S = 2, A = [[eta, 0], [eta, 1 - alpha]], b = [u, u] with u the step of the token.
    """
    (a1, b1), (a2, b2) = earlier, later
    return a2 @ a1, a2 @ b1 + b2


def softmax_monoid(earlier: Element, later: Element) -> Element:
    """Elements (m, u, w) of a running softmax average w / u (Aaren, arXiv 2405.13956, section 3.2).

        m = max(m1, m2),  u = u1 e^{m1 - m} + u2 e^{m2 - m},  w = w1 e^{m1 - m} + w2 e^{m2 - m}

    m, u (...), w of the same shape or with one more dimension for the channels of a value. A token of score s and
    value v is (s, 1, v); (-inf, 0, 0) is the identity, and stands for a token that is masked. Log-sum-exp of the scores
    is m + log u. No exponent is positive, and -inf against -inf gives zero weight, not NaN. Gradients run through u and
    w alone: u e^m and w e^m, all that has a meaning, do not depend on which m was taken out.
    """
    (m1, u1, w1), (m2, u2, w2) = earlier, later
    m = torch.maximum(m1, m2).detach()
    finite = m.clamp_min(torch.finfo(m.dtype).min)
    e1, e2 = (m1 - finite).exp(), (m2 - finite).exp()
    f1, f2 = (e1.unsqueeze(-1), e2.unsqueeze(-1)) if w1.ndim > m.ndim else (e1, e2)
    return m, u1 * e1 + u2 * e2, w1 * f1 + w2 * f2


def check_monoid(combine: Combine, elements: Sequence[Tensor], *, dim: int) -> float:
    """The associativity that `associative_scan` takes on trust, measured on every three neighbours.

        (a b) c  =  a (b c)

    combine, elements, dim: as for `associative_scan`, N >= 3. Returns the largest difference relative to the largest
    entry of its tensor.
    Errors: ValueError when it exceeds the square root of the dtype's eps.

    >>> check_monoid(affine, (torch.rand(5), torch.rand(5)), dim=0) < 1e-6
    True
    """
    whole = _check("elements", elements, dim)
    count = whole[0].shape[dim] - 2
    if count < 1:
        raise ValueError(f"elements: got {count + 2} along dim {dim}; associativity takes at least 3")
    a, b, c = (tuple(e.narrow(dim, start, count) for e in whole) for start in range(3))
    left = _combined(combine, _combined(combine, a, b), c)
    right = _combined(combine, a, _combined(combine, b, c))
    worst = 0.0
    for i, (x, y) in enumerate(zip(left, right, strict=True)):
        error = float((x - y).abs().max() / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny))
        if not error <= torch.finfo(x.dtype).eps ** 0.5:
            raise ValueError(
                f"combine: is not associative; tensor {i} of (a b) c and a (b c) differ by {error:.3g}, relatively"
            )
        worst = max(worst, error)
    return worst
