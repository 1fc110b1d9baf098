"""The evaluate stage on real shards: figures, impossible samples, files, TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distpc.artifacts import read_json
from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import log_prob_exact
from distpc.circuits.io import load_model
from distpc.data.spec import DatasetSpec
from distpc.inference import evaluate
from distpc.inference.likelihood import bits_and_error
from distpc.inference.pictures import tile_size, to_pictures

from .conftest import config_of, context, load_split, make_run


@pytest.fixture(scope="module")
def evaluation(digits_run: Path) -> dict:
    return read_json(digits_run / "evaluate" / "evaluation.json")


def exact_nats(circuit: Circuit, x: torch.Tensor) -> np.ndarray:
    return np.asarray(log_prob_exact(circuit, x, None, None))


def test_figures_equal_the_exact_evaluator(digits_run, model_dir, evaluation):
    circuit = load_model(model_dir)
    for split in ("valid", "test"):
        x = load_split(digits_run, split)
        nats = exact_nats(circuit, x)
        bpd = -nats.sum() / (math.log(2) * x.numel())
        error = (nats / math.log(2) / 64).std(ddof=1) / math.sqrt(len(nats))
        assert evaluation[f"{split}_bpd"] == pytest.approx(bpd, abs=1e-5)
        figures = evaluation["splits"][split]
        assert figures["bits_standard_error"] == pytest.approx(error, rel=1e-4)
        assert figures["num_samples"] == figures["num_samples_in_split"] == len(x)
        assert figures["num_values"] == x.numel()


def test_every_split_is_counted_whole(digits_run, evaluation):
    counts = {name: split["num_samples"] for name, split in evaluation["splits"].items()}
    assert sum(counts.values()) == 1797
    assert counts == {s: len(load_split(digits_run, s)) for s in ("train", "valid", "test")}
    assert evaluation["test_non_finite"] == 0
    assert 1.5 < evaluation["test_bpd"] < 2.5


def test_train_may_be_a_stated_number_of_samples(digits_run, digits_config, tmp_path):
    few = digits_config.evaluate.model_copy(update={"max_train_samples": 150})
    config = digits_config.model_copy(update={"evaluate": few})
    ctx = context(digits_run, config, "evaluate", "shards", "index", "finetune")
    ctx.out = tmp_path
    ctx.tensorboard = tmp_path / "tb"
    evaluate.run(ctx)
    train = ctx.metadata["splits"]["train"]
    assert (train["num_samples"], train["num_samples_in_split"]) == (150, 1437)
    nats = exact_nats(
        load_model(digits_run / "finetune" / "model"), load_split(digits_run, "train")
    )
    assert train["nats_per_sample"] == pytest.approx(nats[:150].mean(), abs=1e-3)


def test_pictures_open_with_the_right_size(digits_run):
    sizes = {"samples": tile_size(12, 4, 8, 8), "completions": tile_size(21, 7, 8, 8, headers=True)}
    for name, size in sizes.items():
        with Image.open(digits_run / "evaluate" / f"{name}.png") as picture:
            assert (picture.height, picture.width) == size
            assert picture.mode == "RGB"


def test_tensorboard_shows_figures_and_pictures(digits_run, evaluation):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(digits_run / "tb" / "evaluate"))
    events.Reload()
    assert events.Scalars("evaluate/test_bpd")[0].value == pytest.approx(evaluation["test_bpd"])
    assert set(events.Tags()["images"]) == {"evaluate/samples", "evaluate/completions"}


def test_an_impossible_test_sample_makes_the_figure_infinite(digits_run, model_dir, tmp_path):
    from distpc.circuits.io import save_model

    config = config_of({"kind": "digits"})
    circuit = load_model(model_dir)
    circuit.set_smoothing(0.0, 0.0, 1437)
    x = load_split(digits_run, "test")
    with torch.no_grad():
        for number, region in enumerate(circuit.graph.regions):
            if region.kind == "input" and region.variable == 27:
                circuit.statistics_of(number)[:, int(x[0, 27])] = 0
    save_model(circuit, tmp_path / "model", dataset=circuit.dataset, training={})
    ctx = context(digits_run, config, "evaluate", "shards", "index", "finetune")
    ctx.inputs["finetune"] = type(ctx.inputs["finetune"])(tmp_path, "finetune", "f", 1.0)
    ctx.out, ctx.tensorboard = tmp_path / "out", tmp_path / "tb"
    ctx.out.mkdir()
    evaluate.run(ctx)
    result = read_json(ctx.out / "evaluation.json")
    assert result["test_bpd"] == math.inf
    assert result["test_bpd_standard_error"] is None
    affected = int((x[:, 27] == x[0, 27]).sum())
    assert result["test_non_finite"] == affected > 0
    assert len(result["splits"]["test"]["non_finite_keys"]) == min(affected, 20)
    assert result["splits"]["test"]["num_samples"] == len(x)


def test_missing_values_are_not_counted(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 3, (400, 1)) * np.ones((1, 5)) + (rng.random((400, 5)) < 0.1)
    table[rng.random(table.shape) < 0.2] = np.nan
    np.save(tmp_path / "table.npy", table)
    config = config_of({"kind": "arrays", "path": str(tmp_path / "table.npy"), "num_categories": 4})
    run = make_run(tmp_path / "run", config, 4)
    ctx = context(run, config, "evaluate", "shards", "index", "finetune")
    evaluate.run(ctx)
    x = load_split(run, "test")
    nats = exact_nats(load_model(run / "finetune" / "model"), x)
    observed = int((x >= 0).sum())
    assert observed < x.numel()
    assert ctx.metadata["splits"]["test"]["num_values"] == observed
    expected = -nats.sum() / (math.log(2) * observed)
    assert ctx.metadata["test_bpd"] == pytest.approx(expected, abs=1e-5)
    header, *rows = (run / "evaluate" / "samples.csv").read_text().splitlines()
    assert len(header.split(",")) == 5
    assert len(rows) == config.evaluate.num_pictures


def test_text_has_bits_per_character_and_samples_as_lines(tmp_path):
    text = "the cat sat on the mat à côté and the dog sat on the log. "
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(text[number:] + text * 4)
    config = config_of({"kind": "text", "path": str(tmp_path), "chunk_length_bytes": 8})
    run = make_run(tmp_path / "run", config, 3)
    ctx = context(run, config, "evaluate", "shards", "index", "finetune")
    evaluate.run(ctx)
    bpc = ctx.metadata["test_bpc"]
    x = load_split(run, "test")
    nats = exact_nats(load_model(run / "finetune" / "model"), x)
    characters = sum(len(bytes(row[row >= 0].tolist()).decode(errors="ignore")) for row in x)
    starts = int(((x >= 0) & ((x & 0xC0) != 0x80)).sum())
    # A chunk's end may cut a character: it counts where it starts.
    assert characters <= starts < int((x >= 0).sum())
    assert ctx.metadata["splits"]["test"]["num_values"] == starts
    assert bpc == pytest.approx(-nats.sum() / math.log(2) / starts, abs=1e-4)
    assert 0 < bpc < 8
    assert ctx.metadata["perplexity"] == pytest.approx(2**bpc)
    assert "test_bpd" not in ctx.metadata
    lines = (run / "evaluate" / "samples.txt").read_text().splitlines()
    assert len(lines) == config.evaluate.num_pictures
    assert DatasetSpec.load(run / "shards").kind == "text"


def test_colour_images_in_lossless_ycocg(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(120):
        colour = rng.integers(0, 256, 3)
        pixels = (colour + rng.integers(-20, 20, (6, 4, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    source = {"kind": "image_folder", "path": str(tmp_path / "images"), "mode": "rgb"}
    config = config_of(source, color="ycocg_r")
    run = make_run(tmp_path / "run", config, 3)
    ctx = context(run, config, "evaluate", "shards", "index", "finetune")
    evaluate.run(ctx)
    assert 0 < ctx.metadata["test_bpd"] < 9
    assert ctx.metadata["splits"]["test"]["num_values"] == 12 * 6 * 4 * 3
    with Image.open(run / "evaluate" / "completions.png") as picture:
        assert (picture.height, picture.width) == tile_size(21, 7, 6, 4, headers=True)
        cell = np.asarray(picture)[20:-2, 2:]
    x = load_split(run, "test")[:1]
    shown = to_pictures(x.numpy(), DatasetSpec.load(run / "shards"))[0]
    assert np.array_equal(cell[4 : 6 * 8 : 8, 4 : 4 * 8 : 8], shown)


def test_real_and_categorical_columns_together(tmp_path):
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 300)
    lines = ["kind,size,flag"]
    for row in range(300):
        size = "" if row % 7 == 0 else f"{group[row] * 2 + rng.normal() / 4:.3f}"
        lines.append(f"{group[row]},{size},{int(group[row] > 0)}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    config = config_of({"kind": "arrays", "path": str(tmp_path / "table.csv")})
    run = make_run(tmp_path / "run", config, 10)
    ctx = context(run, config, "evaluate", "shards", "index", "finetune")
    evaluate.run(ctx)
    x = load_split(run, "test")
    nats = exact_nats(load_model(run / "finetune" / "model"), x)
    bpd = -nats.sum() / math.log(2) / int((~x.isnan()).sum())
    assert ctx.metadata["test_bpd"] == pytest.approx(bpd, abs=1e-4)
    header, first, *_ = (run / "evaluate" / "samples.csv").read_text().splitlines()
    assert header == "kind,size,flag"
    kind, size, flag = first.split(",")
    assert kind in "012" and flag in "01" and math.isfinite(float(size))


def test_the_standard_error_is_that_of_a_ratio():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 10, (2000, 50))
    nats = -counts * 1.3 + rng.normal(0, 1, counts.shape) * np.sqrt(counts)
    figures = [bits_and_error(nats[i], counts[i]) for i in range(len(nats))]
    spread = np.std([figure for figure, _ in figures])
    errors = np.mean([error for _, error in figures])
    assert errors == pytest.approx(spread, rel=0.05)
