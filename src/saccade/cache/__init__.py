"""What a decoder keeps and reads: ragged pages, policies of eviction and of reading, sessions."""

from saccade.cache.baselines import (
    adakv,
    expected_attention,
    h2o,
    keydiff,
    knorm,
    pyramidkv,
    snapkv,
    streaming_llm,
    tova,
)
from saccade.cache.budgets import AcrossHeads, AcrossLayers, Pyramid, Uniform, budgeted, top
from saccade.cache.coded import CodedPool, Grid, Quantized
from saccade.cache.hosted import HostedPool, Offloaded
from saccade.cache.mechanism import Cached
from saccade.cache.policy import Evict, Policy
from saccade.cache.pool import PagePool
from saccade.cache.readers import Quest, Reader
from saccade.cache.recorded import CudaGraph, Recorded
from saccade.cache.rotation import Rotation, Turned
from saccade.cache.scorers import (
    Expected,
    KeyDifference,
    KeyNorm,
    LastQuery,
    Observed,
    Received,
    Recency,
    Scorer,
)
from saccade.cache.session import Session
from saccade.cache.store import Store, Tokens
from saccade.cache.view import Stored, View
from saccade.cache.virtual import CudaDriver, Driver, SimulatedDriver, VirtualCache

__all__ = [
    "AcrossHeads",
    "AcrossLayers",
    "Cached",
    "CodedPool",
    "CudaDriver",
    "CudaGraph",
    "Driver",
    "Evict",
    "Expected",
    "Grid",
    "HostedPool",
    "KeyDifference",
    "KeyNorm",
    "LastQuery",
    "Observed",
    "Offloaded",
    "PagePool",
    "Policy",
    "Pyramid",
    "Quantized",
    "Quest",
    "Reader",
    "Received",
    "Recency",
    "Recorded",
    "Rotation",
    "Scorer",
    "Session",
    "SimulatedDriver",
    "Store",
    "Stored",
    "Tokens",
    "Turned",
    "Uniform",
    "View",
    "VirtualCache",
    "adakv",
    "budgeted",
    "expected_attention",
    "h2o",
    "keydiff",
    "knorm",
    "pyramidkv",
    "snapkv",
    "streaming_llm",
    "top",
    "tova",
]
