"""Networks that write the circuit's weights: probabilistic integral circuits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distpc.config.sources import Section

States = Annotated[int, Field(ge=2)]


class IntegralConfig(Section):
    """Integral circuits: latents are continuous on [-1, 1], and light networks, functions of them,
    write the weights of sums and inputs. `structure` says which regions there are, num_states how
    many quadrature points stand for a latent in the model of the run; `distpc materialise` makes
    others. Goes with finetune.rule adam, whose step size is the networks' learning rate."""

    enabled: bool = False
    """Train such networks instead of the circuit's own parameters."""
    rule: Literal["trapezoid", "gauss_legendre"] = "trapezoid"
    """Quadrature of every latent."""
    width: int = Field(default=128, ge=1)
    """Units of a hidden layer."""
    num_layers: int = Field(default=2, ge=1)
    """Hidden layers of what sums share; inputs have one."""
    num_frequencies: int = Field(default=64, ge=1)
    """Random frequencies, of which the networks are given the cosine and sine."""
    frequency_scale: float = Field(default=1.0, gt=0)
    """Standard deviation of the frequencies, in cycles per unit of a latent."""
    sum_sharing: Literal["heads", "full"] = "heads"
    """`heads`: sums share all but the last layer of a network; `full`: all of it."""
    leaf_sharing: Literal["full", "heads"] = "full"
    """The same of inputs; `full` ties the inputs of all variables with equally many categories."""
    leaf_floor: float = Field(default=1e-4, gt=0, lt=1)
    """Share of a uniform distribution in every input over categories."""
    train_states: list[States] = Field(default=[])
    """Quadrature points of a training step, one of these numbers drawn for each, so that the
    networks hold for any number; default: structure.num_states alone."""
    jitter: float = Field(default=1.0, ge=0, le=1)
    """How far quadrature points move in their cells in a training step: 0 not, 1 anywhere."""
    evaluate_states: list[States] = Field(default=[])
    """Numbers of points with which the test split is evaluated besides structure.num_states."""
    block_points: int = Field(default=16384, ge=1)
    """Most points at which a network is evaluated at once, to bound memory."""
