"""Every induced tree of a small circuit: the choices of all its sums, and the values below them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import exact_weights


class Trees(NamedTuple):
    """N trees: log p(x, z) in float64, values (N, V) and latents (N, Z), -1 where there is none."""

    log_prob: Tensor
    x: Tensor
    latents: Tensor


def enumerate_trees(circuit: Circuit, x: Tensor, *, sum_out: bool = False) -> Trees:
    """All trees that agree with one row of evidence (V,), -1 for missing.

    Args:
        sum_out: sum missing values out instead of trying all of them; the trees are p(z) then.
    """
    weights = exact_weights(circuit)
    regions = circuit.graph.regions
    known: dict[tuple[int, int], Trees] = {}

    def of_input(index: int, unit: int) -> Trees:
        variable = regions[index].variable
        code = int(x[variable])
        codes = torch.arange(circuit.num_categories[variable]) if code < 0 else torch.tensor([code])
        logs = weights[index][unit, codes].log()
        if code < 0 and sum_out:
            codes, logs = torch.tensor([-1]), torch.zeros(1, dtype=torch.float64)
        values = torch.full((len(codes), len(x)), -1, dtype=torch.int8)
        values[:, variable] = codes.to(torch.int8)
        return Trees(
            logs, values, torch.full((len(codes), circuit.num_latents), -1, dtype=torch.int8)
        )

    def of(index: int, unit: int) -> Trees:
        if (index, unit) in known:
            return known[index, unit]
        region = regions[index]
        if region.kind == "input":
            found = of_input(index, unit)
        elif region.kind == "product":
            found = of(region.children[0], unit)
            for child in region.children[1:]:
                found = _cross(found, of(child, unit))
        elif region.kind == "kronecker":
            left, right = region.children
            units = regions[right].num_units
            found = _cross(of(left, unit // units), of(right, unit % units))
        elif region.kind == "concat":
            below = unit
            for child in region.children:
                if below < regions[child].num_units:
                    found = of(child, below)
                    break
                below -= regions[child].num_units
        else:
            parts = []
            for weight, child in zip(
                weights[index][unit], circuit.graph.mixed_units(index)[unit], strict=True
            ):
                part = of(region.children[0], int(child))
                parts.append(part._replace(log_prob=part.log_prob + weight.log()))
            found = Trees(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        if region.latent is not None:
            latents = found.latents.clone()
            latents[:, region.latent] = unit
            found = found._replace(latents=latents)
        known[index, unit] = found
        return found

    return of(circuit.graph.root, 0)


def _cross(left: Trees, right: Trees) -> Trees:
    """Every tree of `left` with every tree of `right`; they set different variables."""
    i = torch.arange(len(left.log_prob)).repeat_interleave(len(right.log_prob))
    j = torch.arange(len(right.log_prob)).repeat(len(left.log_prob))
    return Trees(
        left.log_prob[i] + right.log_prob[j],
        torch.maximum(left.x[i], right.x[j]),
        torch.maximum(left.latents[i], right.latents[j]),
    )
