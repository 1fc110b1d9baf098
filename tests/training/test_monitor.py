from pathlib import Path

import numpy as np
import torch
from hidden_trees import hidden_tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distpc.circuits.circuit import Circuit
from distpc.data.spec import DatasetSpec
from distpc.training.monitor import (
    Monitor,
    completion_grid,
    latent_usage,
    lower_half_hidden,
    note_stop,
)

SPEC = DatasetSpec("toy", "image", 8, (5,) * 8, (4, 2, 1))


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_writes_scalars_health_and_pictures(tmp_path: Path) -> None:
    circuit = Circuit(hidden_tree(8, 3), SPEC.num_categories, seed=0)
    with Monitor(tmp_path, SPEC, enabled=True) as monitor:
        monitor.scalars(1, {"valid_bpd": 2.5})
        health = monitor.health(1, circuit)
        monitor.pictures(1, circuit, np.zeros((2, 8), dtype=np.int64))
    events = read(tmp_path)
    assert events.Scalars("valid_bpd")[0].value == 2.5
    assert health["latents/dead_states"] == 0
    assert "latents/usage_entropy_bits" in events.Tags()["scalars"]
    assert any(tag.startswith("sum_weight_entropy_bits/") for tag in events.Tags()["scalars"])
    assert sorted(events.Tags()["images"]) == ["completions", "samples"]


def test_examples_that_the_circuit_rules_out_are_not_completed(tmp_path: Path) -> None:
    circuit = Circuit(hidden_tree(8, 3), SPEC.num_categories, seed=0)
    circuit.set_smoothing(0.0, 0.0, 1)
    with torch.no_grad():
        for index, region in enumerate(circuit.graph.regions):
            if region.variable is not None:
                circuit.statistics_of(index)[:, 4] = 0.0
    impossible, possible = np.full((3, 8), 4), np.zeros((1, 8), dtype=np.int64)
    assert completion_grid(circuit, impossible, SPEC) is None
    mixed = completion_grid(circuit, np.concatenate([impossible, possible]), SPEC)
    assert mixed is not None
    alone = completion_grid(circuit, possible, SPEC)
    np.testing.assert_array_equal(mixed, alone)
    with Monitor(tmp_path, SPEC, enabled=True) as monitor:
        monitor.pictures(1, circuit, impossible)
    assert read(tmp_path).Tags()["images"] == ["samples"]


def test_resuming_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    for first, last, value in ((1, 6, 9.0), (4, 8, 1.0)):
        with Monitor(tmp_path, SPEC, enabled=True, first_step=first) as monitor:
            for step in range(first, last):
                monitor.scalars(step, {"train_bpd": value})
    events = read(tmp_path).Scalars("train_bpd")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.value for event in events] == [9.0] * 3 + [1.0] * 4


def test_says_why_training_stopped(tmp_path: Path) -> None:
    note_stop(tmp_path, ValueError("rank 3 is lost"))
    (text,) = read(tmp_path).Tensors("stopped/text_summary")
    assert text.tensor_proto.string_val == [b"rank 3 is lost"]


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    with Monitor(tmp_path, SPEC, enabled=False) as monitor:
        monitor.scalars(1, {"valid_bpd": 2.5})
    assert not list(tmp_path.iterdir())


def test_usage_is_a_share_of_every_latent() -> None:
    usage = latent_usage(Circuit(hidden_tree(8, 3), [5] * 8, seed=0))
    assert usage is not None and usage.shape == (8, 3)
    assert abs(float(usage.sum(-1).mean()) - 1.0) < 1e-6


def test_lower_half_of_all_channels_is_hidden() -> None:
    spec = DatasetSpec("toy", "image", 24, (17,) * 24, (4, 2, 3))
    observed = lower_half_hidden(spec).reshape(4, 2, 3)
    assert observed[:2].all() and not observed[2:].any()
