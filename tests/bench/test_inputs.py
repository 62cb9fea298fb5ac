"""Where q, k, v come from."""

import pytest
import torch

from saccade.bench.inputs import (
    Captured,
    CapturedModel,
    CapturedText,
    Photograph,
    Synthetic,
    Unreadable,
    capture_attention,
    grid_of,
)
from saccade.hosts.lm import LM, LMConfig
from saccade.tasks.text import held_out_text

SMALL = LMConfig(dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, max_length=128)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "lm.safetensors"
    torch.manual_seed(0)
    LM(SMALL).save(path)
    return path


def test_captured_text_is_what_the_layer_is_given(weights):
    sample = CapturedText([64, 32], weights=weights).sample(64)
    tokens = torch.tensor(list(held_out_text()[:64]))[None]
    given = LM.from_pretrained(weights).capture(tokens)[1]
    for name in "qkv":
        assert torch.equal(getattr(sample, name), getattr(given, name))
    assert sample.x.square().mean(-1).sub(1).abs().max() < 1e-4
    assert sample.shape == "B1 H4:2 N64 D8"


def test_a_shorter_sample_is_a_prefix(weights):
    source = CapturedText([64], layer=0, weights=weights)
    long, short = source.sample(64), source.sample(16, 1)
    assert torch.equal(short.q, long.q[:, :, :16])
    assert torch.equal(short.x, long.x[:, :16])
    assert (short.dims.grid, long.dims.grid) == ((16,), None)


@pytest.mark.parametrize(
    ("options", "lengths", "message"),
    [
        (
            {"weights": "/nowhere"},
            [8],
            "weights: none of saccade's language model at /nowhere; compare on synthetic",
        ),
        ({}, [129], "lengths: got 129; saccade's language model reads at most 128 tokens"),
        ({"layer": 3}, [8], "layer: got 3; the model has layers 0 to 2"),
    ],
)
def test_text_that_cannot_be_had(weights, options, lengths, message):
    source = CapturedText(lengths, **{"weights": weights, **options})
    with pytest.raises(ValueError, match=message):
        source.sample(lengths[0])


def test_more_than_was_captured(weights):
    with pytest.raises(ValueError, match="length: got 65; text was captured for at most 64"):
        CapturedText([64], weights=weights).sample(65)
    with pytest.raises(ValueError, match="lengths: got none"):
        Captured([])


@pytest.fixture(scope="module")
def llama(weights):
    return LM.from_pretrained(weights).to_llama()


def test_a_transformers_model_gives_the_same_as_its_twin_of_ours(weights, llama):
    ours, theirs = CapturedText([48], weights=weights).sample(48), CapturedModel(llama, [48]).sample(48)
    for name in "qkvx":
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-4, atol=1e-4)
    assert llama.config._attn_implementation != "saccade_capture"


def test_models_that_cannot_be_captured(llama):
    with pytest.raises(ValueError, match="layer: got 9; the model has layers 0 to 2"):
        capture_attention(llama, torch.zeros(1, 4, dtype=torch.int64), 9)
    with pytest.raises(Unreadable, match="capture: transformers cannot load '/nowhere/at/all'"):
        CapturedModel("/nowhere/at/all", [8]).sample(8)


def test_synthetic_inputs_are_those_of_the_shape():
    sample = Synthetic((2, 4, 2, 64, 8)).sample(36, 2)
    assert (sample.q.shape, sample.k.shape, sample.x.shape) == ((2, 4, 36, 8), (2, 2, 36, 8), (2, 36, 32))
    assert sample.dims.grid == (6, 6)
    assert torch.equal(sample.q, Synthetic((2, 4, 2, 64, 8)).sample(36, 2).q)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 2), "shape: got"), ((1, 3, 2, 4, 8), "num_kv_heads: got 2"), ((1, 2, 2, 0, 8), "shape: got 0")],
)
def test_bad_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        Synthetic(shape)


@pytest.mark.parametrize(("length", "rank"), [(256, 2), (1000, 2), (512, 3), (64, 1), (8192, 2)])
def test_grids_hold_about_as_many_tokens(length, rank):
    grid = grid_of(length, rank)
    assert len(grid) == rank
    assert 0.8 * length <= torch.Size(grid).numel() <= 1.2 * length


def test_likeness_in_a_photograph_is_peaked_and_local():
    sample = Photograph().sample(256)
    weights = (sample.q @ sample.k.mT * sample.dims.head_dim**-0.5).softmax(-1)
    keys = weights.sort(-1, descending=True).values.cumsum(-1).gt(0.5).int().argmax(-1).double() + 1
    assert keys.median() < 64  # far from uniform, where 128 keys hold half of the mass
    assert torch.equal(sample.q, sample.k)
    assert Photograph().sample(512, 3).dims.grid[0] == 4
    assert sample.x.square().mean().sub(1).abs() < 1e-4


def test_a_crop_of_a_grid_is_its_middle():
    whole = Synthetic((1, 1, 1, 1, 4)).sample(64, 2)
    part = whole.crop(16)
    assert part.dims.grid == (4, 4)
    assert torch.equal(part.q.unflatten(2, (4, 4)), whole.q.unflatten(2, (8, 8))[:, :, 2:6, 2:6])
    assert torch.equal(whole.crop(10**6).x, whole.x)


def test_a_width_that_no_heads_fill():
    from dataclasses import replace

    sample = Synthetic((1, 2, 2, 4, 8)).sample(4)
    assert replace(sample, x=torch.zeros(1, 4, 24)).mixer_dims.num_heads == 3
    with pytest.raises(ValueError, match="x: got width 12, which heads of 8 channels do not fill"):
        _ = replace(sample, x=torch.zeros(1, 4, 12)).mixer_dims
