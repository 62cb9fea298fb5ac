"""What a decoder keeps of the tokens that it has read, in bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.bench.sample import Sample
from saccade.cache import Cached
from saccade.contract import CachePolicy, Mechanism
from saccade.scan import snapshot
from saccade.testing.decode import decode


def kept_bytes(module: Mechanism, inputs: Sequence[Tensor]) -> int | None:
    """Bytes of the state after all tokens of the inputs; None where the mechanism does not decode.

    inputs: those of a call: q, k, v, or x. A `CachePolicy` says what it keeps, so that nothing runs: the rows of keys
    and values that `kept` names, in the dtype of the inputs. One that decides from the data reads the tokens as a
    prompt, and its pages in use count, with all that lies beside them. Others decode the tokens one by one, which takes
    as many steps as there are tokens.
    """
    if isinstance(module, Cached):
        session = module.session()
        with torch.no_grad():
            module.read(session, *inputs)
        return session.nbytes_in_use
    if not (module.can_step() and module.causal):
        return None
    if isinstance(module, CachePolicy):
        _, k, v = inputs
        row = (k.shape[3] + v.shape[3]) * k.element_size()
        return k.shape[0] * int(module.kept(k.shape[2]).sum()) * row
    return snapshot.nbytes(decode(module, inputs)[1])


def dense_bytes(k: Tensor, v: Tensor) -> int:
    """Bytes of the whole cache of dense attention: every key and value."""
    return k.nbytes + v.nbytes


def baseline_bytes(is_mixer: bool, sample: Sample) -> int:
    """Bytes of the cache of what it is compared with: dense attention on k and v, for a layer a dense one on x."""
    if not is_mixer:
        return dense_bytes(sample.k, sample.v)
    dims, x = sample.mixer_dims, sample.x
    return 2 * x.shape[0] * x.shape[1] * dims.num_kv_heads * dims.head_dim * x.element_size()
