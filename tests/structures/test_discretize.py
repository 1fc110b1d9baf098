import numpy as np

from distpc.structures.discretize import Bins, discretize, frequency_edges


def test_few_values_stay_and_missing_is_kept():
    x = np.array([[0, 200], [3, -1], [-1, 7]])
    rows, num_values = discretize(x, [4, 256], 4)
    assert rows[:, 0].tolist() == [0, 3, -1]
    assert num_values.tolist() == [4, 4]
    assert rows[1, 1] == -1
    assert rows[0, 1] > rows[2, 1] >= 0


def test_a_frequent_value_takes_one_bin_and_frees_the_others():
    rng = np.random.default_rng(0)
    values = np.concatenate([np.zeros(5000, dtype=int), rng.integers(1, 256, 5000)])
    edges = frequency_edges(values, 11)
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=11)
    assert counts[0] == 5000
    assert len(counts) == 11
    assert counts[1:].min() > 400
    assert counts[1:].max() < 600


def test_real_columns_by_range_and_frequency():
    x = np.array([[0.0], [1.0], [2.0], [np.nan], [30.0]])
    by_range, sizes = discretize(x, [None], 3, binning="range")
    assert by_range[:, 0].tolist() == [0, 0, 0, -1, 2]
    assert sizes.tolist() == [3]
    by_frequency, _ = discretize(x, [None], 2)
    assert by_frequency[:, 0].tolist() == [0, 0, 1, -1, 1]


def test_float_categories_and_empty_columns():
    rows, _ = discretize(np.array([[1.0, np.nan], [np.nan, np.nan]]), [2, None], 4)
    assert rows.tolist() == [[1, -1], [-1, -1]]


def test_bins_of_a_sample_apply_to_a_stream_again_and_again():
    rng = np.random.default_rng(0)
    x = np.stack([rng.integers(-1, 200, 900), rng.integers(-1, 3, 900)], axis=1)
    rows, num_values = discretize(x, [200, 3], 8)
    bins = Bins.of(x, [200, 3], 8)
    stream = bins.stream([x[:400], x[400:]])
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(stream)), rows)
    assert bins.num_values.tolist() == num_values.tolist() == [8, 3]
