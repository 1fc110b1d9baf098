import itertools

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree

from distpc.errors import DataError, StructureError
from distpc.structures import ChowLiuModel, chow_liu_tree
from distpc.structures.chow_liu import maximum_spanning_tree


def test_weight_is_that_of_another_algorithm():
    rng = np.random.default_rng(0)
    weights = rng.random((60, 60))
    weights = weights + weights.T
    tree = maximum_spanning_tree(weights)
    total = sum(weights[one, other] for one, other in tree.edges().tolist())
    assert total == pytest.approx(-minimum_spanning_tree(-weights).sum())


def test_ties_are_broken_the_same_way():
    tree = maximum_spanning_tree(np.ones((5, 5)))
    assert tree == maximum_spanning_tree(np.ones((5, 5)))
    assert tree.root == 0


def test_the_chain_that_made_the_data_is_found():
    rng = np.random.default_rng(3)
    rows = np.zeros((4000, 6), dtype=np.int64)
    rows[:, 0] = rng.integers(0, 3, 4000)
    for column in range(1, 6):
        flip = rng.random(4000) < 0.3
        rows[:, column] = np.where(flip, rng.integers(0, 3, 4000), rows[:, column - 1])
    rows[rng.random(rows.shape) < 0.1] = -1
    edges = {tuple(sorted(edge)) for edge in chow_liu_tree(rows, [3] * 6).edges().tolist()}
    assert edges == {(column, column + 1) for column in range(5)}


def test_probabilities_sum_to_one():
    rows = np.random.default_rng(0).integers(0, 2, (50, 3)) * [1, 1, 2]
    model = ChowLiuModel.fit(rows, [2, 2, 3])
    worlds = np.array(list(itertools.product(range(2), range(2), range(3))))
    assert np.exp(model.log_prob(worlds)).sum() == pytest.approx(1.0)


def test_missing_values_and_batches():
    rng = np.random.default_rng(1)
    rows = rng.integers(-1, 3, (300, 5))
    whole = ChowLiuModel.fit(rows, [3] * 5)
    parts = ChowLiuModel.fit([rows[:100], rows[100:]], [3] * 5)
    assert whole.tree == parts.tree
    np.testing.assert_array_equal(whole.root_log_prob, parts.root_log_prob)
    root = rows[:, whole.tree.root]
    counts = np.bincount(root[root >= 0], minlength=3) + 3.0
    np.testing.assert_allclose(np.exp(whole.root_log_prob), counts / counts.sum())


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(DataError):
        ChowLiuModel.fit(np.zeros((0, 2), dtype=int), [2, 2])
    with pytest.raises(StructureError) as caught:
        maximum_spanning_tree(np.full((2, 2), np.nan))
    assert caught.value.where == "weights"
