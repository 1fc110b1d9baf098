"""What to compute, and when, so that variables can be revealed one after another.

While variables are revealed in some order, every region has two messages, given the values seen so
far: *up*, the likelihoods of its units (ones, and never computed, before anything below is seen),
and *down*, how much of the likelihood each of its units carries (everything outside the region).
A message is fresh as long as nothing was revealed on its side of the region. Before a variable is
revealed, the down messages of its inputs are requested, and through them whatever is not fresh. In
a tree-shaped graph whose variables come in depth-first order that is one down and at most one up
message a region, as in a forward and a backward pass; other orders and graphs with shared regions
cost more and are as exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from distpc.errors import EvidenceError
from distpc.structures.region_graph import RegionGraph

Side = Literal["up", "down"]
Message = tuple[Side, int]


class Step(NamedTuple):
    """One instruction.

    Attributes:
        kind: "down": from the parents of `region`; "up": from its children; "extend": multiply
            more children into the up message of a product; "reveal": variable `region`.
        region: a region, or the variable.
        parents: of "down": (parent, position among its children) of each parent.
        children: whose up messages go in, of "up" and "extend": some of the region's children; of
            "down": of its siblings, or its parents. Whatever is not named is all ones.
            Of "reveal": the input regions of the variable, whose down messages are read.
        frees: messages that nobody reads after this step.
    """

    kind: Literal["down", "up", "extend", "reveal"]
    region: int
    parents: tuple[tuple[int, int], ...] = ()
    children: tuple[int, ...] = ()
    frees: tuple[Message, ...] = ()


def depth_first_order(graph: RegionGraph) -> list[int]:
    """Variables in an order that leaves no subtree half seen, where the graph is a tree.

    Small subtrees come first: what is seen last in a product needs no up message.
    """
    order: dict[int, None] = {}
    seen: set[int] = set()
    stack = [graph.root]
    while stack:
        index = stack.pop()
        if index in seen:
            continue
        seen.add(index)
        region = graph.regions[index]
        if region.variable is not None:
            order.setdefault(region.variable)
        children = sorted(region.children, key=lambda child: (len(graph.scopes[child]), child))
        stack.extend(reversed(children))
    return list(order)


def plan(graph: RegionGraph, order: Sequence[int]) -> tuple[Step, ...]:
    """The steps that reveal all variables in `order`.

    Raises:
        EvidenceError: the order does not name every variable once.
    """
    if sorted(order) != list(range(graph.num_variables)):
        raise EvidenceError(
            "an order does not name every variable once",
            where="order",
            found=f"{len(order)} entries, {len(set(order))} different ones",
            expected=f"each of 0 .. {graph.num_variables - 1}",
        )
    planner = _Planner(graph, order)
    for position, variable in enumerate(order):
        planner.reveal(position, variable)
    return _with_frees(planner.steps)


class _Planner:
    """Runs the revealing symbolically and writes down the steps.

    A message is stamped with the number of variables that were seen on its side when it was
    computed: the seen ones only become more, so equal numbers are equal sets.
    """

    def __init__(self, graph: RegionGraph, order: Sequence[int]) -> None:
        self.graph = graph
        self.steps: list[Step] = []
        self.seen = 0
        self.stamps: dict[Message, int] = {("down", graph.root): 0}
        self.included: dict[int, dict[int, int]] = {}
        self.parents: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.inputs: dict[int, list[int]] = defaultdict(list)
        place = {variable: position for position, variable in enumerate(order)}
        positions: dict[frozenset[int], list[int]] = {}
        self.positions: list[list[int]] = []
        reachable = {graph.root}
        for index in range(graph.root, -1, -1):
            region, scope = graph.regions[index], graph.scopes[index]
            if scope not in positions:
                positions[scope] = sorted(place[variable] for variable in scope)
            self.positions.append(positions[scope])
            if index not in reachable:
                continue
            if region.variable is not None:
                self.inputs[region.variable].append(index)
            for slot, child in enumerate(region.children):
                self.parents[child].append((index, slot))
                reachable.add(child)
        self.positions.reverse()

    def reveal(self, position: int, variable: int) -> None:
        """Plan what variable number `position` of the order needs, and it itself."""
        inputs = tuple(self.inputs[variable])
        for index in inputs:
            self._request(("down", index))
        self.steps.append(Step("reveal", variable, children=inputs))
        self.seen = position + 1

    def _inside(self, index: int) -> int:
        """How many variables below a region were seen."""
        return bisect_left(self.positions[index], self.seen)

    def _is_fresh(self, message: Message) -> bool:
        side, index = message
        inside = self._inside(index)
        return self.stamps.get(message) == (inside if side == "up" else self.seen - inside)

    def _request(self, message: Message) -> None:
        # A stack of its own: chains are deeper than Python's.
        stack = [message]
        while stack:
            if self._is_fresh(stack[-1]):
                stack.pop()
                continue
            step = self._step(*stack[-1])
            missing = [needed for needed in self._reads(step) if not self._is_fresh(needed)]
            stack.extend(missing)
            if not missing:
                self._write(step)
                stack.pop()

    def _step(self, side: Side, index: int) -> Step:
        """How to compute a message now."""
        if side == "down":
            return Step("down", index, tuple(self.parents[index]), self._siblings(index))
        region = self.graph.regions[index]
        children = tuple(child for child in region.children if self._inside(child))
        included = self.included.get(index, {})
        news = tuple(child for child in children if child not in included)
        if included and all(self._inside(child) == stamp for child, stamp in included.items()):
            return Step("extend", index, children=news)
        return Step("up", index, children=children)

    def _siblings(self, index: int) -> tuple[int, ...]:
        """Regions whose up messages go into a down message: the parent's own, which is the
        product of its children's, or where the region itself is partly seen, the others."""
        regions: list[int] = []
        for parent, slot in self.parents[index]:
            kind, children = self.graph.regions[parent].kind, self.graph.regions[parent].children
            if kind == "product" and not self._inside(index):
                regions += [parent] if self._inside(parent) else []
            elif kind in ("product", "kronecker"):
                others = children[:slot] + children[slot + 1 :]
                regions += [other for other in others if self._inside(other)]
        return tuple(dict.fromkeys(regions))

    def _reads(self, step: Step) -> list[Message]:
        """Messages that a step reads and that must be fresh."""
        downs: list[Message] = [("down", parent) for parent, _ in step.parents]
        return downs + [("up", child) for child in step.children]

    def _write(self, step: Step) -> None:
        index = step.region
        inside = self._inside(index)
        if step.kind == "down":
            self.stamps["down", index] = self.seen - inside
        else:
            self.stamps["up", index] = inside
            if self.graph.regions[index].kind == "product":
                added = {child: self._inside(child) for child in step.children}
                known = self.included.get(index, {}) if step.kind == "extend" else {}
                self.included[index] = {**known, **added}
        self.steps.append(step)


def _with_frees(steps: list[Step]) -> tuple[Step, ...]:
    """Say of every message which step reads it last."""
    live: set[Message] = set()
    result = []
    for step in reversed(steps):
        read: list[Message] = [("down", parent) for parent, _ in step.parents]
        if step.kind == "reveal":
            read += [("down", index) for index in step.children]
        else:
            read += [("up", child) for child in step.children]
        frees = tuple(dict.fromkeys(message for message in read if message not in live))
        if step.kind in ("down", "up"):
            live.discard((step.kind, step.region))
        live.update(read)
        if step.kind == "extend":
            live.add(("up", step.region))
        result.append(step._replace(frees=frees))
    return tuple(reversed(result))
