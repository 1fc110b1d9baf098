"""Principal components and whitening, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distpc.errors import LatentError
from distpc.latents.principal import fit_projection, moments_of


def correlated(num_points=4000, offset=3.0):
    """(P, 4) float16 points that vary in three directions only, and a constant column."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(num_points, 3)) * [5.0, 2.0, 0.5]
    mixed = values @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return torch.from_numpy(np.c_[mixed, np.zeros(num_points)] + offset).half()


def moments(points: torch.Tensor, num_shards: int):
    parts = [moments_of(part) for part in points.chunk(num_shards)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def test_components_have_the_largest_variances():
    points = correlated()
    projection = fit_projection(moments(points, 5), None, False, "here")
    found = projection(points).double().numpy()
    covariance = np.cov(points.double().numpy(), rowvar=False)
    variances = np.linalg.eigvalsh(covariance)[::-1]
    # The constant column is no direction.
    assert found.shape == (4000, 3)
    np.testing.assert_allclose(found.var(0), variances[:3], rtol=5e-3)
    np.testing.assert_allclose(found.mean(0), 0, atol=5e-3)
    two = fit_projection(moments(points, 5), 2, False, "here")
    assert torch.equal(two.basis, projection.basis[:, :2])


def test_whitened_points_have_unit_covariance():
    points = correlated()
    whitened = fit_projection(moments(points, 3), None, True, "here")(points).double().numpy()
    np.testing.assert_allclose(np.cov(whitened, rowvar=False), np.eye(3), atol=0.01)


def test_threads_change_no_bit_of_the_moments():
    points = torch.randn(3000, 96).half()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(moments_of(points))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0].products, found[1].products)
    np.testing.assert_array_equal(found[0].sums, found[1].sums)


def test_features_without_variance_are_refused():
    for value in (0.0, 300.0, 0.1):
        constant = torch.full((1000, 5), value).half()
        with pytest.raises(LatentError, match="do not vary"):
            fit_projection(moments(constant, 3), None, True, "here")
    with pytest.raises(LatentError, match="fewer directions") as caught:
        fit_projection(moments(correlated(), 2), 4, True, "here")
    assert caught.value.fix == "set latents.projection_width=3"
