"""Exact queries, a module each; all take rows in batches that bound what is held at once."""

from distpc.circuits.queries.conditional import conditional, conditional_blocks, conditional_joint
from distpc.circuits.queries.entropy import Entropy, entropy
from distpc.circuits.queries.flows import flows, refuse_impossible
from distpc.circuits.queries.information import mutual_information
from distpc.circuits.queries.likelihood import log_prob
from distpc.circuits.queries.marginal_map import ApproximateMarginalMap, marginal_map_approximate
from distpc.circuits.queries.moments import Moments, expectation
from distpc.circuits.queries.mpe import MostProbable, mpe
from distpc.circuits.queries.posterior import posterior
from distpc.circuits.queries.sampling import sample, sample_blocks
from distpc.circuits.queries.uses import uses

__all__ = [
    "ApproximateMarginalMap",
    "Entropy",
    "Moments",
    "MostProbable",
    "conditional",
    "conditional_blocks",
    "conditional_joint",
    "entropy",
    "expectation",
    "flows",
    "log_prob",
    "marginal_map_approximate",
    "mpe",
    "mutual_information",
    "posterior",
    "refuse_impossible",
    "sample",
    "sample_blocks",
    "uses",
]
