"""Settings of progressive growing, a kind of distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from distpc.config.sources import Section

if TYPE_CHECKING:
    from distpc.config.schema import RunConfig


class GrowingConfig(Section):
    """Progressive growing of leaf circuits: the heads of each global cluster are refined where the
    likelihood is worst, and circuits pruned and grown on the way (LVD-PG)."""

    first_heads: int = Field(default=2, ge=1)
    """Leaf densities (heads) of a global cluster at the start, a tree of its own for each."""
    final_heads: int = Field(default=4, ge=1)
    """Leaf densities of a global cluster at the end; latents.num_clusters times this many are the
    values of every patch latent of the final circuit."""
    epochs: int = Field(default=10, ge=1)
    """Passes over a global cluster's patches in every round."""
    batch_size: int = Field(default=256, ge=1)
    """Patches in a batch."""
    step_size: float = Field(default=0.3, gt=0, le=1)
    """First step size of online EM in a round; it falls linearly."""
    prune_threshold: float = Field(default=1e-4, ge=0, lt=1)
    """Edges that a patch uses at most this often are pruned before a circuit grows; 0: those that
    none uses."""
    reluctance_nats: float = Field(default=1.0, ge=0)
    """How much more likely another head must make a patch before the patch changes to it."""
    covered_fraction: float = Field(default=0.4, gt=0, le=1)
    """Share of the patches, those of the heads with the worst likelihoods, that is refined."""
    patches_per_head: int = Field(default=2500, ge=1)
    """Least patches a head of the refined ones, where final_heads is above 5."""
    grown_fraction: float = Field(default=0.2, ge=0, le=1)
    """Least share of hidden states that are cloned, those that the refined heads use most."""
    noise: float = Field(default=0.2, ge=0)
    """Standard deviation of the noise on cloned weights."""
    cross: float = Field(default=0.2, ge=0, le=1)
    """Factor on weights between different copies."""
    cluster_rounds: int = Field(default=15, ge=0)
    """Lloyd rounds in which the patches of refined heads are clustered again, from the centroids
    that they had."""
    top_samples: int | None = Field(default=None, ge=1)
    """Training samples of which the top level sees soft likelihoods; default: all with latents."""
    top_epochs: int = Field(default=5, ge=0)
    """Passes of the top level over them; leaf circuits stay as they are meanwhile."""
    top_batch_size: int = Field(default=256, ge=1)
    """Samples in a batch of the top level."""
    top_step_size: float = Field(default=0.1, gt=0, le=1)
    """First step size of the top level's online EM; it falls linearly."""

    @model_validator(mode="after")
    def _consistent(self) -> GrowingConfig:
        if self.final_heads < self.first_heads:
            raise ValueError(
                f"final_heads {self.final_heads} is below first_heads {self.first_heads}: heads "
                "are only ever added"
            )
        return self


def check_progressive(config: RunConfig) -> None:
    """Refuse what does not go with progressive growing.

    Raises:
        ValueError: naming the field.
    """
    structure, parallel = config.structure, config.parallel
    if (structure.kind, structure.leaf) != ("patches", "hclt"):
        raise ValueError(
            "distill.kind progressive grows leaf circuits: set structure.kind to patches and "
            f"structure.leaf to hclt (they are {structure.kind} and {structure.leaf})"
        )
    for field, wanted in (("leaf_latents", False), ("leaf_tied", False), ("leaf_num_groups", 1)):
        if getattr(structure, field) != wanted:
            raise ValueError(
                f"distill.kind progressive has a body for every cluster: structure.{field} must be "
                f"{wanted}, it is {getattr(structure, field)}"
            )
    if not config.latents.keep_features:
        raise ValueError(
            "distill.kind progressive clusters features again: set latents.keep_features to true"
        )
    if parallel.zero_stage == 3 or parallel.node_parallel > 1:
        raise ValueError(
            "distill.kind progressive prunes edges, which are not shared out over ranks yet: set "
            "parallel.zero_stage to 0, 1 or 2, and parallel.node_parallel to 1"
        )
