"""Where a training stands, beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainingFacts:
    """Where a training stands, beside its parameters: all that a resumed run continues from.

    Attributes:
        step: updates done.
        samples: training samples consumed.
        loader: the loader's state after the last batch (JSON).
        best: step, epoch, bits and impossible samples of the best validation so far.
        sums: of the running epoch: nats, observed values, samples (for the training figure).
        train_bits: bits per dimension of the last whole epoch, each batch before its update.
        impossible: training samples of likelihood 0 met so far.
        reseeded: dead states started again so far.
        valid: the last validation's figures, as `best`.
        curve: [samples consumed, validation bits] of every validation.
    """

    step: int = 0
    samples: int = 0
    loader: dict[str, int] = field(default_factory=dict)
    best: dict[str, float] | None = None
    sums: dict[str, float] = field(default_factory=dict)
    train_bits: float | None = None
    impossible: int = 0
    reseeded: int = 0
    valid: dict[str, float] | None = None
    curve: list[list[float]] = field(default_factory=list)
