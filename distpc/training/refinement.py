"""Which heads of a leaf circuit are refined: those that explain their patches worst.

Legend: P patches, D variables of a patch, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.lost import FLOAT_FLOOR
from distpc.config.growing import GrowingConfig

_FEW_HEADS = 5
"""Up to so many final heads one is added a round."""


@dataclass(frozen=True)
class Refinement:
    """What is done to the heads.

    Attributes:
        refined: heads whose patches are clustered again, ascending.
        cloned: those of them that are cloned, ascending.
    """

    refined: tuple[int, ...]
    cloned: tuple[int, ...]


@torch.no_grad()
def head_likelihoods(circuit: Circuit, patches: Tensor, batch_size: int) -> Tensor:
    """(P, H) float32 log p(patch | head) in nats.

    One pass gives all heads. A head that is 87 nats (the range of float32) below the best one of
    its circuit counts as 87 below.

    Args:
        circuit: whose root mixes the product that carries latent 0, the head.
        patches: (P, D) integers, -1 where missing.
        batch_size: patches at a time.
    """
    place = circuit.schedule.places[circuit.graph.root - 1]
    assert place is not None
    step, row = place
    prior = circuit.weights_of(circuit.graph.root, torch.float64)[0]
    found = []
    for part in patches.split(batch_size):
        evidence = circuit.reader.read(part.long(), device=circuit.device)
        evaluation = circuit.evaluate(evidence, keep=True)
        values = evaluation.scaled.outputs[step][row].double()
        # p(x) = sum of prior * values, on a scale that this tells.
        scale = evaluation.log_prob.double() - (values @ prior).log()
        logs = values.clamp_min(FLOAT_FLOOR).log() + scale.unsqueeze(1)
        if evaluation.logs is not None:
            logs[evaluation.again] = evaluation.logs.outputs[step][row].double()
        found.append(logs.float())
    return torch.cat(found)


def move_heads(likelihoods: Tensor, heads: Tensor, reluctance: float) -> Tensor:
    """(P,) the best head of every patch; it leaves the present one only for one that makes it more
    than `reluctance` nats more likely."""
    scores = likelihoods.clone()
    rows = torch.arange(len(heads))
    scores[rows, heads] += reluctance
    best = scores.argmax(1)
    # Of equal scores the present head.
    return torch.where(scores[rows, heads] >= scores[rows, best], heads, best)


def choose_refinement(
    likelihoods: Tensor, heads: Tensor, settings: GrowingConfig, rng: np.random.Generator
) -> Refinement | None:
    """The heads with the worst mean likelihoods, until they cover the configured share of patches;
    None where no more heads can be added.

    Args:
        likelihoods: (P, H), see `head_likelihoods`.
        heads: (P,) head of every patch.
        settings: of growing.
        rng: draws how many heads are added, where there may be several.
    """
    num_heads = likelihoods.shape[1]
    counts = np.bincount(heads.numpy(), minlength=num_heads)
    own = likelihoods[torch.arange(len(heads)), heads].double().numpy()
    sums = np.bincount(heads.numpy(), weights=own, minlength=num_heads)
    used = np.flatnonzero(counts)
    worst = used[np.argsort(sums[used] / counts[used], kind="stable")]
    covered = np.cumsum(counts[worst])
    size = int(np.searchsorted(covered, settings.covered_fraction * len(heads), side="right")) + 1
    refined = worst[:size]
    number = len(refined)
    added = 1
    if settings.final_heads > _FEW_HEADS:
        per_head = covered[number - 1] // settings.patches_per_head
        most = min(2 * number, int(per_head))
        if most <= number:
            return None
        added = int(rng.integers(number + 1, most + 1)) - number
    added = min(added, number, settings.final_heads - num_heads)
    # A head of one patch has nothing to be split into.
    cloned = [head for head in refined[:added].tolist() if counts[head] > 1]
    if not cloned:
        return None
    return Refinement(tuple(sorted(refined.tolist())), tuple(sorted(cloned)))
