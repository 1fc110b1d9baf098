"""Distributions of variables given evidence: of each alone, or of a few jointly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpc.circuits.evidence import Evidence
from distpc.circuits.inputs import TableBank
from distpc.circuits.queries.batches import batches, collect, rows_at_once
from distpc.circuits.queries.flows import (
    BYTES_PER_UNIT,
    flows,
    readers,
    refuse_impossible,
    steps_of,
)
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

JOINT_CELLS = 2**26
"""Most probabilities in a joint conditional (256 MiB)."""


def conditional(
    circuit: Circuit,
    x: Any,
    observed: Any,
    variables: Sequence[int],
    batch_size: int | None = None,
) -> Tensor:
    """Distribution of each variable given the evidence.

    Args:
        circuit: the model.
        x: (B, V) values; those not observed are ignored.
        observed: bool (V,) or (B, V).
        variables: categorical variables to answer for.
        batch_size: rows evaluated at once; None: as many as fit into bounded memory.

    Returns:
        (B, len(variables), C) float32, C the largest number of categories among them; 0 beyond a
        variable's own categories. A variable that is observed has probability 1 at its value.

    Raises:
        EvidenceError: evidence of probability 0, or a variable that is real or unknown.
    """
    width = max((num_categories(circuit, v, "conditionals") for v in variables), default=0)
    blocks = conditional_blocks(circuit, x, observed, variables, batch_size)
    return collect(x, blocks, (0, len(variables), width))


def conditional_blocks(
    circuit: Circuit,
    x: Any,
    observed: Any,
    variables: Sequence[int],
    batch_size: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """As `conditional`, batch after batch with the number of its first row: all of it may be far
    larger than x."""
    tables = Conditionals(circuit, variables)
    for start, evidence in batches(circuit, x, observed, batch_size or tables.rows_at_once):
        log_probs, block = tables(evidence)
        refuse_impossible(log_probs, start)
        yield start, block


class Conditionals:
    """p(variable | evidence) of some categorical variables, for one batch after another.

    Attributes:
        rows_at_once: rows that fit into bounded memory.
    """

    def __init__(self, circuit: Circuit, variables: Sequence[int]) -> None:
        self.circuit = circuit
        self.variables = variables
        self.sizes = [num_categories(circuit, v, "conditionals") for v in variables]
        self.width = max(self.sizes, default=0)
        self.readers = readers(circuit, variables)
        self.steps = steps_of(self.readers)
        weights = {
            bank: bank.weights() for bank in circuit.bank_list if isinstance(bank, TableBank)
        }
        self.tables: dict[int, Tensor] = {}
        for reader in (reader for found in self.readers.values() for reader in found):
            bank, table = circuit.bank_of(reader.region)
            assert isinstance(bank, TableBank)
            self.tables[reader.region] = weights[bank][bank.table(table)]
        cells = 4 * len(variables) * self.width
        self.rows_at_once = rows_at_once(circuit, BYTES_PER_UNIT, cells)

    def __call__(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Log-likelihoods (B,), and (B, len(variables), C); zeros for impossible rows."""
        log_probs, step_flows = flows(self.circuit, evidence, self.steps)
        shape = (len(log_probs), len(self.variables), self.width)
        result = torch.zeros(shape, device=self.circuit.device)
        for position, (variable, size) in enumerate(zip(self.variables, self.sizes, strict=True)):
            total = result[:, position, :size]
            for reader in self.readers[variable]:
                total += step_flows[reader.step][reader.row] @ self.tables[reader.region].T
            # Rounding in a long backward pass leaves the sum a little off one.
            total /= total.sum(-1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
            codes = evidence.codes[variable]
            is_observed = (codes >= 0).nonzero()[:, 0]
            total[is_observed] = 0.0
            total[is_observed, codes[is_observed]] = 1.0
        return log_probs, result


def conditional_joint(
    circuit: Circuit,
    x: Any,
    observed: Any,
    variables: Sequence[int],
    batch_size: int | None = None,
) -> Tensor:
    """Joint distribution of several variables given the evidence.

    All values of all but the largest of them are tried as evidence, and answered with the
    conditional of the largest one: p(q, last | e) is proportional to p(e, q) p(last | e, q).

    Args:
        circuit, x, observed, batch_size: as for `conditional`.
        variables: different categorical variables, at least one.

    Returns:
        (B, C1, ..., Cn) float32 that sums to 1 for each row; where one of the variables is
        observed, only its value has probability.

    Raises:
        EvidenceError: more than `JOINT_CELLS` probabilities, evidence of probability 0, or
            variables that are real, unknown, repeated or none.
    """
    sizes = [num_categories(circuit, variable, "joint conditionals") for variable in variables]
    if not sizes or len(set(variables)) != len(variables):
        raise EvidenceError(
            "a joint conditional is over different variables",
            where="variables",
            found=list(variables),
            expected="at least one, each once",
        )
    cells = math.prod(sizes)
    _refuse_large(len(x) if hasattr(x, "__len__") else 1, sizes)
    last = max(range(len(sizes)), key=sizes.__getitem__)
    others = [position for position in range(len(sizes)) if position != last]
    tables = Conditionals(circuit, [variables[last]])
    others_sizes = [sizes[position] for position in others]
    # Axes as the values are tried: the others, then the last; and back to the order asked for.
    back = [0, *(1 + [*others, last].index(position) for position in range(len(sizes)))]
    bytes_more = 16 * cells
    size = batch_size or rows_at_once(circuit, BYTES_PER_UNIT, bytes_more)

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for start, evidence in batches(circuit, x, observed, size):
            refuse_impossible(circuit.evaluate(evidence).log_prob.detach(), start)
            fixed = [variables[position] for position in others]
            joint = _joint(tables, evidence, fixed, others_sizes)
            yield start, joint.view(-1, *others_sizes, sizes[last]).permute(back)

    return collect(x, blocks(), (0, *sizes))


def _joint(tables: Conditionals, evidence: Evidence, fixed: list[int], sizes: list[int]) -> Tensor:
    """(B, product of sizes, C) p(fixed, variable of `tables` | evidence)."""
    batch = evidence.codes.shape[1]
    count = math.prod(sizes)
    logs = torch.empty(batch, count, dtype=torch.float64, device=evidence.codes.device)
    shares = torch.empty(batch, count, tables.width, device=evidence.codes.device)
    per_pass = max(1, tables.rows_at_once // max(1, batch))
    for first in range(0, count, per_pass):
        flat = torch.arange(first, min(first + per_pass, count), device=logs.device)
        # Every row with each of these values: row b, value i at b * len(flat) + i.
        rows = torch.arange(batch, device=logs.device).repeat_interleave(len(flat))
        tried = evidence.select(rows)
        contradicts = torch.zeros(len(rows), dtype=torch.bool, device=logs.device)
        values = flat
        for variable, size in zip(reversed(fixed), reversed(sizes), strict=True):
            value = (values % size).repeat(batch)
            seen = tried.codes[variable]
            contradicts |= (seen >= 0) & (seen != value)
            tried.codes[variable] = value
            values = values // size
        log_probs, block = tables(tried)
        log_probs = torch.where(contradicts, -torch.inf, log_probs.double())
        logs[:, flat] = log_probs.view(batch, -1)
        shares[:, flat] = block.view(batch, len(flat), -1)
    weights = torch.softmax(logs, dim=1).float()
    return shares.mul_(weights.unsqueeze(-1))


def _refuse_large(rows: int, sizes: list[int]) -> None:
    cells = rows * math.prod(sizes)
    if cells > JOINT_CELLS:
        raise EvidenceError(
            "a joint conditional is too large",
            where="variables",
            found=f"{rows} rows x {' x '.join(map(str, sizes))} = {cells:,} probabilities",
            expected=f"at most {JOINT_CELLS:,}",
            fix="ask for fewer variables, or for fewer rows at a time",
        )


def num_categories(circuit: Circuit, variable: int, what: str) -> int:
    """C of a categorical variable.

    Raises:
        EvidenceError: it is real or unknown, so that there is no table `what` could be.
    """
    known = 0 <= variable < circuit.num_variables
    size = circuit.num_categories[variable] if known else None
    if size is None:
        raise EvidenceError(
            f"{what} are tables over categories",
            where=f"variable {variable}",
            found="a real variable" if known else "no such variable",
            expected=f"a categorical variable among 0 .. {circuit.num_variables - 1}",
        )
    return size
