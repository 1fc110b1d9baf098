"""Circuits: compile a region graph, evaluate, differentiate, query and save it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit
    from distpc.circuits.io import load_model, save_model

__all__ = ["Circuit", "load_model", "save_model"]


def __getattr__(name: str) -> Any:
    # torch is imported when a name is used, so that listing this package stays cheap.
    if name == "Circuit":
        from distpc.circuits import circuit

        return circuit.Circuit
    if name in ("load_model", "save_model"):
        from distpc.circuits import io

        return getattr(io, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
