"""The teacher stage on real digits: figures, equal results after a kill and on more ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from distpc.artifacts import StageContext, file_digest
from distpc.config.teachers import MaeConfig
from distpc.errors import DataError, TeacherError, TrainingError
from distpc.parallel.mesh import Mesh
from distpc.parallel.meter import FIGURES
from distpc.teachers import load_teacher, train
from distpc.teachers.checkpoint import checkpoint_path
from distpc.teachers.shuffled import ShuffledTeacher
from distpc.teachers.trainer import learning_rate

TINY = {"width": 16, "num_heads": 2, "encoder_blocks": 1, "feature_width": 4, "num_epochs": 2}

# Batches of 128 of 1437 training images: step 12 ends the first epoch, the last step is 23.
DYING = """
import json, os, signal, sys
import torch
from distpc.artifacts import StageContext
from distpc.parallel.mesh import Mesh
from distpc.teachers import trainer

torch.set_num_threads(1)
trainer.CHECKPOINT_SECONDS = float(sys.argv[2])

class Dying(trainer.TeacherTrainer):
    def _step(self, batch):
        if self.state.step == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._step(batch)

Dying(StageContext.from_json(json.loads(sys.argv[1])), Mesh.from_environment()).train()
"""

ContextMaker = Callable[..., StageContext]


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    # DeepSpeed asks for it even where there is one process.
    monkeypatch.setenv("LOCAL_RANK", "0")


def _train_here(ctx: StageContext) -> None:
    # The process group of one stays: DeepSpeed remembers the first one of a process.
    train.train_rank(ctx.to_json(), Mesh.from_environment())


def _scalars(ctx: StageContext, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ctx.tensorboard / "teacher"))
    events.Reload()
    assert events.Tags()["images"] == ["teacher/reconstruction"]
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _check_what_ranks_measured(ctx: StageContext, num_ranks: int) -> None:
    """At the second step: in the manifest, TensorBoard and the file for Ray's gauges."""
    ranks = ctx.metadata["ranks"]
    assert ranks == json.loads((ctx.out / "logs" / FIGURES).read_text())["ranks"]
    assert len(ranks) == num_ranks
    for number, figures in enumerate(ranks):
        parts = ("compute_seconds", "communication_seconds", "data_seconds")
        assert figures["step_seconds"] == pytest.approx(sum(figures[part] for part in parts))
        assert figures["communication_seconds"] > 0
        # 16 patches, width 16: some thousands of weights, used six times for each patch.
        flops = figures["tflops"] * 1e12 / figures["samples_per_second"]
        assert 1e4 < flops < 1e7
        assert 0 < figures["device_peak_fraction"] < 1
        assert figures["peak_memory_bytes"] > 2**20
        for name, value in figures.items():
            assert _scalars(ctx, f"ranks/{name}/{number}") == [(2, pytest.approx(value, rel=1e-5))]


@pytest.mark.parametrize("kind", ["pixels", "random"])
def test_controls_are_written_at_once(make_context: ContextMaker, kind: str) -> None:
    ctx = make_context({"kind": kind, "random_width": 6})
    train.run(ctx)
    teacher = load_teacher(ctx.out)
    assert teacher.kind == ctx.metadata["kind"] == kind
    assert (
        teacher.feature_width == ctx.metadata["feature_width"] == {"pixels": 4, "random": 6}[kind]
    )
    assert ctx.metadata["num_parameters"] == 0
    assert ctx.metadata["seconds"] < 5


def test_shuffled_controls_take_the_place_of_their_teacher(make_context: ContextMaker) -> None:
    ctx = make_context({"kind": "pixels", "shuffle_samples": True, "shuffle_num_samples": 100})
    train.run(ctx)
    teacher = load_teacher(ctx.out)
    assert isinstance(teacher, ShuffledTeacher)
    assert ctx.metadata["name"] == "shuffled pixels"
    assert teacher.bank.shape == (100, 64)
    assert teacher.bank.float().std() > 1
    written = (ctx.out / "teacher.json").stat().st_mtime_ns
    train.run(ctx)
    assert (ctx.out / "teacher.json").stat().st_mtime_ns == written


def test_two_ranks_train_the_same_teacher_as_one(make_context: ContextMaker) -> None:
    teacher = {"kind": "mae", "mae": {**TINY, "batch_size": 125}}
    one, two = make_context(teacher, 1, "one"), make_context(teacher, 2, "two")
    _train_here(one)
    train.run(two)
    train.run(one)
    # Not the weights: biases of keys have no effect, so AdamW blows up their gradients' rounding.
    x = torch.arange(64).remainder(17).repeat(2, 1)
    first, second = (load_teacher(ctx.out).encode(x) for ctx in (one, two))
    assert torch.allclose(first, second, atol=1e-4)
    assert one.metadata["valid_mse"] == pytest.approx(two.metadata["valid_mse"], rel=1e-4)
    assert two.metadata["variance"] == pytest.approx(0.073, abs=0.004)
    assert two.metadata["num_steps"] == 23
    assert sorted(path.name for path in two.out.iterdir()) == [
        "logs",
        "teacher.json",
        "teacher.safetensors",
    ]
    rates = dict(_scalars(two, "teacher/learning_rate"))
    assert sorted(rates) == list(range(1, 24))
    assert rates[1] == pytest.approx(1e-3)
    assert len(_scalars(two, "teacher/train_mse")) == 23
    _check_what_ranks_measured(one, 1)
    _check_what_ranks_measured(two, 2)
    assert [step for step, _ in _scalars(two, "teacher/valid_mse")] == [12, 23]


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1000.0], ids=["every-step", "every-epoch"])
def test_killed_training_ends_with_the_same_weights(
    make_context: ContextMaker, checkpoint_seconds: float
) -> None:
    teacher = {"kind": "mae", "mae": TINY}
    whole, broken = make_context(teacher, 1, "whole"), make_context(teacher, 1, "broken")
    _train_here(whole)
    arguments = [json.dumps(broken.to_json()), str(checkpoint_seconds)]
    died = subprocess.run([sys.executable, "-c", DYING, *arguments], check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL
    assert sorted(path.name for path in broken.out.iterdir()) == ["checkpoints", "logs"]
    _train_here(broken)
    train.run(broken)
    assert not checkpoint_path(broken.out).parent.exists()
    digests = [file_digest(ctx.out / "teacher.safetensors") for ctx in (whole, broken)]
    assert digests[0] == digests[1]
    assert json.loads((broken.out / "teacher.json").read_text())["weights"]["sha256"] == digests[0]
    for tag in ("teacher/train_mse", "teacher/valid_mse"):
        assert _scalars(whole, tag) == _scalars(broken, tag)


def test_finished_teachers_are_kept(make_context: ContextMaker) -> None:
    ctx = make_context({"kind": "mae", "mae": TINY})
    _train_here(ctx)
    written = (ctx.out / "teacher.safetensors").stat().st_mtime_ns
    train.run(ctx)
    assert (ctx.out / "teacher.safetensors").stat().st_mtime_ns == written
    assert ctx.metadata["valid_mse"] > 0


def test_training_explains_the_data(make_context: ContextMaker) -> None:
    mae = {**TINY, "width": 32, "feature_width": 8, "batch_size": 32, "learning_rate": 5e-3}
    ctx = make_context({"kind": "mae", "mae": mae})
    _train_here(ctx)
    train.run(ctx)
    assert ctx.metadata["valid_mse"] < 0.75 * ctx.metadata["variance"]
    explained = 1 - ctx.metadata["valid_mse"] / ctx.metadata["variance"]
    assert ctx.metadata["explained"] == pytest.approx(explained)


def test_divergence_names_the_step(make_context: ContextMaker) -> None:
    mae = {**TINY, "learning_rate": 1e30, "warmup_fraction": 0.0}
    ctx = make_context({"kind": "mae", "mae": mae})
    with pytest.raises(TrainingError) as caught:
        _train_here(ctx)
    assert caught.value.where is not None and "step 2 of" in caught.value.where
    assert not (ctx.out / "teacher.json").exists()


def test_batches_larger_than_the_split_are_refused(make_context: ContextMaker) -> None:
    ctx = make_context({"kind": "mae", "mae": {**TINY, "batch_size": 2000}})
    with pytest.raises(DataError, match="fewer samples than one batch"):
        _train_here(ctx)


def test_checkpoints_are_checked(make_context: ContextMaker) -> None:
    ctx = make_context({"kind": "mae", "mae": TINY})
    _train_here(ctx)
    path = checkpoint_path(ctx.out)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(TeacherError, match="damaged"):
        _train_here(ctx)
    path.write_bytes(whole)
    ctx.fingerprint = "0" * 16
    _train_here(ctx)
    assert len({step for step, _ in _scalars(ctx, "teacher/train_mse")}) == 23


def test_learning_rate_rises_and_falls() -> None:
    config = MaeConfig(learning_rate=0.5, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[9] == rates[10] == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert learning_rate(0, 1, MaeConfig(warmup_fraction=0.9)) > 0


def test_pictures_show_what_was_hidden() -> None:
    from distpc.data.pictures import three_channels, to_display
    from distpc.data.spec import DatasetSpec
    from distpc.teachers.mae import MaskedAutoencoder
    from distpc.teachers.pictures import reconstruction_grid

    sizes = {"width": 8, "num_heads": 2, "encoder_blocks": 1, "decoder_blocks": 1}
    for color, top in (("as_is", (256, 256, 256)), ("ycocg_r", (256, 512, 512))):
        spec = DatasetSpec("colour", "image", 48, top * 16, image_shape=(4, 4, 3), color=color)
        teacher = MaskedAutoencoder(spec, 2, feature_width=3, neighbourhood=1, **sizes)
        x = torch.full((2, 48), 255)
        grid = reconstruction_grid(teacher, x, torch.tensor([[0, 1], [2, 3]]))
        assert grid.shape == (2 + 3 * 58, 2 + 2 * 58, 3)
        original, masked = grid[2:58, 2:], grid[60:116, 2:]
        shown = three_channels(to_display(x.numpy(), spec)).repeat(14, axis=1).repeat(14, axis=2)
        assert (original[:, :56] == shown[0]).all()
        assert (masked[:28, :56] == original[:28, :56]).all()
        assert (masked[28:, :56] == 128).all()
        assert (masked[:28, 58:] == 128).all()
