"""What progressive growing and latents inside of leaves go with."""

from types import SimpleNamespace

import pytest

from distpc.config import RunConfig, parse_config
from distpc.errors import ConfigError
from distpc.pipeline.comparison.budget import distillation_visits
from distpc.pipeline.stages import STAGES

PROGRESSIVE = {"structure.leaf": "hclt", "distill.kind": "progressive"}


def config(**fields: object) -> RunConfig:
    values: dict = {"name": "a", "data": {"source": {"kind": "digits"}},
                    "teacher": {"kind": "pixels"}}  # fmt: skip
    for field, value in fields.items():
        section = values
        *path, last = field.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return parse_config(values, where="a.yaml")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"structure.leaf": "product"}, "structure.leaf to hclt"),
        ({"structure.leaf_latents": True}, "structure.leaf_latents must be False"),
        ({"structure.leaf_tied": True}, "structure.leaf_tied must be False"),
        ({"structure.leaf_num_groups": 2}, "structure.leaf_num_groups must be 1, it is 2"),
        ({"latents.keep_features": False}, "latents.keep_features to true"),
        ({"parallel.zero_stage": 3}, "parallel.zero_stage to 0, 1 or 2"),
        ({"parallel.node_parallel": 2}, "parallel.node_parallel to 1"),
        ({"distill.growing.final_heads": 1}, "final_heads 1 is below first_heads 2"),
        ({"distill.growing.step_size": 0}, "distill.growing.step_size"),
        ({"distill.growing.covered_fraction": 1.5}, "distill.growing.covered_fraction"),
        ({"distill.growing.epoch": 3}, "did you mean 'epochs'?"),
        ({"distill.kind": "progresive"}, "distill.kind"),
    ],
)
def test_settings_that_do_not_go_with_growing_are_named(fields, named):
    assert config(**PROGRESSIVE).distill.growing.final_heads == 4
    with pytest.raises(ConfigError) as caught:
        config(**{**PROGRESSIVE, **fields})
    assert named in str(caught.value) and "a.yaml" in str(caught.value)


@pytest.mark.parametrize("field", ["leaf_latents", "leaf_tied"])
def test_latents_inside_of_leaves_need_leaves_with_an_inside(field):
    with pytest.raises(ConfigError, match=f"structure.{field} is about leaf hclt"):
        config(**{f"structure.{field}": True})


def test_growing_settings_make_no_other_run_stale():
    distill = next(stage for stage in STAGES if stage.name == "distill")
    plain = config(**{"structure.leaf": "hclt"})
    assert distill.fields(plain) == distill.fields(
        config(**{"structure.leaf": "hclt", "distill.growing.epochs": 3, "distill.inner_near": 2})
    )
    assert "features" in distill.unread(plain)
    grown = config(**PROGRESSIVE)
    assert "features" not in distill.unread(grown)
    assert distill.fields(grown) != distill.fields(
        config(**{**PROGRESSIVE, "distill.growing.epochs": 3})
    )
    inner = {"structure.leaf": "hclt", "structure.leaf_latents": True}
    assert distill.fields(config(**inner)) != distill.fields(
        config(**{**inner, "distill.inner_near": 2})
    )


def test_visits_of_distillation_are_charged():
    entries: list = [SimpleNamespace(num_samples=100) for _ in range(3)]
    trained = {"structure.leaf": "hclt", "distill.leaf_epochs": 7}
    assert distillation_visits(config(), entries) == 300
    assert distillation_visits(config(**trained), entries) == 8 * 300
    assert (
        distillation_visits(config(**trained, **{"structure.leaf_latents": True}), entries) == 300
    )
    grown = {**PROGRESSIVE, "distill.growing.epochs": 2, "distill.growing.top_samples": 100}
    # Three rounds of two passes, and the count; likelihoods and five passes of the top level.
    assert distillation_visits(config(**grown), entries) == 7 * 300 + 6 * 100
