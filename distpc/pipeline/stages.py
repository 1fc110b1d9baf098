"""The stages of a run, in order: what each reads, and what of the config its result depends on.

Fields left out of `fields` (ranks, workers, micro-batches, checkpoint intervals ...) change how a
result is computed, not what it is, so changing them redoes nothing.
"""

from __future__ import annotations

from typing import Any

from distpc.artifacts import Stage
from distpc.artifacts.fields import ABSENT, Named
from distpc.config import RunConfig
from distpc.config.sources import ShardsSource, TextSource, TokenSamplesSource
from distpc.config.teachers import PRETRAINED, TEXT_ONLY, TeacherConfig


def _section(name: str, section: Any, *, without: tuple[str, ...] = ()) -> Named:
    return Named(name, section.model_dump(mode="json", exclude=set(without)))


def _seed(config: RunConfig) -> Named:
    return Named("seed", config.seed)


def _shards(config: RunConfig) -> Any:
    if isinstance(config.data.source, ShardsSource):
        # Where they lie is no part of what they are.
        return (
            Named("data.source.kind", config.data.source.kind),
            Named("data.color", config.data.color),
        )
    without = ("patch_size_pixels", "cache_bytes", "split_seed")
    split_seed = Named("data.split_seed", config.split_seed)
    return _section("data", config.data, without=without), split_seed


def _teacher(config: RunConfig) -> Any:
    teacher = config.teacher
    fields = [
        Named("teacher.kind", teacher.kind),
        _settings(teacher),
        Named("data.patch_size_pixels", config.data.patch_size_pixels),
        _seed(config),
    ]
    state = ABSENT if teacher.state == "token" else teacher.state
    shuffled = teacher.shuffle_num_samples if teacher.shuffle_samples else ABSENT
    fields.append(Named("teacher.state", state))
    fields.append(Named("teacher.shuffle_num_samples", shuffled))
    return fields


def _settings(teacher: TeacherConfig) -> Named:
    """The settings of its kind, if it has any."""
    section = "teacher.pretrained" if teacher.kind in PRETRAINED else f"teacher.{teacher.kind}"
    values = teacher.of_kind()
    if values is None:
        return Named("teacher", None)
    if "sees" in values:
        values = {**values, "sees": Named("teacher.sees", values["sees"])}
    if teacher.kind == "random":
        # It has no section of its own.
        width = Named("teacher.random_width", values["width"])
        section, values = "teacher", {**values, "width": width}
    return Named(section, values)


def _features(config: RunConfig) -> Any:
    latents, mixed = config.latents, config.teacher.extraction_mixed_precision
    fields: list[Any] = [
        Named("latents.max_samples", latents.max_samples),
        Named("teacher.extraction_mixed_precision", mixed),
    ]
    if _is_text(config):
        # Features of text that do not say which tokens are missing are another result.
        fields.append("missing tokens marked")
    fitted_to = latents.fit_samples or f"of {latents.num_clusters} clusters"
    # Last: where it stands does not move then, and differences are told by its name.
    some = ABSENT if latents.keep_features else fitted_to
    fields.append(Named("latents.fit_samples", some))
    return fields


def _is_text(config: RunConfig) -> bool:
    """Whether the data are text, as far as the configuration tells."""
    is_source = isinstance(config.data.source, TextSource | TokenSamplesSource)
    return is_source or config.teacher.kind in TEXT_ONLY


def _fit(config: RunConfig) -> Any:
    latents = config.latents
    without = [
        "max_samples",
        "max_bad_samples",
        "keep_features",
        "fit_samples",
        "min_usage_entropy_fraction",
        "max_dead_fraction",
        "feature_memory",
    ]
    if latents.algorithm != "mini_batch":
        without.append("batch_points")
    return _section("latents", latents, without=tuple(without)), _seed(config)


def _structure(config: RunConfig) -> Any:
    structure = config.structure
    leaf = ("leaf", "leaf_num_states", "leaf_num_groups", "leaf_latents", "leaf_tied")
    of_patches = ("tree_of", *leaf)
    if structure.kind != "patches":
        return _section("structure", structure, without=of_patches), _seed(config)
    of_leaf = leaf[:1] if structure.leaf == "product" else leaf
    used = ("kind", "tree_of", "max_samples", "num_bins", "pseudocount", *of_leaf)
    unused = tuple(field for field in type(structure).model_fields if field not in used)
    patches = (
        Named("latents.num_clusters", config.latents.num_clusters),
        Named("data.patch_size_pixels", config.data.patch_size_pixels),
    )
    return _section("structure", structure, without=unused), patches, _seed(config)


def _distill(config: RunConfig) -> Any:
    of_leaf = ("leaf_epochs", "leaf_batch_size", "leaf_step_size")
    inner = ("inner_pixel", "inner_near")
    counted = config.structure.leaf == "product" or config.structure.leaf_latents
    unused: tuple[str, ...] = of_leaf if counted else ()
    unused += () if config.structure.leaf_latents else inner
    if config.distill.kind == "plain":
        unused += ("growing",)
    else:
        # States of leaf circuits are made in this stage, and nothing is counted under them.
        unused += of_leaf
    return _section("distill", config.distill, without=unused), _seed(config)


def _finetune(config: RunConfig) -> Any:
    how: tuple[str, ...] = ("micro_batch_size", "checkpoint_every_seconds", "keep_checkpoints")
    how += () if config.finetune.reseed_every_epochs else ("reseed_below",)
    settings = _section("finetune", config.finetune, without=how), _seed(config)
    if not config.integral.enabled:
        return *settings, Named("integral", ABSENT)
    without = ("evaluate_states", "block_points")
    return *settings, _section("integral", config.integral, without=without)


def _evaluate(config: RunConfig) -> Any:
    figures = _section("evaluate", config.evaluate, without=("batch_size",)), _seed(config)
    if not config.integral.enabled:
        return figures
    return *figures, Named("integral.evaluate_states", config.integral.evaluate_states)


def _has_tree_of_latents(config: RunConfig) -> bool:
    """Whether the structure is learnt from latents; trees over variables are from the data."""
    return config.structure.tree_of == "latents" and config.structure.kind != "hclt"


def has_teacher(config: RunConfig) -> bool:
    """Whether the run makes latents at all."""
    return config.teacher.kind != "none"


def is_distilled(config: RunConfig) -> bool:
    """Whether fine-tuning starts from a distilled circuit."""
    return has_teacher(config) and config.finetune.initialization == "distilled"


DATA = ("shards", "index")
OF_LATENTS = ("teacher", "features", "fit", "assign")
OF_CIRCUIT = ("structure", "distill", "finetune", "evaluate")

STAGES: tuple[Stage, ...] = (
    Stage(
        "shards",
        "distpc.data.shards:run",
        (),
        _shards,
        identity="distpc.data.shards:source_identity",
        refresh="distpc.data.existing:note_place",
    ),
    Stage("index", "distpc.data.index:run", ("shards",), lambda config: None),
    Stage(
        "teacher",
        "distpc.teachers.train:run",
        DATA,
        _teacher,
        has_teacher,
        identity="distpc.teachers.train:model_identity",
    ),
    Stage(
        "features",
        "distpc.latents.extract:run",
        (*DATA, "teacher"),
        _features,
        has_teacher,
        judge="distpc.latents.extract:judge",
    ),
    Stage("fit", "distpc.latents.fit:run", ("features",), _fit, has_teacher),
    # The limits that refuse a collapsed codebook decide whether there is a result, not what it is.
    Stage(
        "assign",
        "distpc.latents.assign:run",
        (*DATA, "teacher", "features", "fit"),
        lambda config: Named("latents.keep_features", config.latents.keep_features),
        has_teacher,
        judge="distpc.latents.assign:judge",
    ),
    Stage(
        "structure",
        "distpc.training.structure:run",
        (*DATA, "assign"),
        _structure,
        unread=lambda config: () if _has_tree_of_latents(config) else ("assign",),
    ),
    Stage(
        "distill",
        "distpc.training.distill:run",
        (*DATA, "features", "assign", "structure"),
        _distill,
        is_distilled,
        unread=lambda config: () if config.distill.kind == "progressive" else ("features",),
    ),
    Stage("finetune", "distpc.training.finetune:run", (*DATA, "structure", "distill"), _finetune),
    Stage(
        "evaluate",
        "distpc.inference.evaluate:run",
        (*DATA, "finetune"),
        _evaluate,
    ),
)
