"""Broken twins: for every check at least one mechanism, broken in one way, that the check must flag.

A check that nothing can fail proves nothing. Each twin is a healthy mechanism with one fault, and says by which words
of the message its check must flag it, so that no twin is caught for a reason of its own. Those that keep in a decoder
what they should not are in `caching_twins`, those that decode or pack otherwise than the whole in `decode_twins`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.contract import Attention, Case, Dims, Finding, Mechanism, claim, rotated
from saccade.errors import check_cu_seqlens
from saccade.testing.healthy import Decayed, Sliding
from saccade.where import Causal, Plan, Window


@dataclass(frozen=True)
class Twin:
    """`broken` must fail the check named `check` with a message that contains `because`."""

    check: str
    broken: type[Mechanism]
    because: str


TWINS: list[Twin] = []


def twin(check: str, because: str) -> Any:
    """Enter the decorated mechanism as a broken twin of `check`."""

    def enter(broken: type[Mechanism]) -> type[Mechanism]:
        TWINS.append(Twin(check, broken, because))
        return broken

    return enter


@twin("value", "max error")
class OffByOne(Sliding):
    """Its window does not count the query itself."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return Sliding(self.dims, size=self.size + 1).compute(q, k, v, **options)


@twin("value", "max error")
class WrongScale(Sliding):
    """Divides by sqrt(D + 1e-9)."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q * (1 + 1e-9), k, v, **options)


@twin("value", "shape")
class Broadcasts(Decayed):
    """Keeps only the last token."""

    def compute(self, x: Tensor, **options: Any) -> Tensor:
        return super().compute(x, **options)[:, -1:]


@twin("dtype_float32", "max error")
class Coarse(Sliding):
    """Works in bfloat16 whatever it is given in float32."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        dtype = torch.bfloat16 if q.dtype == torch.float32 else q.dtype
        return super().compute(q.to(dtype), k.to(dtype), v.to(dtype), **options).to(q.dtype)


@twin("dtype_bfloat16", "max error")
class FewerBits(Sliding):
    """In bfloat16 keeps four bits of the values."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if q.dtype == torch.bfloat16:
            v = (v * 4).round() / 4
        return super().compute(q, k, v, **options)


@twin("dtype_bfloat16", "max error")
class DiscreteFewerBits(FewerBits):
    """The same, hidden behind the pooled draws that decisions are granted."""

    spec = replace(Sliding.spec, discrete=True)


@twin("dtype_bfloat16", "got dtype torch.float32")
class Promotes(Sliding):
    """Answers in float32."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q, k, v, **options).to(torch.promote_types(q.dtype, torch.float32))


@twin("full_budget", "full budget")
class NeverFull(Sliding):
    """Leaves the first key out at the full budget."""

    @classmethod
    def full_budget(cls, dims: Dims, length: int) -> dict[str, Any]:
        return {"size": length - 1}


@twin("gradients", "gradient of k (cut off")
class Detached(Sliding):
    """No gradient reaches the keys."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q, k.detach(), v, **options)


@twin("gradients", "gradient of decay (cut off")
class DetachedParameter(Decayed):
    """No gradient reaches the decay."""

    def compute(self, x: Tensor, **options: Any) -> Tensor:
        held = copy.copy(self)
        held._parameters = {**self._parameters, "decay": self.decay.detach()}  # type: ignore[dict-item]
        return Decayed.compute(held, x, **options)


@twin("gradients", "gradient of q")
class Doubled(Sliding):
    """The value is right, the gradient of the queries twice too large."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(2 * q - q.detach(), k, v, **options)


@twin("causality", "none may look ahead")
class Leaks(Sliding):
    """Adds a trace of the mean over all tokens, the future ones too."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q, k, v, **options) + 1e-6 * v.mean((1, 2), keepdim=True)


@twin("causality", "which may not be looked at")
class ChoosesAhead(Leaks):
    """The same of a mechanism whose choices are discrete, of which the last bit is not asked."""

    spec = replace(Leaks.spec, discrete=True)


@twin("batch_equivariance", "permuted batch")
class FirstOfBatch(Sliding):
    """Every batch element reads the keys of the first one a little."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q, k + 1e-3 * (k[:1] - k), v, **options)


@twin("batch_equivariance", "batches of one")
class BatchCentred(Decayed):
    """Subtracts the mean over the batch."""

    def compute(self, x: Tensor, **options: Any) -> Tensor:
        return super().compute(x - x.mean(0, keepdim=True), **options)

    def oracle(self, x: Tensor) -> Tensor:
        return super().oracle(x - x.mean(0, keepdim=True))


@twin("head_equivariance", "permuted heads")
class Slopes(Sliding):
    """Heads differ, and the class does not say so."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q * (1 + torch.arange(q.shape[1], dtype=q.dtype)[:, None, None]), k, v, **options)


class Volatile:
    """Holds a tensor that a copy keeps and a pickle loses."""

    def __init__(self, hidden: Tensor | None = None) -> None:
        self.hidden = hidden

    def __deepcopy__(self, memo: Any) -> Volatile:
        return Volatile(self.hidden)

    def __reduce__(self) -> tuple[type[Volatile], tuple[()]]:
        return Volatile, ()


@twin("poisoned_buffers", "poisoned memory")
class ReadsUnwritten(Sliding):
    """Multiplies memory that it never wrote by zero."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = super().compute(q, k, v, **options)
        return out + 0 * torch.empty_like(out)


class UnwrittenGradient(torch.autograd.Function):
    """The identity, whose gradient is memory that was never written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(gradient)


@twin("poisoned_buffers", "the gradients of x")
class GradientUnwritten(Decayed):
    """Its backward pass returns memory that it never wrote."""

    def compute(self, x: Tensor, **options: Any) -> Tensor:
        return super().compute(UnwrittenGradient.apply(x), **options)


@twin("non_contiguous", "strided inputs")
class AssumesContiguous(Sliding):
    """Reads the queries as if they were contiguous."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(
            torch.as_strided(q, q.shape, torch.empty(q.shape, device="meta").stride()), k, v, **options
        )


@twin("determinism", "two calls")
class Draws(Sliding):
    """Adds noise in evaluation mode."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q + 1e-6 * torch.randn_like(q), k, v, **options)


@twin("determinism", "two calls")
class Remembers(Decayed):
    """Adds a little of what the last call saw."""

    last: Tensor | float = 0.0

    def compute(self, x: Tensor, **options: Any) -> Tensor:
        out, self.last = super().compute(x, **options) + self.last, x.detach().mean()
        return out


@twin("no_mutation", "changed or added q")
class InPlace(Sliding):
    """Takes the exponential of the caller's queries in place, and the logarithm again."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q.exp_().log_(), k, v, **options)


@twin("no_mutation", "changed or added calls")
class Counts(Decayed):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self, dims: Dims, *, start: float = 1.0) -> None:
        super().__init__(dims, start=start)
        self.register_buffer("calls", torch.zeros(()))

    def compute(self, x: Tensor, **options: Any) -> Tensor:
        self.calls.add_(1)
        return super().compute(x, **options)


@twin("no_mutation", "global torch settings")
class SetsPrecision(Decayed):
    """Chooses the precision of everybody's matrix products."""

    def compute(self, x: Tensor, **options: Any) -> Tensor:
        torch.set_float32_matmul_precision("high")
        return super().compute(x, **options)


@twin("nan_spread", "swallowed")
class Swallows(Sliding):
    """Turns NaN into zero before anybody sees it."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q, k, v.nan_to_num(), **options)


@twin("nan_spread", "carried too far")
class Spreads(Sliding):
    """Multiplies values outside the window by zero instead of leaving them."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q, k, v, **options) + 0 * v.sum((1, 2), keepdim=True)


@twin("bad_input", "q of rank 3: the error does not name q")
class Unchecked(Sliding):
    """Hands everything on unread."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return self.compute(q, k, v, **options)


@twin("bad_input", "size=2.5")
class UncheckedParameter(Sliding):
    """Rounds a fractional window without a word."""

    def __init__(self, dims: Dims, *, size: int = 5) -> None:
        super().__init__(dims, size=int(size))


@twin("bad_input", "does not name x")
class Mumbles(Decayed):
    """Says that something is wrong, but not what."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        try:
            return super().forward(x, **options)
        except (TypeError, ValueError):
            raise ValueError("bad shape") from None


@twin("bad_input", "accepted in silence")
class TrustsEnds(Decayed):
    """Does not look whether cu_seqlens fits."""

    def compute(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        if cu_seqlens is not None:
            ends = sorted({int(end) for end in cu_seqlens if 0 < end < x.shape[1]})
            cu_seqlens = check_cu_seqlens(torch.tensor([0, *ends, x.shape[1]]), x.shape[1], x.shape[0])
        return super().compute(x, cu_seqlens=cu_seqlens)


@twin("compiles", "under torch.compile")
class OtherWhenCompiled(Sliding):
    """Takes another branch under the compiler."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(2 * q if torch.compiler.is_compiling() else q, k, v, **options)


@twin("pickle_round_trip", "state_dict")
class HiddenDraw(Sliding):
    """Draws a projection that no state_dict holds."""

    turn: Tensor

    def __init__(self, dims: Dims, *, size: int = 5) -> None:
        super().__init__(dims, size=size)
        self.register_buffer("turn", torch.randn(dims.head_dim), persistent=False)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q * self.turn, k, v, **options)


@twin("pickle_round_trip", "pickle")
class HoldsLambda(Sliding):
    """Keeps a function that no pickle takes."""

    def __init__(self, dims: Dims, *, size: int = 5) -> None:
        super().__init__(dims, size=size)
        self.read = lambda x: x


@twin("pickle_round_trip", "unpickled module gives another output")
class LosesScale(Sliding):
    """Keeps its scale where a pickle does not find it."""

    def __init__(self, dims: Dims, *, size: int = 5) -> None:
        super().__init__(dims, size=size)
        self.scale = Volatile(torch.ones(()))

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(2 * q if self.scale.hidden is None else q, k, v, **options)


@twin("gpu_float32", "device")
class MadeOnTheCpu(Sliding):
    """Makes a tensor without asking where its inputs are."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q * torch.ones(q.shape[2], 1), k, v, **options)


@twin("gpu_bfloat16", "max error")
class CoarseThere(Sliding):
    """Rounds its values to integers on a GPU."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q, k, v.round() if v.is_cuda else v, **options)


@twin("gpu_gradients", "gradient of k")
class CutOffThere(Sliding):
    """Has no gradient of its keys on a GPU."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().compute(q, k.detach() if k.is_cuda else k, v, **options)


@twin("gpu_waits", "bool(")
class AsksThere(Sliding):
    """Asks whether its queries are finite before it goes on."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if not bool(q.isfinite().all()):
            raise ValueError("q: not finite")
        return super().compute(q, k, v, **options)


@twin("gpu_said_to_wait", "does not; leave that out")
class RunsAhead(Sliding):
    """Says that it must wait, and need not."""

    spec = replace(Sliding.spec, waits="sizes are read by the host")


@twin("saves_work", "dense attention needs")
class DenseAndMasked(Sliding):
    """Scores every pair and throws most of them away."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        mask = Window(self.size).dense(q.shape[2], k.shape[2], heads=1).to(q.device)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf) / math.sqrt(q.shape[3])
        return scores.softmax(-1) @ v


@twin("saves_work", "dense attention needs")
class DenseAndFused(Sliding):
    """Hands every pair to a fused kernel, and a mask."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        mask = Window(self.size).dense(q.shape[2], k.shape[2], heads=1)[0].to(q.device)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@twin("saves_work", "it is N x M")
class MaterialisesMask(Sliding):
    """Builds the whole mask, only to look at its diagonal."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        mask = torch.ones(q.shape[2], k.shape[2]).tril()
        return super().compute(q, k, v * mask.diagonal()[:, None].to(v.dtype), **options)


@twin("saves_work", "density 1.000")
class PlansAll(Sliding):
    """Plans every admissible pair."""

    def plan(self, q: Tensor, k: Tensor) -> Plan:
        return Causal().plan(q.shape[2], k.shape[2], block=(16, 16))


@twin("declaration", "spec.paper")
class NoPaper(Sliding):
    """Names no paper. (B, H, N, D)"""

    spec = replace(Sliding.spec, paper="")


@twin("declaration", "no public primitive is called 'Windows'")
class UsesNothingKnown(Sliding):
    """arXiv 2004.05150, (B, H, N, D), size."""

    spec = replace(Sliding.spec, uses=("Window", "Windows"))


@twin("declaration", "drops no key")
class NeverDrops(Sliding):
    """arXiv 2004.05150, (B, H, N, D), size."""

    @classmethod
    def cases(cls) -> list[Case]:
        return [Case(Dims(2, 8), 11, {"size": size}) for size in (11, 13)]


@twin("declaration", "does not name the paper 2004.05150")
class Undocumented(Sliding):
    """q (B, H, N, D), size."""


@twin("declaration", "without a default: size")
class NoDefault(Sliding):
    """arXiv 2004.05150, (B, H, N, D)."""

    def __init__(self, dims: Dims, size: int) -> None:
        super().__init__(dims, size=size)


@twin("declaration", "claims: none")
class ClaimsNothing(Sliding):
    """arXiv 2004.05150, (B, H, N, D), size."""

    linear_work = None  # type: ignore[assignment]


@twin("declaration", "give at least 2")
class OneCase(Sliding):
    """arXiv 2004.05150, (B, H, N, D), size."""

    @classmethod
    def cases(cls) -> list[Case]:
        return super().cases()[:1]


@twin("odd_and_prime", "multiples of 8")
class EvenSizes(Sliding):
    """Is only tried where every tile fits."""

    @classmethod
    def cases(cls) -> list[Case]:
        return [Case(Dims(2, 8), 16), Case(Dims(2, 8), 32)]


@twin("odd_and_prime", "one head")
class OneHead(Sliding):
    """Is only tried with one head."""

    @classmethod
    def cases(cls) -> list[Case]:
        return [Case(Dims(1, 8), 17), Case(Dims(1, 8), 23)]


def _out_of_sight() -> None:
    """Inside a function, where a run of all docstrings does not find it."""

    @twin("example", "example fails")
    class WrongExample(Sliding):
        """Promises too much.

        >>> Sliding(Dims(num_heads=2, head_dim=4)).size
        6
        """


_out_of_sight()


@twin("example", "has no example")
class NoExample(Sliding):
    """Shows nothing."""


@twin("oracle_independent", "uses Window")
class OracleOfPatterns(Sliding):
    """Its oracle asks the pattern that the fast path follows."""

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = Window(self.size).dense(q.shape[2])
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return ((q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -torch.inf)).softmax(-1) @ v


@twin("oracle_independent", "uses self.compute")
class OracleOfItself(Sliding):
    """Its oracle is the fast path."""

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.compute(q, k, v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A helper that hides torch's own attention."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@twin("oracle_independent", "fused uses F.scaled_dot_product_attention")
class OracleFused(Attention):
    """Its oracle calls a helper that calls a kernel."""

    spec = Sliding.spec
    cases = Sliding.cases

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused(q, k, v)


@twin("oracle_independent", "share")
class SharedHelper(Decayed):
    """Oracle and fast path take the same wrong turn."""

    def turned(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    def compute(self, x: Tensor, **options: Any) -> Tensor:
        return super().compute(self.turned(x), **options)

    def oracle(self, x: Tensor) -> Tensor:
        return super().oracle(self.turned(x))


@twin("oracle_independent", "share rotated")
class SharedBook(Decayed):
    """The fast path takes what is by the book, for oracles, and so does its oracle."""

    def compute(self, x: Tensor, **options: Any) -> Tensor:
        return super().compute(rotated(x, torch.arange(x.shape[1]), 100.0), **options)

    def oracle(self, x: Tensor) -> Tensor:
        return super().oracle(rotated(x, torch.arange(x.shape[1]), 100.0))


@twin("claim", "0.50 times")
class FalseClaim(Sliding):
    """Claims what is not so."""

    @claim("Twice as good as itself.")
    def better(cls) -> Finding:
        return Finding(False, "0.50 times as good")


@twin("claim", "holds no number")
class VagueClaim(Sliding):
    """Claims without a figure."""

    @claim("Much better.")
    def better(cls) -> Finding:
        return Finding(True, "much better indeed")
