"""Training rules: one idea a class, each a map from statistics and mean flows to statistics."""

from __future__ import annotations

from collections.abc import Sequence

from distpc.circuits.circuit import Circuit
from distpc.errors import ConfigError, TrainingError
from distpc.training.rules.adam import AdamOnLogits
from distpc.training.rules.anemone import Anemone
from distpc.training.rules.base import Rule, Smoothing
from distpc.training.rules.batch_em import FullBatchEM, MiniBatchEM
from distpc.training.rules.convert import convert_
from distpc.training.rules.growing_em import GrowingEM
from distpc.training.rules.online_em import OnlineEM

__all__ = [
    "AdamOnLogits",
    "Anemone",
    "FullBatchEM",
    "GrowingEM",
    "MiniBatchEM",
    "OnlineEM",
    "RULES",
    "Rule",
    "Smoothing",
    "convert_",
    "make_rule",
    "needs_whole_rows",
    "refuse_shards",
]

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (OnlineEM, GrowingEM, MiniBatchEM, FullBatchEM, Anemone, AdamOnLogits)
}


def make_rule(
    name: str,
    circuit: Circuit,
    smoothing: Smoothing,
    momentum: float = 0.9,
    growth: float = 2.0,
) -> Rule:
    """The rule of that name.

    Args:
        name: a key of `RULES`.
        circuit: what it trains.
        smoothing: see the class of the rule.
        momentum: of Anemone.
        growth: of growing EM.

    Raises:
        ConfigError: there is no such rule.
        TrainingError: it cannot train the circuit's inputs.
    """
    if name not in RULES:
        raise ConfigError(
            "there is no such training rule",
            where="rule",
            found=name,
            expected=", ".join(RULES),
        )
    if name == Anemone.name:
        return Anemone(circuit, smoothing, momentum)
    if name == GrowingEM.name:
        return GrowingEM(circuit, smoothing, growth)
    return RULES[name](circuit, smoothing)


def needs_whole_rows(name: str, num_categories: Sequence[int | None]) -> bool:
    """Whether ZeRO cannot shard what a rule trains.

    Args:
        name: a key of `RULES`.
        num_categories: C of every variable, None for real ones.
    """
    if name == AdamOnLogits.name:
        return None in num_categories
    return RULES[name].needs_whole_rows


def refuse_shards(rule: Rule, zero_stage: int, node_parallel: int = 1) -> None:
    """Refuse a rule on whole rows where an optimizer sees flat shards of parameters, and one on
    whole circuits where ranks share the rows.

    Raises:
        TrainingError: naming the rule, and the stage or the node axis.
    """
    if rule.needs_whole_circuit and node_parallel > 1:
        raise TrainingError(
            f"the rule '{rule.name}' needs the whole circuit at its step, and ranks share its rows",
            where="parallel.node_parallel",
            found=node_parallel,
            expected=1,
            fix="set parallel.node_parallel to 1, or finetune.rule to online_em",
        )
    if rule.needs_whole_rows and zero_stage > 0:
        raise TrainingError(
            f"the rule '{rule.name}' needs whole rows at its step, and ZeRO shards cut them",
            where="parallel.zero_stage",
            found=zero_stage,
            expected=0,
            fix="set parallel.zero_stage to 0, or finetune.rule to online_em",
        )
