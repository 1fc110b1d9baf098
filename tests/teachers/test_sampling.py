"""Sampling from a causal language model: a tiny transformer, whole files, resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distpc.artifacts.files import read_json
from distpc.cli import main
from distpc.config.schema import ParallelConfig
from distpc.config.sources import TokenSamplesSource
from distpc.data.sources import open_source
from distpc.data.tokenizers import train_bpe
from distpc.errors import ArtifactError, ConfigError, TeacherError
from distpc.teachers.sampling import SampleSettings, SampleWorker, load_causal, sample_teacher

TEXT = "the cat sat on the mat and the dog lay on the log. "
LENGTH = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("lm")
    config = transformers.GPT2Config(
        vocab_size=270, n_positions=16, n_embd=8, n_layer=1, n_head=1,
        bos_token_id=0, eos_token_id=5, initializer_range=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    train_bpe([TEXT], 260).save(folder)
    return folder


def worker(model: Path, out: Path, settings: SampleSettings) -> SampleWorker:
    kept = {"num_samples": settings.num_samples, "length": LENGTH, "batch_size": 16}
    return SampleWorker(str(model), str(out), {**kept, "seed": settings.seed}, 0, 5)


def test_samples_follow_the_model_and_end_where_it_ends(model: Path, tmp_path: Path) -> None:
    num = 4000
    settings = SampleSettings(num, LENGTH, batch_size=16)
    draw = worker(model, tmp_path, settings)
    rows = draw._draw(num, torch.Generator().manual_seed(1)).numpy()
    ended = (rows == 5).cumsum(1) - (rows == 5) > 0
    assert (rows[ended] == -1).all() and (rows[~ended] >= 0).all() and ended.any()
    with torch.no_grad():
        first = load_causal(model)(torch.tensor([[0]])).logits[0, -1].softmax(-1).double().numpy()
    found = np.bincount(rows[:, 0], minlength=270) / num
    assert (np.abs(found - first) < 5 * np.sqrt(first / num) + 1e-3).all()
    # The second token, given the most frequent first one: the cache is used rightly.
    top = int(np.argmax(np.where(np.arange(270) == 5, 0, found)))
    chosen = rows[rows[:, 0] == top]
    with torch.no_grad():
        second = load_causal(model)(torch.tensor([[0, top]])).logits[0, -1].softmax(-1)
    exact = second.double().numpy()
    found = np.bincount(chosen[:, 1], minlength=270) / len(chosen)
    assert (np.abs(found - exact) < 5 * np.sqrt(exact / len(chosen)) + 5e-3).all()


def test_a_file_depends_on_its_number_alone(model: Path, tmp_path: Path) -> None:
    settings = SampleSettings(40, LENGTH, seed=3)
    one = worker(model, tmp_path, settings)
    one(("samples-000000.npy", 0, 20))
    one(("samples-000001.npy", 1, 20))
    before = [np.load(tmp_path / f"samples-00000{n}.npy") for n in range(2)]
    assert not np.array_equal(*before)
    worker(model, tmp_path, settings)(("samples-000001.npy", 1, 20))
    assert np.array_equal(np.load(tmp_path / "samples-000001.npy"), before[1])


def test_what_cannot_be_sampled(model: Path, tmp_path: Path) -> None:
    parallel = ParallelConfig(num_workers=1)
    with pytest.raises(TeacherError, match="no language model"):
        sample_teacher(tmp_path, tmp_path / "out", SampleSettings(4), parallel)
    for wrong in (SampleSettings(0), SampleSettings(4, length=1)):
        with pytest.raises(ConfigError, match="too small"):
            sample_teacher(model, tmp_path / "out", wrong, parallel)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.npy").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="something else"):
        sample_teacher(model, other, SampleSettings(4), parallel)
    assert (other / "precious.npy").read_bytes() == b"mine"


@pytest.mark.slow
def test_the_command_resumes_and_grows(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    base = ["sample-teacher", str(model), "--out", str(out), "--length", str(LENGTH)]
    base += ["--samples-per-file", "16"]
    assert main([*base, "--num", "40"]) == 0
    files = sorted(out.glob("samples-*.npy"))
    assert [len(np.load(file)) for file in files] == [16, 16, 8]
    content = [file.read_bytes() for file in files]
    stamps = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    assert main([*base, "--num", "48", "--workers", "2"]) == 0
    again = sorted(out.glob("samples-*.npy"))
    assert [len(np.load(file)) for file in again] == [16, 16, 16]
    assert again[1].read_bytes() == content[1] and again[0].stat().st_mtime_ns == stamps[0]
    assert main([*base, "--num", "48", "--seed", "1"]) == 2
    source = open_source(TokenSamplesSource(kind="token_samples", path=str(out)), tmp_path)
    assert source.num_samples == 48 and source.spec.num_categories == (270,) * LENGTH
    assert source.spec.end_token == 5 and read_json(out / "samples.json")["complete"] is True


def test_a_pretrained_teacher_refuses_tokens_of_another_tokenizer(model: Path) -> None:
    from distpc.config.teachers import TeacherConfig
    from distpc.data.spec import DatasetSpec
    from distpc.data.tokenizers import load_tokenizer
    from distpc.errors import DataError
    from distpc.teachers import build_teacher

    config = TeacherConfig.model_validate(
        {"kind": "hf_text", "sees": "prefix", "pretrained": {"folder": str(model)}}
    )
    own = load_tokenizer(model).digest
    spec = DatasetSpec("t", "text", 6, (270,) * 6, tokens="tokens", tokenizer=own)
    assert build_teacher(config, spec, 1, 0).encode(torch.zeros(2, 6).long()).shape == (2, 6, 8)
    other = DatasetSpec("t", "text", 6, (270,) * 6, tokens="tokens", tokenizer="0123456789abcdef")
    with pytest.raises(DataError, match="not the one that the data were made with"):
        build_teacher(config, other, 1, 0)
