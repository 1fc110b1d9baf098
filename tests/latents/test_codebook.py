"""Codebooks: their file, what it refuses, and which latents they give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distpc.errors import LatentError
from distpc.latents.codebook import Codebook, read_codebook, write_codebook
from distpc.latents.principal import Projection

MARKS = {"fingerprint": "f", "features": "abc"}


def some_features(num_samples=50, num_latents=3, width=4):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(num_samples, num_latents, width))).half()


def nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(P, d) points against (K, d) centroids, every distance written out in float64."""
    return np.square(points[:, None] - centroids).sum(-1).argmin(-1)


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_latents_are_the_nearest_centroids(tmp_path, per_position, projected):
    rng = np.random.default_rng(1)
    rows = some_features()
    lead = (3, 6) if per_position else (6,)
    width = 2 if projected else 4
    centroids = torch.from_numpy(rng.normal(size=(*lead, width))).float()
    basis = torch.from_numpy(rng.normal(size=(4, 2))).float()
    projection = Projection(torch.ones(4), basis) if projected else None
    path = tmp_path / "centroids.safetensors"
    write_codebook(path, Codebook(centroids, projection), MARKS)
    codebook = read_codebook(path, features="abc", shape=(3, 4))
    assert codebook.num_clusters == 6
    latents, distances = codebook.assign(rows)
    points = rows.double().numpy()
    if projected:
        points = ((points - 1) @ basis.double().numpy()).astype(np.float16).astype(np.float64)
    for position in range(3):
        own = centroids[position] if per_position else centroids
        wanted = nearest(points[:, position], own.double().numpy())
        np.testing.assert_array_equal(latents[:, position], wanted)
        squares = np.square(points[:, position] - own.numpy()[wanted]).sum(-1)
        np.testing.assert_allclose(distances[:, position], squares, rtol=0.01)
    assert latents.dtype == torch.int32


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "centroids.safetensors"
    write_codebook(path, Codebook(torch.ones(5, 3)), MARKS)
    read_codebook(path, features="abc", shape=(7, 3))
    with pytest.raises(LatentError, match="another width"):
        read_codebook(path, features="abc", shape=(7, 4))
    with pytest.raises(LatentError, match="other features"):
        read_codebook(path, features="xyz", shape=(7, 3))
    write_codebook(path, Codebook(torch.ones(6, 5, 3)), MARKS)
    with pytest.raises(LatentError, match="other positions"):
        read_codebook(path, features="abc", shape=(7, 3))
    projection = Projection(torch.zeros(8), torch.ones(8, 3))
    write_codebook(path, Codebook(torch.ones(5, 3), projection), MARKS)
    with pytest.raises(LatentError, match="another width") as caught:
        read_codebook(path, features="abc", shape=(7, 3))
    assert "for 8 columns" in caught.value.found
    write_codebook(path, Codebook(torch.full((2, 3), torch.nan)), MARKS)
    with pytest.raises(LatentError, match="not finite"):
        read_codebook(path, features="abc", shape=(7, 3))
