"""Whole runs on digits whose leaves are grown, or supervised at every level."""

import pytest

from distpc.artifacts import Artifact, read_json
from distpc.circuits.io import load_model
from distpc.config import parse_config
from distpc.pipeline.runner import Pipeline

pytestmark = pytest.mark.slow


def run(folder, structure, distill, num_epochs=6):
    config = parse_config(
        {
            "name": "leaves",
            "data": {"source": {"kind": "digits"}, "patch_size_pixels": 4},
            "teacher": {"kind": "pixels"},
            "latents": {"num_clusters": 4},
            "structure": {"leaf": "hclt", "leaf_num_states": 6, **structure},
            "distill": distill,
            "finetune": {"num_epochs": num_epochs, "step_size": 0.3},
            "parallel": {"num_ranks": 1, "num_workers": 2, "cpus_per_worker": 0.5},
        },
        where="test",
    )
    return Pipeline(config, folder).run()


def test_grown_leaves_are_fine_tuned_with_the_top(tmp_path):
    growing = {"epochs": 6, "final_heads": 4}
    report = run(tmp_path, {}, {"kind": "progressive", "growing": growing})
    found = report["distillation"]
    assert found["kind"] == "progressive" and 8 <= found["num_heads"] <= 16
    # Leaves move, too: fine-tuning gains more than a top level alone could.
    assert report["valid_bpd"] < found["valid_bpd"] - 0.01
    assert report["test_bpd"] < 2.2
    before, after = (load_model(tmp_path / name / "model") for name in ("distill", "finetune"))
    assert before.graph.to_json() == after.graph.to_json()
    masks = [[bank.mask for bank in c.bank_list if getattr(bank, "mask", None) is not None]
             for c in (before, after)]  # fmt: skip
    assert len(masks[0]) == len(masks[1]) > 0
    assert all((one == other).all() for one, other in zip(*masks, strict=True))
    # The same command has nothing left to do.
    again = run(tmp_path, {}, {"kind": "progressive", "growing": growing})
    assert all(stage["skipped"] for stage in again["stages"].values())
    assert read_json(tmp_path / "report.json")["test_bpd"] == report["test_bpd"]


def test_leaves_supervised_at_every_level(tmp_path):
    structure = {"leaf_num_states": 16, "leaf_latents": True, "leaf_tied": True}
    report = run(tmp_path, structure, {}, num_epochs=8)
    assert "codebook" in Artifact.open(tmp_path / "distill").metadata["pieces"]
    assert report["valid_bpd"] < report["distillation"]["valid_bpd"] - 0.1
    assert report["test_bpd"] < 2.35
