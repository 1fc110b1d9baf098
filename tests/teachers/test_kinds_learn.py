"""Every kind that is trained here explains what a constant prediction cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distpc.artifacts import Artifact, StageContext
from distpc.config import RunConfig
from distpc.data import index, shards
from distpc.parallel.mesh import Mesh
from distpc.teachers import load_teacher, train
from distpc.teachers.patch_nets import logistic_mixture_log_prob

ContextMaker = Callable[..., StageContext]
CODER = {"width": 32, "encoder_blocks": 1, "batch_size": 32, "learning_rate": 3e-3}
ATTENTION = {"width": 32, "num_heads": 2, "batch_size": 32, "learning_rate": 3e-3}
WORDS = "the quick brown fox jumps over the lazy dog and the cat sat on the mat by the door"


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.mark.parametrize(
    ("kind", "section", "explained"),
    [
        ("vqvae", {**CODER, "code_width": 8, "num_codes": 24, "num_epochs": 8}, 0.03),
        ("vae", {**CODER, "feature_width": 8, "num_epochs": 6}, 0.05),
        ("data2vec", {**ATTENTION, "num_blocks": 2, "num_epochs": 4}, 0.3),
    ],
)
def test_images(
    make_context: ContextMaker, kind: str, section: dict[str, Any], explained: float
) -> None:
    ctx = make_context({"kind": kind, kind: section})
    train.train_rank(ctx.to_json(), Mesh.from_environment())
    train.run(ctx)
    teacher = load_teacher(ctx.out)
    assert teacher.kind == kind
    figures = ctx.metadata
    assert figures["explained"] > explained


@pytest.mark.parametrize(
    ("kind", "sees", "more", "explained"),
    [
        ("causal_lm", "suffix", {"num_epochs": 12}, 0.25),
        # Hidden tokens are few, and the beginning is slow.
        (
            "masked_lm",
            "both",
            {
                "num_epochs": 30,
                "learning_rate": 6e-3,
                "mask_ratio_min": 0.1,
                "mask_ratio_max": 0.2,
            },
            0.06,
        ),
    ],
)
def test_text(tmp_path: Path, kind: str, sees: str, more: dict[str, Any], explained: float) -> None:
    generator = torch.Generator().manual_seed(0)
    words = WORDS.split()
    picks = torch.randint(len(words), (4000,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(" ".join(words[pick] for pick in picks))
    section = {**ATTENTION, **more}
    config = RunConfig.model_validate(
        {
            "name": "words",
            "data": {"source": {"kind": "text", "path": str(tmp_path / "text.txt")}},
            "teacher": {"kind": kind, "sees": sees, kind: section},
        }
    )
    made: dict[str, Artifact] = {}
    for name, stage in (("shards", shards.run), ("index", index.run), ("teacher", None)):
        out = tmp_path / name
        out.mkdir()
        ctx = StageContext(config, out, made, "e" * 16, tmp_path / "tb")
        if stage is not None:
            stage(ctx)
            made[name] = Artifact.seal(out, name, "0" * 16, 0.0, ctx.metadata)
    train.train_rank(ctx.to_json(), Mesh.from_environment())
    train.run(ctx)
    assert ctx.metadata["explained"] > explained


def test_logistic_mixtures_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(1)
    values = (torch.arange(17).float() / 16)[:, None]
    shapes = [torch.randn(1, 1, 3, generator=generator) for _ in range(3)]
    log_prob = logistic_mixture_log_prob(values, torch.full((17, 1), 16.0), *shapes)
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-5)
