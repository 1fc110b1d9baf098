"""The whole pipeline on text: a hidden Markov model distilled from a language model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
name: words
data:
  source:
    kind: text
    path: {texts}
    tokenizer: {{kind: bpe, vocabulary_size: 285}}
    chunk_length_tokens: 16
    end_of_document: true
  samples_per_shard: 64
teacher:
  kind: causal_lm
  sees: prefix
  state: both
  causal_lm: {{num_epochs: 2, width: 16, num_heads: 2, num_blocks: 1, batch_size: 32}}
latents: {{num_clusters: 15, num_rounds: 5, max_dead_fraction: 0.9}}
structure: {{kind: hmm, num_states: 16, tied: true}}
finetune: {{num_epochs: 2, batch_size: 32, rule: growing_em}}
evaluate: {{num_pictures: 4}}
parallel: {{num_ranks: 1, num_workers: 1}}
"""
WORDS = ["the cat sat on", "the mat while", "a dog lay on", "the log and", "nobody knew why"]


def distpc(*arguments: str, expected: int = 0) -> str:
    command = [sys.executable, "-m", "distpc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == expected, done.stderr[-4000:]
    return done.stderr + done.stdout


@pytest.mark.slow
def test_a_hidden_markov_model_is_distilled_and_guides(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        lines = [WORDS[(number * 7 + i * (i % 3 + 1)) % len(WORDS)] for i in range(40)]
        (texts / f"{number:02d}.txt").write_text(" ".join(lines) + ".")
    config, out = tmp_path / "words.yaml", tmp_path / "run"
    config.write_text(CONFIG.format(texts=texts))
    run = ["run", str(config), "--out", str(out)]
    distpc(*run)
    report = json.loads((out / "report.json").read_text())
    keys = "train_bpt valid_bpt test_bpt test_bpt_documents test_characters_per_token perplexity"
    assert all(report[key] > 0 for key in keys.split())
    assert report["perplexity"] == pytest.approx(2 ** report["test_bpt"])
    assert report["latents"]["num_clusters"] == 15
    assert (out / "model" / "tokenizer" / "tokenizer.json").is_file()
    distilled = json.loads((out / "distill" / "manifest.json").read_text())["metadata"]
    assert distilled["valid_bpt"] < 8.0
    # The same command has nothing left to do; a token more in the vocabulary redoes all of it.
    assert distpc(*run).count("done before, skipped") == 10
    changed = distpc(*run, "data.source.tokenizer.vocabulary_size=286", "--dry-run")
    assert "config or inputs changed" in changed
    tool = Path(__file__).parents[2] / "tools" / "constrained_text.py"
    command = [sys.executable, str(tool), str(out / "model"), "--words", "cat", "log", "why"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "100 of 100 texts" in done.stdout, done.stderr[-2000:]
    command += ["--length", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "exactly 0" in done.stderr
