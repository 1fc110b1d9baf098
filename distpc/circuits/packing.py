"""Packs the tables of input regions into parameters of bounded size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

Table = Hashable


def pack_tables(
    rows: Sequence[Sequence[Table]],
    key_of: Callable[[Table], Hashable],
    bytes_of: Callable[[Table], int],
    max_bytes: int,
) -> tuple[list[int], list[list[Table]]]:
    """Assign tables to banks, so that all tables of a row are in one bank.

    Args:
        rows: the tables that each row reads (their keys agree).
        key_of: tables of different keys never share a bank.
        bytes_of: size of a table.
        max_bytes: bound on a bank; only tables that rows chain together may exceed it.

    Returns:
        The bank of each row, and the tables of each bank.
    """
    leader: dict[Table, Table] = {table: table for row in rows for table in row}
    for row in rows:
        for table in row[1:]:
            leader[_find(leader, table)] = _find(leader, row[0])
    components: dict[Table, dict[Table, None]] = defaultdict(dict)
    for row in rows:
        components[_find(leader, row[0])].update(dict.fromkeys(row))
    banks: list[list[Table]] = []
    bank_of: dict[Table, int] = {}
    open_bank: dict[Hashable, tuple[int, int]] = {}
    for name, component in components.items():
        size = sum(map(bytes_of, component))
        key = key_of(next(iter(component)))
        number, filled = open_bank.get(key, (-1, max_bytes))
        if filled + size > max_bytes:
            number, filled = len(banks), 0
            banks.append([])
        banks[number] += component
        open_bank[key] = (number, filled + size)
        bank_of[name] = number
    return [bank_of[_find(leader, row[0])] for row in rows], banks


def _find(leader: dict[Table, Table], table: Table) -> Table:
    while leader[table] != table:
        leader[table] = leader[leader[table]]
        table = leader[table]
    return table
