"""Samples of a model as a picture grid, lines of text, or rows of values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distpc.artifacts.files import write_bytes
from distpc.circuits.circuit import Circuit
from distpc.data.spec import DatasetSpec
from distpc.data.tokenizers import Bytes, Tokenizer, tokenizer_of
from distpc.errors import EvidenceError
from distpc.inference.evidence import column_name
from distpc.inference.model import open_model
from distpc.inference.pictures import save_png, tile, to_pictures
from distpc.inference.tables import write_csv, write_npy


def draw_samples(circuit: Circuit, n: int, seed: int) -> np.ndarray:
    """(n, V) values drawn from the circuit; the same for the same seed."""
    values: np.ndarray = circuit.sample(n, seed=seed).cpu().numpy()
    return values


def sample_grid(values: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """One (height, width, 3) picture of (n, V) image values, laid out near a square."""
    return tile(to_pictures(values, spec), columns=max(1, math.ceil(math.sqrt(len(values)))))


def to_lines(
    values: np.ndarray, tokenizer: Tokenizer | None = None, end_token: int | None = None
) -> list[str]:
    """Texts of (n, V) tokens, a line each: control characters escaped, bad UTF-8 marked.

    Args:
        values: -1 where missing.
        tokenizer: of the tokens; default: bytes.
        end_token: the token that ends a document, and with it the line.
    """
    decode = (tokenizer or Bytes()).decode
    texts = (decode(_before(row[row >= 0].tolist(), end_token)) for row in values)
    return [
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        for text in texts
    ]


def _before(tokens: list[int], end_token: int | None) -> list[int]:
    return tokens[: tokens.index(end_token)] if end_token in tokens else tokens


def write_values(
    path: Path, values: np.ndarray, spec: DatasetSpec, tokenizer: Tokenizer | None = None
) -> None:
    """Write (n, V) values in the form that the path's suffix names: .png, .txt, .csv or .npy.

    Args:
        path: of the output.
        values: of samples.
        spec: of their data set.
        tokenizer: of text; default: bytes.

    Raises:
        EvidenceError: another suffix, .png of data that are no images, .txt of data that are no
            text.
    """
    if path.suffix == ".png":
        save_png(path, sample_grid(values, spec))
    elif path.suffix == ".npy":
        write_npy(path, values)
    elif path.suffix == ".csv":
        header = [column_name(spec, column) for column in range(spec.num_variables)]
        write_csv(path, header, _cells(values, spec))
    elif path.suffix == ".txt" and spec.kind == "text":
        write_lines(path, to_lines(values, tokenizer, spec.end_token))
    else:
        raise EvidenceError(
            "the output's suffix does not fit the model's data",
            where=path,
            found=path.suffix or "no suffix",
            expected={"image": ".png, .npy or .csv", "text": ".txt, .npy or .csv"}.get(
                spec.kind, ".csv or .npy"
            ),
        )


def _cells(values: np.ndarray, spec: DatasetSpec) -> Iterator[list[object]]:
    """Rows whose categories are whole numbers, whatever the array's type."""
    for row in values.tolist():
        yield [
            f"{value:.7g}" if count is None else int(value)
            for value, count in zip(row, spec.num_categories, strict=True)
        ]


def write_lines(path: Path, lines: list[str]) -> None:
    """Write lines of UTF-8 text, whole or not at all."""
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def sample_command(model_dir: Path, n: int, seed: int, out: Path) -> Path:
    """Draw `n` samples of the model in `model_dir` and write them to `out`.

    The suffix decides the form: .png (images), .txt (text), .csv or .npy.

    Raises:
        EvidenceError: n below one, or a suffix that does not fit the model's data.
        ModelFileError: the model cannot be read.
    """
    if n < 1:
        raise EvidenceError("too few samples are asked for", found=n, expected="at least 1")
    circuit, spec = open_model(Path(model_dir))
    tokenizer = tokenizer_of(spec, Path(model_dir)) if Path(out).suffix == ".txt" else None
    write_values(Path(out), draw_samples(circuit, n, seed), spec, tokenizer)
    return Path(out)
