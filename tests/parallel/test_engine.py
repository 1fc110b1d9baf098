import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_targets import GLOBAL_BATCH, STEPS, Net, global_batch, make_optimizer

from distpc.parallel.launch import run_ranks

CASES = [(stage, kind, 2, False) for stage in range(4) for kind in ("online", "adamw")]
# Micro-batches of the whole share, and of one sample, where ranks get empty ones.
CASES += [(0, "online", 6, False), (3, "online", 1, False), (2, "online", 1, False)]
# Offloaded to the memory of the host, with several micro-batches.
CASES += [(stage, "online", 2, True) for stage in range(1, 4)]


def plain_torch(kind: str, steps: int, halve_after: int) -> tuple[dict[str, torch.Tensor], float]:
    """The same training in one process without any engine, and its largest gradient norm."""
    model = Net()
    optimizer = make_optimizer(kind, model)
    largest = 0.0
    for step in range(steps):
        if step == halve_after:
            optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.zero_grad()
        (model(global_batch(step)).sum() / GLOBAL_BATCH).backward()
        gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        largest = max(largest, float(torch.stack(gradients).norm()))
        optimizer.step()
    return model.state_dict(), largest


def assert_same(found: dict[str, Any], expected: dict[str, torch.Tensor], case: str) -> None:
    assert found.keys() == expected.keys(), case
    for name, value in expected.items():
        difference = (torch.tensor(found[name]) - value).abs().max()
        assert difference < 2e-6, f"{case}: {name} differs by {difference}"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_zero_stage_trains_like_plain_torch(
    num_ranks: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "states.json"
    run_ranks(
        "parallel_targets:train_engine",
        {"cases": CASES, "out": str(out)},
        num_ranks=num_ranks,
        threads_per_rank=1,
        log_folder=tmp_path / "logs",
    )
    results = json.loads(out.read_text())
    assert len(results) == len(CASES)
    for stage, kind, micro_batch, offload in CASES:
        case = f"{stage} {kind} {micro_batch} {offload}"
        result = results[case]
        trained, largest = plain_torch(kind, STEPS, STEPS)
        assert largest > 2, "gradients too small to notice clipping"
        assert_same(result["trained"], trained, case)
        assert_same(result["loaded"], {k: v + 1 for k, v in trained.items()}, case)
        assert_same(result["resumed"], plain_torch(kind, 2 * STEPS, STEPS)[0], case)
        assert result["num_steps"] == 2 * STEPS
        zero = result["config"]["zero_optimization"]
        assert zero["stage"] == stage
        assert ("offload_optimizer" in zero, "offload_param" in zero) == (
            offload,
            offload and stage == 3,
        )
    printed = "".join(capfd.readouterr())
    assert printed == "", "DeepSpeed is to be quiet"


def test_refusals(tmp_path: Path) -> None:
    out = tmp_path / "messages"
    run_ranks(
        "parallel_targets:misuse_engine",
        {"out": str(out)},
        num_ranks=2,
        threads_per_rank=1,
        log_folder=tmp_path / "logs",
    )
    for rank in range(2):
        wrong_state, not_finite = json.loads(out.with_suffix(f".{rank}").read_text())
        assert "not one of this model" in wrong_state
        assert "second.bias" in wrong_state
        assert "not finite" in not_finite
