"""LongT5's transient global attention: the same numbers and gradients as transformers' layer with the same weights."""

import pytest
import torch

from saccade.contract import Dims
from saccade.mechanisms.static_sparse.longt5_tglobal import LongT5TGlobal
from saccade.testing.budget import assert_close
from saccade.testing.gradients import differentiate

# tokens, radius, block, buckets, largest distance: whole blocks, a tail, and distances beyond the last bucket. Blocks
# are powers of two, because transformers finds block numbers by adding up float fractions of one.
SHAPES = [(48, 5, 4, 12, 20), (59, 7, 8, 32, 128), (197, 150, 2, 32, 128), (23, 3, 1, 8, 9)]
OURS = {
    "q.weight": "query.weight",
    "k.weight": "key.weight",
    "v.weight": "value.weight",
    "o.weight": "out.weight",
    "global_input_layer_norm.weight": "norm.weight",
    "relative_attention_bias.weight": "bias.table",
    "global_relative_attention_bias.weight": "side.table",
}


def layers(dims, radius, block, buckets, distance):
    """transformers' layer, with random weights, and ours with the same ones."""
    from transformers import LongT5Config
    from transformers.models.longt5.modeling_longt5 import LongT5TransientGlobalAttention

    config = LongT5Config(
        d_model=dims.dim,
        d_kv=dims.head_dim,
        num_heads=dims.num_heads,
        local_radius=radius,
        global_block_size=block,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
        dropout_rate=0.0,
    )
    theirs = LongT5TransientGlobalAttention(config, has_relative_attention_bias=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    ours = LongT5TGlobal(dims, radius=radius, block=block, num_buckets=buckets, max_distance=distance)
    state = {OURS[name]: x.mT if name.endswith("bias.weight") else x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state)
    return theirs, ours


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_layer_is_that_of_transformers(shape):
    n, *settings = shape
    dims = Dims(3, 4)
    theirs, ours = layers(dims, *settings)
    x, weight = torch.randn(2, 2, n, dims.dim)

    def masked(x):
        """Their layer as their model calls it; without a mask it looks beyond the radius, and at its own padding."""
        return theirs(x, mask=torch.ones(x.shape[:2]))[0]

    # Theirs takes its softmax in float32 whatever comes in: it is judged by the float64 numbers of ours.
    found, eager = masked(x), ours(x)
    slopes = differentiate(masked, (x,), ("x",), theirs, weight)
    eager_slopes = differentiate(ours, (x,), ("x",), ours, weight)
    exact_slopes = differentiate(ours.double(), (x.double(),), ("x",), ours, weight.double())
    with torch.no_grad():
        terms = 2 * settings[0] + 1 + n // settings[1]
        assert_close(found, ours(x.double()), eager, name="output", terms=terms)
    scale = max(float(slope.abs().max()) for slope in exact_slopes.values())
    for name, slope in slopes.items():
        slope, mine = slope.mT if name.endswith("bias.weight") else slope, OURS.get(name, name)
        assert_close(slope, exact_slopes[mine], eager_slopes[mine], name=f"gradient of {mine}", terms=n, scale=scale)
