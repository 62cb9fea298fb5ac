"""What the plug-in touches of vLLM, as vLLM publishes it (v1/attention/backend.py, backends/registry.py): names,
abstract methods and fields, without anything behind them.
"""

import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class MultipleOf:
    def __init__(self, base):
        self.base = base


class AttentionMetadata:
    pass


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor


class AttentionBackend(ABC):
    @staticmethod
    @abstractmethod
    def get_name(): ...

    @staticmethod
    @abstractmethod
    def get_impl_cls(): ...

    @staticmethod
    @abstractmethod
    def get_builder_cls(): ...

    @staticmethod
    @abstractmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"): ...


class AttentionMetadataBuilder(ABC, Generic[T]):
    @abstractmethod
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names
        self.vllm_config, self.device = vllm_config, device

    @abstractmethod
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False): ...


class AttentionImpl(ABC, Generic[T]):
    @abstractmethod
    def __init__(self, num_heads, head_size, scale): ...

    @abstractmethod
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output): ...


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CUSTOM = None


REGISTERED = {}


def register_backend(backend, class_path=None, is_mamba=False):
    REGISTERED[backend] = class_path
    return lambda cls: cls


CONFIG = types.SimpleNamespace(additional_config={})


def modules():
    """Module name -> module."""
    names = ["vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"]
    found = {name: types.ModuleType(name) for name in names}
    here = sys.modules[__name__]
    inside = {
        "vllm.config": {"get_current_vllm_config": lambda: CONFIG},
        "vllm.v1.attention.backend": {
            name: getattr(here, name)
            for name in (
                "AttentionBackend",
                "AttentionImpl",
                "AttentionMetadata",
                "AttentionMetadataBuilder",
                "CommonAttentionMetadata",
                "MultipleOf",
            )
        },
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": AttentionBackendEnum,
            "register_backend": register_backend,
        },
    }
    for name, what in inside.items():
        found[name] = types.ModuleType(name)
        vars(found[name]).update(what)
    return found
