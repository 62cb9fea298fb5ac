"""The attention backend: vLLM's classes, our pages. Written against vLLM's interface of backends, v1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)

from saccade.softmax import Pages, attend, attend_pages
from saccade.vllm.choosing import choice
from saccade.where import Causal

KEYS, VALUES = 0, 1  # of the second axis of a cache


@dataclass
class Metadata(AttentionMetadata):
    """Of one batch, for all layers.

    decodes: leading requests with one new token each. starts, ends: where the tokens of the other requests begin, and
    how many each has had, on the host. On the device: table (requests, pages), lengths (requests,), slots (tokens,).
    """

    num_tokens: int
    decodes: int
    starts: list[int]
    ends: list[int]
    table: Tensor
    lengths: Tensor
    slots: Tensor


class Builder(AttentionMetadataBuilder[Metadata]):
    """Tells decoding requests from those that still read; asks the device for lengths only where some do."""

    reorder_batch_threshold: int | None = 1  # decodes come first

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        single = (starts.diff() == 1).tolist()
        decodes = single.index(False) if False in single else len(single)
        lengths = common.seq_lens[: common.num_reqs]
        return Metadata(
            num_tokens=common.num_actual_tokens,
            decodes=decodes,
            starts=starts[decodes:].tolist(),
            ends=lengths[decodes:].tolist() if decodes < len(single) else [],
            table=common.block_table_tensor[: common.num_reqs],
            lengths=lengths,
            slots=common.slot_mapping[: common.num_actual_tokens].long(),
        )


class Backend(AttentionBackend):
    """Cache (pages, 2, Hkv, page, D): keys and values of a head in a page lie together, as `Pages` has them."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, 2, num_kv_heads, block_size, head_size

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        return True


class Impl(AttentionImpl[Metadata]):
    """One layer: writes new tokens into its pages, reads prompts densely and, for decoding, the pages that are chosen.

    Errors: NotImplementedError, that names it, for what it does not do: ALiBi, sliding windows, caches of 8 bits or
    shared between layers, attention that is not a decoder's.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes is not None,
            "sliding_window": sliding_window is not None,
            "kv_cache_dtype": kv_cache_dtype.startswith(("fp8", "int8", "nvfp4")),
            "attn_type": attn_type != "decoder",
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name is not None,
        }
        for name in (name for name, asked in refused.items() if asked):
            raise NotImplementedError(f"{name}: saccade's backend does not have it; choose another attention backend")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.options: dict[str, Any] = {"scale": self.scale, "softcap": logits_soft_cap or None, "sink": sinks}
        self.choice = choice((get_current_vllm_config().additional_config or {}).get("saccade", {}))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """output, filled; query (tokens, H, D), key, value (tokens, Hkv, D), kv_cache as `Backend` has it.

        Without metadata, as in a profiling run, zeros.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale: saccade's backend does not quantise what it returns")
        if attn_metadata is None:
            return output.zero_()
        meta, count = attn_metadata, attn_metadata.num_tokens
        q, k, v = (x[:count].view(count, -1, self.head_size) for x in (query, key, value))
        found = output[:count].view(count, self.num_heads, self.head_size)
        self._write(k, v, kv_cache, meta)
        if meta.decodes:
            found[: meta.decodes] = self._decode(q[: meta.decodes], kv_cache, meta)
        for row, (start, stop) in enumerate(zip(meta.starts, meta.starts[1:], strict=False), meta.decodes):
            end = meta.ends[row - meta.decodes]
            found[start:stop] = self._read(q[start:stop], kv_cache, meta.table[row], end)
        return output

    def _write(self, k: Tensor, v: Tensor, cache: Tensor, meta: Metadata) -> None:
        page = cache.shape[3]
        pages, offsets = meta.slots // page, meta.slots % page
        cache[pages, KEYS, :, offsets] = k.to(cache.dtype)
        cache[pages, VALUES, :, offsets] = v.to(cache.dtype)
        if self.choice is not None:
            self.choice.wrote(len(cache), pages, offsets, k, v)

    def _decode(self, q: Tensor, cache: Tensor, meta: Metadata) -> Tensor:
        """(decodes, H, D)."""
        table, lengths = meta.table[: meta.decodes], meta.lengths[: meta.decodes]
        chosen = None if self.choice is None else self.choice.choose(q, table, lengths, cache.shape[3])
        pages = Pages(cache[:, KEYS], cache[:, VALUES], table, lengths)
        return attend_pages(q[:, :, None], pages, chosen, **self.options)[:, :, 0]

    def _read(self, q: Tensor, cache: Tensor, table: Tensor, end: int) -> Tensor:
        """The last tokens of one request, after `end` in all: (tokens, H, D)."""
        mine = cache[table[: -(-end // cache.shape[3])].long()]
        k, v = (mine[:, part].transpose(0, 1).flatten(1, 2)[None, :, :end] for part in (KEYS, VALUES))
        return attend(q.transpose(0, 1)[None], k, v, Causal(), **self.options)[0].transpose(0, 1)
