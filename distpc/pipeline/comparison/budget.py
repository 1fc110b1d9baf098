"""How many samples each run of a comparison may still train on after its distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distpc.config import RunConfig
from distpc.data.index import ShardEntry, ShardIndex
from distpc.errors import ConfigError
from distpc.latents.extract import first_shards
from distpc.pipeline.comparison.variants import Run
from distpc.pipeline.stages import is_distilled


def with_budget(run: Run, index_folder: Path, num_visits: int | None) -> tuple[Run, int]:
    """The run with `finetune.num_samples` set, and the visits that distillation is charged.

    A visit is a training sample passed once, see `distillation_visits`. What a teacher was trained
    on is not charged: it is listed in the report of the run.

    Args:
        run: of the comparison.
        index_folder: the finished index stage that all runs share.
        num_visits: the budget; None for finetune.num_epochs passes.

    Raises:
        ConfigError: distillation alone takes the whole budget.
    """
    config = run.config
    entries = ShardIndex.load(index_folder).shards("train")
    total = num_visits or config.finetune.num_epochs * sum(e.num_samples for e in entries)
    charged = 0
    if is_distilled(config):
        charged = distillation_visits(config, first_shards(entries, config.latents.max_samples))
    if charged >= total:
        raise ConfigError(
            "distillation takes the whole budget of the comparison",
            where=f"compare.variants.{run.variant}",
            found=f"{charged} visits",
            expected=f"fewer than {total} (compare.num_visits)",
            fix="lower latents.max_samples or distill.leaf_epochs, or raise compare.num_visits",
        )
    finetune = config.finetune.model_copy(update={"num_samples": total - charged})
    return replace(run, config=config.model_copy(update={"finetune": finetune})), charged


def distillation_visits(config: RunConfig, entries: Sequence[ShardEntry]) -> int:
    """Samples that distillation passes.

    Counting latents passes every sample that has them once; leaf circuits pass them `leaf_epochs`
    times more, unless their latents are supervised as well: then they are counted in the same pass.
    Growing passes them `growing.epochs` times a round, in as many rounds as it may have; its top
    level passes its samples once for the likelihoods, and `growing.top_epochs` times.

    Args:
        config: of a distilled run.
        entries: shards that have latents.
    """
    samples = sum(entry.num_samples for entry in entries)
    growing = config.distill.growing
    if config.distill.kind == "progressive":
        rounds = 1 + growing.final_heads - growing.first_heads
        of_top = sum(e.num_samples for e in first_shards(entries, growing.top_samples))
        return (1 + rounds * growing.epochs) * samples + (1 + growing.top_epochs) * of_top
    structure = config.structure
    has_circuits = (structure.kind, structure.leaf) == ("patches", "hclt")
    is_trained = has_circuits and not structure.leaf_latents
    return (1 + (config.distill.leaf_epochs if is_trained else 0)) * samples
