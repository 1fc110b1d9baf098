"""Questions about rows of a table: their likelihood, or what their missing cells may be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from distpc.artifacts.files import atomic_path
from distpc.circuits.circuit import Circuit
from distpc.data.spec import DatasetSpec
from distpc.errors import EvidenceError
from distpc.inference.evidence import check_values, column_name, is_missing
from distpc.inference.model import open_model
from distpc.inference.tables import read_rows, write_csv, write_npy

QUESTIONS = ("log_prob", "conditional")
ROWS_AT_ONCE = 256


def query_command(
    model_dir: Path, data_path: Path, what: str = "log_prob", out: Path | None = None
) -> None:
    """Answer `what` for every row of `data_path` (.npy or .csv, NaN or empty = missing).

    * log_prob: log-likelihood in nats of the values that are there, the missing ones summed out.
      .npy: (B,) float32; .csv: columns row, log_prob. Impossible rows have -inf.
    * conditional: the distribution of every missing categorical cell given the values that are
      there. .npy: (B, V, C) float32, one-hot where a value is there, NaN for real columns; .csv:
      columns row, column, value, probability for missing cells.

    Without `out` the lines of the .csv are printed.

    Raises:
        EvidenceError: an unknown question or suffix, or data that do not fit the model; bad cells
            are named by row and column.
        ModelFileError: the model cannot be read.
    """
    out = None if out is None else Path(out)
    if what not in QUESTIONS:
        raise EvidenceError(
            "an unknown question", where="what", found=what, expected=" or ".join(QUESTIONS)
        )
    if out is not None and out.suffix not in (".npy", ".csv"):
        raise EvidenceError(
            "the output is of an unknown kind",
            where=out,
            found=out.suffix or "no suffix",
            expected=".npy or .csv",
        )
    circuit, spec = open_model(Path(model_dir))
    x = check_values(read_rows(Path(data_path), spec), spec, data_path)
    if out is not None and out.suffix == ".npy":
        if what == "log_prob":
            write_npy(out, circuit.log_prob(x).cpu().numpy())
        else:
            _write_conditional_array(out, circuit, x)
    elif what == "log_prob":
        write_csv(out, ("row", "log_prob"), _log_prob_lines(circuit, x))
    else:
        header = ("row", "column", "value", "probability")
        write_csv(out, header, _conditional_lines(circuit, x, spec))


def conditionals(circuit: Circuit, x: torch.Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (b, V, C) float32) blocks of p(variable | the row's values).

    One-hot where the value is there; NaN for real variables, which have no categories, and for
    rows that are impossible under the circuit.
    """
    counts = circuit.num_categories
    variables = [v for v, count in enumerate(counts) if count is not None]
    width = max((count for count in counts if count is not None), default=0)
    if not variables:
        raise EvidenceError(
            "conditional needs categorical columns",
            found="real columns only",
            fix="ask for log_prob, or sample completions",
        )
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = x[start : start + ROWS_AT_ONCE]
        seen = ~is_missing(part)
        block = np.full((len(part), len(counts), width), np.nan, dtype=np.float32)
        # Nothing can be conditioned on the impossible: those rows stay NaN.
        possible = np.flatnonzero(torch.isfinite(circuit.log_prob(part)).cpu().numpy())
        if len(possible):
            answer = circuit.conditional(part[possible], seen[possible], variables)
            block[possible[:, None], variables] = answer.cpu().numpy()
        yield start, block


def _write_conditional_array(out: Path, circuit: Circuit, x: torch.Tensor) -> None:
    width = max((count for count in circuit.num_categories if count is not None), default=0)
    header = {
        "shape": (len(x), circuit.num_variables, width),
        "fortran_order": False,
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
    }
    # Block by block: the answer may be C times larger than the table that was asked about.
    with atomic_path(out) as partial, partial.open("wb") as handle:
        np.lib.format.write_array_header_2_0(handle, header)
        for _, block in conditionals(circuit, x):
            handle.write(block.tobytes())


def _log_prob_lines(circuit: Circuit, x: torch.Tensor) -> Iterator[tuple[int, str]]:
    for row, value in enumerate(circuit.log_prob(x).tolist()):
        yield row, f"{value:.9g}"


def _conditional_lines(
    circuit: Circuit, x: torch.Tensor, spec: DatasetSpec
) -> Iterator[tuple[int, str, int, str]]:
    for start, block in conditionals(circuit, x):
        missing = is_missing(x[start : start + len(block)]).numpy()
        for row, column in np.argwhere(missing).tolist():
            count = spec.num_categories[column]
            for value in range(count or 0):
                probability = f"{block[row, column, value]:.7g}"
                yield start + row, column_name(spec, column), value, probability
