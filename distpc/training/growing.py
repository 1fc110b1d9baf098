"""Progressive growing of one leaf circuit: refine its heads where the likelihood is worst.

After Liu X., Liu A., Van den Broeck, Liang, "Understanding the Distillation Process from Deep
Generative Models to Tractable Probabilistic Circuits" (ICML 2023). A global cluster's patches are
clustered into a few heads, which share a circuit. In every round it is trained; then edges that are
hardly used are pruned, patches move to the head that explains them better, the heads with the worst
likelihoods are chosen, the hidden states that they use are cloned, and their patches are clustered
again, into more heads.
Legend: P patches, D variables of a patch, F feature width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.sums import SumBank
from distpc.circuits.transforms import aggregate_flows, prune_edges, prune_states, split_states
from distpc.circuits.transforms.flows import Flows
from distpc.circuits.transforms.states import find_states
from distpc.config.growing import GrowingConfig
from distpc.latents.local import cluster_points
from distpc.latents.nearest import assign_points
from distpc.structures.chow_liu import chow_liu_tree
from distpc.structures.discretize import discretize
from distpc.structures.joined import joined_graph
from distpc.structures.tree import Tree
from distpc.training.leaf import fit_heads
from distpc.training.refinement import Refinement, choose_refinement, head_likelihoods, move_heads
from distpc.training.start import start_near_data_

_TREE_PATCHES = 20_000
"""Patches that a head's tree is learnt from."""
_TREE_BINS = 16
_FLOW_PATCHES = 8_192
"""Patches whose flows say what is pruned and grown: edges are dropped below a use of 1e-4."""
_BATCH = 1024


@dataclass
class Growth:
    """A leaf circuit between two rounds.

    Attributes:
        circuit: over D variables with one latent, the head; trained.
        heads: (P,) int64 head of every patch.
        centroids: (H, F) of the heads' features.
        rounds: for every round so far its `heads`, `states`, `edges`, and `nats_by_epoch` of
            log p(patch, head).
    """

    circuit: Circuit
    heads: Tensor
    centroids: Tensor
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_heads(self) -> int:
        """H."""
        return self.circuit.latent_sizes[0]


@dataclass(frozen=True)
class Grower:
    """One global cluster's job.

    Attributes:
        patches: (P, D) integers, at least one.
        features: (P, F) of the patches.
        num_categories: of the D variables.
        num_states: hidden states a variable at the start.
        settings: of growing.
        pseudocount: patches' worth of smoothing a row.
        seed: of everything random, with the cluster's number.
        keep: called with the growth after every trained round.
    """

    patches: Tensor
    features: Tensor
    num_categories: list[int]
    num_states: int
    settings: GrowingConfig
    pseudocount: float
    seed: tuple[int, int]
    keep: Callable[[Growth], None] = lambda growth: None

    def run(self, growth: Growth | None = None) -> Growth:
        """Train and refine until there are as many heads as configured, or nothing is left to
        refine; `growth` is what `keep` was given last by an attempt that was interrupted."""
        if growth is None:
            growth = self._train(self._start())
        while (refined := self._refined(growth)) is not None:
            growth = self._train(refined)
        return growth

    def _start(self) -> Growth:
        """The first heads, with a tree for each, and random parameters near the data."""
        number = min(self.settings.first_heads, len(torch.unique(self.features, dim=0)))
        centroids = cluster_points(
            self.features, number, self.settings.cluster_rounds, [*self.seed, 0]
        )
        heads, _ = assign_points(self.features, centroids)
        trees = [self._tree(self.patches[heads == head]) for head in range(number)]
        circuit = Circuit(
            joined_graph([tree for tree in trees if tree is not None], self.num_states, number),
            self.num_categories,
            seed=self._number(0),
        )
        start_near_data_(circuit, self.patches.split(65_536))
        return Growth(circuit, heads, centroids)

    def _tree(self, patches: Tensor) -> Tree | None:
        """The Chow-Liu tree of some patches' variables; None without patches."""
        if not len(patches):
            return None
        rows, sizes = discretize(
            patches[:_TREE_PATCHES].numpy().astype(np.int64), self.num_categories, _TREE_BINS
        )
        return chow_liu_tree(rows, sizes)

    def _train(self, growth: Growth) -> Growth:
        settings, number = self.settings, len(growth.rounds) + 1
        curve = fit_heads(
            growth.circuit,
            self.patches,
            growth.heads,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            step_size=settings.step_size,
            pseudocount=self.pseudocount,
            seed=self._number(number),
        )
        facts = {"heads": growth.num_heads, **_size(growth.circuit), "nats_by_epoch": curve}
        growth = replace(growth, rounds=[*growth.rounds, facts])
        self.keep(growth)
        return growth

    def _refined(self, growth: Growth) -> Growth | None:
        """Pruned, grown, with patches clustered anew; None where growing has come to its end."""
        settings = self.settings
        if growth.num_heads >= settings.final_heads:
            return None
        rng = np.random.default_rng([*self.seed, len(growth.rounds)])
        pruned = self._pruned(growth, rng)
        likelihoods = head_likelihoods(pruned, self.patches, _BATCH)
        heads = move_heads(likelihoods, growth.heads, settings.reluctance_nats)
        plan = choose_refinement(likelihoods, heads, settings, rng)
        if plan is None:
            return None
        circuit = self._grown(pruned, heads, plan, rng)
        centroids, heads = self._clustered(growth.centroids, heads, plan)
        return Growth(circuit, heads, centroids, growth.rounds)

    def _pruned(self, growth: Growth, rng: np.random.Generator) -> Circuit:
        """Without the edges that the patches hardly use, and states that nothing leads to."""
        circuit = growth.circuit
        rows = torch.from_numpy(rng.permutation(len(self.patches))[:_FLOW_PATCHES])
        flows = self._flows(circuit, growth.heads, rows)
        # Heads stay: what is above them is no part of a leaf circuit.
        bank, table = circuit.bank_of(circuit.graph.root)
        for number, other in enumerate(circuit.bank_list):
            edges = flows.edges[number]
            if other is bank and edges is not None:
                edges[table] += flows.num_samples
        pruned = prune_edges(circuit, flows, threshold=self.settings.prune_threshold)
        return prune_states(pruned.circuit).circuit

    def _flows(self, circuit: Circuit, heads: Tensor, rows: Tensor) -> Flows:
        patches, latents = self.patches[rows].long(), heads[rows, None]
        return aggregate_flows(circuit, patches, _BATCH, latents=latents)

    def _grown(
        self, circuit: Circuit, heads: Tensor, plan: Refinement, rng: np.random.Generator
    ) -> Circuit:
        """The heads of the plan, and the hidden states that they use most, cloned."""
        rows = torch.from_numpy(np.flatnonzero(np.isin(heads.numpy(), plan.cloned)))
        rows = rows[torch.from_numpy(rng.permutation(len(rows))[:_FLOW_PATCHES])]
        flows = self._flows(circuit, heads, rows)
        states = find_states(circuit)
        region = circuit.graph.root - 1
        is_free = ~states.pinned
        is_free[states.of_units[region]] = False
        use = states.use([nodes.numpy() for nodes in flows.nodes])
        share = len(plan.cloned) / (len(plan.cloned) + len(states.of_units[region]))
        share = max(share, self.settings.grown_fraction)
        free = np.flatnonzero(is_free)
        chosen = free[np.argsort(-use[free], kind="stable")[: round(share * len(free))]]
        units = [(region, head) for head in plan.cloned]
        for state in chosen.tolist():
            owner = states.regions[state][0]
            units.append((owner, int(np.flatnonzero(states.of_units[owner] == state)[0])))
        return split_states(
            circuit,
            units,
            noise=self.settings.noise,
            cross=self.settings.cross,
            seed=int(rng.integers(2**31)),
        )

    def _clustered(
        self, centroids: Tensor, heads: Tensor, plan: Refinement
    ) -> tuple[Tensor, Tensor]:
        """Centroids and heads after the patches of all refined heads were clustered again.

        A clone stands behind its original, so that heads behind it move up.
        """
        num_clones = len(plan.cloned)
        clones_before = np.searchsorted(np.array(plan.cloned), np.arange(len(centroids)))
        moved = torch.from_numpy(np.arange(len(centroids)) + clones_before)
        new = torch.zeros(len(centroids) + num_clones, centroids.shape[1])
        new[moved] = centroids
        old_places = moved[list(plan.refined)].tolist()
        places = old_places + [int(moved[head]) + 1 for head in plan.cloned]
        rows = torch.from_numpy(np.flatnonzero(np.isin(heads.numpy(), plan.refined)))
        found = cluster_points(
            self.features[rows],
            len(places),
            self.settings.cluster_rounds,
            [*self.seed, len(centroids)],
            start=centroids[list(plan.refined)],
        )
        new[places] = found
        heads = moved[heads]
        heads[rows] = torch.tensor(places)[assign_points(self.features[rows], found)[0]]
        return new, heads

    def _number(self, number: int) -> int:
        """A seed of its own for each round of each cluster."""
        return int(np.random.default_rng([*self.seed, 7, number]).integers(2**31))


def num_weights(circuit: Circuit) -> int:
    """Parameters of a circuit, those of pruned edges left out."""
    pruned = 0
    for bank in circuit.bank_list:
        if isinstance(bank, SumBank) and bank.mask is not None:
            pruned += int((~bank.mask).sum())
    return circuit.num_parameters - pruned


def _size(circuit: Circuit) -> dict[str, int]:
    """Hidden states, and edges of sums that are not pruned."""
    inputs = [r.num_units for r in circuit.graph.regions if r.kind == "input"]
    tables = [bank for bank in circuit.bank_list if not isinstance(bank, SumBank)]
    of_inputs = sum(bank.statistics.numel() for bank in tables)
    return {"states": sum(inputs), "edges": num_weights(circuit) - of_inputs}
