"""What an integral circuit's networks look like, and what they are trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from distpc.circuits.integral.quadrature import RULES
from distpc.errors import ConfigError

SUM_SHARING = ("heads", "full")
LEAF_SHARING = ("full", "heads")


@dataclass(frozen=True)
class IntegralSettings:
    """Networks, quadrature and training of an integral circuit.

    Attributes:
        rule: of quadrature, see `quadrature.RULES`.
        width: H, units of a hidden layer.
        num_layers: hidden layers of the trunk of sums; inputs' have one.
        num_frequencies: random frequencies, two Fourier features each.
        frequency_scale: standard deviation of the frequencies, in cycles per unit of the latent.
        sum_sharing: "heads": sums of one kind share the trunk and have heads of their own
            (composite sharing, C in the paper); "full": they share the function (F).
        leaf_sharing: the same of inputs, which "full" ties to each other.
        leaf_floor: share of a uniform distribution in every unit over categories, in (0, 1).
        train_states: K of training steps, one of them drawn for each; empty: the graph's own.
        jitter: how far quadrature points move in their cells in training, in [0, 1].
        block_points: most points at which a trunk is evaluated at once, to bound memory.
    """

    rule: str = "trapezoid"
    width: int = 128
    num_layers: int = 2
    num_frequencies: int = 64
    frequency_scale: float = 1.0
    sum_sharing: str = "heads"
    leaf_sharing: str = "full"
    leaf_floor: float = 1e-4
    train_states: tuple[int, ...] = ()
    jitter: float = 1.0
    block_points: int = 16384

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_states", tuple(self.train_states))
        sizes = ("width", "num_layers", "num_frequencies", "block_points")
        for name, is_right, expected in (
            ("rule", self.rule in RULES, ", ".join(RULES)),
            *((name, getattr(self, name) >= 1, "1 or more") for name in sizes),
            ("frequency_scale", self.frequency_scale > 0, "above 0"),
            ("sum_sharing", self.sum_sharing in SUM_SHARING, ", ".join(SUM_SHARING)),
            ("leaf_sharing", self.leaf_sharing in LEAF_SHARING, ", ".join(LEAF_SHARING)),
            ("leaf_floor", 0 < self.leaf_floor < 1, "between 0 and 1"),
            ("train_states", all(k >= 2 for k in self.train_states), "2 states or more"),
            ("jitter", 0 <= self.jitter <= 1, "0 to 1"),
        ):
            if not is_right:
                raise ConfigError(
                    "a setting of an integral circuit is out of its range",
                    where=name,
                    found=getattr(self, name),
                    expected=expected,
                )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "train_states": list(self.train_states)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> IntegralSettings:
        """The inverse of `to_json`; fields of newer versions are an error."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}")
        return cls(**values)
