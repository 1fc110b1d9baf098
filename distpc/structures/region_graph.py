"""Region graphs: circuits as a small DAG of vector nodes, before any tensor exists.

A region is a vector of `num_units` units over one scope (set of variables):

* ``input``    units are distributions of one variable;
* ``product``  unit k multiplies unit k of every child (children have disjoint scopes and the same
  number of units);
* ``kronecker`` unit (i, j), numbered i * K2 + j, multiplies unit i of the first of its two
  children and unit j of the second (of K2 units): what a Tucker layer sums over;
* ``sum``      every unit mixes units of its one child: all of them (a dense `num_units x child
  units` matrix of weights), or those of its block (see `Region.blocks`);
* ``concat``   the units of several regions over the same scope, side by side. A sum over a concat
  mixes alternatives.

Regions that carry the same `tie` share their parameters: input regions the same distributions,
sum regions the same matrix. A product or concat region may carry a `latent`: its unit k then
stands for the value k of that latent variable, and observing the latent keeps one unit.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np

from distpc.errors import StructureError
from distpc.structures.determinism import INDICATOR, is_deterministic

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 had no families, blocks and Kronecker products."""

Kind = Literal["input", "product", "kronecker", "sum", "concat"]


@dataclass(frozen=True)
class Region:
    """One vector node.

    Attributes:
        kind: input, product, sum or concat.
        num_units: length of the vector.
        children: indices of regions earlier in the graph; empty for inputs.
        variable: the variable of an input region.
        tie: name of shared parameters, or None for parameters of its own.
        latent: index of the latent variable whose values the units are, if any.
        family: distribution of an input's units; None: categorical, or Gaussian where the variable
            is real. The known ones are in `distpc.circuits.families`.
        blocks: a sum's units and its child's units form this many blocks of equal size, and a unit
            mixes the child's units of its own block only. 1: dense. Two sums in a row with blocks
            the one way and the other are a Monarch matrix; as many blocks as units over a concat
            (strided) are a mixing layer.
        strided: which units are a block: every `blocks`-th one, or (False) consecutive ones.
    """

    kind: Kind
    num_units: int
    children: tuple[int, ...] = ()
    variable: int | None = None
    tie: str | None = None
    latent: int | None = None
    family: str | None = None
    blocks: int = 1
    strided: bool = False


DEFAULTS = {field.name: field.default for field in fields(Region) if field.default is not MISSING}


class RegionGraph:
    """Regions in topological order (children first); the last one is the root, of one unit.

    Smooth and decomposable by construction check: a graph that is not is refused.

    Args:
        regions: children before parents.
        num_variables: V; every variable must appear below the root.

    Raises:
        StructureError: naming the region and the rule that it breaks.
    """

    def __init__(self, regions: list[Region] | tuple[Region, ...], num_variables: int) -> None:
        self.regions = tuple(regions)
        self.num_variables = num_variables
        self._scopes: list[frozenset[int]] = []
        self._check()

    @property
    def root(self) -> int:
        """Index of the root region."""
        return len(self.regions) - 1

    @cached_property
    def num_latents(self) -> int:
        """Latent variables that regions name; they are numbered 0 .. num_latents - 1."""
        return 1 + max((r.latent for r in self.regions if r.latent is not None), default=-1)

    def mixed_units(self, index: int, units: range | None = None) -> np.ndarray:
        """For each unit (or those given) of sum region `index` the child's units that it mixes,
        (K', fan-in)."""
        region = self.regions[index]
        blocks = region.blocks
        per_block = np.arange(self.regions[region.children[0]].num_units // blocks)
        unit = np.arange(region.num_units) if units is None else np.arange(units.start, units.stop)
        if region.strided:
            return (unit % blocks)[:, None] + per_block * blocks
        return (unit // (region.num_units // blocks))[:, None] * len(per_block) + per_block

    def fan_in(self, index: int) -> int:
        """Units that each unit of sum region `index` mixes."""
        region = self.regions[index]
        return self.regions[region.children[0]].num_units // region.blocks

    @property
    def scopes(self) -> tuple[frozenset[int], ...]:
        """Variables below each region."""
        return tuple(self._scopes)

    @property
    def is_smooth(self) -> bool:
        """Whether sums mix units of one scope: always, by construction.

        A sum has one child, and a concat over several scopes is refused.
        """
        return True

    @property
    def is_decomposable(self) -> bool:
        """Whether the factors of a product share no variable: always, by construction.

        A product whose children share one is refused.
        """
        return True

    @cached_property
    def is_deterministic(self) -> bool:
        """Whether every sum unit mixes units of disjoint supports, whatever the weights are.

        Supports are told apart by indicator inputs alone.
        """
        return is_deterministic(self)

    @cached_property
    def indicated(self) -> dict[int, int]:
        """Categories of each variable that has indicator inputs (one unit a category)."""
        found = ((r.variable, r.num_units) for r in self.regions if r.family == INDICATOR)
        return {variable: units for variable, units in found if variable is not None}

    @cached_property
    def is_structured_decomposable(self) -> bool:
        """Whether all products with one scope split it in the same way."""
        splits: dict[frozenset[int], frozenset[frozenset[int]]] = {}
        for scope, region in zip(self._scopes, self.regions, strict=True):
            if region.kind in ("product", "kronecker") and len(region.children) > 1:
                split = frozenset(self._scopes[child] for child in region.children)
                if splits.setdefault(scope, split) != split:
                    return False
        return True

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with a format version."""
        return {
            "format_version": FORMAT_VERSION,
            "num_variables": self.num_variables,
            "regions": [
                {k: v for k, v in asdict(region).items() if v != DEFAULTS.get(k, ...)}
                for region in self.regions
            ],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RegionGraph:
        """The inverse of `to_json`.

        Raises:
            StructureError: another format version, or a broken graph.
        """
        if not isinstance(value, dict):
            raise StructureError("no region graph", found=type(value).__name__)
        if value.get("format_version") not in READABLE_VERSIONS:
            raise StructureError(
                "a region graph has a format version that this code does not read",
                found=value.get("format_version"),
                expected=" or ".join(map(str, READABLE_VERSIONS)),
            )
        try:
            regions = [
                Region(**{**region, "children": tuple(region.get("children", ()))})
                for region in value["regions"]
            ]
            return cls(regions, value["num_variables"])
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise StructureError(
                "a region graph has other fields than this code reads",
                found=f"{type(error).__name__}: {error}",
                expected="what RegionGraph.to_json writes",
            ) from error

    def _check(self) -> None:
        if not self.regions:
            raise StructureError("a region graph has no regions")
        for index, region in enumerate(self.regions):
            self._check_region(index, region)
        root = self.regions[-1]
        if root.num_units != 1:
            raise self._broken(self.root, "the root has one unit", f"{root.num_units} units")
        missing = set(range(self.num_variables)) - self.scopes[-1]
        if missing:
            raise self._broken(
                self.root, "the root covers every variable", f"none of {sorted(missing)[:5]}"
            )

    def _check_region(self, index: int, region: Region) -> None:
        if any(not 0 <= child < index for child in region.children):
            raise self._broken(index, "children come before their parent", region.children)
        if region.num_units < 1:
            raise self._broken(index, "a region has at least one unit", region.num_units)
        units = [self.regions[child].num_units for child in region.children]
        scopes = [self._scopes[child] for child in region.children]
        if region.kind == "input":
            if region.children or region.variable is None:
                raise self._broken(index, "an input has a variable and no children", region)
            if not 0 <= region.variable < self.num_variables:
                raise self._broken(
                    index, f"variables are 0 .. {self.num_variables - 1}", region.variable
                )
        elif not region.children:
            raise self._broken(index, f"a {region.kind} has children", "none")
        elif region.kind == "sum":
            if len(region.children) != 1:
                raise self._broken(index, "a sum has one child", region.children)
            if region.blocks < 1 or region.num_units % region.blocks or units[0] % region.blocks:
                raise self._broken(
                    index,
                    "blocks divide a sum's units and its child's",
                    f"{region.blocks} blocks, {region.num_units} and {units[0]} units",
                )
        elif region.kind in ("product", "kronecker"):
            if sum(map(len, scopes)) != len(frozenset().union(*scopes)):
                raise self._broken(
                    index,
                    f"a {region.kind}'s children share no variable (decomposable)",
                    region.children,
                )
            if region.kind == "kronecker":
                if len(units) != 2 or units[0] * units[1] != region.num_units:
                    raise self._broken(
                        index, f"two children whose units multiply to {region.num_units}", units
                    )
            elif set(units) != {region.num_units}:
                raise self._broken(index, f"children have {region.num_units} units", units)
        elif region.kind == "concat":
            if len(set(scopes)) != 1:
                raise self._broken(
                    index, "a concat's children have one scope (smooth)", region.children
                )
            if sum(units) != region.num_units:
                raise self._broken(index, f"{region.num_units} units in all", units)
        else:
            raise self._broken(index, "a kind that regions have", region.kind)
        if region.kind != "sum" and (region.blocks != 1 or region.strided):
            raise self._broken(index, "blocks belong to sums", f"{region.blocks} blocks")
        if region.kind != "input" and region.family is not None:
            raise self._broken(index, "a family belongs to inputs", region.family)
        own = [] if region.variable is None else [region.variable]
        self._scopes.append(frozenset(own).union(*scopes))

    def _broken(self, index: int, rule: str, found: object) -> StructureError:
        return StructureError(
            "a region graph breaks a rule",
            where=f"region {index} ({self.regions[index].kind})",
            found=found,
            expected=rule,
        )
