"""The two functions that transformers calls: one makes the mask of a forward pass, one attends in each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from saccade.hf.serving import Asked

NAME = "saccade"  # under which transformers knows both, and where a layer's module holds what attends in it


@dataclass(frozen=True)
class Group:
    """Rows of a batch with equally many real tokens: indices rows (G,), queries (G, n), keys (G, m), all int64.

    members: the rows once more, on the host.
    """

    members: tuple[int, ...]
    rows: Tensor
    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Tokens:
    """What there is to attend to in one forward pass, in place of a mask: made once, read by every layer.

    num_queries, num_keys: N, the last of M. window: keys that a query sees, or None when it sees all before it. groups:
    the real tokens, or None when nothing is padding. room: keys that the cache hands over, the first M of which were
    read; more than M where it is static.
    """

    num_queries: int
    num_keys: int
    window: int | None = None
    groups: tuple[Group, ...] | None = None
    room: int | None = None
    # transformers asks every mask for its axes: these are no (batch, tokens), and are handed on as they are.
    ndim: ClassVar[int] = 0

    def read_of(self, *held: Tensor) -> tuple[Tensor, ...]:
        """What was read (B, Hkv, M, D) of what a cache hands over, keys or values (B, Hkv, room, D)."""
        return tuple(x[:, :, : self.num_keys] if x.shape[2] == self.room != self.num_keys else x for x in held)

    def attend(self, call: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Call with real tokens only; rows of padding come back as zeros."""
        if self.groups is None:
            return call(q, k, v)
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        for group in self.groups:
            rows, queries, keys = (x.to(q.device) for x in (group.rows[:, None], group.queries, group.keys))
            found = call(*(x[rows, :, at].transpose(1, 2) for x, at in ((q, queries), (k, keys), (v, keys))))
            out[rows, :, queries] = found.transpose(1, 2)
        return out

    def read(self, call: Callable[..., Tensor], *new: Tensor) -> Tensor:
        """Call with the real ones of new tokens only, each tensor (B, ..., N, C), and with the rows that have some.

        call(*new, rows) -> (G, H, n, Dv); rows None when they are all of the batch. A step of one token is one call.
        """
        if self.groups is None:
            return call(*new, None)
        groups, batch = self.groups, len(new[0])
        if self.num_queries == 1:
            members = tuple(sorted(row for each in groups for row in each.members))
            if len(members) == batch:
                return call(*new, None)
            rows = torch.tensor(members, device=new[0].device)
            groups = (Group(members, rows, rows.new_zeros(len(members), 1), rows),)
        out: Tensor | None = None
        for each in groups:
            rows, at = each.rows.to(new[0].device)[:, None], each.queries.to(new[0].device)
            found = call(*(x[rows, :, at].transpose(1, 2) for x in new), each.members)
            if out is None:
                out = found.new_zeros(batch, found.shape[1], self.num_queries, found.shape[3])
            out[rows, :, at] = found.transpose(1, 2)
        if out is None:
            raise ValueError("attention_mask: got padding alone; pass at least one token that is real")
        return out


def group(real: Tensor, num_queries: int, before: int | Tensor) -> tuple[int, tuple[Group, ...] | None, bool]:
    """Tokens in the cache, now on the host; rows by their numbers of real queries and keys, None when all is real; and
    whether padding lies between tokens.

    real: bool (B, M or more), of which what is behind the queries counts for nothing. before: tokens in the cache, on
    the host or the device: M - N. Waits for the device once.
    """
    place = torch.arange(real.shape[1], device=real.device)
    real = real & (place < before + num_queries)
    last = torch.where(real, place, -1).amax(1)
    first = torch.where(real, place, real.shape[1]).amin(1)
    sums = torch.stack([(real & (place >= before)).sum(1), real.sum(1), last - first + 1], 1)
    start, *flat = torch.cat([sums.new_zeros(1) + before, sums.flatten()]).tolist()
    rows_of: dict[tuple[int, int], list[int]] = {}
    spans = list(zip(*[iter(flat)] * 3, strict=True))
    for row, (n, m, _) in enumerate(spans):
        rows_of.setdefault((n, m), []).append(row)
    if list(rows_of) == [(num_queries, start + num_queries)]:
        return start, None, False
    found = []
    for (n, m), members in rows_of.items():
        if n:
            rows = torch.tensor(members, device=real.device)
            # Stable, so that real tokens come first and in their order; unlike nonzero it does not wait for the device.
            queries, keys = (
                part.int().argsort(dim=1, descending=True, stable=True)[:, :count]
                for part, count in ((real[rows, start : start + num_queries], n), (real[rows], m))
            )
            found.append(Group(tuple(members), rows, queries, keys))
    return start, tuple(found), any(m and m != span for _, m, span in spans)


@torch.compiler.disable
def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | Tokens | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> Tokens:
    """The mask function of transformers' AttentionMaskInterface: `Tokens` instead of a tensor.

    attention_mask: bool (B, tokens so far, or more), False for padding; what this function made before, as `generate`
    does for a static cache; or None. q_offset: tokens before the first query, of a static cache a tensor, for which the
    host waits once. local_size: sliding window. The other names are transformers' own. Errors: ValueError for what is
    no causal attention over a cache.
    """
    if isinstance(attention_mask, Tokens):
        return attention_mask
    # transformers takes this back for all that is not plainly causal, and for every step over a static cache; one token
    # attends to all before it.
    if use_vmap or not (allow_is_causal_skip or q_length == 1):
        raise ValueError(
            "attention_mask: the model asks for more than causal attention (packed sequences, or a mask function of "
            "its own); pass sequences one a row, and an attention_mask of zeros for padding"
        )
    before, groups, holes = q_offset - kv_offset, None, False
    if attention_mask is None:
        before = int(before)
    else:
        before, groups, holes = group(attention_mask[:, kv_offset : kv_offset + kv_length].bool(), q_length, before)
    num_keys = before + q_length
    if num_keys > kv_length:
        raise ValueError(
            f"cache: got {num_keys} tokens for a cache that holds {kv_length}; pass a StaticCache with more room, or a "
            "DynamicCache"
        )
    if attention_mask is not None and (
        attention_mask.shape[0] != batch_size or attention_mask.shape[1] < kv_offset + num_keys
    ):
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)} for a batch of {batch_size} that has read "
            f"{kv_offset + num_keys} tokens; pass one number for each, those in the cache too"
        )
    window = local_size if local_size is not None and local_size < num_keys else None
    if window is not None and holes:
        raise ValueError(
            f"attention_mask: padding lies between tokens, and a sliding window of {window} counts it; pad on the left"
        )
    return Tokens(q_length, num_keys, window, groups, kv_length)


CHANGES = ("position_bias", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions")


@torch.compiler.disable
def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    use_cache: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' AttentionInterface: what `apply` put on the module attends.

    query (B, H, N, D), key, value (B, Hkv, M, D) -> (o (B, N, H, D), None). attention_mask: `Tokens`. The other names
    are transformers' own. Errors: ValueError for a mask that `mask` did not make, and for options that change attention
    and are not served.
    """
    served = vars(module).get(NAME)
    if served is None:
        raise RuntimeError(
            f"model: nothing was applied to this {type(module).__name__}; its model shares the configuration of "
            "another that saccade.hf.apply changed, so copy the configuration, or call apply on this one too"
        )
    if not isinstance(attention_mask, Tokens):
        got = f"a tensor of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else "none"
        raise ValueError(
            f"attention_mask: got {got}, which tells no mechanism where padding is; pass (batch, tokens), or "
            "leave it out"
        )
    for name in CHANGES:
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name}: saccade does not serve it; leave it out, or restore the model first")
    if dropout:
        raise ValueError(f"dropout: got {dropout}; set the model's attention_dropout to 0, or call model.eval()")
    tokens = attention_mask
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    asked = Asked(scale, softcap, s_aux, tokens.window, bool(use_cache))
    held = vars(key).get(NAME)
    if held is not None:  # keys and values lie in pages; these are the new ones
        return served.read(held, tokens, query, key, value, asked).transpose(1, 2).contiguous(), None
    key, value = tokens.read_of(key, value)
    if (query.shape[2], key.shape[2]) != (tokens.num_queries, tokens.num_keys):
        raise ValueError(
            f"cache: got {key.shape[2]} keys for {query.shape[2]} queries, {tokens.num_keys} for {tokens.num_queries} "
            "were announced; pass a cache that was made for this model"
        )
    out = tokens.attend(lambda q, k, v: served(q, k, v, asked), query, key, value)
    return out.transpose(1, 2).contiguous(), None
