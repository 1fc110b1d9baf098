"""Where to cut a schedule whose messages the backward pass computes again, see `recompute`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_MOST = 64


def stretches(
    kept: Sequence[int], messages: Sequence[int], readers: Sequence[Sequence[int]]
) -> tuple[range, ...]:
    """The cut for which the bytes kept, and computed again at a time, are least.

    Args:
        kept: for each step the bytes that its forward pass leaves for its backward pass.
        messages: bytes of what each step yields.
        readers: steps that read it.
    """

    def held(cut: Sequence[range]) -> int:
        inner = max(sum(kept[number] for number in numbers) for numbers in cut)
        return inner + between(messages, readers, cut)

    tried = (tuple(_cut(kept, sum(kept) / parts)) for parts in range(1, _MOST + 1))
    return min(tried, key=held)


def between(messages: Sequence[int], readers: Sequence[Sequence[int]], cut: Sequence[range]) -> int:
    """Bytes of the messages that pass from a stretch to another, which are kept."""
    home = {number: place for place, numbers in enumerate(cut) for number in numbers}
    return sum(
        size
        for number, size in enumerate(messages)
        if any(home[reader] != home[number] for reader in readers[number])
    )


def _cut(kept: Sequence[int], most: float) -> Iterator[range]:
    """Stretches of at most that many bytes, or of one step."""
    first, held = 0, 0
    for number, size in enumerate(kept):
        if held + size > most and number > first:
            yield range(first, number)
            first, held = number, 0
        held += size
    yield range(first, len(kept))
