"""Settings of the stage `distill`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distpc.config.growing import GrowingConfig
from distpc.config.sources import Section


class DistillConfig(Section):
    """Training on data and latents together."""

    kind: Literal["plain", "progressive"] = "plain"
    """plain: every cluster is a leaf density, all trained at once; progressive: clusters are split
    further where the likelihood is worst, and leaf circuits grow with them (LVD-PG). Progressive
    goes with structure.leaf hclt, whose final circuits and number of clusters are its own."""
    growing: GrowingConfig = GrowingConfig()
    """Settings of kind progressive."""
    emission_noise: float = Field(default=0.1, ge=0, le=1)
    """Share of a random row mixed into counted leaf rows; 1: random rows alone, a control."""
    transition_noise: float = Field(default=0.04, ge=0, le=1)
    """Share of a random row mixed into counted transition rows; 1: random rows alone, a control."""
    pseudocount: float = Field(default=0.01, ge=0)
    """Samples' worth of smoothing a row."""
    leaf_epochs: int = Field(default=20, ge=1)
    """Passes over a piece's patches (leaf hclt)."""
    leaf_batch_size: int = Field(default=2048, ge=1)
    """Patches in a batch (leaf hclt)."""
    leaf_step_size: float = Field(default=0.5, gt=0, le=1)
    """First step size of online EM in a piece; it falls linearly (leaf hclt)."""
    inner_pixel: float = Field(default=0.5, ge=0)
    """Weight of a pixel's other channels in the clusters that supervise the states inside of
    leaves, against 1 of a variable's own value (structure.leaf_latents)."""
    inner_near: float = Field(default=0.5, ge=0)
    """Weight there of the mean of the 3 x 3 pixels about a variable, of each channel."""
