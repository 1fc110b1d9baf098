"""How many samples each run of a comparison may still train on after its distillation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distpc.data.index import ShardIndex
from distpc.errors import ConfigError
from distpc.latents.extract import first_shards
from distpc.pipeline.comparison.variants import Run
from distpc.pipeline.stages import is_distilled


def with_budget(run: Run, index_folder: Path, num_visits: int | None) -> tuple[Run, int]:
    """The run with `finetune.num_samples` set, and the visits that distillation is charged.

    A visit is a training sample passed once. Counting latents passes every sample that has them
    once; leaf circuits pass them `leaf_epochs` times more. What a teacher was trained on is not
    charged: it is listed in the report of the run.

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
        used = first_shards(entries, config.latents.max_samples)
        # Leaves all of whose latents are supervised are counted in the same pass.
        trained = config.structure.leaf == "hclt" and not config.structure.leaf_latents
        passes = 1 + (config.distill.leaf_epochs if trained else 0)
        charged = passes * sum(entry.num_samples for entry in used)
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
