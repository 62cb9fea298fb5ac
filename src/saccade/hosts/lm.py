"""A Llama-shaped causal language model over bytes, which carries any attention: the model that measurements run on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.errors import positive

WEIGHTS = Path(__file__).parent / "weights" / "saccade_lm.safetensors"
AttentionCall = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class LMConfig:
    """Sizes of the model. Tokens are bytes; the entries of the vocabulary beyond 256 are spare."""

    vocab_size: int = 320
    dim: int = 256
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    ffn_dim: int = 704
    rope_theta: float = 100_000.0
    norm_eps: float = 1e-5
    max_length: int = 8192

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_dim",
            "max_length",
        ):
            positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: got {self.num_kv_heads} for {self.num_heads} heads; pass a divisor")
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim: got {self.head_dim}; pass an even number, of which rotary positions take halves"
            )


def dense(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """Causal softmax attention; queries are the last N of M positions."""
    n, m = q.shape[2], k.shape[2]
    if n == m or n == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=n == m and n > 1, enable_gqa=True)
    mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def rotary(positions: Tensor, config: LMConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (N, D) float32 of the rotary embedding (arXiv 2104.09864), with a head's halves as the two axes."""
    # Not theta to a negative power, which rounds differently: at position 8191 the angles would part from Llama's.
    rates = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim)
    angles = positions[:, None].float() * rates
    return torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, N, D), turned by its positions."""
    one, two = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-two, one], -1) * sin.to(x.dtype)


class SelfAttention(nn.Module):
    """Projections without bias, rotary positions, an attention handed in."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        c = self.config = config
        self.q_proj = nn.Linear(c.dim, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.dim, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k, v (B, Hkv, N, D); q and k carry their positions."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class Cache:
    """Keys and values (B, Hkv, M, D) of every layer that has been read; M tokens so far."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; all of them come back."""
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], k], 2)
            self.values[layer] = torch.cat([self.values[layer], v], 2)
        return self.keys[layer], self.values[layer]


class DecoderLayer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.self_attn, self.mlp = SelfAttention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionCall, cache: Cache | None = None
    ) -> Tensor:
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        x = x + self.self_attn.o_proj(attention(q, k, v, self.layer).transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class Captured:
    """What one layer's attention is given.

    q (B, H, N, D), k, v (B, Hkv, N, D): q and k after the rotary embedding. hidden (B, N, C): what they were projected
    from, behind the norm.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor


class LM(nn.Module):
    """tokens (B, N) int64 -> logits (B, N, vocab): next-byte scores.

    config: sizes (default: the shipped model's). attention: (q, k, v, layer) -> o, handed in (default: dense causal
    attention). Parameter names are those of transformers' LlamaForCausalLM without their prefix `model.`; the embedding
    is tied.

    >>> LM(LMConfig(num_layers=1))(torch.zeros(1, 5, dtype=torch.int64)).shape
    torch.Size([1, 5, 320])
    """

    def __init__(self, config: LMConfig | None = None, attention: AttentionCall | None = None) -> None:
        super().__init__()
        self.config = config or LMConfig()
        self.attention = attention or dense
        self.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.dim)
        self.layers = nn.ModuleList(DecoderLayer(self.config, i) for i in range(self.config.num_layers))
        self.norm = nn.RMSNorm(self.config.dim, eps=self.config.norm_eps)
        nn.init.normal_(self.embed_tokens.weight, std=self.config.dim**-0.5)

    def _enter(self, tokens: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32) or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}; pass int64 (B, N) with N >= 1"
            )
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        return self.embed_tokens(tokens), *rotary(positions, self.config)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        x, cos, sin = self._enter(tokens, cache.length if cache else 0)
        for layer in self.layers:
            x = layer(x, cos, sin, self.attention, cache)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    @torch.no_grad()
    def generate(self, tokens: Tensor, num_new: int) -> Tensor:
        """Greedy continuation: (B, N) -> (B, num_new)."""
        positive("num_new", num_new)
        cache, new, last = Cache(), [], tokens
        for _ in range(num_new):
            last = self(last, cache)[:, -1:].argmax(-1)
            new.append(last)
        return torch.cat(new, 1)

    @overload
    def capture(self, tokens: Tensor) -> list[Captured]: ...
    @overload
    def capture(self, tokens: Tensor, layer: int) -> Captured: ...
    @torch.no_grad()
    def capture(self, tokens: Tensor, layer: int | None = None) -> list[Captured] | Captured:
        """What every layer's attention, or that of one `layer` (from 0), is given while the model reads `tokens`."""
        last = self.config.num_layers - 1
        if layer is not None and positive("layer", layer, least=0) > last:
            raise ValueError(f"layer: got {layer}; this model has layers 0 to {last}")
        x, cos, sin = self._enter(tokens, 0)
        found: list[Captured] = []
        blocks: list[Any] = list(self.layers)
        for index, block in enumerate(blocks):
            normed = block.input_layernorm(x)
            q, k, v = block.self_attn.qkv(normed, cos, sin)
            found.append(Captured(q, k, v, normed))
            if index == (last if layer is None else layer):
                break
            x = block(x, cos, sin, self.attention)
        return found if layer is None else found[-1]

    def save(self, path: str | Path) -> None:
        """Write bfloat16 weights, with the configuration in the file's metadata."""
        from safetensors.torch import save_file

        weights = {
            name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in self.state_dict().items()
        }
        save_file(weights, str(path), metadata={"config": json.dumps(asdict(self.config))})

    @classmethod
    def from_pretrained(cls, path: str | Path = WEIGHTS, *, dtype: torch.dtype = torch.float32) -> LM:
        """The model of a file that `save` wrote; by default the one that comes with the package."""
        from safetensors import safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"path: no weights at {path}; pass a file written by LM.save")
        with safe_open(str(path), "pt") as file:
            if "config" not in (file.metadata() or {}):
                raise ValueError(f"path: {path} carries no configuration; pass a file written by LM.save")
            config = LMConfig(**json.loads(file.metadata()["config"]))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = cls(config)
        model.load_state_dict(weights)
        return model.to(dtype).eval()

    def llama_config(self) -> dict[str, Any]:
        """Arguments of transformers' LlamaConfig for this model."""
        c = self.config
        return {
            "vocab_size": c.vocab_size,
            "hidden_size": c.dim,
            "intermediate_size": c.ffn_dim,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
            "rms_norm_eps": c.norm_eps,
            "max_position_embeddings": c.max_length,
            "tie_word_embeddings": True,
        }

    def to_llama(self) -> Any:
        """The same model as transformers' LlamaForCausalLM (needs `pip install saccade[hf]`)."""
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise ImportError("transformers is missing: pip install saccade[hf]") from error
        llama: Any = LlamaForCausalLM(LlamaConfig(**self.llama_config()))
        llama.to(self.embed_tokens.weight.dtype)
        llama.model.load_state_dict(self.state_dict())
        llama.tie_weights()
        return llama.eval()
