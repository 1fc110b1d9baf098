"""Which worker of a pool takes which item next."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection


class ItemQueue:
    """Items that wait, and which worker takes which.

    A worker takes first the items that it had before (it may have cached what they need), then
    new ones, then the last of the worker with most left. Suspects, over which a worker died, are
    taken by themselves, so that the next death tells which of them is to blame.
    """

    def __init__(self, num_items: int, homes: dict[int, int]) -> None:
        self._new: deque[int] = deque()
        self._own: dict[int, deque[int]] = {}
        self._suspects: deque[int] = deque()
        self._suspected: set[int] = set()
        for index in range(num_items):
            if index in homes:
                self._own.setdefault(homes[index], deque()).append(index)
            else:
                self._new.append(index)

    def __len__(self) -> int:
        """Items that wait."""
        waiting = len(self._new) + len(self._suspects)
        return waiting + sum(len(own) for own in self._own.values())

    def next_for(self, worker: int, held: Collection[int] = ()) -> int | None:
        """Remove and return the index of the next item for `worker`, which holds `held`.

        None when nothing waits, or nothing that goes beside what the worker holds.
        """
        if any(index in self._suspected for index in held):
            return None
        if self._suspects:
            # Whoever holds other items ends them first.
            return None if held else self._suspects.popleft()
        own = self._own.get(worker)
        if own:
            return own.popleft()
        if self._new:
            return self._new.popleft()
        longest = max(self._own.values(), key=len, default=None)
        return longest.pop() if longest else None

    def put_back(self, index: int) -> None:
        """Let an item wait again, as a suspect."""
        self._suspected.add(index)
        self._suspects.append(index)
