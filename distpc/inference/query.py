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

OF_ROWS = ("log_prob", "conditional", "mpe", "expectation")
OF_MODEL = ("entropy", "mutual_information")
ROWS_AT_ONCE = 256


def query_command(
    model_dir: Path,
    data_path: Path | None = None,
    what: str = "log_prob",
    out: Path | None = None,
    num_samples: int = 1000,
    seed: int = 0,
) -> None:
    """Answer `what` for every row of `data_path` (.npy or .csv, NaN or empty = missing).

    * log_prob: log-likelihood in nats of the values that are there, the missing ones summed out.
      .npy: (B,) float32; .csv: columns row, log_prob. Impossible rows have -inf.
    * conditional: the distribution of every missing categorical cell given the values that are
      there. .npy: (B, V, C) float32, one-hot where a value is there, NaN for real columns; .csv:
      columns row, column, value, probability for missing cells.
    * mpe: the missing values that are most probable together with the latents. .npy: (B, V)
      values; .csv: a column for each variable, then log_prob, that of values and latents.
      Impossible rows stay as they are, with log_prob -inf.
    * expectation: mean and variance of every missing cell. .npy: (B, V, 2) float32, variance 0
      where a value is there; .csv: columns row, column, mean, variance for missing cells.

    Or, without data, for the model:

    * entropy: exact entropies, bounds and an estimate by `num_samples` samples of `seed`, in nats.
      .csv: columns quantity, nats.
    * mutual_information: of all pairs of variables, in nats. .npy: (V, V) float64, entropies on
      the diagonal; .csv: columns first, second, nats.

    Without `out` the lines of the .csv are printed.

    Raises:
        EvidenceError: an unknown question or suffix, data that a question needs or cannot use, or
            data that do not fit the model; bad cells are named by row and column.
        ModelFileError: the model cannot be read.
    """
    out = None if out is None else Path(out)
    _check_question(what, data_path, out)
    circuit, spec = open_model(Path(model_dir))
    as_array = out is not None and out.suffix == ".npy"
    if data_path is None:
        if what == "entropy":
            write_csv(out, ("quantity", "nats"), _entropy_lines(circuit, num_samples, seed))
        elif out is not None and as_array:
            write_npy(out, circuit.mutual_information().cpu().numpy())
        else:
            write_csv(out, ("first", "second", "nats"), _information_lines(circuit, spec))
        return
    x = check_values(read_rows(Path(data_path), spec), spec, data_path)
    if out is not None and as_array:
        _write_array(out, circuit, x, what)
    else:
        write_csv(out, *_lines(circuit, x, spec, what))


def _check_question(what: str, data_path: Path | None, out: Path | None) -> None:
    if what not in OF_ROWS + OF_MODEL:
        raise EvidenceError(
            "an unknown question",
            where="what",
            found=what,
            expected=" or ".join(OF_ROWS + OF_MODEL),
        )
    if out is not None and out.suffix not in (".npy", ".csv"):
        raise EvidenceError(
            "the output is of an unknown kind",
            where=out,
            found=out.suffix or "no suffix",
            expected=".npy or .csv",
        )
    if out is not None and what == "entropy" and out.suffix != ".csv":
        raise EvidenceError(
            "entropies have names", where=out, found=out.suffix, expected=".csv, or no --out"
        )
    if (data_path is None) != (what in OF_MODEL):
        raise EvidenceError(
            f"'{what}' is a question about " + ("the model" if what in OF_MODEL else "rows"),
            where="data",
            found=data_path,
            expected="none" if what in OF_MODEL else "a .npy or .csv file",
        )


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


def explanations(circuit: Circuit, x: torch.Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of the most probable (b, V) values and their (b,) log p(values, latents).

    Impossible rows keep their missing values, at -inf.
    """
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = x[start : start + ROWS_AT_ONCE].clone()
        possible = torch.isfinite(circuit.log_prob(part)).cpu()
        log_prob = torch.full((len(part),), -torch.inf, dtype=torch.float64)
        if possible.any():
            found = circuit.mpe(part[possible])
            part[possible] = found.x.cpu().to(part.dtype)
            log_prob[possible] = found.log_prob.cpu()
        yield part.numpy(), log_prob.numpy()


def moments(circuit: Circuit, x: torch.Tensor) -> Iterator[np.ndarray]:
    """(b, V, 2) float32 blocks of means and variances; NaN for impossible rows."""
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = x[start : start + ROWS_AT_ONCE]
        block = torch.full((*part.shape, 2), torch.nan)
        possible = torch.isfinite(circuit.log_prob(part)).cpu()
        if possible.any():
            block[possible] = torch.stack(circuit.expectation(part[possible]), dim=-1).cpu()
        yield block.numpy()


def _write_array(out: Path, circuit: Circuit, x: torch.Tensor, what: str) -> None:
    if what == "log_prob":
        write_npy(out, circuit.log_prob(x).cpu().numpy())
    elif what == "mpe":
        write_npy(out, np.concatenate([values for values, _ in explanations(circuit, x)]))
    elif what == "expectation":
        write_npy(out, np.concatenate(list(moments(circuit, x))))
    else:
        _write_conditional_array(out, circuit, x)


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


def _lines(
    circuit: Circuit, x: torch.Tensor, spec: DatasetSpec, what: str
) -> tuple[tuple[str, ...], Iterator[tuple[object, ...]]]:
    """Header and rows of an answer about rows."""
    if what == "log_prob":
        return ("row", "log_prob"), _log_prob_lines(circuit, x)
    if what == "mpe":
        names = [column_name(spec, column) for column in range(spec.num_variables)]
        return (*names, "log_prob"), _explanation_lines(circuit, x, spec)
    if what == "expectation":
        return ("row", "column", "mean", "variance"), _moment_lines(circuit, x, spec)
    header = ("row", "column", "value", "probability")
    return header, _conditional_lines(circuit, x, spec)


def _log_prob_lines(circuit: Circuit, x: torch.Tensor) -> Iterator[tuple[int, str]]:
    for row, value in enumerate(circuit.log_prob(x).tolist()):
        yield row, f"{value:.9g}"


def _explanation_lines(
    circuit: Circuit, x: torch.Tensor, spec: DatasetSpec
) -> Iterator[tuple[object, ...]]:
    for values, log_prob in explanations(circuit, x):
        missing = is_missing(torch.from_numpy(values)).numpy()
        for row, (cells, value) in enumerate(zip(values.tolist(), log_prob.tolist(), strict=True)):
            texts = [
                "" if missing[row, column] else f"{cell:.7g}" if count is None else int(cell)
                for column, (cell, count) in enumerate(zip(cells, spec.num_categories, strict=True))
            ]
            yield *texts, f"{value:.9g}"


def _moment_lines(
    circuit: Circuit, x: torch.Tensor, spec: DatasetSpec
) -> Iterator[tuple[object, ...]]:
    first = 0
    for block in moments(circuit, x):
        for row, column in np.argwhere(is_missing(x[first : first + len(block)]).numpy()).tolist():
            mean, variance = block[row, column]
            yield first + row, column_name(spec, column), f"{mean:.7g}", f"{variance:.7g}"
        first += len(block)


def _entropy_lines(circuit: Circuit, num_samples: int, seed: int) -> Iterator[tuple[str, str]]:
    found = circuit.entropy(num_samples, seed)
    yield "H(X, Z), upper bound", f"{found.joint:.9g}"
    yield "H(X | Z), lower bound", f"{found.given_latents:.9g}"
    if found.exact is not None:
        yield "H(X), exact", f"{found.exact:.9g}"
    if num_samples:
        yield "H(X), estimate", f"{found.estimate:.9g}"
        yield "standard error", f"{found.standard_error:.3g}"


def _information_lines(circuit: Circuit, spec: DatasetSpec) -> Iterator[tuple[str, str, str]]:
    pairs = circuit.mutual_information()
    for first in range(len(pairs)):
        for second in range(first + 1, len(pairs)):
            names = column_name(spec, first), column_name(spec, second)
            yield *names, f"{float(pairs[first, second]):.7g}"


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
