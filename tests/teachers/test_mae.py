"""The masked autoencoder: what it sees, what it predicts, and that encoding needs no more
memory for more images."""

from __future__ import annotations

import pytest
import torch

from distpc.data.spec import DatasetSpec
from distpc.teachers import mae
from distpc.teachers.mae import MaskedAutoencoder, draw_visible
from distpc.teachers.transformer import Block, grid_positions, grid_rotations

SPEC = DatasetSpec("grey", "image", 64, (17,) * 64, image_shape=(8, 8, 1))


def _model(neighbourhood: int = 1) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(
        SPEC,
        2,
        width=16,
        num_heads=2,
        encoder_blocks=2,
        decoder_blocks=1,
        feature_width=4,
        neighbourhood=neighbourhood,
    )


def _images(num: int) -> torch.Tensor:
    return torch.randint(0, 17, (num, 64), generator=torch.Generator().manual_seed(1))


def test_hidden_patches_do_not_leak_into_the_reconstruction() -> None:
    model = _model()
    values = model.patches(_images(3))
    visible = draw_visible(3, 16, 0.5, torch.Generator().manual_seed(0))
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter(1, visible, False)
    other = torch.where(hidden[:, :, None], 1 - values, values)
    assert torch.equal(model.reconstruct(values, visible), model.reconstruct(other, visible))
    seen = torch.where(hidden[:, :, None], values, 1 - values)
    assert not torch.allclose(model.reconstruct(values, visible), model.reconstruct(seen, visible))


def test_order_of_visible_patches_does_not_matter() -> None:
    model = _model()
    values = model.patches(_images(2))
    visible = torch.tensor([[3, 7, 1], [0, 15, 8]])
    forward = model.reconstruct(values, visible)
    assert torch.allclose(forward, model.reconstruct(values, visible.flip(1)), atol=1e-5)


def test_error_is_over_all_values_of_each_image() -> None:
    model = _model()
    x = _images(2)
    visible = torch.tensor([[0, 1], [2, 3]])
    values = model.patches(x)
    difference = (model.reconstruct(values, visible) - values).reshape(2, -1)
    assert torch.allclose(model(x, visible)[:, 0], difference.square().mean(dim=1))


def test_encoding_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(neighbourhood=3)
    whole = model.encode(_images(9))
    monkeypatch.setattr(mae, "_CHUNK_FLOATS", 5 * 9 * 16)
    assert torch.allclose(whole, model.encode(_images(9)), atol=1e-6)


def test_encoding_equals_the_encoder_on_the_neighbourhood_alone() -> None:
    model = _model(neighbourhood=3)
    x = _images(2)
    tokens = model.embed(model.patches(x) - 0.5)
    features = model.encode(x)
    for patch, around in ((0, [0, 1, 4, 5]), (6, [6, 1, 2, 3, 5, 7, 9, 10, 11])):
        alone = tokens[:, around]
        for block in model.encoder:
            alone = block(alone, model.rotations[torch.tensor(around)].expand(2, -1, -1, -1))
        expected = model.to_feature(model.encoder_norm(alone))[:, 0]
        assert torch.allclose(features[:, patch], expected, atol=1e-5)


@pytest.mark.parametrize(("ratio", "visible"), [(0.0, 16), (0.5, 8), (0.9, 2), (0.99, 1)])
def test_visible_patches_are_distinct_and_as_many_as_asked(ratio: float, visible: int) -> None:
    drawn = draw_visible(50, 16, ratio, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, visible)
    assert all(len(set(row)) == visible for row in drawn.tolist())
    if visible < 16:
        assert len({tuple(sorted(row)) for row in drawn.tolist()}) > 1
    assert drawn.unique().numel() == 16


def test_absent_tokens_are_not_attended_to() -> None:
    torch.manual_seed(0)
    block = Block(8, 2)
    tokens = torch.randn(2, 5, 8)
    present = torch.tensor([[True, True, True, False, False]] * 2)
    seen = block(tokens, present=present)[:, :3]
    assert torch.allclose(seen, block(tokens[:, :3]), atol=1e-6)


def test_a_token_alone_is_mixed_with_nothing() -> None:
    torch.manual_seed(0)
    block = Block(8, 2)
    tokens = torch.randn(3, 4, 8)
    only_first = torch.tensor([[True, False, False, False]] * 3)
    assert torch.allclose(block(tokens, present=only_first)[:, :1], block(tokens[:, :1]), atol=1e-6)


@pytest.mark.parametrize("width", [8, 10, 64])
def test_positions_tell_all_patches_apart(width: int) -> None:
    positions = grid_positions(7, 5, width)
    assert positions.shape == (35, width)
    assert torch.pdist(positions).min() > 0.01


@pytest.mark.parametrize(("width", "num_heads"), [(16, 2), (10, 2), (14, 2), (8, 2)])
def test_attention_knows_relative_positions_only(width: int, num_heads: int) -> None:
    torch.manual_seed(0)
    block = Block(width, num_heads)
    rotations = grid_rotations(6, 5, width // num_heads)
    tokens = torch.randn(1, 3, width)
    at = [torch.tensor([[0, 1, 7]]), torch.tensor([[12, 13, 19]]), torch.tensor([[0, 1, 5]])]
    first, moved, other = (block(tokens, rotations[places]) for places in at)
    assert torch.allclose(first, moved, atol=1e-5)
    assert not torch.allclose(first, other, atol=1e-5)


def test_equal_patches_have_equal_features_wherever_they_lie() -> None:
    x = torch.arange(4).repeat(1, 16)
    model = _model()
    x[0, torch.from_numpy(model.grid.variables())] = torch.tensor([3, 9, 16, 0])
    features = model.encode(x)
    assert torch.allclose(features, features[:, :1].expand_as(features), atol=1e-5)
