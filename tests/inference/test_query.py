"""Likelihoods and conditionals of the rows of a file."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch

from distpc.circuits.exact import log_prob_exact
from distpc.circuits.io import load_model
from distpc.errors import EvidenceError
from distpc.inference.query import query_command

from .conftest import load_split


@pytest.fixture(scope="module")
def rows(digits_run):
    """(5, 64) floats with missing cells: none in row 0, all in row 4."""
    x = load_split(digits_run, "test")[:5].numpy().astype(float)
    x[1:4][np.random.default_rng(0).random((3, 64)) < 0.3] = np.nan
    x[4] = np.nan
    return x


@pytest.fixture
def data_path(rows, tmp_path):
    np.save(tmp_path / "rows.npy", rows)
    return tmp_path / "rows.npy"


def ask(model_dir, data_path, what, out):
    query_command(model_dir, data_path, what=what, out=out)
    return out


def exact(model_dir, rows):
    x = torch.from_numpy(np.where(np.isnan(rows), 0, rows)).long()
    observed = torch.from_numpy(~np.isnan(rows))
    return np.asarray(log_prob_exact(load_model(model_dir), x, observed, None))


def test_missing_cells_are_summed_out(model_dir, rows, data_path, tmp_path):
    found = np.load(ask(model_dir, data_path, "log_prob", tmp_path / "out.npy"))
    assert found == pytest.approx(exact(model_dir, rows), abs=1e-3)
    assert found[4] == pytest.approx(0.0, abs=1e-4)


def test_csv_in_and_out(model_dir, rows, data_path, tmp_path):
    lines = [",".join("" if np.isnan(v) else str(int(v)) for v in row) for row in rows]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    out = ask(model_dir, tmp_path / "rows.csv", "log_prob", tmp_path / "out.csv")
    with out.open(newline="") as handle:
        found = list(csv.DictReader(handle))
    assert [line["row"] for line in found] == list("01234")
    values = [float(line["log_prob"]) for line in found]
    assert values == pytest.approx(exact(model_dir, rows), abs=1e-3)


def test_conditionals_of_missing_cells(model_dir, rows, data_path, tmp_path):
    p = np.load(ask(model_dir, data_path, "conditional", tmp_path / "out.npy"))
    assert p.shape == (5, 64, 17)
    assert p.sum(-1) == pytest.approx(np.ones((5, 64)), abs=1e-4)
    there = ~np.isnan(rows)
    assert (p[there].argmax(-1) == rows[there]).all()
    assert (p[there].max(-1) == 1).all()
    column = int(np.flatnonzero(np.isnan(rows[2]))[3])
    trials = np.repeat(rows[2:3], 17, axis=0)
    trials[:, column] = np.arange(17)
    expected = np.exp(exact(model_dir, trials) - exact(model_dir, rows[2:3]))
    assert p[2, column] == pytest.approx(expected, abs=1e-5)


def test_without_a_file_the_lines_are_printed(model_dir, rows, data_path, capsys):
    query_command(model_dir, data_path)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "row,log_prob"
    assert float(lines[0].split(",")[1]) == pytest.approx(exact(model_dir, rows)[0], abs=1e-3)


def test_a_closed_pipe_is_no_error(model_dir, data_path, tmp_path):
    np.save(tmp_path / "empty.npy", np.full((64, 64), np.nan))
    code = (
        "import sys; from distpc.inference.query import query_command as ask\n"
        "ask(sys.argv[1], sys.argv[2], 'conditional')"
    )
    command = [sys.executable, "-c", code, str(model_dir), str(tmp_path / "empty.npy")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"row,column,value,probability\n"
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait() == 0, errors
    assert "BrokenPipe" not in errors


def test_conditionals_as_lines(model_dir, rows, data_path, tmp_path):
    p = np.load(ask(model_dir, data_path, "conditional", tmp_path / "out.npy"))
    out = ask(model_dir, data_path, "conditional", tmp_path / "out.csv")
    with out.open(newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == int(np.isnan(rows).sum()) * 17
    for line in lines[::97]:
        cell = int(line["row"]), int(line["column"]), int(line["value"])
        assert float(line["probability"]) == pytest.approx(float(p[cell]), abs=1e-6)


def test_refusals_name_the_cell(model_dir, rows, data_path, tmp_path):
    bad = rows.copy()
    bad[3, 7] = 17
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(EvidenceError, match="row 3, column 7"):
        query_command(model_dir, tmp_path / "bad.npy", "log_prob", tmp_path / "out.npy")
    with pytest.raises(EvidenceError, match="log_prob or conditional"):
        query_command(model_dir, data_path, "entropy", tmp_path / "out.npy")
    with pytest.raises(EvidenceError, match=r"\.npy or \.csv"):
        query_command(model_dir, data_path, "log_prob", tmp_path / "out.txt")
    assert not (tmp_path / "out.npy").exists()
