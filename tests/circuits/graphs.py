"""Small region graphs of every shape that circuits must handle, and how to judge their flows."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import exact_weights, log_prob_exact
from distpc.circuits.families import FAMILIES
from distpc.structures.builder import GraphBuilder
from distpc.structures.determinism import INDICATOR
from distpc.structures.region_graph import Region, RegionGraph


class Builder:
    """Appends regions and returns their indices."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def __call__(self, kind: str, num_units: int, children: tuple[int, ...] = (), **more) -> int:
        self.regions.append(Region(kind, num_units, tuple(children), **more))
        return len(self.regions) - 1


def tree_parents(size: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [-1] + [rng.randrange(node) for node in range(1, size)]


def hclt(parents: list[int], num_units: int) -> RegionGraph:
    """One latent per variable; `parents[v] < v`."""
    add = Builder()
    messages: list[list[int]] = [[] for _ in parents]
    for v in reversed(range(len(parents))):
        leaf = add("input", num_units, variable=v)
        latent = add("product", num_units, (leaf, *messages[v]), latent=v)
        top = add("sum", num_units if v else 1, (latent,))
        if v:
            messages[parents[v]].append(top)
    return RegionGraph(add.regions, len(parents))


def patches(
    num_patches: int = 3, width: int = 2, num_units: int = 3, tied: bool = True, seed: int = 0
) -> RegionGraph:
    """A tree of patches with product leaves."""
    add = Builder()
    parents = tree_parents(num_patches, seed)
    messages: list[list[int]] = [[] for _ in parents]
    for p in reversed(range(num_patches)):
        leaves = [
            add("input", num_units, variable=p * width + d, tie=f"leaf/{d}" if tied else None)
            for d in range(width)
        ]
        emission = add("product", num_units, tuple(leaves))
        latent = add("product", num_units, (emission, *messages[p]), latent=p)
        top = add("sum", num_units if p else 1, (latent,))
        if p:
            messages[parents[p]].append(top)
    return RegionGraph(add.regions, num_patches * width)


def grouped_patches(num_patches: int = 2, num_units: int = 2) -> RegionGraph:
    """Patches of 3 variables; the leaf is a tied HCLT with heads in each of 2 groups."""
    add = Builder()
    latents = []
    for p in range(num_patches):
        heads = []
        for g in range(2):
            up: tuple[int, ...] = ()
            for d in (2, 1, 0):
                tie = f"leaf/{g}/emission/{d}"
                leaf = add("input", num_units, variable=3 * p + d, tie=tie)
                body = add("product", num_units, (leaf, *up))
                if d:
                    up = (add("sum", num_units, (body,), tie=f"leaf/{g}/transition/{d}"),)
            heads.append(add("sum", 1 + g, (body,), tie=f"leaf/{g}/heads"))
        emission = add("concat", 3, tuple(heads))
        latents.append((emission, p))
    below: tuple[int, ...] = ()
    for emission, p in reversed(latents):
        latent = add("product", 3, (emission, *below), latent=p)
        below = (add("sum", 3 if p else 1, (latent,)),)
    return RegionGraph(add.regions, 3 * num_patches)


def shared_child() -> RegionGraph:
    """A DAG: the message of variables 0, 1 is read by two products, one of them through a sum."""
    add = Builder()
    a, b = add("input", 3, variable=0), add("input", 3, variable=1)
    shared = add("product", 3, (a, b))
    c, d = add("input", 3, variable=2), add("input", 3, variable=2, tie="own")
    left = add("product", 3, (shared, c))
    right = add("product", 3, (add("sum", 3, (shared,)), d))
    both = add("concat", 6, (left, right), latent=0)
    lone = add("sum", 2, (both,))
    return RegionGraph([*add.regions, Region("sum", 1, (lone,))], 3)


def hub(num_children: int, num_units: int = 2) -> RegionGraph:
    """One latent with many children."""
    return hclt([-1] + [0] * num_children, num_units)


def chain(length: int, num_units: int = 2, tied: bool = False) -> RegionGraph:
    """A hidden Markov model; tied: one transition and one emission for all positions."""
    add = Builder()
    below: tuple[int, ...] = ()
    for t in reversed(range(length)):
        leaf = add("input", num_units, variable=t, tie="emission" if tied else None)
        latent = add("product", num_units, (leaf, *below), latent=t)
        tie = "transition" if tied and t else None
        below = (add("sum", num_units if t else 1, (latent,), tie=tie),)
    return RegionGraph(add.regions, length)


def tucker_tree(tied: bool = False) -> RegionGraph:
    """Four variables; Kronecker products of 2 and 3 units, mixed by Tucker sums."""
    builder = GraphBuilder()
    tie = "tucker" if tied else None
    pairs = [
        builder.tucker(3 - tied, builder.input(2, v), builder.input(3, v + 1), tie) for v in (0, 2)
    ]
    return builder.finish(builder.kronecker(*pairs), 4)


def two_splits() -> RegionGraph:
    """Four variables split in two ways and mixed unit by unit."""
    builder = GraphBuilder()
    inputs = [builder.input(3, v) for v in range(4)]
    alternatives = []
    for left, right in (((0, 1), (2, 3)), ((0, 2), (1, 3))):
        halves = [
            builder.sum(3, builder.product([inputs[v] for v in pair])) for pair in (left, right)
        ]
        alternatives.append(builder.sum(3, builder.product(halves)))
    return builder.finish(builder.mixing(alternatives), 4)


def monarch_chain(length: int = 4, num_units: int = 6, blocks: int = 3) -> RegionGraph:
    """A tied hidden Markov model whose transition is a Monarch matrix."""
    builder = GraphBuilder()
    state = builder.input(num_units, length - 1, "emission")
    for t in reversed(range(length - 1)):
        factors = [builder.input(num_units, t, "emission")]
        factors.append(builder.monarch(num_units, state, blocks, "transition"))
        state = builder.product(factors, latent=t)
    return builder.finish(state, length)


SMALL: dict[str, Callable[[], tuple[RegionGraph, list[int]]]] = {
    "hclt": lambda: (hclt(tree_parents(6, 1), 3), [2, 3, 2, 2, 3, 2]),
    "hclt-2": lambda: (hclt(tree_parents(7, 5), 4), [2] * 7),
    "tied-patches": lambda: (patches(3, 2, 3), [3, 2] * 3),
    "own-patches": lambda: (patches(3, 2, 3, tied=False, seed=3), [3, 2] * 3),
    "grouped-patches": lambda: (grouped_patches(), [2, 3, 2] * 2),
    "shared-child": lambda: (shared_child(), [2, 3, 3]),
    "hub": lambda: (hub(6), [2] * 7),
    "chain": lambda: (chain(6), [2, 3, 2, 3, 2, 3]),
    "tied-chain": lambda: (chain(6, 3, tied=True), [3] * 6),
    "tucker": lambda: (tucker_tree(), [2, 3, 2, 3]),
    "tied-tucker": lambda: (tucker_tree(tied=True), [2, 3, 2, 3]),
    "two-splits": lambda: (two_splits(), [2, 3, 2, 2]),
    "monarch": lambda: (monarch_chain(), [3] * 4),
    "monarch-wide": lambda: (monarch_chain(5, 4, 2), [2] * 5),
    "one-input": lambda: (RegionGraph([Region("input", 1, variable=0)], 1), [4]),
}


def small_circuit(name: str, seed: int = 0, noise: float = 2.0) -> Circuit:
    graph, num_categories = SMALL[name]()
    return Circuit(graph, num_categories, seed=seed, init_noise=noise)


def exact_flows(circuit: Circuit, loss_of: Callable[[Tensor], Tensor], *args, **kwargs):
    """theta * d loss / d theta of every parameter, by autograd through the judge: {name: flow}."""
    weights = exact_weights(circuit)
    for tensor in {id(tensor): tensor for tensor in weights.values()}.values():
        tensor.requires_grad_()
    loss_of(log_prob_exact(circuit, *args, weights=weights, **kwargs)).backward()
    return {
        # A weight of 0 has no flow, however steep the likelihood is there.
        region: torch.where(tensor.detach() == 0, 0.0, tensor.detach() * tensor.grad)
        for region, tensor in weights.items()
        if tensor.grad is not None
    }


def flows_of(circuit: Circuit, region: int) -> Tensor:
    """The gradient that backward left for a region, shaped as its weights."""
    bank, table = circuit.bank_of(region)
    grad = bank.statistics.grad
    return grad[table] if grad.dim() == 3 else grad[bank.table(table)].T


def random_evidence(circuit: Circuit, batch: int, seed: int, missing: float = 0.3):
    """x with missing values and partly observed latents."""
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.randint(0, categories, (batch,), generator=generator)
        for categories in circuit.num_categories
    ]
    x = torch.stack(columns, 1)
    x[torch.rand(x.shape, generator=generator) < missing] = -1
    latents = torch.full((batch, circuit.num_latents), -1)
    for z, size in enumerate(circuit.latent_sizes):
        latents[:, z] = torch.randint(-1, size, (batch,), generator=generator)
    return x, latents


def with_family(graph: RegionGraph, name: str) -> tuple[RegionGraph, list[int | None]]:
    """The graph with inputs of one family, and variables that fit it."""
    family = FAMILIES[name]
    regions = [replace(r, family=name) if r.kind == "input" else r for r in graph.regions]
    units = {r.variable: r.num_units for r in regions if r.kind == "input"}
    is_tied = any(r.tie is not None for r in regions if r.kind == "input")
    sizes: list[int | None] = []
    for variable in range(graph.num_variables):
        if family.is_real:
            sizes.append(None)
        elif family.units_are_categories:
            sizes.append(units[variable])
        else:
            sizes.append(family.num_categories or (2 if is_tied else 2 + variable % 2))
    return RegionGraph(regions, graph.num_variables), sizes


def indicator_circuit(graph: RegionGraph, seed: int = 0, noise: float = 2.0) -> Circuit:
    """A circuit whose indicators are point masses, also where the family is not there."""
    sizes = [graph.indicated[variable] for variable in range(graph.num_variables)]
    if INDICATOR in FAMILIES:
        return Circuit(graph, sizes, seed=seed, init_noise=noise)
    plain = [replace(r, family=None) if r.kind == "input" else r for r in graph.regions]
    circuit = Circuit(RegionGraph(plain, graph.num_variables), sizes, seed=seed, init_noise=noise)
    for index, region in enumerate(plain):
        if region.kind == "input":
            circuit.statistics_of(index)[:] = torch.eye(region.num_units)
    circuit.rescale_to_uses_()
    return circuit
