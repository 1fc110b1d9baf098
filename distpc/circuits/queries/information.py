"""Mutual information of pairs of variables, from their exact pair marginals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distpc.circuits.queries.conditional import Conditionals, num_categories
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


@torch.no_grad()
def mutual_information(
    circuit: Circuit, variables: Sequence[int] | None = None, batch_size: int | None = None
) -> Tensor:
    """I(X_i; X_j) in nats of all pairs of variables.

    A pair's marginal is p(i = c) p(j | i = c): with each value of each variable as evidence in
    turn, one backward pass gives the conditionals of all the others, and

        I(i; j) = sum_c p(i = c) KL(p(j | i = c) || p(j)).

    Takes as many rows of evidence as the variables have categories in all; only a few of them are
    held at once. The two orders of a pair differ by rounding and are averaged.

    Args:
        circuit: the model.
        variables: categorical variables; None: all of them.
        batch_size: rows evaluated at once; None: as many as fit into bounded memory.

    Returns:
        (n, n) float64, symmetric; the diagonal holds the entropies.

    Raises:
        EvidenceError: a real variable (the mutual information of mixtures of densities has no
            closed form), an unknown or a repeated one.
    """
    asked = list(range(circuit.num_variables)) if variables is None else list(variables)
    sizes = [num_categories(circuit, variable, "pair marginals") for variable in asked]
    if len(set(asked)) != len(asked):
        raise EvidenceError(
            "a variable is named twice", where="variables", found=asked, expected="each once"
        )
    result = torch.zeros(len(asked), len(asked), dtype=torch.float64, device=circuit.device)
    if not asked:
        return result
    tables = Conditionals(circuit, asked)
    _, marginals = tables(circuit.reader.missing(1, circuit.device))
    marginals = marginals[0].double()
    position = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    value = torch.cat([torch.arange(size) for size in sizes])
    position, value = position.to(circuit.device), value.to(circuit.device)
    # A category that never occurs is no evidence, and adds nothing.
    occurs = marginals[position, value] > 0
    position, value = position[occurs], value[occurs]
    # The divergences take four float64 copies of a block.
    cells = 32 * len(asked) * tables.width
    rows = batch_size or max(1, min(tables.rows_at_once, 2**28 // cells))
    of_variables = torch.tensor(asked, device=circuit.device)
    for part, values in zip(position.split(rows), value.split(rows), strict=True):
        evidence = circuit.reader.missing(len(part), circuit.device)
        evidence.codes[of_variables[part], torch.arange(len(part), device=part.device)] = values
        _, block = tables(evidence)
        weights = marginals[part, values].unsqueeze(1)
        result.index_add_(0, part, weights * _divergence(block.double(), marginals))
    return ((result + result.T) / 2).clamp_min_(0.0)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of (..., C); 0 log 0 is 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
