"""Which runs a comparison has: variants x sizes x seeds of one configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distpc.config import RunConfig, parse_config
from distpc.config.compare import Variant
from distpc.errors import ConfigError

EM = {"finetune.initialization": "random", "teacher.kind": "none"}
"""Training on the data alone, from random parameters."""

LVD = {
    "finetune.initialization": "distilled",
    "finetune.batch_size": 250,
    "finetune.step_size": 0.1,
    "finetune.pseudocount": 10,
    "finetune.leaf_pseudocount": 2.56,
}
"""After distillation steps are small: large ones destroy what it gave in a few batches."""

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        variant: its name.
        group: of the variant, if any.
        size: value of `compare.size_fields`, None where the comparison has one size.
        seed: of the run.
        config: what it runs.
        folder: its run folder.
    """

    variant: str
    group: str | None
    size: int | None
    seed: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """For messages."""
        size = "" if self.size is None else f" size {self.size}"
        return f"{self.variant}{size} seed {self.seed}"


def plan_runs(config: RunConfig, folder: Path) -> list[Run]:
    """All runs of a comparison, sizes and seeds of a variant behind each other.

    Args:
        config: with the section `compare`.
        folder: of the comparison.

    Raises:
        ConfigError: a variant that the configuration does not allow, or a name that is no folder.
    """
    asked = config.compare
    variants = _chosen(asked.variants or standard_variants(config), asked.only)
    sizes: list[int | None] = [*asked.sizes] or [None]
    runs = []
    for name, variant in variants.items():
        if not NAME.match(name):
            raise ConfigError(
                "a variant's name has to serve as a folder",
                where="compare.variants",
                found=repr(name),
                expected="letters, digits and _ . -",
            )
        for size in sizes:
            for seed in asked.seeds:
                place = folder / "runs" / name / (f"size-{size}" if size else "") / f"seed-{seed}"
                made = _configure(config, name, variant, size, seed)
                runs.append(Run(name, variant.group, size, seed, made, place))
    _check_equal(runs)
    return runs


def standard_variants(config: RunConfig) -> dict[str, Variant]:
    """The variants of a configuration that names none.

    EM in three settings (step size, batch, pseudocounts), which a measured prototype found best at
    one size or another; latents from random patches, from features shuffled over samples, from
    random features, from the data's own values; and from the configured teacher.
    """
    own = "onehot" if config.data.source.kind == "text" else "pixels"
    settings = {
        "em_large_batch": (0.3, 1000, 10.0, 25.6),
        "em_small_batch": (0.1, 250, 100.0, 256.0),
        "em_smooth": (0.3, 1000, 100.0, 256.0),
    }
    found = {
        name: Variant(
            group="em",
            set={
                **EM,
                "finetune.step_size": step,
                "finetune.batch_size": batch,
                "finetune.pseudocount": count,
                "finetune.leaf_pseudocount": leaf_count,
            },
        )
        for name, (step, batch, count, leaf_count) in settings.items()
    }
    found["shuffled"] = Variant(set={**LVD, "teacher.kind": own, "teacher.shuffle_samples": True})
    found["random_features"] = Variant(set={**LVD, "teacher.kind": "random"})
    found["random_patches"] = Variant(
        set={**LVD, "teacher.kind": own, "latents.init": "random", "latents.num_rounds": 0}
    )
    found[own] = Variant(set={**LVD, "teacher.kind": own})
    if config.teacher.kind not in (own, "random", "none"):
        found[config.teacher.kind] = Variant(set={**LVD, "teacher.kind": config.teacher.kind})
    return found


def _chosen(variants: dict[str, Variant], only: list[str]) -> dict[str, Variant]:
    unknown = [name for name in only if name not in variants]
    if unknown:
        raise ConfigError(
            "a variant is asked for that the comparison does not have",
            where="compare.only",
            found=", ".join(unknown),
            expected=f"of {', '.join(variants)}",
        )
    return {name: variants[name] for name in only} if only else variants


def _configure(
    config: RunConfig, name: str, variant: Variant, size: int | None, seed: int
) -> RunConfig:
    values = config.model_dump(mode="json", exclude={"compare"})
    values["seed"] = seed
    values["data"]["split_seed"] = config.split_seed
    fields: dict[str, Any] = dict(variant.set)
    if size is not None:
        fields |= dict.fromkeys(config.compare.size_fields, size)
    for field, value in fields.items():
        _set(values, field, value, name)
    return parse_config(values, where=f"compare.variants.{name}")


def _set(values: dict[str, Any], field: str, value: Any, name: str) -> None:
    *sections, last = field.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            raise ConfigError(
                "a variant sets a field of a section that does not exist",
                where=f"compare.variants.{name}",
                found=field,
                fix="see docs/config.md for every field",
            )
        values = inner
    values[last] = value


def _check_equal(runs: list[Run]) -> None:
    """Refuse variants that would train other circuits, or on other data.

    Raises:
        ConfigError: naming the variant and the field.
    """
    by_size: dict[int | None, Run] = {}
    for run in runs:
        first = by_size.setdefault(run.size, run)
        for field, found, expected in (
            ("latents.num_clusters", run.config.latents.num_clusters,
             first.config.latents.num_clusters),
            ("structure", run.config.structure, first.config.structure),
            ("data", run.config.data, first.config.data),
        ):  # fmt: skip
            if found != expected:
                raise ConfigError(
                    "the variants of a comparison train different circuits",
                    where=f"compare.variants.{run.variant}, {field}",
                    found=found,
                    expected=f"{expected}, as in {first.variant}",
                    fix="compare circuits of equal size: list sizes in compare.sizes",
                )
    structure = runs[0].config.structure
    from_latents = structure.kind == "patches" and structure.tree_of == "latents"
    if from_latents and len({run.variant for run in runs}) > 1:
        raise ConfigError(
            "the variants of a comparison would get different trees",
            where="structure.tree_of",
            found="latents, which differ from variant to variant",
            expected="patch_means",
            fix="set structure.tree_of=patch_means",
        )
