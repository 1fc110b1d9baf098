"""The command line: help for every command, overrides anywhere, errors on stderr with exit 2."""

from pathlib import Path

import pytest

from distpc.cli import main
from distpc.cli.runs import STAGE_HELP
from distpc.pipeline.stages import STAGES

CONFIG = str(Path(__file__).parents[2] / "configs" / "digits.yaml")


def test_every_stage_has_a_command() -> None:
    assert [stage.name for stage in STAGES] == list(STAGE_HELP)


@pytest.mark.parametrize("command", ["run", *STAGE_HELP, "catalogue", "sample", "query"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"distpc {command} " in capsys.readouterr().out.rsplit("example", 1)[1]


def test_overrides_may_stand_before_and_behind_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", CONFIG, "seed=5", "--out", str(tmp_path), "name=other", "--dry-run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "seed: 5" in shown and "name: other" in shown
    assert f"run folder: {tmp_path}" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_run_may_stop_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", CONFIG, "--until", "index", "--out", str(tmp_path)]) == 0
    assert {"shards", "index"} == {path.parent.name for path in tmp_path.glob("*/manifest.json")}
    unneeded = ["structure.kind=hclt", "teacher.kind=none", "finetune.initialization=random"]
    assert main(["run", CONFIG, "--until", "assign", *unneeded]) == 2
    assert "has no stage 'assign'" in capsys.readouterr().err


def test_codebooks_of_positions_are_for_latents_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", CONFIG, "--out", str(tmp_path), "latents.codebook=per_position"]
    assert main([*arguments, "--dry-run"]) == main(arguments) == 2
    assert "distpc run CONFIG --until assign" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "--dry-run", "--until", "assign"]) == 0


def test_only_what_is_built_has_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(f"text number {number} of twenty\n" * 4)
    source = f"data.source={{kind: text, path: '{tmp_path}', chunk_length_tokens: 16}}"
    text = ["run", CONFIG, "--out", str(tmp_path / "run"), source, "teacher.kind=onehot"]
    states = ["structure.kind=hmm", "structure.num_states=7", "latents.num_clusters=8"]
    assert main([*text, *states, "--dry-run"]) == 2
    assert "structure.num_states" in capsys.readouterr().err
    for structure in (states, []):
        # Not even the kind of structure matters where none is made.
        assert main([*text, *structure, "--dry-run", "--until", "assign"]) == 0
        shown = capsys.readouterr().out.partition("\ndata: ")[2]
        assert "\ncircuit: " not in shown and "finetune " not in shown
        assert "  fit        run " in shown
    assert main([*text, *states, "--until", "structure"]) == 2
    assert main(["structure", *text[1:], *states]) == 2
    assert "structure.num_states" in capsys.readouterr().err
    assert main([*text, *states, "--until", "index"]) == 0
    # What is built is looked at all the same.
    bad = ["teacher.kind=masked_lm", "teacher.masked_lm.batch_size=999"]
    assert main([*text, *states, *bad, "--until", "assign"]) == 2
    assert "teacher.masked_lm.batch_size" in capsys.readouterr().err


def test_a_users_error_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", CONFIG, "finetune.epochs=5"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("distpc: ConfigError: unknown config key 'finetune.epochs'")
    assert "did you mean 'num_epochs'?" in shown


@pytest.mark.parametrize(
    "arguments",
    [["run", CONFIG, "--dryrun"], ["sample", "model", "a=b"], ["train", CONFIG], []],
)
def test_unknown_arguments_end_with_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_missing_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(tmp_path / "model")]) == 2
    assert str(tmp_path / "model") in capsys.readouterr().err
