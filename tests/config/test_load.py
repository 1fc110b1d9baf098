"""Configurations are checked when read, and errors name the nearest key."""

from pathlib import Path

import pytest

from distpc.config import dump_config, load_config
from distpc.config.reference import config_reference
from distpc.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MINIMAL = "name: tiny\ndata:\n  source: {kind: digits}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert load_config(path).name


def test_dump_reads_back(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, ["finetune.num_epochs=3", "teacher.mae.width=32"])
    assert (config.finetune.num_epochs, config.teacher.mae.width) == (3, 32)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finetune.num_epoch=5", ["finetune.num_epoch", "did you mean 'num_epochs'"]),
        ("teacher.mae.widht=5", ["teacher.mae.widht", "did you mean 'width'"]),
        ("data.source.pth=x", ["'data.source.pth'", "where:    data.source.pth=x"]),
        (
            "data.source={kind: image_folder, path: x, resize_pixel: 3}",
            ["did you mean 'resize_pixels'"],
        ),
        ("latent.num_clusters=5", ["latent", "did you mean 'latents'"]),
        ("data.source.kind=digit", ["digit", "'idx'"]),
        ("finetune.step_size=2", ["finetune.step_size", "less than or equal to 1", "2"]),
        ("data.split.train=0.5", ["data.split", "0.7", "must be 1"]),
        ("structure.kind=quad_tree", ["finetune.initialization"]),
        ("parallel.offload=true", ["take zero_stage 1 to 3"]),
        ("parallel={zero_stage: 3, recompute_messages: true}", ["take zero_stage 0 to 2"]),
        ("name.first=x", ["below a field that is no section"]),
        ("nonsense", ["section.field=value"]),
        ("seed=[1", ["not YAML"]),
    ],
)
def test_wrong_override(minimal: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "", "name: x\n"])
def test_wrong_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"wrong\.yaml"):
        load_config(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_reference_is_up_to_date(repository: Path) -> None:
    written = (repository / "docs" / "config.md").read_text()
    assert written == config_reference(), "run python tools/make_config_reference.py"
