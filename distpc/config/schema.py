"""The whole configuration of a run, section by section. Units stand in the names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distpc.config.compare import CompareConfig
from distpc.config.distillation import DistillConfig
from distpc.config.growing import check_progressive
from distpc.config.integral import IntegralConfig
from distpc.config.places import ArtifactsConfig
from distpc.config.sources import Section, Source
from distpc.config.teachers import TeacherConfig

WHOLE_ROWS = ("mini_batch_em", "full_batch_em", "anemone")
"""Training rules that ZeRO cannot shard whatever the data."""

DISTILLED = ("patches", "hmm", "hclt")
"""Kinds of structure whose latents a teacher can supervise."""


class SplitConfig(Section):
    """How samples are shared out, by a seeded permutation; fractions add up to one."""

    train: float = Field(default=0.8, gt=0, lt=1)
    """Fraction for training."""
    valid: float = Field(default=0.1, gt=0, lt=1)
    """Fraction for choosing the best model."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Fraction for the reported figure; 0 where the source has test data of its own."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitConfig:
        total = self.train + self.valid + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"train + valid + test is {total:g}, must be 1")
        return self


class DataConfig(Section):
    """Source, splits, shards and what a value means."""

    source: Source
    """Where the samples come from; `kind` is digits, idx, image_folder, text, token_samples,
    arrays or shards."""
    split: SplitConfig = SplitConfig()
    """Shares of train, valid and test."""
    split_seed: int | None = Field(default=None, ge=0)
    """Seed of the permutation that shares samples out; default: the run's seed. Set it where runs
    of several seeds are to be measured on the same samples."""
    samples_per_shard: int = Field(default=1024, ge=1)
    """Samples in one WebDataset shard (the last of a split holds fewer)."""
    color: Literal["as_is", "ycocg_r", "ycocg_lossy"] = "as_is"
    """Colour space of RGB images: as they are, YCoCg-R (lossless: bits per dimension compare with
    RGB), or the literature's YCoCg rounded to 256 values (lossy: they do not)."""
    patch_size_pixels: int = Field(default=2, ge=1)
    """Side of the square patches that teachers, latents and patch circuits see as units."""
    max_bad_samples: int = Field(default=0, ge=0)
    """Undecodable source images that are left out (and listed) before the run stops."""
    cache_bytes: int = Field(default=2**30, ge=0)
    """Memory that each training process may fill with decoded shards."""


class LatentsConfig(Section):
    """K-means of teacher features; cluster ids become values of the patch latents."""

    num_clusters: int = Field(default=64, ge=2)
    """Clusters, and so values of every patch latent (K of k-means, Z in the structures)."""
    max_samples: int | None = Field(default=None, ge=1)
    """Training samples whose features and latents are made, the first shards up to this many;
    default: all. What was used is recorded."""
    max_bad_samples: int = Field(default=0, ge=0)
    """Training samples that may be left out because they cannot be encoded (features that are not
    finite, a sample that kills every worker). All are named in the stage's folder and log."""
    keep_features: bool = True
    """Keep the features of all samples on the disk. Otherwise k-means is fitted to those of some
    shards only, spread over all, and features become latents as they are made."""
    fit_samples: int | None = Field(default=None, ge=1)
    """Samples that k-means is fitted to where features are not kept, by whole shards; default: as
    many as give 1,024 features a cluster."""
    num_rounds: int = Field(default=30, ge=0)
    """Most Lloyd rounds of one restart; 0 leaves the first centroids as they are."""
    num_restarts: int = Field(default=1, ge=1)
    """Restarts of the clustering; the one with the least inertia is kept."""
    tolerance: float = Field(default=1e-4, ge=0)
    """A restart ends when a round lowers the inertia by less than this fraction."""
    init: Literal["k-means++", "k-means||", "random"] = "k-means||"
    """How the first centroids are chosen; random: points drawn alike (with num_rounds 0 the control
    of clustering itself)."""
    algorithm: Literal["lloyd", "mini_batch"] = "lloyd"
    """lloyd: every round looks at all points; mini_batch: at a seeded draw of them, with one whole
    round at the end; all num_rounds are made."""
    batch_points: int = Field(default=65536, ge=1)
    """Points in a mini-batch, over all shards (algorithm mini_batch)."""
    balanced: bool = False
    """Make clusters about equally large: after every round but the last, centroids of small ones
    move into large ones and split them; all num_rounds are made (algorithm lloyd)."""
    codebook: Literal["shared", "per_position"] = "shared"
    """One codebook for all latents of a sample, or one for each, which may have fewer different
    features than clusters; tied leaves (structure.kind patches) need a shared one."""
    projection: Literal["none", "pca", "whiten"] = "none"
    """Map of features before they are clustered: their principal components, or those divided by
    their standard deviations."""
    projection_width: int | None = Field(default=None, ge=1)
    """Principal components kept (projection pca, whiten); default: all that vary."""
    feature_memory: Literal["mapped", "held"] = "mapped"
    """Features in workers: mapped from their files, or copied into memory (for slow or remote
    disks); float16 in both."""
    min_usage_entropy_fraction: float = Field(default=0.3, ge=0, le=1)
    """Refuse latents whose usage entropy is below this fraction of log2(num_clusters)."""
    max_dead_fraction: float = Field(default=0.2, ge=0, le=1)
    """Refuse latents with a larger fraction of clusters that no training patch uses."""

    @model_validator(mode="after")
    def _consistent(self) -> LatentsConfig:
        if self.balanced and self.algorithm != "lloyd":
            raise ValueError("latents.balanced needs algorithm lloyd: a batch has no shares")
        if self.projection_width is not None and self.projection == "none":
            raise ValueError("latents.projection_width needs projection pca or whiten")
        return self


class StructureConfig(Section):
    """The circuit's region graph."""

    kind: Literal[
        "patches",
        "hclt",
        "factorised",
        "chow_liu",
        "hmm",
        "quad_tree",
        "quad_graph",
        "rat",
        "poon_domingos",
    ] = "patches"
    """`patches`: a leaf bank shared by all patches under a hidden Chow-Liu tree over patch
    latents; `hclt`: a hidden Chow-Liu tree over the variables; `factorised`: independent
    variables; `chow_liu`: a Chow-Liu tree over the variables themselves, deterministic; `hmm`: a
    hidden Markov model over the variables in their order; `quad_tree`, `quad_graph`: images
    halved down to the pixel in one way, or in both and mixed; `rat`: random halves of the
    variables; `poon_domingos`: all rectangles of an image on a grid. Every kind but `patches`,
    `hmm` and `hclt` goes with teacher.kind none and finetune.initialization random. A distilled
    `hmm` has as many states as clusters, and one more where documents end in a token of their own;
    a distilled `hclt`, of grey images in patches of one pixel, as many as clusters."""
    num_states: int = Field(default=32, ge=1)
    """Units K of every latent or inner region (all kinds but patches, factorised, chow_liu)."""
    num_input_units: int | None = Field(default=None, ge=1)
    """Units of an input (kinds quad_tree, quad_graph, rat, poon_domingos); default: num_states."""
    layer: Literal["cp", "tucker", "monarch"] = "cp"
    """How units of parts combine: `cp`: a dense matrix a factor; `monarch`: two block-diagonal
    ones (kinds with num_states); `tucker`: a dense matrix over all products of two factors' units
    (kinds with num_input_units, parts in twos)."""
    tied: bool = False
    """Share parameters: over the steps of an hmm, the variables of factorised, all edges of hclt,
    blocks of one size of images, regions of one depth of rat."""
    num_splits: Literal[2, 4] = 2
    """Parts of a block: halves or quarters (kind quad_tree)."""
    num_repetitions: int = Field(default=4, ge=1)
    """Random orders of the variables, mixed at the root (kind rat)."""
    max_depth: int | None = Field(default=None, ge=1)
    """Halvings (kind rat), or cuts on the way to a rectangle (kind poon_domingos); below them
    variables are independent given the unit. Default: no limit."""
    delta_pixels: int = Field(default=4, ge=1)
    """Step of the grid along which rectangles are cut (kind poon_domingos)."""
    max_products: int | None = Field(default=None, ge=1)
    """Cuts kept of one rectangle, those nearest to its middle (kind poon_domingos); default:
    all."""
    leaf: Literal["product", "hclt"] = "product"
    """Leaf density p(patch | z): fully factorised, or a multi-head HCLT (kind patches)."""
    leaf_num_states: int = Field(default=8, ge=1)
    """Hidden states of the leaf HCLT (leaf hclt)."""
    leaf_num_groups: int = Field(default=1, ge=1)
    """Groups of clusters with a leaf HCLT body of their own, trained independently (leaf hclt)."""
    leaf_latents: bool = False
    """Make the hidden states inside of leaf HCLTs latents of their own, which distillation then
    supervises, too (leaf hclt): every level of the circuit is counted, and none is random."""
    leaf_tied: bool = False
    """Share the emissions inside of a leaf HCLT among the pixels of a patch, one for each channel
    (leaf hclt): the same parameters allow many more states."""
    tree_of: Literal["latents", "patch_means"] = "latents"
    """What the tree over the patches is learnt from: the patches' latents, or the mean values of
    their pixels, which needs no teacher (kind patches)."""
    max_samples: int = Field(default=20000, ge=1)
    """Training samples from which mutual information is counted (kinds patches, hclt,
    chow_liu)."""
    num_bins: int = Field(default=16, ge=2)
    """Bins that ordered values are put into when mutual information is counted."""
    pseudocount: float = Field(default=0.1, ge=0)
    """Added to every cell of the pairwise count tables."""
    max_fold_mib: float = Field(default=64.0, gt=0)
    """Bound on the parameters that are evaluated, and under parallel.zero_stage 3 gathered,
    together; one matrix may exceed it. Smaller ones save memory there."""

    @property
    def max_fold_bytes(self) -> int:
        """The bound in bytes."""
        return int(self.max_fold_mib * 2**20)

    @model_validator(mode="after")
    def _consistent(self) -> StructureConfig:
        in_parts = self.kind in ("quad_tree", "quad_graph", "rat", "poon_domingos")
        if self.layer == "tucker" and not in_parts:
            raise ValueError(f"structure.layer tucker does not go with kind {self.kind}")
        if self.layer == "tucker" and self.kind == "quad_tree" and self.num_splits != 2:
            raise ValueError("structure.layer tucker needs num_splits 2")
        if self.layer == "monarch" and not (in_parts or self.kind in ("hclt", "hmm")):
            raise ValueError(f"structure.layer monarch does not go with kind {self.kind}")
        if self.num_input_units is not None and not in_parts:
            raise ValueError(f"structure.num_input_units does not go with kind {self.kind}")
        if self.tied and self.kind in ("patches", "chow_liu"):
            raise ValueError(f"structure.tied does not go with kind {self.kind}")
        for field in ("leaf_latents", "leaf_tied"):
            if getattr(self, field) and (self.leaf, self.kind) != ("hclt", "patches"):
                raise ValueError(
                    f"structure.{field} is about leaf hclt of kind patches: "
                    f"leaf is {self.leaf}, kind is {self.kind}"
                )
        return self


class FinetuneConfig(Section):
    """Training on the data alone."""

    initialization: Literal["distilled", "random"] = "distilled"
    """Start from the distilled circuit, or from random parameters (the EM baseline)."""
    rule: Literal[
        "online_em", "growing_em", "mini_batch_em", "full_batch_em", "anemone", "adam"
    ] = "online_em"
    """Training rule of the statistics; mini_batch_em, full_batch_em and anemone, and adam with
    real values, need whole rows: parallel.zero_stage 0. growing_em: exact M-steps on 1, g, g^2,
    ... batches, g being `growth`."""
    growth: float = Field(default=2.0, ge=1)
    """How many times more batches each M-step takes than the one before (rule growing_em)."""
    num_epochs: int = Field(default=20, ge=0)
    """Passes over the training split. All batches are full: the last one goes on into another
    pass, so that up to batch_size - 1 samples more are trained on (one pass over 1,437 samples in
    batches of 256 takes 1,536), which reports count."""
    num_samples: int | None = Field(default=None, ge=1)
    """Samples to train on, in place of num_epochs passes, rounded up in the same way: the budget of
    a comparison."""
    batch_size: int = Field(default=256, ge=1)
    """Samples in a global batch, over all ranks and micro-batches; full_batch_em takes all of the
    training split instead, and holds it in memory."""
    micro_batch_size: int = Field(default=256, ge=1)
    """Most samples that one rank puts through the circuit at once."""
    step_size: float = Field(default=0.1, gt=0, le=1)
    """First step size; after distillation keep it small (about 0.1). Rule adam: the learning rate,
    about 0.01. Not used by full_batch_em."""
    final_step_size: float = Field(default=0.005, gt=0, le=1)
    """Last step size (schedules linear and cosine)."""
    schedule: Literal["constant", "linear", "cosine", "piecewise"] = "linear"
    """How the step size goes from first to last, counted in samples; piecewise: linear between
    `milestones`."""
    milestones: list[tuple[int, Annotated[float, Field(gt=0, le=1)]]] = Field(default=[])
    """Pairs [samples, step size] by rising samples (schedule piecewise)."""
    warmup_samples: int = Field(default=0, ge=0)
    """Samples over which the step size rises from a tenth of the schedule's value."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the flows (rule anemone); above 0 it keeps another copy of the statistics."""
    pseudocount: float = Field(default=0.1, ge=0)
    """Samples' worth of smoothing a sum row, spread over its entries; samples of the whole training
    split, whatever the rule and its batches. Rule adam does not smooth."""
    leaf_pseudocount: float = Field(default=1.0, ge=0)
    """Samples' worth of smoothing an input row, spread over its categories."""
    leaf_width: float = Field(default=0.0, ge=0)
    """Smoothing of categorical input rows over neighbouring values, for values that have an order
    (grey values): standard deviation in values by which flows are spread; 0 spreads nothing."""
    gradient_learning_rate: float = Field(default=0.01, gt=0)
    """Adam's learning rate for parameters that follow gradients (discretised logistic inputs)."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest entry of a gradient of those parameters."""
    fused: bool | None = None
    """Train by the fused step in bfloat16, many times faster on a GPU (docs/gpu.md): one rank, rule
    online_em, trees of dense sums over categorical leaves. None: on a GPU where it covers that."""
    init_noise: float = Field(default=1.0, gt=0)
    """Spread of random parameters: weights are proportional to exp(-init_noise * 2u), u uniform."""
    reseed_every_epochs: float = Field(default=0.0, ge=0)
    """How often dead states are started again from parts of the most used ones; 0: never. Not in
    the last fifth of the training, which new states need to settle."""
    reseed_below: float = Field(default=0.05, gt=0)
    """Share of an even use below which a state is dead: of K values that data use alike, each has a
    K-th of the uses. What smoothing alone gives a state does not count."""
    evaluate_every_epochs: float = Field(default=1.0, gt=0)
    """How often the validation split is evaluated and a checkpoint may become the best one."""
    checkpoint_every_seconds: float = Field(default=60.0, ge=0)
    """Least time between two checkpoints; 0 writes one after every step."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept, beside the best."""
    max_divergence_bits: float = Field(default=1.0, gt=0)
    """Stop when validation is this many bits per dimension worse than the best so far."""

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        samples = [place for place, _ in self.milestones]
        if self.schedule == "piecewise" and (not samples or samples != sorted(samples)):
            raise ValueError("schedule piecewise needs milestones, by rising samples")
        if self.reseed_every_epochs and self.rule not in ("online_em", "mini_batch_em"):
            raise ValueError(
                f"reseed_every_epochs: rule {self.rule} keeps more than the statistics that "
                "re-seeding changes; use rule online_em or mini_batch_em"
            )
        return self


class EvaluateConfig(Section):
    """The final figures and pictures."""

    batch_size: int = Field(default=512, ge=1)
    """Samples evaluated at once."""
    num_pictures: int = Field(default=36, ge=1)
    """Samples and completions in the picture grids."""
    max_train_samples: int = Field(default=100_000, ge=1)
    """Training samples evaluated at the end, the first ones; valid and test always count whole."""


class ParallelConfig(Section):
    """Processes of a run. None of these fields changes its result beyond float rounding."""

    num_ranks: int = Field(default=2, ge=1)
    """Training processes (DeepSpeed ranks) of a machine when no launcher started them."""
    num_hosts: int = Field(default=1, ge=1)
    """Machines with num_ranks each. More than one needs a launcher (launch/README.md), which then
    counts itself, or a Ray cluster; without either, a dry run says what they would do."""
    threads_per_rank: int = Field(default=1, ge=1)
    """CPU threads of one training process."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage of circuit training."""
    node_parallel: int = Field(default=1, ge=1)
    """Ranks that share the rows of every sum, for the same samples (the node axis); must divide the
    number of ranks, and the others are replicas for different samples (the data axis)."""
    offload: bool = False
    """Keep in the host's memory what zero_stage 1 to 3 shard: a second copy of the statistics that
    the optimizer steps, and under 3 the statistics themselves."""
    recompute_messages: bool = False
    """Compute most messages again in the backward pass instead of keeping them for it: less memory
    for long chains and deep trees, and a third more products. Not with zero_stage 3."""
    whole_circuit_gib: float = Field(default=8.0, ge=0)
    """Where ranks share the parameters (zero_stage 3, node_parallel), rank 0 puts the whole circuit
    together at validations, for samples, dead states and entropies, if it takes no more than
    this."""
    check_replicas_every_steps: int = Field(default=50, ge=0)
    """Steps between two comparisons, bit by bit, of what ranks must hold alike; 0: never."""
    measure_every_steps: int = Field(default=100, ge=0)
    """Steps between two of which every rank measures computing, communication, waiting for data
    and the fraction of the device's speed; the second step is measured too. 0: none."""
    num_workers: int = Field(default=2, ge=1)
    """Ray actors for features, k-means, assignment and distillation; a cluster with less room is
    refused."""
    max_workers: int | None = Field(default=None, ge=1)
    """Ray actors that there may be while the cluster has free places: they join when machines join
    it. Default: num_workers."""
    prefetch_shards: int = Field(default=1, ge=0)
    """Shards that a worker reads and decodes while its teacher encodes another one; each is held in
    its memory."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for one worker."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs, or a fraction of one, that Ray reserves for one worker."""
    max_worker_restarts: int = Field(default=3, ge=0)
    """Times that one shard is tried again after a worker that held it died."""
    join_seconds: float = Field(default=300.0, gt=0)
    """Time that all ranks have to join, under a launcher or on a Ray cluster."""
    lost_seconds: float = Field(default=120.0, ge=2)
    """A rank that gives no sign of life for this long is lost, and one that distpc started itself
    also if it stands still for as long without computing and without waiting for others: all ranks
    end."""
    collective_seconds: float = Field(default=600.0, ge=1)
    """Time that one collective operation of the ranks may wait for the others, for example for one
    that makes pictures meanwhile: then all ranks end."""
    wait_seconds: float = Field(default=86400.0, gt=0)
    """Time that the other ranks wait for rank 0 to finish one stage that it runs alone."""

    @property
    def total_ranks(self) -> int:
        """R, over all machines."""
        return self.num_hosts * self.num_ranks

    @model_validator(mode="after")
    def _consistent(self) -> ParallelConfig:
        if self.recompute_messages and self.zero_stage == 3:
            raise ValueError(
                "recompute_messages does not go with zero_stage 3, which lets go of the parameters "
                "that are read again: take zero_stage 0 to 2, or smaller micro-batches"
            )
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload is of what ZeRO shards: take zero_stage 1 to 3 with it")
        return self


class RunConfig(Section):
    """One run: the whole pipeline from source data to an evaluated circuit."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run; its folder is runs/NAME unless --out is given."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random in the run."""
    data: DataConfig
    """Source, splits, shards and what a value means."""
    teacher: TeacherConfig = TeacherConfig()
    """Which model's features are clustered into latent values."""
    latents: LatentsConfig = LatentsConfig()
    """K-means of teacher features."""
    structure: StructureConfig = StructureConfig()
    """The circuit's region graph."""
    integral: IntegralConfig = IntegralConfig()
    """Networks that write the circuit's weights."""
    distill: DistillConfig = DistillConfig()
    """Training on data and latents together."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Training on the data alone."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """The final figures and pictures."""
    parallel: ParallelConfig = ParallelConfig()
    """Processes of the run."""
    artifacts: ArtifactsConfig = ArtifactsConfig()
    """Places of finished stages besides the run folder, and the cache of object stores."""
    compare: CompareConfig = CompareConfig()
    """Variants, seeds, sizes and budget of `distpc compare`; nothing else reads it."""

    @property
    def split_seed(self) -> int:
        """Seed of the permutation that shares samples out."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        kind = self.structure.kind
        distilled = self.finetune.initialization == "distilled"
        if kind == "patches" and self.teacher.kind == "none" and distilled:
            raise ValueError(
                "structure.kind patches needs patch latents to distil from: set teacher.kind, or "
                "finetune.initialization to random"
            )
        if (
            kind == "patches"
            and self.teacher.kind == "none"
            and self.structure.tree_of == "latents"
        ):
            raise ValueError(
                "without a teacher there are no latents to learn the tree from: set teacher.kind, "
                "or structure.tree_of to patch_means"
            )
        if self.distill.kind == "progressive" and distilled:
            check_progressive(self)
        has_teacher = self.teacher.kind != "none"
        if kind in ("hmm", "hclt") and distilled != has_teacher:
            names = {"hmm": "hidden Markov model", "hclt": "hidden Chow-Liu tree"}
            raise ValueError(
                f"a {names[kind]} is distilled from a teacher, or random without one: set "
                f"teacher.kind (it is {self.teacher.kind}), or finetune.initialization to random"
            )
        if kind not in DISTILLED and distilled:
            raise ValueError(
                f"structure.kind {kind} has no teacher latents to distil from: "
                "set finetune.initialization to random"
            )
        if kind not in DISTILLED and has_teacher:
            raise ValueError(f"structure.kind {kind} uses no teacher: set teacher.kind to none")
        if self.integral.enabled:
            self._check_integral()
        elif self.finetune.rule in WHOLE_ROWS and self.parallel.zero_stage > 0:
            raise ValueError(
                f"finetune.rule {self.finetune.rule} needs whole rows at its step, and ZeRO shards "
                "cut them: set parallel.zero_stage to 0, or finetune.rule to online_em"
            )
        return self

    def _check_integral(self) -> None:
        """Refuse what networks that write weights do not go with."""
        structure, finetune, parallel = self.structure, self.finetune, self.parallel
        for field, value, goes, expected in (
            ("finetune.rule", finetune.rule, "adam", "adam: networks follow gradients"),
            ("finetune.initialization", finetune.initialization, "random", "random"),
            ("parallel.recompute_messages", parallel.recompute_messages, False, "false"),
        ):
            if value != goes:
                raise ValueError(f"integral circuits: {field} is {value}, must be {expected}")
        if parallel.zero_stage == 3:
            raise ValueError(
                "integral circuits: parallel.zero_stage is 3, must be 0 to 2: what ZeRO-3 shards "
                "are parameters, and the networks are small"
            )
        if structure.kind == "chow_liu" or structure.layer == "monarch":
            raise ValueError(
                f"integral circuits: structure.kind {structure.kind} with layer {structure.layer} "
                "has units that are no points of a latent: take another kind, and layer cp or "
                "tucker"
            )
        if structure.num_states < 2 and structure.kind not in ("patches", "factorised"):
            raise ValueError("integral circuits: structure.num_states must be 2 or more")
