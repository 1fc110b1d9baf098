"""The mathematics of one Lloyd round, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distpc.latents import nearest
from distpc.latents.kmeans import (
    distinct_hashes,
    farthest,
    grid_bits,
    refill,
    squares_of,
    totals_of,
)
from distpc.latents.nearest import assign_points


def blobs(num_points: int, num_blobs: int, width: int, seed: int, offset: float = 0.0):
    """float16 points around well separated centres, and the centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_blobs, width)) * 10 + offset
    points = centres[rng.integers(num_blobs, size=num_points)]
    points = points + rng.normal(size=points.shape) * 0.1
    return torch.from_numpy(points.astype(np.float16)), centres


def exact_round(points: np.ndarray, centroids: np.ndarray):
    """One Lloyd round in float64 with every distance written out."""
    squares = np.square(points[:, None] - centroids[None]).sum(-1)
    labels = squares.argmin(1)
    sums = np.stack([points[labels == k].sum(0) for k in range(len(centroids))])
    return labels, squares.min(1), sums, np.bincount(labels, minlength=len(centroids))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_statistics_agree_with_float64(monkeypatch, offset, fused):
    if fused:
        assert nearest._has_onednn()
    else:
        monkeypatch.setattr(nearest, "_has_onednn", lambda: False)
    monkeypatch.setattr(nearest, "CHUNK_ROWS", 100)
    monkeypatch.setattr(nearest, "BLOCK_ROWS", 64)
    monkeypatch.setattr(nearest, "TILE_COLUMNS", 4)
    rng = np.random.default_rng(0)
    points = torch.from_numpy((rng.normal(size=(1000, 7)) + offset).astype(np.float16))
    centroids = points[rng.choice(1000, size=9, replace=False)].float()
    labels, squares, sums, counts = exact_round(points.double().numpy(), centroids.double().numpy())

    found = totals_of(points, centroids, grid_bits(1000, 510.0))
    found_labels, found_squares = assign_points(points, centroids)
    inertia = squares_of(points) + found.reduction(centroids.numpy())
    assert inertia == pytest.approx(found_squares.double().sum().item(), rel=1e-5)

    agree = found_labels.numpy() == labels
    # Rounded float16 points may lie between two centroids to within float32's precision.
    assert agree.mean() > (0.999 if offset == 0 else 0.99)
    np.testing.assert_allclose(found_squares.numpy()[agree], squares[agree], rtol=1e-5)
    if agree.all():
        np.testing.assert_allclose(found.sums, sums, rtol=1e-12)
        np.testing.assert_array_equal(found.counts, counts)
    order = np.argsort(-found_squares.numpy(), kind="stable")[:9]
    np.testing.assert_array_equal(farthest(found_squares, 9), order)


def test_whole_runs_agree_with_float64():
    points, _ = blobs(3000, 6, 4, seed=3)
    exact = points[:6].double().numpy()
    centroids = points[:6].float()
    for _ in range(10):
        _, _, sums, counts = exact_round(points.double().numpy(), exact)
        if not counts.all():
            pytest.fail("this case is meant to have no empty cluster")
        exact = sums / counts[:, None]
        total = totals_of(points, centroids, 24)
        centroids = torch.from_numpy(total.means(centroids.numpy()))
    np.testing.assert_allclose(centroids.numpy(), exact, atol=1e-5)


@pytest.mark.parametrize("largest", [3.0, 60_000.0])
def test_sums_have_no_order(largest):
    """Any shards in any order add up to the same bits, however large the values."""
    rng = np.random.default_rng(1)
    points = torch.from_numpy((rng.normal(size=(4000, 3)) * largest / 5).astype(np.float16))
    points[::7] *= 1e-4
    centroids = points[:2].float()
    # As if there were 25 million of them: where values are large, they are rounded.
    bits = grid_bits(25_000_000, float(points.abs().max()))
    assert (bits < 24) == (largest > 100)
    parts = [totals_of(part, centroids, bits) for part in points.split(250)]
    forwards, backwards = parts[0], parts[-1]
    for part in parts[1:]:
        forwards = forwards + part
    for part in parts[-2::-1]:
        backwards = part + backwards
    whole = totals_of(points, centroids, bits)
    for other in (backwards, whole):
        np.testing.assert_array_equal(other.sums, forwards.sums)
        np.testing.assert_array_equal(other.counts, forwards.counts)
    exact = points.double().numpy()
    assert np.abs(whole.sums.sum(0) - exact.sum(0)).max() <= 4000 * 2.0**-bits


def round_of(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The next centroids, empty clusters refilled."""
    total = totals_of(points, centroids, 24)
    _, distances = assign_points(points, centroids)
    means = total.means(centroids.numpy())
    empty = np.flatnonzero(total.counts == 0)
    rows = torch.from_numpy(farthest(distances, len(centroids)))
    moved, count = refill(means, empty, distances[rows].numpy(), points[rows].float().numpy())
    return torch.from_numpy(moved), count


def test_empty_clusters_move_to_different_far_points():
    centroids = torch.tensor([[0.0], [100.0], [101.0], [102.0]])
    # Two equal outliers and one on the other side: a second copy would be wasted.
    points = torch.tensor([[0.0], [0.1], [-0.1], [9.0], [9.0], [-5.0]])
    moved, refilled = round_of(points, centroids)
    assert refilled == 3
    assert moved[1].item() == 9.0
    assert moved[2].item() == -5.0
    assert moved[0].item() == pytest.approx(13 / 6)
    assert moved[3].item() in (pytest.approx(0.1, abs=1e-3), pytest.approx(-0.1, abs=1e-3))


def test_clusters_stay_where_no_point_is_left():
    centroids = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    moved, refilled = round_of(torch.ones(4, 2), centroids)
    assert refilled == 0
    assert torch.equal(moved, centroids)


def test_equal_centroids_and_points_on_centroids():
    centroids = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    points = torch.tensor([[0.5, 0.0], [2.0, 0.0], [0.0, 0.0]], dtype=torch.float16)
    labels, distances = assign_points(points, centroids)
    assert labels.tolist() == [0, 1, 0]
    assert distances.tolist() == [0.25, 0.0, 0.0]


def test_tiles_of_centroids_find_the_same(monkeypatch):
    points, _ = blobs(500, 6, 4, seed=1)
    centroids = points[:37].float()
    labels, distances = assign_points(points, centroids)
    monkeypatch.setattr(nearest, "TILE_COLUMNS", 8)
    again, same = assign_points(points, centroids)
    # Products of other shapes round otherwise, so that of nearly equal ones another may win.
    np.testing.assert_allclose(same, distances, rtol=1e-4, atol=1e-5)
    assert (labels == again).double().mean() > 0.98
    assert labels.max() > 32


def test_distinct_points_are_counted():
    points = torch.tensor([[1.0, 2], [2, 1], [1, 2], [-0.0, 3], [0.0, 3], [3, 0], [2, 1]]).half()
    assert len(distinct_hashes(points, 10)) == 4
    assert len(distinct_hashes(points, 2)) == 2
    others = torch.tensor([[2.0, 1], [9, 9]]).half()
    union = np.union1d(distinct_hashes(points, 10), distinct_hashes(others, 10))
    assert len(union) == 5
    values = torch.arange(50_000).view(-1, 1).expand(-1, 2) % torch.tensor([239, 241])
    assert len(distinct_hashes(values.half(), 50_000)) == 50_000
