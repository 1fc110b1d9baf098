"""Stage `finetune`: training on the data alone, over DeepSpeed ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from distpc.artifacts.files import fingerprint, read_json, write_json
from distpc.artifacts.stage import StageContext
from distpc.circuits.circuit import Circuit
from distpc.circuits.footprint import footprint
from distpc.circuits.io import DESCRIPTION, load_model, save_model
from distpc.circuits.share_out import share_units_, splits_of
from distpc.data.index import ShardIndex
from distpc.data.loader import Loader
from distpc.data.plan import LoaderState
from distpc.data.spec import DatasetSpec
from distpc.data.tokenizers import copy_tokenizer
from distpc.errors import DistpcError
from distpc.parallel.collectives import axes, barrier
from distpc.parallel.engine import Engine
from distpc.parallel.launch import run_ranks
from distpc.parallel.memory import fitting_bucket
from distpc.parallel.mesh import Mesh, is_main_process
from distpc.parallel.meter import Meter
from distpc.parallel.places import Split
from distpc.structures.region_graph import RegionGraph
from distpc.training.checkpoint import (
    Checkpoints,
    Saver,
    TrainingFacts,
    load_optimizer,
    load_parameters,
)
from distpc.training.fused import fused_step
from distpc.training.last_good import LAST_GOOD
from distpc.training.monitor import Monitor, note_stop
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import Rule, Smoothing, make_rule, refuse_shards
from distpc.training.samples import take_rows
from distpc.training.start import MARGINAL_SAMPLES, smooth_over_neighbours, start_near_data_
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
                num_ranks=parallel.num_ranks,
                threads_per_rank=parallel.threads_per_rank,
                log_folder=ctx.out / LOGS,
                join_seconds=parallel.join_seconds,
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
    circuit = starting_circuit(ctx, spec, index, random_rows=found is None)
    # Both before the circuit is laid over the ranks: no whole parameter may be left after it.
    num_parameters = circuit.num_parameters
    if found is not None:
        load_parameters(circuit, found)
    parts = _assemble(ctx, spec, index, mesh, circuit, saver, facts)
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
            "num_parameters": num_parameters,
            "zero_stage": ctx.config.parallel.zero_stage,
            "node_parallel": mesh.node_parallel,
            "resumed_at_step": resumed_at_step,
            "deepspeed": parts.engine.config_json,
            "fused": parts.fused is not None,
        }
        write_json(ctx.out / RESULTS, {**results, **extra})
    # Where every rank was started from outside, all of them read the results.
    barrier(mesh)


def starting_circuit(
    ctx: StageContext, spec: DatasetSpec, index: ShardIndex, *, random_rows: bool = True
) -> Circuit:
    """The circuit that training starts from, equal on every rank, as its rule wants it.

    Args:
        ctx: of the stage.
        spec: of the data.
        index: of the shards.
        random_rows: whether a random start has to be moved near the data's marginals; not needed
            when a checkpoint will overwrite it.
    """
    config = ctx.config.finetune
    if config.initialization == "distilled":
        circuit = load_model(ctx.input("distill").path / "model")
    else:
        graph = RegionGraph.from_json(read_json(_graph_path(ctx)))
        circuit = Circuit(
            graph,
            spec.num_categories,
            seed=ctx.config.seed,
            init_noise=config.init_noise,
            max_fold_bytes=ctx.config.structure.max_fold_bytes,
        )
        if random_rows:
            start_near_data_(circuit, take_rows(index, "train", MARGINAL_SAMPLES))
    smooth_over_neighbours(circuit, take_rows(index, "train", MARGINAL_SAMPLES), config.leaf_width)
    rule_of(ctx, circuit, index).start()
    return circuit


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
    circuit: Circuit,
    saver: Saver,
    facts: TrainingFacts,
) -> Parts:
    config, parallel = ctx.config.finetune, ctx.config.parallel
    if parallel.recompute_messages:
        circuit.recompute_messages_()
    costs = footprint(circuit.graph, circuit.schedule, mesh.node_parallel)
    # A multiply-add is two operations; backward takes two products for forward's one.
    flops = 6.0 * costs.multiply_adds
    whole, splits = _shared(ctx, mesh, circuit)
    rule = rule_of(ctx, circuit, index)
    optimizer = CircuitOptimizer(
        circuit.parameter_groups(),
        step_size=config.step_size,
        rule=rule,
        gradient_learning_rate=config.gradient_learning_rate,
        gradient_clip=config.gradient_clip,
    )
    loader = Loader(
        index,
        spec,
        "train",
        global_batch=index.num_samples("train") if rule.needs_all_data else config.batch_size,
        mesh_rank=mesh.data_rank,
        num_ranks=mesh.data_parallel,
        seed=ctx.config.seed,
        cache_bytes=ctx.config.data.cache_bytes,
        state=LoaderState.from_json(facts.loader) if facts.loader else None,
    )
    engine = Engine(
        circuit,
        optimizer,
        mesh=mesh,
        zero_stage=parallel.zero_stage,
        reduce_bucket=fitting_bucket(costs.num_parameters, costs.largest_bank),
        offload=parallel.offload,
        splits=splits,
    )
    return Parts(
        circuit=circuit,
        whole=whole,
        optimizer=optimizer,
        engine=engine,
        # The engine has put the circuit on its device, where it stays.
        fused=fused_step(ctx.config, mesh, circuit),
        loader=loader,
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


def _shared(ctx: StageContext, mesh: Mesh, circuit: Circuit) -> tuple[Circuit, dict[str, Split]]:
    """Keep this rank's units of the circuit; a circuit for whole parameters, and what is split."""
    whole = circuit
    if mesh.is_main and (ctx.config.parallel.zero_stage == 3 or mesh.node_parallel > 1):
        whole = Circuit(
            circuit.graph, circuit.num_categories, max_fold_bytes=circuit.max_fold_bytes
        )
        whole.load_state_dict(circuit.state_dict())
        whole.set_smoothing(*circuit.smoothing)
    if mesh.node_parallel == 1:
        return whole, {}
    return whole, splits_of(circuit, share_units_(circuit, axes(mesh).node))


def _has_model(ctx: StageContext) -> bool:
    """Whether an earlier attempt got as far as the model; its checkpoints may be gone already."""
    return (ctx.out / RESULTS).is_file() and (ctx.out / MODEL / DESCRIPTION).is_file()


def _save_best(ctx: StageContext, results: dict[str, Any]) -> None:
    spec = DatasetSpec.load(ctx.input("shards").path)
    index = ShardIndex.load(ctx.input("index").path)
    best = Checkpoints(ctx.out / CHECKPOINTS, identity_of(ctx)).at(results["best_step"])
    circuit = starting_circuit(ctx, spec, index, random_rows=False)
    load_parameters(circuit, best)
    rule_of(ctx, circuit, index).finish()
    training = {
        "step": results["best_step"],
        "epoch": results["best_epoch"],
        f"valid_{spec.unit}": results[f"valid_{spec.unit}"],
        "seed": ctx.config.seed,
        "finetune": ctx.config.finetune.model_dump(mode="json"),
    }
    copy_tokenizer(ctx.input("shards").path, ctx.out / MODEL)
    save_model(circuit, ctx.out / MODEL, dataset=spec.to_json(), training=training)


def _graph_path(ctx: StageContext) -> Path:
    return ctx.input("structure").path / "region_graph.json"
