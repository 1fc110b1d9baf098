"""Types of the commands' arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

Commands = argparse._SubParsersAction


def path(text: str) -> Path | str:
    """A path, or a URL as it is."""
    return text if "://" in text else Path(text)


def count(text: str) -> int:
    """A whole number above 0."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"at least 1, found {text}")
    return count


def amount(text: str) -> float:
    """A finite number above 0."""
    amount = float(text)
    if not 0 < amount < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0, found {text}")
    return amount


def seed(text: str) -> int:
    """A seed: 0 .. 2**63 - 1."""
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"a seed is 0 .. 2**63 - 1, found {text}")
    return seed
