"""Every rule through the DeepSpeed engine: one rank, two ranks, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import prepare, variant

from distpc.artifacts.stage import StageContext
from distpc.circuits.io import load_model
from distpc.config import parse_config
from distpc.errors import ConfigError
from distpc.parallel.launch import run_ranks
from distpc.training import finetune
from distpc.training.checkpoint import Checkpoint, Checkpoints

RULES: dict[str, dict[str, Any]] = {
    "mini_batch_em": {"schedule": "piecewise", "milestones": [[0, 0.5], [1000, 0.1]]},
    "full_batch_em": {},
    "anemone": {"schedule": "cosine", "warmup_samples": 500},
    "adam": {"schedule": "constant", "step_size": 0.02},
}
WITH_STATE = ("anemone", "adam")
EARLY = 2
"""Step of the checkpoint that is resumed."""
SHARDED = "adam-zero2"
"""Adam on two ranks under ZeRO 2, which brings rows to scale every other step of five."""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageContext]:
    base = prepare(
        tmp_path_factory.mktemp("run"),
        num_epochs=1,
        batch_size=301,
        micro_batch_size=90,
        checkpoint_every_seconds=0.0,
        keep_checkpoints=20,
    )
    found = {}
    for rule, fields in RULES.items():
        for ranks in (1, 2):
            name = f"{rule}-{ranks}"
            found[name] = variant(base, name, {"rule": rule, **fields}, num_ranks=ranks)
    for rule in WITH_STATE:
        name = f"{rule}-resumed"
        found[name] = variant(base, name, {"rule": rule, **RULES[rule]}, num_ranks=1)
    fields = {"rule": "adam", **RULES["adam"]}
    found[SHARDED] = variant(base, SHARDED, fields, num_ranks=2, zero_stage=2)
    options: dict[str, Any] = {"threads_per_rank": 1, "log_folder": base.out.parent / "logs"}
    for ranks, target in ((1, "runs:train_and_resume"), (2, "runs:train_each")):
        payload = {
            "contexts": [found[f"{rule}-{ranks}"].to_json() for rule in RULES]
            + [found[SHARDED].to_json()] * (ranks == 2),
            "adam_settles_every": 2,
            "resumed": [
                (found[f"{rule}-1"].to_json(), found[f"{rule}-resumed"].to_json())
                for rule in WITH_STATE
            ],
            "early_checkpoints": EARLY + 1,
        }
        run_ranks(target, payload, num_ranks=ranks, **options)
    return found


def newest(ctx: StageContext) -> Checkpoint:
    found = Checkpoints(ctx.out / finetune.CHECKPOINTS, finetune.identity_of(ctx)).newest()
    assert found is not None
    return found


def assert_same(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float
) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_train_as_one_does(stages: dict[str, StageContext], rule: str) -> None:
    one, two = newest(stages[f"{rule}-1"]), newest(stages[f"{rule}-2"])
    # 1,437 samples: all at once, or 5 batches.
    assert one.facts.step == two.facts.step == (1 if rule == "full_batch_em" else 5)
    # Adam divides by the size of gradients, and so lifts the rounding of those near zero.
    tolerance = 3e-3 if rule == "adam" else 1e-5
    assert_same(one.statistics(), two.statistics(), rtol=1e-3, atol=tolerance)
    assert one.facts.valid is not None and two.facts.valid is not None
    assert one.facts.valid["bits"] == pytest.approx(two.facts.valid["bits"], abs=1e-4)


def test_adam_on_shards_leaves_the_model_of_whole_rows(stages: dict[str, StageContext]) -> None:
    models = []
    for name in ("adam-1", SHARDED):
        ctx = stages[name]
        finetune._save_best(ctx, json.loads((ctx.out / finetune.RESULTS).read_text()))
        models.append(load_model(ctx.out / finetune.MODEL).state_dict())
    assert_same(*models, rtol=1e-3, atol=3e-3)
    whole, shards = (newest(stages[name]).facts.valid for name in ("adam-1", SHARDED))
    assert whole is not None and shards is not None
    assert whole["bits"] == pytest.approx(shards["bits"], abs=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_learns_and_leaves_a_model_on_the_flow_scale(
    stages: dict[str, StageContext], rule: str
) -> None:
    ctx = stages[f"{rule}-1"]
    results = json.loads((ctx.out / finetune.RESULTS).read_text())
    assert results["best_step"] > 0 and results["train_impossible_samples"] == 0
    finetune._save_best(ctx, results)
    model = load_model(ctx.out / finetune.MODEL)
    assert model.smoothing[:2] == (0.0, 0.0)
    uses = model.uses()
    for index, region in enumerate(model.graph.regions):
        if region.kind == "sum":
            total = model.statistics_of(index).sum(1)
            torch.testing.assert_close(total, uses[index], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", WITH_STATE)
def test_state_is_in_the_checkpoint_and_a_resumed_run_is_bit_equal(
    stages: dict[str, StageContext], rule: str
) -> None:
    whole, resumed = newest(stages[f"{rule}-1"]), newest(stages[f"{rule}-resumed"])
    results = json.loads((stages[f"{rule}-resumed"].out / finetune.RESULTS).read_text())
    assert results["resumed_at_step"] == EARLY and resumed.facts.step == 5
    assert len(whole.rule_state()) >= 2 * len(whole.statistics())
    assert_same(whole.statistics(), resumed.statistics())
    assert_same(whole.rule_state(), resumed.rule_state())


def test_rules_on_whole_rows_and_zero_are_refused_with_the_configuration(tmp_path: Path) -> None:
    values = {
        "name": "test",
        "data": {"source": {"kind": "digits"}},
        "finetune": {"rule": "anemone"},
        "parallel": {"zero_stage": 2},
    }
    with pytest.raises(ConfigError, match="anemone needs whole rows") as caught:
        parse_config(values, where="test")
    assert "zero_stage to 0" in str(caught.value)
    for finetune_fields in (
        {"schedule": "piecewise"},
        {"schedule": "piecewise", "milestones": [[9, 0.1], [3, 0.1]]},
        {"milestones": [[0, 1.5]]},
    ):
        with pytest.raises(ConfigError, match="milestones"):
            parse_config({**values, "finetune": finetune_fields, "parallel": {}}, where="test")
