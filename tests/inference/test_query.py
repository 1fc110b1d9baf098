"""Likelihoods and conditionals of the rows of a file."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import log_prob_exact
from distpc.circuits.io import load_model, save_model
from distpc.errors import EvidenceError
from distpc.inference.query import query_command
from distpc.structures.region_graph import Region, RegionGraph

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


def test_most_probable_values_of_missing_cells(model_dir, rows, data_path, tmp_path):
    values = np.load(ask(model_dir, data_path, "mpe", tmp_path / "out.npy"))
    there = ~np.isnan(rows)
    assert (values[there] == rows[there]).all()
    found = load_model(model_dir).mpe(torch.from_numpy(rows))
    assert (values == found.x.numpy()).all()
    out = ask(model_dir, data_path, "mpe", tmp_path / "out.csv")
    with out.open(newline="") as handle:
        header, *lines = list(csv.reader(handle))
    assert header == [*map(str, range(64)), "log_prob"]
    assert np.array_equal(np.array(lines)[:, :64].astype(int), values)
    log_prob = [float(line[64]) for line in lines]
    assert log_prob == pytest.approx(found.log_prob.tolist(), abs=1e-5)


def test_expectations_of_missing_cells(model_dir, rows, data_path, tmp_path):
    both = np.load(ask(model_dir, data_path, "expectation", tmp_path / "out.npy"))
    p = np.load(ask(model_dir, data_path, "conditional", tmp_path / "p.npy")).astype(float)
    numbers = np.arange(17)
    mean = (p * numbers).sum(-1)
    assert both[..., 0] == pytest.approx(mean, abs=1e-3)
    variance = (p * (numbers - mean[..., None]) ** 2).sum(-1)
    assert both[..., 1] == pytest.approx(variance, abs=1e-3)
    out = ask(model_dir, data_path, "expectation", tmp_path / "out.csv")
    with out.open(newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == int(np.isnan(rows).sum())
    for line in lines[::31]:
        cell = both[int(line["row"]), int(line["column"])]
        assert [float(line["mean"]), float(line["variance"])] == pytest.approx(cell, rel=1e-5)


def test_rows_that_are_impossible_stay_unanswered(tmp_path):
    graph = RegionGraph(
        [
            Region("input", 1, variable=0),
            Region("input", 1, variable=1),
            Region("product", 1, (0, 1)),
        ],
        2,
    )
    circuit = Circuit(graph, [2, 3])
    circuit.statistics_of(0)[:] = torch.tensor([[1.0, 0.0]])
    circuit.statistics_of(1)[:] = torch.tensor([[0.25, 0.5, 0.25]])
    save_model(circuit, tmp_path / "model", dataset={}, training={})
    (tmp_path / "rows.csv").write_text("1,\n0,\n")
    found = ask(tmp_path / "model", tmp_path / "rows.csv", "mpe", tmp_path / "out.csv").read_text()
    assert found.splitlines()[1:] == ["1,,-inf", "0,1,-0.693147181"]
    both = np.load(
        ask(tmp_path / "model", tmp_path / "rows.csv", "expectation", tmp_path / "out.npy")
    )
    assert np.isnan(both[0]).all()
    assert both[1, 1] == pytest.approx([1.0, 0.5], abs=1e-6)


def test_questions_about_the_model(model_dir, tmp_path, capsys):
    query_command(model_dir, what="entropy", num_samples=200, seed=1)
    header, *lines = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert header == ["quantity", "nats"]
    values = {name: float(value) for name, value in lines}
    assert values["H(X | Z), lower bound"] < values["H(X), estimate"]
    assert values["H(X), estimate"] < values["H(X, Z), upper bound"]
    assert "H(X), exact" not in values
    query_command(model_dir, what="mutual_information", out=tmp_path / "pairs.npy")
    query_command(model_dir, what="mutual_information", out=tmp_path / "pairs.csv")
    pairs = np.load(tmp_path / "pairs.npy")
    assert pairs.shape == (64, 64)
    with (tmp_path / "pairs.csv").open(newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == 64 * 63 // 2
    for line in lines[::101]:
        cell = pairs[int(line["first"]), int(line["second"])]
        assert float(line["nats"]) == pytest.approx(cell, rel=1e-6)


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
        query_command(model_dir, data_path, "meaning", tmp_path / "out.npy")
    with pytest.raises(EvidenceError, match="question about the model"):
        query_command(model_dir, data_path, "entropy", tmp_path / "out.csv")
    with pytest.raises(EvidenceError, match="question about rows"):
        query_command(model_dir, None, "mpe", tmp_path / "out.npy")
    with pytest.raises(EvidenceError, match="entropies have names"):
        query_command(model_dir, None, "entropy", tmp_path / "out.npy")
    with pytest.raises(EvidenceError, match=r"\.npy or \.csv"):
        query_command(model_dir, data_path, "log_prob", tmp_path / "out.txt")
    assert not (tmp_path / "out.npy").exists()
