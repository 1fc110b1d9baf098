"""Contradictions between config, data and machine are refused before anything is written."""

from pathlib import Path

import pytest

from distpc.config import load_config
from distpc.errors import ConfigError, DistpcError
from distpc.pipeline.preflight import check_run

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finetune.batch_size=1500", ["finetune.batch_size", "1437 training samples, 1500"]),
        ("teacher.mae.batch_size=1438", ["teacher.mae.batch_size", "1437"]),
        ("finetune.batch_size=1", ["1 samples, 2 ranks"]),
        ("data.patch_size_pixels=3", ["data.patch_size_pixels", "8 x 8 pixels"]),
        ("parallel.num_workers=6400", ["6400", "parallel.num_workers"]),
        ("parallel.cpus_per_worker=900", ["900", "cpus_per_worker"]),
        ("data.color=ycocg_r", ["data.color", "RGB"]),
        ("data.source={kind: text, path: /nowhere}", ["/nowhere", "data.source.path"]),
        ("teacher.kind=causal_lm", ["teacher causal_lm reads text", "kind image"]),
    ],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, override: str, words: list[str]) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(DistpcError) as caught:
        check_run(load_config(CONFIG, [override]))
    for word in words:
        assert word in str(caught.value)


def test_a_node_axis_without_units_is_refused() -> None:
    settings = ["structure.num_states=4", "parallel.num_ranks=32", "parallel.node_parallel=32"]
    config = CONFIG.with_name("digits_hclt.yaml")
    with pytest.raises(ConfigError) as caught:
        check_run(load_config(config, settings))
    for word in ("parallel.node_parallel", "32 ranks", "4 units", "1, 2, 4", "node_parallel=4"):
        assert word in str(caught.value)
    check_run(load_config(config, [*settings[:2], "parallel.node_parallel=4"]))


@pytest.mark.parametrize(
    ("override", "stumbles", "passes"),
    [
        ("finetune.batch_size=1500", "finetune", "assign"),
        ("teacher.mae.batch_size=1438", "teacher", "structure"),
        ("data.patch_size_pixels=3", "features", "index"),
        ("parallel.num_workers=6400", "distill", "shards"),
    ],
)
def test_what_is_not_built_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, override: str, stumbles: str, passes: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(CONFIG, [override])
    check_run(config, builds=[passes])
    with pytest.raises(DistpcError):
        check_run(config, builds=[stumbles])


def test_shipped_digits_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("digits", "digits_hclt"):
        check_run(load_config(CONFIG.with_name(f"{name}.yaml")))
