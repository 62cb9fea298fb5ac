"""The isotropic host: any size and rank, class token, positions, DiT; parameters counted by hand."""

import pytest
import torch
from torch import nn

from saccade.hosts.block import AdaptiveBlock, AttentionMixer, Block, num_parameters
from saccade.hosts.vit import ToImage, ViT, WavePositions


def block(dims, stage, index):
    return Block(dims, AttentionMixer(nn.functional.scaled_dot_product_attention, dims=dims), mlp_ratio=2)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("size", [(45,), (13, 22), (3, 9, 7)])
def test_any_size_and_rank(size, class_token):
    model = ViT(size, 4, 12, 2, 3, block, class_token=class_token, in_channels=2, num_classes=5)
    x = torch.randn(2, 2, *size)
    cells = torch.Size(-(-n // 4) for n in size).numel()
    assert model.tokens(x).shape == (2, cells + class_token, 12)
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x))


def test_parameters_counted_by_hand():
    one = 2 * 2 * 6 + (6 * 18 + 18) + (6 * 6 + 6) + (6 * 12 + 12) + (12 * 6 + 6)
    rest = (3 * 16 * 6 + 6) + 6 * 6 + (2 * 6 + 6 * 10 + 10)  # patches, positions, head
    assert num_parameters(lambda: ViT((8, 9), 4, 6, 2, 3, block, num_classes=10)) == 2 * one + rest
    with_token = num_parameters(lambda: ViT((8, 9), 4, 6, 2, 3, block, num_classes=10, class_token=True))
    assert with_token == 2 * one + rest + 6


def test_blocks_know_the_grid_unless_a_token_stands_in_front():
    told = []

    def note(dims, stage, index):
        told.append((dims.grid, stage, index))
        return nn.Identity()

    ViT((13, 22), 4, 12, 2, 3, note)
    ViT((13, 22), 4, 12, 1, 3, note, class_token=True)
    assert told == [((4, 6), 0, 0), ((4, 6), 0, 1), (None, 0, 0)]


@torch.no_grad()
def test_the_class_token_is_read():
    model = ViT((8, 8), 4, 12, 1, 3, block, class_token=True, num_classes=5)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(x), model.head[2](model.head[0](model.tokens(x)[:, 0])))


@torch.no_grad()
def test_waves_are_the_formula():
    model = ViT((12, 20), 4, 14, 0, 2, block, positions=WavePositions, head=None).double()
    table = model.positions.table
    for y in range(3):
        for x in range(5):
            row = []
            for c in (y, x):
                angles = torch.tensor([c * 10000 ** (-i / 3) for i in range(3)], dtype=torch.float64)
                row += [*angles.sin(), *angles.cos()]
            torch.testing.assert_close(table[y * 5 + x, :12].float(), torch.stack(row).float())
    assert not table[:, 12:].any()


def test_a_dit_starts_as_its_patches_and_follows_its_condition():
    def dit(dims, stage, index):
        return AdaptiveBlock(
            dims, AttentionMixer(nn.functional.scaled_dot_product_attention, dims=dims), 6, mlp_ratio=2
        )

    def head(dims, channels):
        return ToImage(dims, channels, 4, (13, 22))

    model = ViT((13, 22), 4, 12, 2, 3, dit, positions=WavePositions, head=head, num_classes=3)
    x, c = torch.randn(2, 3, 13, 22), torch.randn(2, 6)
    with torch.no_grad():
        assert model(x, condition=c).shape == x.shape
        assert torch.equal(model(x, condition=c), model(x, condition=-c))  # at first every block is the identity
        for each in model.blocks:
            nn.init.normal_(each.modulation.weight)
        assert not torch.allclose(model(x, condition=c), model(x, condition=-c))
    model(x, condition=c).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ViT((8, 8, 8, 8), 4, 12, 1, 3, block), r"size: got \(8, 8, 8, 8\)"),
        (lambda: ViT((8, 8), 4, 12, 1, 5, block), "heads: got 5 for dim 12"),
        (lambda: ViT((8, 8), 0, 12, 1, 3, block), "patch: got 0"),
        (lambda: ViT((8, 8), 4, 12, 1, 3, block)(torch.ones(1, 3, 8, 9)), r"x: got shape \(1, 3, 8, 9\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
