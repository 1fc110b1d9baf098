"""report.json holds exactly the promised keys, from the stages' own records."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from distpc.artifacts import Artifact, read_json
from distpc.config import parse_config
from distpc.errors import ArtifactError
from distpc.inference.report import build_report, peak_memory_bytes, write_report

STAGES = ("shards", "index", "finetune", "evaluate")
KEYS = {
    "config",
    "dataset",
    "seed",
    "num_parameters",
    "train_bpd",
    "valid_bpd",
    "test_bpd",
    "teacher",
    "latents",
    "distillation",
    "stages",
    "peak_memory_bytes",
    "versions",
}


def stages(run, *names):
    return {
        name: {
            "seconds": Artifact.open(run / name).seconds,
            "fingerprint": f"fingerprint-{name}",
            "skipped": name == "shards",
        }
        for name in names
    }


def test_the_keys_of_a_run_without_a_teacher(digits_run, digits_config):
    report = build_report(digits_run, digits_config, stages(digits_run, *STAGES))
    assert set(report) == KEYS
    assert report["teacher"] is None
    assert report["latents"] is None
    assert report["distillation"] is None
    evaluation = read_json(digits_run / "evaluate" / "evaluation.json")
    assert report["test_bpd"] == evaluation["test_bpd"]
    assert report["num_parameters"] > 1000
    assert report["dataset"]["num_samples"] == {"train": 1437, "valid": 180, "test": 180}
    assert report["stages"]["shards"]["skipped"] is True
    assert set(report["versions"]) == {
        *("python", "torch", "deepspeed", "ray", "webdataset", "numpy", "distpc")
    }
    assert report["versions"]["numpy"] == np.__version__
    assert 10 * 2**20 < report["peak_memory_bytes"] < 2**40
    write_report(digits_run / "report.json", report)
    assert read_json(digits_run / "report.json") == json.loads(json.dumps(report))
    assert parse_config(report["config"], where="report") == digits_config


def test_teacher_and_latents_come_from_their_stages(digits_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits_run, run, symlinks=True)
    config = parse_config(
        {"name": "t", "data": {"source": {"kind": "digits"}}, "teacher": {"kind": "pixels"}},
        where="test",
    )
    facts = {
        "teacher": {"feature_width": 4, "peak_memory_bytes": 2**45},
        "assign": {"num_clusters": 64, "used": 60, "usage_entropy_bits": 5.5, "dead": [3]},
        "distill": {"num_samples": 9, "num_heads": 7, "valid_bpd": 2.5, "pieces": {}},
    }
    for name, metadata in facts.items():
        (run / name).mkdir()
        Artifact.seal(run / name, name, f"fingerprint-{name}", 1.0, metadata)
    report = build_report(run, config, stages(run, *STAGES, *facts))
    assert report["teacher"]["kind"] == "pixels"
    assert report["teacher"]["feature_width"] == 4
    assert report["latents"] == {"num_clusters": 64, "used": 60, "usage_entropy_bits": 5.5}
    found = {"kind": "plain", "num_samples": 9, "num_heads": 7, "valid_bpd": 2.5}
    assert report["distillation"] == found
    assert report["peak_memory_bytes"] == 2**45


def test_a_missing_fact_is_named(digits_run, digits_config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits_run, run, symlinks=True)
    metadata = Artifact.open(run / "evaluate").metadata
    del metadata["valid_bpd"]
    Artifact.seal(run / "evaluate", "evaluate", "f", 1.0, metadata)
    with pytest.raises(ArtifactError, match="valid_bpd"):
        build_report(run, digits_config, stages(run, *STAGES))
    (run / "evaluate" / "manifest.json").unlink()
    with pytest.raises(ArtifactError):
        build_report(run, digits_config, stages(run, *STAGES))


def test_peak_memory_sees_a_large_array():
    before = peak_memory_bytes()
    block = np.ones(before + 2**26, dtype=np.uint8)
    assert peak_memory_bytes() >= block.nbytes
