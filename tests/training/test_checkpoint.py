import json
import os
import subprocess
import sys
import textwrap
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from distpc.errors import ArtifactError, ResourceError
from distpc.parallel.mesh import Mesh
from distpc.training.checkpoint import Checkpoint, Checkpoints, Piece, Saver, TrainingFacts
from distpc.training.checkpoint.draft import Draft
from distpc.training.checkpoint.manifest import FORMAT_VERSION, MANIFEST
from distpc.training.checkpoint.snapshot import check_shapes

IDENTITY = {"graph": "abc", "finetune.step_size": 0.1}
ALONE = Mesh(0, 1, 0, torch.device("cpu"))
_ATTEMPTS = count()


def statistics(step: int) -> dict[str, torch.Tensor]:
    return {
        "sums.0": torch.arange(12.0).reshape(3, 4) + step,
        "inputs.0": torch.arange(5.0),
        "inputs.0#count": torch.tensor(step),
        "mask": torch.tensor([True, False, True]),
    }


def pieces(tensors: dict[str, torch.Tensor], number: int, num_shards: int) -> list[Piece]:
    """What one of several ranks writes, cut in the middle of rows."""
    found = []
    for key, tensor in tensors.items():
        first, last = (tensor.numel() * n // num_shards for n in (number, number + 1))
        if first < last:
            values = tensor.reshape(-1)[first:last].clone()
            found.append(Piece(key, tuple(tensor.shape), first, values))
    return found


def save(checkpoints: Checkpoints, step: int, best: int | None = None, num_shards: int = 2) -> Path:
    facts = TrainingFacts(step=step, samples=step * 10)
    if best is not None:
        facts.best = {"step": best, "epoch": 0.0, "bits": 2.0, "impossible": 0}
    draft = Draft(checkpoints, facts, f"try{next(_ATTEMPTS)}", num_shards)
    for number in range(num_shards):
        draft.write(number, pieces(statistics(step), number, num_shards))
    draft.publish(threading.Event())
    return checkpoints.folder / f"step-{step:08d}"


def edit_manifest(path: Path, change: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def assert_holds(found: Checkpoint | None, step: int) -> None:
    assert found is not None and found.facts == TrainingFacts(step=step, samples=step * 10)
    tensors = {**found.statistics(), **found.rule_state()}
    assert tensors.keys() == statistics(step).keys()
    for name, value in statistics(step).items():
        assert torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_newest_comes_back_whole(tmp_path: Path, num_shards: int) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    assert checkpoints.newest() is None
    for step in (3, 12):
        path = save(checkpoints, step, num_shards=num_shards)
    found = checkpoints.newest()
    assert_holds(found, 12)
    assert len(list(path.iterdir())) == num_shards + 1
    # Any range, across the borders of what ranks wrote.
    assert found is not None
    for start in range(12):
        for stop in range(start + 1, 13):
            expected = statistics(12)["sums.0"].reshape(-1)[start:stop]
            assert torch.equal(found.read("sums.0", start, stop), expected)


def test_other_programs_can_read_a_shard(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = save(Checkpoints(tmp_path, IDENTITY), 4)
    assert torch.equal(
        load_file(path / "shard-00001.safetensors")["sums.0@6"],
        statistics(4)["sums.0"].reshape(-1)[6:],
    )


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
    (tmp_path / "step-00000003" / "shard-00000.safetensors").write_bytes(b"")
    found = checkpoints.newest()
    assert found is not None and found.facts.step == 2 and found.facts.best is not None
    assert checkpoints.at(int(found.facts.best["step"])).facts.step == 0


def cut(path: Path) -> str:
    file = path / "shard-00001.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-4])
    return f"{size - 4} bytes.*{size} bytes"


def flip(path: Path) -> str:
    file = path / "shard-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "has changed since it was written.*SHA-256"


def lose_file(path: Path) -> str:
    (path / "shard-00001.safetensors").unlink()
    return "is missing.*no such file"


def lose_manifest(path: Path) -> str:
    (path / MANIFEST).unlink()
    return "is missing"


def lose_range(path: Path) -> str:
    edit_manifest(path, lambda m: m["files"].pop("shard-00001.safetensors"))
    return r"lacks elements of.*elements 0:6.*elements 0:12 of shape \[3, 4\]"


def lose_first_range(path: Path) -> str:
    edit_manifest(path, lambda m: m["files"].pop("shard-00000.safetensors"))
    return r"lacks elements of 'sums.0'.*elements 6:12 after 0:0"


def double_range(path: Path) -> str:
    def change(manifest: dict[str, Any]) -> None:
        ranges = manifest["files"]["shard-00001.safetensors"]["ranges"]
        ranges[[r[0] for r in ranges].index("sums.0")][1] = 4

    edit_manifest(path, change)
    return r"holds elements twice of 'sums.0'.*elements 4:12 after 0:6"


@pytest.mark.parametrize(
    "damage", [cut, flip, lose_file, lose_manifest, lose_range, lose_first_range, double_range]
)
def test_a_damaged_checkpoint_does_not_count_and_never_starts_afresh(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    save(checkpoints, 1)
    pattern = "(?s)" + damage(save(checkpoints, 2))
    assert_holds(checkpoints.newest(), 1)
    assert "the one before it is tried" in caplog.text
    with pytest.raises(ArtifactError, match="missing or cut") as caught:
        checkpoints.at(2)
    caught.match(pattern)
    # Set aside, it neither counts as one of the newest nor shadows the steps to come.
    assert_holds(checkpoints.resume(ALONE), 1)
    assert [path.name for path in checkpoints.paths()] == ["step-00000001"]
    assert (tmp_path / "damaged-step-00000002").is_dir()
    damage(checkpoints.paths()[0])
    with pytest.raises(ArtifactError, match="no checkpoint is whole") as caught:
        checkpoints.resume(ALONE)
    caught.match(pattern)
    assert "to train from the start" in str(caught.value.fix)


def test_refuses_another_training_and_says_why(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, IDENTITY), 1)
    with pytest.raises(ArtifactError, match=r"finetune\.step_size differ") as caught:
        Checkpoints(tmp_path, {**IDENTITY, "finetune.step_size": 0.2}).newest()
    assert "0.1" in str(caught.value.found) and "0.2" in str(caught.value.expected)
    edit_manifest(path, lambda m: m.update(format_version=1))
    with pytest.raises(ArtifactError, match="format version") as caught:
        Checkpoints(tmp_path, IDENTITY).newest()
    assert (caught.value.found, caught.value.expected) == ("1", str(FORMAT_VERSION))


def test_refuses_another_circuit_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'sums\.0' differs") as caught:
        check_shapes(tmp_path, {"sums.0": (2, 3)}, {"sums.0": (2, 4)})
    assert caught.value.found == "shape (2, 3)" and caught.value.expected == "shape (2, 4)"


def test_shards_of_different_circuits_make_no_checkpoint(tmp_path: Path) -> None:
    draft = Draft(Checkpoints(tmp_path, IDENTITY), TrainingFacts(), "x", 2)
    draft.write(0, [Piece("sums.0", (3, 4), 0, torch.zeros(6))])
    draft.write(1, [Piece("sums.0", (2, 4), 6, torch.zeros(2))])
    with pytest.raises(ArtifactError, match="different circuits") as caught:
        draft.publish(threading.Event())
    assert "[2, 4]" in str(caught.value.found) and "[3, 4]" in str(caught.value.expected)


def test_shards_that_never_come_are_named(tmp_path: Path) -> None:
    draft = Draft(Checkpoints(tmp_path, IDENTITY), TrainingFacts(), "x", 3)
    draft.write(1, [])
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(ResourceError, match="1 of 3 shards; none of rank 0, 2"):
        draft.publish(given_up)


def test_the_step_it_vouches_for_is_exact_while_training_goes_on(tmp_path: Path) -> None:
    saver = Saver(Checkpoints(tmp_path, IDENTITY), ALONE)
    facts = TrainingFacts(loader={"epoch": 0})
    for step in range(1, 6):
        facts.step, facts.samples, facts.loader["epoch"] = step, step * 10, step
        saver.save(facts, pieces(statistics(step), 0, 1))
        # The trainer goes on in the same facts at once.
        facts.step, facts.loader["epoch"] = 99, 99
    assert not saver.has_failed
    saver.wait()
    assert not saver.is_busy
    found = saver.checkpoints.newest()
    assert found is not None and (found.facts.step, found.facts.loader) == (5, {"epoch": 5})
    assert torch.equal(found.statistics()["sums.0"], statistics(5)["sums.0"])
    assert [path.name for path in saver.checkpoints.paths()] == ["step-00000005", "step-00000004"]


def test_a_full_disk_is_a_typed_error_of_the_next_wait_and_leaves_the_previous(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    save(checkpoints, 1)
    script = f"""
    import resource, signal, torch
    from pathlib import Path
    from distpc.errors import ResourceError
    from distpc.parallel.mesh import Mesh
    from distpc.training.checkpoint import Checkpoints, Piece, Saver, TrainingFacts
    saver = Saver(
        Checkpoints(Path({str(tmp_path)!r}), {IDENTITY!r}), Mesh(0, 1, 0, torch.device("cpu"))
    )
    # A file size limit stops a write in its middle, as a full disk or quota does.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    saver.save(TrainingFacts(step=2), [Piece("sums.0", (200_000,), 0, torch.ones(200_000))])
    try:
        saver.wait()
    except ResourceError as error:
        print(error)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout.startswith("no space left"), ended.stderr
    assert "run the same command again" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_holds(checkpoints.newest(), 1)
