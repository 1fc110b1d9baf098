import numpy as np
import pytest

from distpc.structures.mutual_information import mutual_information


def by_hand(first, second, sizes, pseudocount):
    table = np.full(sizes, float(pseudocount))
    for a, b in zip(first, second, strict=True):
        if a >= 0 and b >= 0:
            table[a, b] += 1
    table /= table.sum()
    rows, columns = table.sum(1, keepdims=True), table.sum(0, keepdims=True)
    known = table > 0
    return (table[known] * np.log(table[known] / (rows * columns)[known])).sum()


@pytest.mark.parametrize("num_values", [[2, 5, 3, 4, 2], [2, 40, 3, 150, 7]])
@pytest.mark.parametrize("pseudocount", [0.0, 0.1])
def test_equals_a_loop_over_cells(num_values, pseudocount):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(-1, size, 300) for size in num_values], axis=1)
    rows[:, 2] = np.where(rng.random(300) < 0.7, rows[:, 1] % 3, rows[:, 2])
    found = mutual_information(rows, num_values, pseudocount=pseudocount)
    for i in range(5):
        for j in range(5):
            sizes = num_values[i], num_values[j]
            expected = 0 if i == j else by_hand(rows[:, i], rows[:, j], sizes, pseudocount)
            assert found[i, j] == pytest.approx(expected, abs=1e-12)
    batches = (rows[start : start + 70] for start in range(0, 300, 70))
    np.testing.assert_array_equal(
        mutual_information(batches, num_values, pseudocount=pseudocount), found
    )


def test_many_blocks_agree_with_few(monkeypatch):
    rng = np.random.default_rng(2)
    rows = rng.integers(-1, 6, (500, 30))
    few = mutual_information(rows, [6] * 30)
    monkeypatch.setattr("distpc.structures.mutual_information._BLOCK_WIDTH", 20)
    monkeypatch.setattr("distpc.structures.mutual_information._BLOCK_SAMPLES", 64)
    np.testing.assert_allclose(mutual_information(rows, [6] * 30), few, atol=1e-12)


def test_pairs_that_were_never_seen_together_have_none():
    rows = np.array([[0, -1], [1, -1], [-1, 1]])
    assert mutual_information(rows, [2, 2], pseudocount=0.0).tolist() == [[0, 0], [0, 0]]


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError):
        mutual_information(np.array([[0, 3]]), [2, 3])
