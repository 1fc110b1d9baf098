import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree

from distpc.structures import ChowLiuModel, chow_liu_tree
from distpc.structures.chow_liu import maximum_spanning_tree

FOLDERS = [parent / "shared" / "data" / "debd" for parent in Path(__file__).parents[2:]]
DEBD = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])


def read(name, split):
    with gzip.open(DEBD / f"{name}.{split}.data.gz", "rt") as handle:
        return np.loadtxt(handle, delimiter=",", dtype=np.int64)


@pytest.mark.skipif(not DEBD.is_dir(), reason="the binary data sets are not beside the checkout")
@pytest.mark.parametrize(
    "name, expected", [("nltcs", -6.7590), ("plants", -16.5240), ("bnetflix", -60.2503)]
)
def test_published_likelihoods(name, expected):
    train = read(name, "train")
    model = ChowLiuModel.fit(train, [2] * train.shape[1], pseudocount=1.0)
    assert model.log_prob(read(name, "test")).mean() == pytest.approx(expected, abs=1e-3)


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
