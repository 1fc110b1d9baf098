"""What `distpc compare` runs: variants of one configuration on one budget."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from distpc.config.sources import Section

PLANNED = ("seed", "data", "structure", "compare", "finetune.num_epochs", "finetune.num_samples")
"""Fields and sections that a comparison holds equal, or sets itself; no variant may."""


class Variant(Section):
    """One way of training the same circuit."""

    set: dict[str, Any] = Field(default={})
    """Fields that differ from the run's configuration, such as `finetune.step_size: 0.3`."""
    group: str | None = None
    """Settings of one thing, such as EM with several step sizes: the table has a further row for
    the one that is best on the validation split (the lowest mean over the seeds)."""

    @model_validator(mode="after")
    def _sets_nothing_shared(self) -> Variant:
        for field in self.set:
            parts = field.split(".")
            if {".".join(parts[:size]) for size in range(1, len(parts) + 1)} & set(PLANNED):
                raise ValueError(
                    f"a variant sets {field}: data, structure, seeds and budget are the same for "
                    "all variants of a comparison"
                )
        return self


class CompareConfig(Section):
    """Variants, seeds, sizes and the budget of `distpc compare`."""

    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds of every variant; the table has means and spreads over them."""
    sizes: list[int] = Field(default=[])
    """Values of `size_fields`, for a curve over circuit size; default: the configuration's own."""
    size_fields: list[str] = Field(default=["latents.num_clusters"])
    """Fields that one size stands for."""
    num_visits: int | None = Field(default=None, ge=1)
    """Training samples that every variant passes, those counted in distillation included; default:
    finetune.num_epochs passes."""
    variants: dict[str, Variant] = Field(default={})
    """By name; default: the standard list (tuned EM, random patches, shuffled features, random
    features, the data's own values, and the configured teacher)."""
    only: list[str] = Field(default=[])
    """Names of the variants to run; default: all of them."""
    num_parallel: int | None = Field(default=None, ge=1)
    """Runs at a time; default: as many as the cluster has CPUs (GPUs, where runs use them)."""
