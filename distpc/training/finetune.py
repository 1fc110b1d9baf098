"""Stage `finetune`: training on the data alone, over DeepSpeed ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from distpc.artifacts.files import fingerprint, read_json, write_json
from distpc.artifacts.stage import StageContext
from distpc.circuits.circuit import Circuit
from distpc.circuits.fill import Source, fill_
from distpc.circuits.footprint import Footprint, footprint
from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.io import DESCRIPTION, ModelFile, save_model
from distpc.data.index import ShardIndex
from distpc.data.loader import Loader
from distpc.data.plan import LoaderState
from distpc.data.spec import DatasetSpec
from distpc.data.tokenizers import copy_tokenizer
from distpc.errors import ConfigError, DistpcError
from distpc.parallel.collectives import barrier
from distpc.parallel.engine import Engine
from distpc.parallel.launch import run_ranks
from distpc.parallel.memory import FLOAT_BYTES, fitting_bucket
from distpc.parallel.mesh import Mesh, is_main_process
from distpc.parallel.meter import Meter
from distpc.structures.region_graph import RegionGraph
from distpc.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    Saver,
    TrainingFacts,
    check_shapes,
    load_optimizer,
)
from distpc.training.fused import fused_step
from distpc.training.integral import Model, load_saved, save_both, starting_networks
from distpc.training.last_good import LAST_GOOD
from distpc.training.lay_out import lay_out_
from distpc.training.monitor import Monitor, note_stop
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import Rule, Smoothing, make_rule, refuse_shards
from distpc.training.samples import take_rows
from distpc.training.start import MARGINAL_SAMPLES, random_near_data, smooth_over_neighbours
from distpc.training.trainer import Parts, Trainer
from distpc.training.validation import Validation

RESULTS = "training.json"
MODEL = "model"
CHECKPOINTS = "checkpoints"
LOGS = "logs"


def run(ctx: StageContext) -> None:
    """Fine-tune on all ranks, then write the best model on the validation split to `model/`.

    The checkpoints, of which that model is one, are removed after it.

    Raises:
        TrainingError: log-likelihoods or statistics are no longer finite, training diverges, or a
            rank is lost.
        ArtifactError: checkpoints of another training lie in the stage's folder.
        ResourceError: the disk is full.
    """
    parallel = ctx.config.parallel
    if not _has_model(ctx):
        try:
            run_ranks(
                "distpc.training.finetune:train_rank",
                ctx.to_json(),
                num_ranks=parallel.total_ranks,
                threads_per_rank=parallel.threads_per_rank,
                log_folder=ctx.out / LOGS,
                join_seconds=parallel.join_seconds,
                lost_seconds=parallel.lost_seconds,
                collective_seconds=parallel.collective_seconds,
            )
        except DistpcError as error:
            if is_main_process():
                note_stop(ctx.tensorboard / "finetune", error)
            raise
    results = read_json(ctx.out / RESULTS)
    ctx.metadata.update(results)
    if Mesh.from_environment().is_main:
        if not _has_model(ctx):
            _save_best(ctx, results)
        shutil.rmtree(ctx.out / CHECKPOINTS, ignore_errors=True)


def train_rank(payload: dict[str, Any], mesh: Mesh) -> None:
    """What every rank runs: prepare, resume, train, and leave results and checkpoints."""
    ctx = StageContext.from_json(payload)
    mesh = mesh.with_node_axis(ctx.config.parallel.node_parallel)
    spec = DatasetSpec.load(ctx.input("shards").path)
    index = ShardIndex.load(ctx.input("index").path)
    checkpoints = Checkpoints(
        ctx.out / CHECKPOINTS, identity_of(ctx), ctx.config.finetune.keep_checkpoints
    )
    saver = Saver(checkpoints, mesh)
    found = checkpoints.resume(mesh)
    facts = TrainingFacts() if found is None else found.facts
    # The trainer goes on in the same facts.
    resumed_at_step = facts.step
    # Not under a name, by which it would keep blocks of random numbers.
    parts = _assemble(
        ctx,
        spec,
        index,
        mesh,
        beginning(ctx, spec, index, found, verify=mesh.is_main),
        saver,
        facts,
    )
    if found is not None:
        load_optimizer(parts.engine, found)
    trainer = Trainer(
        ctx.config.finetune,
        spec,
        index.num_samples("train"),
        parts,
        facts,
        check_replicas_every=ctx.config.parallel.check_replicas_every_steps,
    )
    with parts.monitor:
        trainer.run()
        results = trainer.results()
    if mesh.is_main:
        extra = {
            "num_parameters": parts.blank.num_parameters,
            "zero_stage": ctx.config.parallel.zero_stage,
            "node_parallel": mesh.node_parallel,
            "resumed_at_step": resumed_at_step,
            "deepspeed": parts.engine.config_json,
            "fused": parts.fused is not None,
        }
        write_json(ctx.out / RESULTS, {**results, **extra})
    # Where every rank was started from outside, all of them read the results.
    barrier(mesh)


class Beginning(NamedTuple):
    """The circuit that training begins with.

    Attributes:
        circuit: whole. It has no values yet, unless the rule needed them all to begin, or it is
            networks.
        source: of its values; None where it has them.
        blank: the same circuit, which never gets any; networks: themselves.
    """

    circuit: Model
    source: Source | None
    blank: Model


def beginning(
    ctx: StageContext,
    spec: DatasetSpec,
    index: ShardIndex,
    saved: Checkpoint | None,
    *,
    verify: bool = True,
) -> Beginning:
    """What training begins with, equal on every rank and in every layout, as its rule wants it.

    Args:
        ctx: of the stage.
        spec: of the data.
        index: of the shards.
        saved: to go on from; None: from the distilled model, or from a random circuit.
        verify: whether this process compares a distilled model's checksum.

    Raises:
        ArtifactError: `saved` is of another circuit.
        ModelFileError: the distilled model is damaged.
    """
    config = ctx.config.finetune
    if ctx.config.integral.enabled:
        return _beginning_of_networks(ctx, spec, index, saved)
    source: Source | None = saved
    if config.initialization == "distilled":
        file = ModelFile(ctx.input("distill").path / "model", verify=verify and saved is None)
        circuit, source = file.circuit(), saved or file
    else:
        circuit = Circuit(
            RegionGraph.from_json(read_json(_graph_path(ctx))),
            spec.num_categories,
            max_fold_bytes=ctx.config.structure.max_fold_bytes,
            device="meta",
        )
        if saved is None:
            samples = take_rows(index, "train", MARGINAL_SAMPLES)
            source = random_near_data(circuit, samples, ctx.config.seed, config.init_noise)
    smooth_over_neighbours(circuit, take_rows(index, "train", MARGINAL_SAMPLES), config.leaf_width)
    if saved is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in circuit.state_dict().items()}
        check_shapes(saved.path, saved.shapes, shapes)
    blank = circuit.blank()
    rule = rule_of(ctx, circuit, index)
    if saved is not None or rule.keeps_statistics:
        rule.resume()
    else:
        assert source is not None
        fill_(circuit, source)
        source = None
        # With the parameters that the circuit has now.
        rule_of(ctx, circuit, index).start()
    blank.set_smoothing(*circuit.smoothing)
    return Beginning(circuit, source, blank)


def _beginning_of_networks(
    ctx: StageContext, spec: DatasetSpec, index: ShardIndex, saved: Checkpoint | None
) -> Beginning:
    graph = RegionGraph.from_json(read_json(_graph_path(ctx)))
    batches = take_rows(index, "train", MARGINAL_SAMPLES) if saved is None else None
    networks = starting_networks(ctx.config, graph, spec, batches)
    if saved is not None:
        load_saved(networks, saved)
    return Beginning(networks, None, networks)


def rule_of(ctx: StageContext, circuit: Circuit, index: ShardIndex) -> Rule:
    """The configured rule, for a circuit.

    Raises:
        TrainingError: it cannot train the circuit, or not under the ZeRO stage.
    """
    config = ctx.config.finetune
    smoothing = Smoothing(config.pseudocount, config.leaf_pseudocount, index.num_samples("train"))
    rule = make_rule(config.rule, circuit, smoothing, config.momentum, config.growth)
    refuse_shards(rule, ctx.config.parallel.zero_stage, ctx.config.parallel.node_parallel)
    return rule


def identity_of(ctx: StageContext) -> dict[str, Any]:
    """What a checkpoint must share with this training to continue it."""
    return {"fingerprint": ctx.fingerprint, "graph": fingerprint(read_json(_graph_path(ctx)))}


def _assemble(
    ctx: StageContext,
    spec: DatasetSpec,
    index: ShardIndex,
    mesh: Mesh,
    begin: Beginning,
    saver: Saver,
    facts: TrainingFacts,
) -> Parts:
    config, parallel, circuit = ctx.config.finetune, ctx.config.parallel, begin.circuit
    if parallel.recompute_messages and isinstance(circuit, Circuit):
        circuit.recompute_messages_()
    costs = footprint(circuit.graph, circuit.schedule, mesh.node_parallel)
    # A multiply-add is two operations; backward takes two products for forward's one.
    flops = 6.0 * costs.multiply_adds
    optimizer, engine = _engine(ctx, index, mesh, begin, costs)
    return Parts(
        circuit=circuit,
        whole=_whole(ctx, mesh, begin),
        blank=begin.blank,
        optimizer=optimizer,
        engine=engine,
        # The engine has put the circuit on its device, where it stays.
        fused=fused_step(ctx.config, mesh, circuit),
        loader=_loader(ctx, spec, index, mesh, optimizer, facts),
        validation=Validation(
            index,
            spec,
            "valid",
            mesh,
            batch_size=config.micro_batch_size,
            cache_bytes=ctx.config.data.cache_bytes,
        ),
        checkpoints=saver.checkpoints,
        saver=saver,
        monitor=Monitor(
            ctx.tensorboard / "finetune", spec, enabled=mesh.is_main, first_step=facts.step + 1
        ),
        meter=Meter(mesh, flops, parallel.measure_every_steps, ctx.out / LOGS),
        mesh=mesh,
        last_good=ctx.out.parent / LAST_GOOD,
    )


def _engine(
    ctx: StageContext, index: ShardIndex, mesh: Mesh, begin: Beginning, costs: Footprint
) -> tuple[CircuitOptimizer, Engine]:
    """Lay the circuit over the ranks; what updates it there."""
    config, parallel, circuit = ctx.config.finetune, ctx.config.parallel, begin.circuit
    how: dict[str, Any] = {
        "zero_stage": parallel.zero_stage,
        "reduce_bucket": fitting_bucket(costs.num_parameters, costs.largest_bank),
        "offload": parallel.offload,
    }
    splits = lay_out_(circuit, begin.source, mesh, **how)
    rule = rule_of(ctx, circuit, index) if isinstance(circuit, Circuit) else None
    if rule is not None and parallel.zero_stage > 0:
        rule.work_on_shards()
    optimizer = CircuitOptimizer(
        circuit.parameter_groups(),
        step_size=config.step_size,
        rule=rule,
        gradient_learning_rate=config.gradient_learning_rate,
        gradient_clip=config.gradient_clip,
    )
    return optimizer, Engine(circuit, optimizer, mesh=mesh, splits=splits, **how)


def _loader(
    ctx: StageContext,
    spec: DatasetSpec,
    index: ShardIndex,
    mesh: Mesh,
    optimizer: CircuitOptimizer,
    facts: TrainingFacts,
) -> Loader:
    """Of the training split, from where `facts` stand."""
    size, rule = ctx.config.finetune.batch_size, optimizer.rule
    if rule is not None and rule.needs_all_data:
        size = index.num_samples("train")
    return Loader(
        index,
        spec,
        "train",
        global_batch=size,
        mesh_rank=mesh.data_rank,
        num_ranks=mesh.data_parallel,
        seed=ctx.config.seed,
        cache_bytes=ctx.config.data.cache_bytes,
        state=LoaderState.from_json(facts.loader) if facts.loader else None,
    )


def _whole(ctx: StageContext, mesh: Mesh, begin: Beginning) -> Model | None:
    """What validations show figures of; None where rank 0 could not hold it, on every rank."""
    parallel = ctx.config.parallel
    if parallel.zero_stage < 3 and mesh.node_parallel == 1:
        return begin.circuit
    costs = footprint(begin.blank.graph, begin.blank.schedule)
    size_gib = FLOAT_BYTES * costs.num_parameters / 2**30
    if size_gib <= parallel.whole_circuit_gib:
        return begin.blank
    if ctx.config.finetune.reseed_every_epochs:
        raise ConfigError(
            "dead states are started again by rank 0, which holds the whole circuit for it",
            where="finetune.reseed_every_epochs",
            found=f"a circuit of {size_gib:.3g} GiB",
            expected=f"at most {parallel.whole_circuit_gib:g} GiB (parallel.whole_circuit_gib)",
            fix="raise parallel.whole_circuit_gib, or set finetune.reseed_every_epochs=0",
        )
    return None


def _has_model(ctx: StageContext) -> bool:
    """Whether an earlier attempt got as far as the model; its checkpoints may be gone already."""
    return (ctx.out / RESULTS).is_file() and (ctx.out / MODEL / DESCRIPTION).is_file()


def _save_best(ctx: StageContext, results: dict[str, Any]) -> None:
    spec = DatasetSpec.load(ctx.input("shards").path)
    index = ShardIndex.load(ctx.input("index").path)
    best = Checkpoints(ctx.out / CHECKPOINTS, identity_of(ctx)).at(results["best_step"])
    model = beginning(ctx, spec, index, best).circuit
    training = {
        "step": results["best_step"],
        "epoch": results["best_epoch"],
        f"valid_{spec.unit}": results[f"valid_{spec.unit}"],
        "seed": ctx.config.seed,
        "finetune": ctx.config.finetune.model_dump(mode="json"),
    }
    copy_tokenizer(ctx.input("shards").path, ctx.out / MODEL)
    facts: dict[str, Any] = {"dataset": spec.to_json(), "training": training}
    if isinstance(model, IntegralCircuit):
        save_both(model, ctx.out / MODEL, **facts)
        return
    values: Checkpoint | None = best
    if not rule_of(ctx, model, index).keeps_statistics:
        fill_(model, best)
        rule_of(ctx, model, index).finish()
        values = None
    save_model(model, ctx.out / MODEL, **facts, values=values)


def _graph_path(ctx: StageContext) -> Path:
    return ctx.input("structure").path / "region_graph.json"
