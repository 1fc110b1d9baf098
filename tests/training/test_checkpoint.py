import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from distpc.errors import ArtifactError, ResourceError
from distpc.training.checkpoint import Checkpoints, TrainingFacts, check_shapes

IDENTITY = {"graph": "abc", "finetune.step_size": 0.1}


def statistics(step: int) -> dict[str, torch.Tensor]:
    return {"sums.0": torch.full((3, 4), float(step)), "inputs.0": torch.arange(5.0)}


def save(checkpoints: Checkpoints, step: int, best: int | None = None) -> Path:
    facts = TrainingFacts(step=step, samples=step * 10)
    if best is not None:
        facts.best = {"step": best, "epoch": 0.0, "bits": 2.0, "impossible": 0}
    return checkpoints.save(facts, statistics(step))


def test_newest_comes_back_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.newest() is None
    for step in (3, 12):
        save(checkpoints, step)
    found = checkpoints.newest()
    assert found is not None
    assert found.facts == TrainingFacts(step=12, samples=120)
    for name, value in statistics(12).items():
        assert torch.equal(found.statistics()[name], value)


def test_keeps_newest_and_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=2)
    for step in range(1, 7):
        save(checkpoints, step, best=min(step, 2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000002", "step-00000005", "step-00000006"]


def test_keeps_what_an_older_checkpoint_counts_as_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY, keep=2)
    for step in range(4):
        save(checkpoints, step, best=0 if step < 3 else 3)
    (tmp_path / "step-00000003" / "statistics.safetensors").write_bytes(b"")
    found = checkpoints.newest()
    assert found is not None and found.facts.step == 2 and found.facts.best is not None
    assert checkpoints.at(int(found.facts.best["step"])).facts.step == 0


def test_a_cut_checkpoint_does_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    save(checkpoints, 1)
    file = save(checkpoints, 2) / "statistics.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    found = checkpoints.newest()
    assert found is not None and found.facts.step == 1
    with pytest.raises(ArtifactError, match="missing or cut"):
        checkpoints.at(2)


def test_refuses_another_training_and_says_why(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, IDENTITY), 1)
    with pytest.raises(ArtifactError, match=r"finetune\.step_size differ") as caught:
        Checkpoints(tmp_path, {**IDENTITY, "finetune.step_size": 0.2}).newest()
    assert "0.1" in str(caught.value.found) and "0.2" in str(caught.value.expected)


def test_refuses_another_circuit_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'sums\.0' differs") as caught:
        check_shapes(tmp_path, {"sums.0": torch.ones(2, 3)}, {"sums.0": torch.ones(2, 4)})
    assert caught.value.found == "shape (2, 3)" and caught.value.expected == "shape (2, 4)"


def run_script(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = f"""
    import os, resource, signal
    from pathlib import Path
    import torch
    from distpc.training import checkpoint
    from distpc.training.checkpoint import Checkpoints, TrainingFacts
    checkpoints = Checkpoints(Path({str(folder)!r}), {IDENTITY!r})
    large = {{"sums.0": torch.ones(200_000)}}
    """
    code = textwrap.dedent(script) + textwrap.dedent(body)
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_killed_while_saving_leaves_the_previous(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    save(checkpoints, 1)
    # The process dies with all tensors written, just before the state that vouches for them.
    ended = run_script(
        tmp_path,
        """
        checkpoint.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(TrainingFacts(step=2), large)
        """,
    )
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    found = checkpoints.newest()
    assert found is not None and found.facts.step == 1
    checkpoints.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_is_a_typed_error_and_leaves_the_previous(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    save(checkpoints, 1)
    ended = run_script(
        tmp_path,
        """
        # A file size limit stops a write in its middle, as a full disk or quota does.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoints.save(TrainingFacts(step=2), large)
        except Exception as error:
            print(type(error).__name__, error)
        """,
    )
    assert ended.stdout.startswith(f"{ResourceError.__name__} no space left"), ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.newest() is not None
