"""Circuits over a hierarchy of partitions: what quad-trees, RAT and Poon-Domingos share.

A hierarchy says into which parts each set of variables may be split; a layer says how the units
of the parts combine. As in Loconte et al., "What is the relationship between tensor
factorizations and circuits (and how can we exploit it)?", TMLR 2025, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from distpc.errors import StructureError
from distpc.structures.builder import GraphBuilder
from distpc.structures.layers import check_layer, check_size, mix
from distpc.structures.region_graph import RegionGraph

Node = TypeVar("Node", bound=Hashable)


@dataclass(frozen=True)
class Hierarchy(Generic[Node]):
    """Nested partitions of variables; a node is any hashable value.

    Attributes:
        root: the node of all variables.
        splits: for each inner node the alternative ways to part it, each a tuple of nodes.
        variables: the variables of a leaf (a node without splits).
        shape: nodes of equal shape share parameters where the circuit is tied; they have equally
            many splits, into equally many parts.
        input_tie: name of the distributions that a variable's inputs share where it is tied.
    """

    root: Node
    splits: Mapping[Node, Sequence[tuple[Node, ...]]]
    variables: Callable[[Node], Sequence[int]]
    shape: Callable[[Node], str]
    input_tie: Callable[[int], str]


def partition_circuit(
    hierarchy: Hierarchy[Node],
    num_variables: int,
    num_states: int,
    *,
    num_input_units: int | None = None,
    layer: str = "cp",
    tied: bool = False,
    family: str | None = None,
) -> RegionGraph:
    """The region graph of a hierarchy.

    A leaf is a product of its variables' inputs. A node with several splits mixes them unit by
    unit (a mixing layer); the root unit mixes the units of the root node.

    Args:
        hierarchy: of partitions.
        num_variables: V.
        num_states: K, units of every inner node.
        num_input_units: units of every input; default K.
        layer: see `Layer`.
        tied: whether nodes of equal shape share parameters.
        family: of the inputs; default: categorical or Gaussian, as the variable.

    Raises:
        StructureError: naming the argument that does not fit.
    """
    num_states = check_size("num_states", num_states)
    num_input_units = num_states if num_input_units is None else num_input_units
    num_input_units = check_size("num_input_units", num_input_units)
    check_layer(layer)
    return _Circuit(hierarchy, num_states, num_input_units, layer, tied, family).graph(
        num_variables
    )


@dataclass
class _Circuit(Generic[Node]):
    """The regions made so far, node by node."""

    hierarchy: Hierarchy[Node]
    num_states: int
    num_input_units: int
    layer: str
    tied: bool
    family: str | None

    def __post_init__(self) -> None:
        self.builder = GraphBuilder()
        self.done: dict[Node, int] = {}

    def graph(self, num_variables: int) -> RegionGraph:
        self._add_below(self.hierarchy.root)
        return self.builder.finish(self.done[self.hierarchy.root], num_variables)

    def _add_below(self, root: Node) -> None:
        """Add every node below `root` once, children first, without recursion."""
        stack = [root]
        while stack:
            node = stack[-1]
            splits = self.hierarchy.splits.get(node, ())
            missing = [part for split in splits for part in split if part not in self.done]
            if node in self.done or not missing:
                stack.pop()
            if node not in self.done and not missing:
                self.done[node] = self._inner(node, splits) if splits else self._leaf(node)
            stack += missing

    def _leaf(self, node: Node) -> int:
        inputs = []
        for variable in self.hierarchy.variables(node):
            tie = self.hierarchy.input_tie(variable) if self.tied else None
            inputs.append(self.builder.input(self.num_input_units, variable, tie, self.family))
        return inputs[0] if len(inputs) == 1 else self.builder.product(inputs)

    def _inner(self, node: Node, splits: Sequence[tuple[Node, ...]]) -> int:
        prefix = self.hierarchy.shape(node) if self.tied else None
        alternatives = []
        for number, split in enumerate(splits):
            tie = None if prefix is None else f"{prefix}/{number}"
            alternatives.append(self._product([self.done[part] for part in split], tie))
        if len(alternatives) == 1:
            return alternatives[0]
        return self.builder.mixing(alternatives, None if prefix is None else f"{prefix}/mixing")

    def _product(self, parts: Sequence[int], tie: str | None) -> int:
        units = [self.builder.regions[part].num_units for part in parts]
        if self.layer == "tucker":
            if len(parts) != 2:
                raise StructureError(
                    "a Tucker layer multiplies two factors",
                    where="layer",
                    found=f"tucker, and a split into {len(parts)}",
                    fix="split in two, or use layer cp",
                )
            name = None if tie is None else f"{tie}/{units[0]}x{units[1]}"
            return self.builder.tucker(self.num_states, parts[0], parts[1], name)
        return self.builder.product(
            [
                mix(
                    self.builder,
                    self.layer,
                    self.num_states,
                    part,
                    # Leaves and inner nodes may differ in units, and so in their matrices.
                    None if tie is None else f"{tie}/{position}/{units[position]}",
                )
                for position, part in enumerate(parts)
            ]
        )
