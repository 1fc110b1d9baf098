"""The top level of a patch circuit, trained on soft likelihoods of frozen leaf circuits.

Instead of one leaf density a patch (its cluster), the top level sees how likely every leaf density
makes the patch: exactly log p(x) of the whole circuit, at the price of the top level alone.
Legend: N samples, Z patches, K leaf densities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.config.distillation import DistillConfig
from distpc.structures.composed import top_graph
from distpc.structures.tree import Tree
from distpc.training.counting import assemble_counted_, count_tables
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.schedule import LinearSchedule

_FINAL_STEP_SIZE = 0.01


def counted_top(
    tree: Tree, blocks: Sequence[Tensor], shares: Tensor, settings: DistillConfig, seed: int
) -> Circuit:
    """The top level as counts of the leaf density that explains each patch best.

    Args:
        tree: over the Z patches.
        blocks: soft likelihoods (n, Z, K) in nats, of N samples in all.
        shares: (K,) how often each leaf density is used: its prior here.
        settings: shares of random rows, pseudocount.
        seed: of those.
    """
    width = len(shares)
    prior = shares.clamp_min(1e-12).log().float()
    latents = np.concatenate([(block + prior).argmax(-1).numpy() for block in blocks])
    graph = top_graph(tree, width)
    categories = [width] * tree.num_nodes
    circuit = Circuit(graph, categories, seed=seed)
    tables = count_tables(graph, categories, latents, latents)
    assemble_counted_(circuit, tables, len(latents), settings, seed)
    return circuit


def fit_top(
    circuit: Circuit,
    blocks: Sequence[Tensor],
    settings: DistillConfig,
    seed: int,
    log: Callable[[int, float], None] = lambda epoch, nats: None,
) -> list[float]:
    """Online EM of the top level on soft likelihoods.

    Args:
        circuit: of `top_graph`.
        blocks: soft likelihoods (n, Z, K) in nats, of N samples in all; may be mapped from files.
        settings: of growing: passes, batch, first step size; pseudocount.
        seed: of the order.
        log: called after every epoch.

    Returns:
        for every epoch the mean nats of log p(x) of the batches before they were learnt from.
    """
    growing = settings.growing
    total = sum(map(len, blocks))
    circuit.set_smoothing(settings.pseudocount, settings.pseudocount, total)
    optimizer = CircuitOptimizer(circuit.parameter_groups(), step_size=growing.top_step_size)
    last = min(_FINAL_STEP_SIZE, growing.top_step_size)
    schedule = LinearSchedule(growing.top_step_size, last, growing.top_epochs * total)
    rng = np.random.default_rng(seed)
    consumed, curve = 0, []
    for epoch in range(growing.top_epochs):
        nats = 0.0
        for number in rng.permutation(len(blocks)):
            block = blocks[number]
            num_batches = -(-len(block) // growing.top_batch_size)
            for rows in np.array_split(rng.permutation(len(block)), num_batches):
                optimizer.zero_grad(set_to_none=True)
                optimizer.set_step_size(schedule(consumed))
                soft = block[torch.from_numpy(rows)]
                log_prob = circuit(circuit.reader.read_soft(soft, circuit.device))
                (-log_prob.sum() / len(rows)).backward()
                optimizer.step()
                consumed += len(rows)
                nats += float(log_prob.detach().double().sum())
        curve.append(nats / total)
        log(epoch + 1, curve[-1])
    return curve
