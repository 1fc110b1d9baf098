"""distpc: distributed training of probabilistic circuits by latent variable distillation.

`import distpc` is light: torch, ray and deepspeed are imported when something needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distpc.circuits import Circuit
    from distpc.circuits import load_model as load
    from distpc.training.fit import fit

__version__ = "0.1.0"
__all__ = ["Circuit", "__version__", "circuits", "fit", "load", "structures"]

_LAZY = {
    "Circuit": ("distpc.circuits", "Circuit"),
    "load": ("distpc.circuits", "load_model"),
    "fit": ("distpc.training.fit", "fit"),
    "circuits": ("distpc.circuits", None),
    "structures": ("distpc.structures", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'distpc' has no attribute '{name}'")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    return module if attribute is None else getattr(module, attribute)
