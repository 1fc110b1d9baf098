"""The evaluate stage: exact figures of every split, samples and completions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distpc.artifacts.files import write_json
from distpc.artifacts.stage import StageContext
from distpc.circuits.circuit import Circuit
from distpc.circuits.integral.io import load_networks
from distpc.data.index import ShardIndex
from distpc.data.reader import iterate_split
from distpc.data.spec import DatasetSpec
from distpc.data.tokenizers import tokenizer_of
from distpc.inference.inpaint import Completions, complete, completion_grid, first_samples
from distpc.inference.integral import measure_states
from distpc.inference.likelihood import SplitFigures, measure
from distpc.inference.masks import observed_mask
from distpc.inference.model import open_model
from distpc.inference.pictures import save_png
from distpc.inference.report import peak_memory_bytes
from distpc.inference.sample import draw_samples, sample_grid, to_lines, write_values
from distpc.inference.streaming import can_stream, measure_documents

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
COMPLETIONS = 4
COMPLETION_MASKS = ("right", "bottom", "centre")


def run(ctx: StageContext) -> None:
    """Evaluate the fine-tuned model: evaluation.json, and pictures or a file of samples.

    Every sample of valid and test is evaluated exactly once, of train at most
    evaluate.max_train_samples (the number stands in the result). Images get samples.png and
    completions.png, text samples.txt, arrays samples.csv. The figures also go to TensorBoard and
    into the stage's metadata.
    """
    circuit, spec = open_model(ctx.input("finetune").path / "model")
    index = ShardIndex.load(ctx.input("index").path)
    batch_size = ctx.config.evaluate.batch_size
    figures = {
        split: measure(
            circuit,
            index,
            split,
            batch_size=batch_size,
            limit=ctx.config.evaluate.max_train_samples if split == "train" else None,
        )
        for split in SPLITS
        if index.num_samples(split)
    }
    result = {
        "format_version": FORMAT_VERSION,
        "dataset": spec.name,
        "unit": spec.unit,
        "caveat": spec.caveat,
        "num_parameters": circuit.num_parameters,
        **_headline(figures, spec),
        "splits": {split: value.to_json() for split, value in figures.items()},
    }
    if spec.kind == "text":
        result.update(_of_documents(ctx, circuit, index))
    if ctx.config.integral.enabled:
        networks = load_networks(ctx.input("finetune").path / "model")
        states = [networks.num_states, *ctx.config.integral.evaluate_states]
        result["integral"] = measure_states(networks, index, states, batch_size=batch_size)
    with _open_tensorboard(ctx) as writer:
        for split, value in figures.items():
            writer.add_scalar(f"evaluate/{split}_{spec.unit}", value.bits, 0)
            writer.add_scalar(f"evaluate/{split}_non_finite", value.num_non_finite, 0)
        if spec.caveat:
            writer.add_text("evaluate/caveat", f"All figures are {spec.caveat}.", 0)
        _show(ctx, circuit, spec, index, writer)
    write_json(ctx.out / "evaluation.json", result)
    ctx.metadata.update(result, peak_memory_bytes=peak_memory_bytes())


def _of_documents(ctx: StageContext, circuit: Circuit, index: ShardIndex) -> dict[str, Any]:
    """Figures of the test split's whole documents, and bits per character of tokens."""
    spec, shards = index.spec, ctx.input("shards").path
    found: dict[str, Any] = {}
    split = "test" if index.num_samples("test") else "valid"
    if can_stream(circuit, shards):
        streamed = measure_documents(circuit, index, shards, split)
        found[f"{split}_{spec.unit}_documents"] = streamed["bits"]
        found[f"{split}_documents"] = streamed["num_documents"]
    if spec.tokens == "tokens":
        tokenizer = tokenizer_of(spec, shards)
        tokens = characters = 0
        for batch in iterate_split(index, spec, split, ctx.config.evaluate.batch_size):
            rows = [row[row >= 0] for row in batch]
            tokens += sum(map(len, rows))
            characters += sum(len(tokenizer.decode(_text(row, spec))) for row in rows)
        found[f"{split}_characters_per_token"] = characters / max(tokens, 1)
    return found


def _text(row: np.ndarray, spec: DatasetSpec) -> list[int]:
    """A chunk's tokens without the one that ends a document."""
    kept: list[int] = row[row != spec.end_token].tolist()
    return kept


def _headline(figures: dict[str, SplitFigures], spec: DatasetSpec) -> dict[str, Any]:
    """train_bpd and so on; for text also the perplexity of a character or token."""
    headline: dict[str, Any] = {
        f"{split}_{spec.unit}": figures[split].bits if split in figures else None
        for split in SPLITS
    }
    test = figures.get("test")
    headline[f"test_{spec.unit}_standard_error"] = test.bits_standard_error if test else None
    headline["test_non_finite"] = test.num_non_finite if test else None
    if spec.kind == "text" and test:
        headline["perplexity"] = 2**test.bits if math.isfinite(test.bits) else test.bits
    return headline


def _show(
    ctx: StageContext,
    circuit: Circuit,
    spec: DatasetSpec,
    index: ShardIndex,
    writer: SummaryWriter,
) -> None:
    """Samples and, for images, completions: as files and in TensorBoard."""
    seed, count = ctx.config.seed, ctx.config.evaluate.num_pictures
    values = draw_samples(circuit, count, seed)
    if spec.image_shape is None:
        suffix = "txt" if spec.kind == "text" else "csv"
        is_text = spec.kind == "text"
        tokenizer = tokenizer_of(spec, ctx.input("shards").path) if is_text else None
        write_values(ctx.out / f"samples.{suffix}", values, spec, tokenizer)
        if is_text:
            lines = to_lines(values, tokenizer, spec.end_token)
            writer.add_text("evaluate/samples", "\n\n".join(lines), 0)
        return
    grids = {"samples": sample_grid(values, spec)}
    completions = _completions(ctx, circuit, spec, index)
    if completions is not None:
        grids["completions"] = completion_grid(completions, spec)
    for name, grid in grids.items():
        save_png(ctx.out / f"{name}.png", grid)
        writer.add_image(f"evaluate/{name}", grid, 0, dataformats="HWC")


def _completions(
    ctx: StageContext, circuit: Circuit, spec: DatasetSpec, index: ShardIndex
) -> Completions | None:
    """Completions of the first test images, whose right, lower or middle part is hidden.

    Images whose visible part is impossible under the circuit have none and are left out.
    """
    count = math.ceil(ctx.config.evaluate.num_pictures / COMPLETIONS)
    split = "test" if index.num_samples("test") else "valid"
    x = first_samples(index, split, count)
    masks = [COMPLETION_MASKS[i % len(COMPLETION_MASKS)] for i in range(len(x))]
    observed = torch.stack([observed_mask(mask, spec) for mask in masks])
    possible = torch.isfinite(circuit.log_prob(x, observed=observed)).cpu()
    if not possible.any():
        return None
    return complete(circuit, x[possible], observed[possible], COMPLETIONS, ctx.config.seed)


def _open_tensorboard(ctx: StageContext) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    folder = ctx.tensorboard / "evaluate"
    # A repeated evaluation replaces what an earlier one showed.
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    return SummaryWriter(log_dir=str(folder))
