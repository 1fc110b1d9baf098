"""Stages are skipped when done, continued when interrupted and redone when stale."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from distpc.artifacts import (
    Artifact,
    Stage,
    StageContext,
    as_json,
    fingerprint,
    read_json,
    write_json,
)
from distpc.artifacts.fields import names_in, plain
from distpc.config import RunConfig, load_config, parse_config
from distpc.errors import ArtifactError, FormatVersionError
from distpc.pipeline.runner import Pipeline
from distpc.pipeline.stages import STAGES as ALL_STAGES

HERE = __name__
CONFIGS = Path(__file__).parents[2] / "configs"
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


def refuse_large(config: RunConfig, numbers: Artifact) -> None:
    if numbers.metadata["n"] > config.evaluate.num_pictures:
        raise ArtifactError("too large", found=numbers.metadata["n"])


def test_finished_stages_are_judged_by_the_limits_of_now(tmp_path: Path) -> None:
    judged = (replace(STAGES[0], judge=f"{HERE}:refuse_large"), *STAGES[1:])
    out = tmp_path / "run"
    assert run(out, seed=3, pictures=3) == ["numbers", "double"]
    Pipeline(config(pictures=3), out, judged).check()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    strict = Pipeline(config(pictures=2), out, judged)
    # Nothing of it has to be made again: what is there is refused, also as what others read.
    assert strict.steps()[0].state == "done"
    for builds in (None, ["numbers"], ["double"], strict.built(until="numbers")):
        with pytest.raises(ArtifactError, match="too large"):
            strict.check(builds)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    strict.check([])
    fields = {**config(pictures=2).model_dump(), "artifacts": {"reuse": [str(out)]}}
    with pytest.raises(ArtifactError, match="too large"):
        Pipeline(parse_config(fields, "test"), tmp_path / "other", judged).run_stages()


def digits(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "digits.yaml", overrides)


def test_what_makes_a_stage_stale_is_named(tmp_path: Path) -> None:
    changed = ("seed=7", "latents.num_clusters=8", "latents.keep_features=false")
    changed += ("teacher.kind=random", "teacher.random_width=5", "evaluate.num_pictures=3")
    before = Pipeline(digits(), tmp_path).steps()
    for step in before:
        step.folder.mkdir()
        if step.stage.name == "fit":
            begun = {"fingerprint": step.fingerprint, "made_from": step.made_from}
            write_json(step.folder / ".attempt.json", begun)
            continue
        Artifact.seal(step.folder, step.stage.name, step.fingerprint, 1.0, {}, step.made_from)
    states = {step.stage.name: step.state for step in Pipeline(digits(), tmp_path).steps()}
    assert states.pop("fit") == "interrupted" and set(states.values()) == {"done"}
    reasons = {s.stage.name: s.reason for s in Pipeline(digits(*changed), tmp_path).steps()}
    old, new = (Pipeline(digits(*over), tmp_path).config for over in ((), changed))
    assert f"seed is {old.seed} before, 7 now" in reasons["teacher"]
    assert "; teacher is {" in reasons["teacher"]
    assert f'teacher.kind is "{old.teacher.kind}" before, "random" now' in reasons["teacher"]
    clusters = f"latents.num_clusters is {old.latents.num_clusters} before, 8 now"
    assert reasons["fit"].startswith("an unfinished attempt with another config: ")
    assert clusters in reasons["fit"] and clusters in reasons["structure"]
    assert "latents.fit_samples is absent before" in reasons["features"]
    assert "latents.keep_features is true before, false now" in reasons["assign"]
    assert "stage features is " in reasons["fit"]
    pictures = f"evaluate.num_pictures is {old.evaluate.num_pictures} before, 3 now"
    assert pictures in reasons["evaluate"] and new.evaluate.num_pictures == 3


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_stages_call_fields_what_the_configuration_calls_them(name: str) -> None:
    config = load_config(CONFIGS / name, [])
    for stage in ALL_STAGES:
        fields = stage.fields(config)
        for path, known in names_in(fields, "fields").items():
            value: object = config
            for part in known.split("."):
                value = getattr(value, part)
            found = plain(fields)
            parts = re.findall(r"\w+", path.removeprefix("fields"))
            if len(parts) == 1 and int(parts[0]) == len(found):
                # Left out here, and named for results that have it.
                continue
            for part in parts:
                found = found[int(part) if isinstance(found, list) else part]
            is_derived = known in ("data.split_seed", "latents.fit_samples", "teacher")
            assert is_derived or isinstance(found, dict) or found == as_json(value), known
