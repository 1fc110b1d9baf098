import tracemalloc

import numpy as np
import pytest

from distpc.errors import DataError
from distpc.structures.mutual_information import count_pairs, mutual_information


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


class Shards:
    """Batches that are made anew at every walk, and counted."""

    def __init__(self, rows):
        self.rows = rows
        self.walks = 0

    def __iter__(self):
        self.walks += 1
        return (self.rows[start : start + 70] for start in range(0, len(self.rows), 70))


def test_little_memory_takes_more_walks_and_gives_the_same(monkeypatch):
    rng = np.random.default_rng(1)
    rows = rng.integers(-1, 4, (500, 20))
    monkeypatch.setattr("distpc.structures.mutual_information._BLOCK_WIDTH", 16)
    shards = Shards(rows)
    found = mutual_information(shards, [4] * 20, max_bytes=4 * 4 * 16**2)
    assert shards.walks == 4  # 15 blocks of 16 x 16 counts, four at a time
    np.testing.assert_array_equal(found, mutual_information(rows, [4] * 20))
    with pytest.raises(DataError, match="an iterator allows one"):
        mutual_information(iter(shards), [4] * 20, max_bytes=4 * 4 * 16**2)


def test_memory_does_not_grow_with_the_rows():
    def peak(num_batches):
        rng = np.random.default_rng(0)
        tracemalloc.start()
        mutual_information((rng.integers(0, 2, (2048, 30)) for _ in range(num_batches)), [2] * 30)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(40) < 1.02 * peak(8)


def test_a_table_that_never_fits_is_refused():
    with pytest.raises(DataError) as caught:
        mutual_information(np.zeros((3, 2), dtype=int), [50_000, 50_000])
    assert "bins" in caught.value.fix


def test_counts_of_pairs():
    rows = np.array([[0, 1, 1], [1, 1, -1], [0, 0, 2]])
    tables = count_pairs([rows, rows[:1]], [2, 2, 3], [(0, 1), (2, 0), (1, 1)])
    assert [table.tolist() for table in tables] == [
        [[1, 2], [0, 1]],
        [[0, 0], [2, 0], [1, 0]],
        [[1, 0], [0, 3]],
    ]


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
    with pytest.raises(DataError, match="not one of its variable's") as caught:
        mutual_information(np.array([[0, 3]]), [2, 3])
    assert caught.value.where == "rows, variable 1"
    with pytest.raises(DataError, match="another shape"):
        mutual_information(np.zeros((2, 3), dtype=int), [2, 3])
