"""saccade inside vLLM: an attention backend that reads few pages, and the plug-in that registers it.

vLLM finds `register` by its entry point `vllm.general_plugins`, in every worker process; then

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"saccade": {"select": "quest", "budget": 4096}}'

select: `"quest"`, the pages whose keys may score highest; `"paged_eviction"`, those of the most important tokens, of
which a page once left out is never read again; or nothing: every page. budget: tokens that a decoding query reads, in
whole pages. Prompts are read densely.

vLLM keeps one table of pages for all heads of a layer, and gives pages out and takes them back itself. So what a policy
decides a head, or a token, is not to be had here, and a page that is not read any more is not freed: it saves time, not
memory. `saccade.hf` and `saccade.serve` do both.
"""

from __future__ import annotations


def register() -> None:
    """Make `CUSTOM` mean this backend. Called by vLLM; imports nothing of it that it has not imported itself."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "saccade.vllm.backend.Backend")
