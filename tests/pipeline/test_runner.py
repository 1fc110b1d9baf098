"""Stages are skipped when done, continued when interrupted and redone when stale."""

from dataclasses import replace
from pathlib import Path

import pytest

from distpc.artifacts import Artifact, Stage, StageContext, fingerprint, read_json, write_json
from distpc.config import RunConfig, parse_config
from distpc.errors import ArtifactError, FormatVersionError
from distpc.pipeline.runner import Pipeline

HERE = __name__
CALLS: list[str] = []


def make_numbers(context: StageContext) -> None:
    CALLS.append("numbers")
    (context.out / "kept.txt").touch()
    if context.config.name == "fails":
        raise RuntimeError("stage broke")
    (context.out / "n.txt").write_text(str(context.config.seed))
    context.metadata["n"] = context.config.seed


def double_numbers(context: StageContext) -> None:
    CALLS.append("double")
    number = int((context.input("numbers").path / "n.txt").read_text())
    (context.out / "n.txt").write_text(str(number * context.config.evaluate.num_pictures))


STAGES = (
    Stage("numbers", f"{HERE}:make_numbers", (), lambda config: config.seed),
    Stage(
        "unused", f"{HERE}:never", (), lambda config: None, lambda config: config.name == "unused"
    ),
    Stage(
        "double",
        f"{HERE}:double_numbers",
        ("numbers", "unused"),
        lambda config: config.evaluate.num_pictures,
    ),
)


def config(name: str = "tiny", seed: int = 3, pictures: int = 2) -> RunConfig:
    return parse_config(
        {
            "name": name,
            "seed": seed,
            "data": {"source": {"kind": "digits"}},
            "evaluate": {"num_pictures": pictures},
        },
        "test",
    )


def run(folder: Path, **fields: object) -> list[str]:
    CALLS.clear()
    Pipeline(config(**fields), folder, STAGES).run_stages()  # type: ignore[arg-type]
    return list(CALLS)


def test_done_stages_are_skipped_and_changes_rerun_what_depends(tmp_path: Path) -> None:
    assert run(tmp_path) == ["numbers", "double"]
    assert (tmp_path / "double" / "n.txt").read_text() == "6"
    assert Artifact.open(tmp_path / "numbers").metadata == {"n": 3}
    assert run(tmp_path) == []
    assert run(tmp_path, pictures=5) == ["double"]
    assert run(tmp_path, seed=4, pictures=5) == ["numbers", "double"]
    assert (tmp_path / "double" / "n.txt").read_text() == "20"


def test_an_interrupted_stage_keeps_its_finished_files(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path, name="fails")
    states = [step.state for step in Pipeline(config(), tmp_path, STAGES).steps()]
    assert states == ["interrupted", "missing"]
    (tmp_path / "numbers" / "kept.txt").write_text("finished before")
    assert run(tmp_path) == ["numbers", "double"]
    assert (tmp_path / "numbers" / "kept.txt").read_text() == "finished before"


def test_an_unfinished_attempt_of_another_config_is_cleared(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(tmp_path, name="fails", seed=9)
    (tmp_path / "numbers" / "kept.txt").write_text("of seed 9")
    run(tmp_path)
    assert (tmp_path / "numbers" / "kept.txt").read_text() == ""


def test_a_cut_artifact_is_redone(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "numbers" / "n.txt").write_text("")
    assert run(tmp_path) == ["numbers"]


def test_death_between_seal_and_clean_up_loses_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    artifact = Artifact.open(tmp_path / "numbers")
    write_json(tmp_path / "numbers" / ".attempt.json", {"fingerprint": artifact.fingerprint})
    assert run(tmp_path) == []


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "numbers" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    (tmp_path / "config.yaml").write_text("mine too")
    with pytest.raises(ArtifactError, match="holds something else"):
        Pipeline(config(), tmp_path, STAGES).run_stage("numbers")
    assert precious.read_text() == "mine"
    assert (tmp_path / "config.yaml").read_text() == "mine too"


def test_results_of_another_version_are_refused_not_deleted(tmp_path: Path) -> None:
    run(tmp_path)
    manifest = tmp_path / "numbers" / "manifest.json"
    write_json(manifest, {**read_json(manifest), "format_version": 2})
    with pytest.raises(FormatVersionError, match="format version"):
        run(tmp_path)
    assert (tmp_path / "numbers" / "n.txt").is_file()


def test_a_deleted_log_makes_nothing_stale(tmp_path: Path) -> None:
    run(tmp_path)
    folder = tmp_path / "numbers"
    (folder / "logs").mkdir()
    (folder / "logs" / "rank-1.log").write_text("said")
    (folder / "manifest.json").unlink()
    step = Pipeline(config(), tmp_path, STAGES).steps
    with pytest.raises(ArtifactError):
        step()
    Artifact.seal(folder, "numbers", "f" * 16, 1.0, {})
    assert list(Artifact.open(folder).files) == ["kept.txt", "n.txt"]


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("old")
    stages = (replace(STAGES[0], identity=f"{HERE}:identity_of_source"), STAGES[2])
    pipeline = Pipeline(config(), tmp_path / "run", stages)
    pipeline.run_stages()
    assert {step.state for step in pipeline.steps()} == {"done"}
    source.write_text("new")
    assert {step.state for step in pipeline.steps()} == {"stale"}


def identity_of_source(config: RunConfig, folder: Path) -> str:
    return (folder.parent.parent / "source.txt").read_text()


def test_one_stage_needs_its_inputs(tmp_path: Path) -> None:
    pipeline = Pipeline(config(), tmp_path, STAGES)
    with pytest.raises(ArtifactError, match="needs stage 'numbers', which is missing"):
        pipeline.run_stage("double")
    pipeline.run_stage("numbers")
    assert pipeline.run_stage("double").stage == "double"
    with pytest.raises(ArtifactError, match="no stage 'unused'"):
        pipeline.run_stage("unused")


def test_fingerprints_depend_on_upstream(tmp_path: Path) -> None:
    first = Pipeline(config(), tmp_path, STAGES).steps()
    second = Pipeline(config(seed=4), tmp_path, STAGES).steps()
    assert [step.fingerprint for step in first] != [step.fingerprint for step in second]
    assert first[1].fingerprint != second[1].fingerprint
    assert len(fingerprint(0)) == 16
