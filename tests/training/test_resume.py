"""Saved by some ranks under some ZeRO stage, resumed by others under another."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_runs import ADAM_STEPS
from runs import prepare, variant

from distpc.artifacts.stage import StageContext
from distpc.parallel.launch import run_ranks
from distpc.training import finetune
from distpc.training.checkpoint import Checkpoint, Checkpoints
from distpc.training.checkpoint.saver import code_fingerprint

STEP, NUM_STEPS = 3, 6
"""Where a run is taken over, in the middle of its only epoch of 1,437 samples; 250 a step."""
STAGES = range(4)
COVERING = {(2, 1, 0), (3, 1, 2), (2, 3, 3), (3, 3, 1)}
CASES = [
    pytest.param(
        *case,
        marks=() if case in COVERING else pytest.mark.slow,
        id=f"zero{case[0]}x2-to-zero{case[2]}x{case[1]}",
    )
    for case in itertools.product((2, 3), (1, 3), STAGES)
]
MESH = (4, 2, 2)
MOVED = [(1, 1, 0), (2, 2, 0), (2, 1, 3), (3, 1, 3), (3, 3, 0), (4, 4, 0)]
"""Ranks, those of the node axis and ZeRO stage that save, and those that resume."""
ADAM_CASES = [(1, 0, source) for source in STAGES]
ADAM_CASES += [(3, stage, source) for stage in STAGES for source in STAGES]
"""Ranks and stage that resume, and the stage that two ranks saved under."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    return prepare(
        tmp_path_factory.mktemp("run"),
        num_epochs=1,
        batch_size=250,
        micro_batch_size=90,
        checkpoint_every_seconds=0.0,
        keep_checkpoints=20,
    )


@pytest.fixture(scope="module")
def saved(base: StageContext) -> dict[int, StageContext]:
    """Whole runs of two ranks; and what two ranks are told about each other's faults."""
    contexts = {
        stage: variant(base, f"saved-{stage}", num_ranks=2, zero_stage=stage) for stage in (2, 3)
    }
    root = base.out.parent
    (root / "misuse").mkdir()
    payload = {
        "finetune": [{"context": ctx.to_json()} for ctx in contexts.values()],
        "adam": [{"folder": str(root / f"adam-2-{stage}"), "stage": stage} for stage in STAGES],
        "misuse": str(root / "misuse"),
    }
    launch(base, payload, 2)
    return contexts


@pytest.fixture(scope="module")
def resumed(
    base: StageContext, saved: dict[int, StageContext], request: pytest.FixtureRequest
) -> dict[tuple[int, int, int], StageContext]:
    """The runs that the chosen tests ask for, one launch for each number of ranks."""
    wanted = {
        tuple(item.callspec.params[name] for name in ("saved_stage", "ranks", "stage"))
        for item in request.session.items
        if getattr(item, "originalname", "") == test_continues_as_if_undisturbed.__name__
    }
    root, found = base.out.parent, {}
    for ranks in (1, 3):
        cases = sorted(case for case in wanted if case[1] == ranks)
        for case in cases:
            name = "-".join(map(str, case))
            found[case] = variant(base, name, num_ranks=ranks, zero_stage=case[2])
        payload = {
            "finetune": [
                {
                    "context": found[case].to_json(),
                    "source": str(saved[case[0]].out),
                    "step": STEP,
                }
                for case in cases
            ],
            "adam": [
                {
                    "folder": str(root / f"adam-{ranks}-{stage}-from-{source}"),
                    "source": str(root / f"adam-2-{source}"),
                    "stage": stage,
                }
                for number, stage, source in ADAM_CASES
                if number == ranks
            ],
        }
        launch(base, payload, ranks)
    return found


def launch(base: StageContext, payload: dict[str, Any], ranks: int) -> None:
    run_ranks(
        "resume_runs:run_all",
        payload,
        num_ranks=ranks,
        threads_per_rank=1,
        log_folder=base.out.parent / f"logs-{ranks}",
    )


def checkpoint(ctx: StageContext, step: int) -> Checkpoint:
    return Checkpoints(ctx.out / finetune.CHECKPOINTS, finetune.identity_of(ctx)).at(step)


def samples(ctx: StageContext) -> list[Counter[str]]:
    """What all ranks together used, batch after batch; those of a node axis see the same."""
    parallel = ctx.config.parallel
    ranks = range(0, parallel.num_ranks, parallel.node_parallel)
    of_ranks = [json.loads((ctx.out / f"samples-{rank}.json").read_text()) for rank in ranks]
    return [sum(map(Counter, batches), Counter()) for batches in zip(*of_ranks, strict=True)]


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("saved_stage", "ranks", "stage"), CASES)
def test_continues_as_if_undisturbed(
    saved: dict[int, StageContext],
    resumed: dict[tuple[int, int, int], StageContext],
    saved_stage: int,
    ranks: int,
    stage: int,
) -> None:
    before, after = saved[saved_stage], resumed[saved_stage, ranks, stage]
    assert_continued(before, after)


@pytest.mark.slow
def test_a_mesh_of_four_continues_on_any_other(base: StageContext) -> None:
    """250 samples a batch, the middle of an epoch; units shared by two ranks, then by others."""
    fields = ("num_ranks", "node_parallel", "zero_stage")
    before = variant(base, "mesh", **dict(zip(fields, MESH, strict=True)))
    launch(base, {"finetune": [{"context": before.to_json()}]}, MESH[0])
    for ranks in sorted({case[0] for case in MOVED}):
        moved = [
            variant(base, f"moved-{case}", **dict(zip(fields, case, strict=True)))
            for case in MOVED
            if case[0] == ranks
        ]
        cases = [
            {"context": ctx.to_json(), "source": str(before.out), "step": STEP} for ctx in moved
        ]
        launch(base, {"finetune": cases}, ranks)
        for after in moved:
            assert_continued(before, after)


def assert_continued(before: StageContext, after: StageContext) -> None:
    """A run that took over in the middle of another's epoch ended as that one did."""
    # What it loaded, as its own shards hold it, is what was saved, to the last bit.
    first, again = checkpoint(before, STEP), checkpoint(after, STEP)
    assert again.facts == first.facts
    for ctx, saved in ((before, first), (after, again)):
        files = {r.file for ranges in saved.table.values() for r in ranges}
        assert len(files) == ctx.config.parallel.num_ranks
    assert_equal(first.statistics(), again.statistics())
    # Sample by sample it goes on where the other would have gone on.
    whole, rest = samples(before), samples(after)
    assert [sum(batch.values()) for batch in rest] == [250] * (NUM_STEPS - STEP)
    assert rest == whole[STEP:] and len(whole) == NUM_STEPS
    ended, other = checkpoint(before, NUM_STEPS), checkpoint(after, NUM_STEPS)
    assert ended.facts.loader == other.facts.loader
    for name, tensor in ended.statistics().items():
        torch.testing.assert_close(other.statistics()[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ranks", "stage", "source"), ADAM_CASES)
def test_moments_of_adam_move_between_stages_and_ranks(
    base: StageContext, resumed: Any, ranks: int, stage: int, source: int
) -> None:
    root = base.out.parent
    folder = Checkpoints(root / f"adam-{ranks}-{stage}-from-{source}", {})
    saved = Checkpoints(root / f"adam-2-{source}", {}).newest()
    assert saved is not None and saved.facts.step == ADAM_STEPS
    again = folder.at(ADAM_STEPS)
    assert set(saved.slots["first.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert_equal(saved.statistics(), again.statistics())
    assert_equal(saved.rule_state(), again.rule_state())
    # And it is what training goes on with: as on one rank under ZeRO 0.
    reference = Checkpoints(root / "adam-1-0-from-0", {}).at(2 * ADAM_STEPS)
    ended = folder.at(2 * ADAM_STEPS)
    for name, tensor in reference.rule_state().items():
        torch.testing.assert_close(ended.rule_state()[name], tensor, rtol=1e-4, atol=1e-6)
    for name, tensor in reference.statistics().items():
        torch.testing.assert_close(ended.statistics()[name], tensor, rtol=1e-4, atol=1e-5)


EXPECTED: dict[str, tuple[str, str]] = {
    "other state": ("ArtifactError", "optimizer state belongs to another circuit"),
    "other circuit": ("ArtifactError", "belongs to another circuit: parameter 'first.bias'"),
    "full disk": ("ResourceError", "no space left on the disk"),
    "range": ("ArtifactError", "lacks elements of 'sums.0'"),
    "not shared": ("ResourceError", "1 of 2 shards; none of rank 1"),
    "unlike": ("TrainingError", "the ranks of a training are not alike: fingerprint differ"),
}


def test_every_rank_is_told_of_a_fault_on_one(base: StageContext, saved: Any) -> None:
    folder = base.out.parent / "misuse"
    told = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0]["fine"] is None and told[0]["mended"] is None
    for fault, (kind, message) in EXPECTED.items():
        assert told[0][fault][0] == kind and message in told[0][fault][1], told[0][fault]
        assert "fix:" in told[0][fault][1]
    assert "0:19000" in told[0]["range"][1] and "0:20000" in told[0]["range"][1]
    # Nothing is left of the checkpoints that failed.
    names = sorted(path.name for path in (folder / "plain").iterdir())
    assert names == ["step-00000001", "step-00000005"]


def test_other_code_has_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "module.py").write_text("x = 1\n")
    before = code_fingerprint(tmp_path)
    (tmp_path / "part" / "module.py").write_text("x = 2\n")
    assert before != code_fingerprint(tmp_path) == code_fingerprint(tmp_path)
