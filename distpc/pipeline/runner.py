"""Runs stages: skips what is done, continues what was interrupted, redoes what is stale."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distpc.artifacts import (
    FORMAT_VERSION,
    Artifact,
    RunLock,
    Stage,
    StageContext,
    as_json,
    fingerprint,
    read_json,
    remove_partials,
    write_bytes,
    write_json,
)
from distpc.artifacts.catalogue import difference
from distpc.artifacts.fields import names_in, plain
from distpc.artifacts.manifest import MANIFEST
from distpc.artifacts.place import Place
from distpc.config import RunConfig, dump_config
from distpc.errors import ArtifactError, ConfigError, FormatVersionError
from distpc.parallel.greeting import code_fingerprint
from distpc.parallel.mesh import is_rank, launched_ranks, launcher_name
from distpc.parallel.world import World
from distpc.pipeline.stages import STAGES

ATTEMPT = ".attempt.json"
TRASH = ".trash-"
RESOLVED = "resolved_config.yaml"
_SINCE = ("before", "now")
RANKED = ("teacher", "finetune")
"""Stages that training ranks run."""
State = Literal["done", "interrupted", "stale", "missing"]


@dataclass(frozen=True)
class Step:
    """A stage within one run.

    Attributes:
        stage: which one.
        folder: its own.
        fingerprint: that its result must have.
        state: of what is in the folder.
        made_from: what the fingerprint is of.
        names: what the configuration calls the values in it.
        reason: why what is in the folder is stale.
    """

    stage: Stage
    folder: Path
    fingerprint: str
    state: State
    made_from: Any = None
    names: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    def differs(self, there: Any, words: tuple[str, str] = ("there", "here")) -> str:
        """Where what another result was made from differs from what this one is, in words."""
        return difference(there, self.made_from, self.names, words)


class Pipeline:
    """All stages of one configuration in one run folder.

    Args:
        config: the run's configuration.
        folder: the run folder; made when a stage first runs.
        stages: the stages in order, inputs before the stages that read them.
    """

    def __init__(self, config: RunConfig, folder: Path, stages: tuple[Stage, ...] = STAGES) -> None:
        self.configured_ranks = config.parallel.total_ranks
        num_ranks = launched_ranks()
        if num_ranks is not None:
            # The ranks are there already, however many the configuration asks for.
            there = {"num_ranks": num_ranks, "num_hosts": 1}
            parallel = config.parallel.model_copy(update=there)
            config = config.model_copy(update={"parallel": parallel})
        self.config = config
        self.folder = folder.absolute()
        self.stages = {stage.name: stage for stage in stages if stage.applies(config)}
        self.not_needed = [stage for stage in stages if stage.name not in self.stages]
        self._skipped: dict[str, bool] = {}

    def steps(self) -> list[Step]:
        """Every stage that this configuration needs, in order, with its state."""
        fingerprints: dict[str, str] = {}
        steps = []
        for stage in self.stages.values():
            made_from = as_json(
                {
                    "stage": stage.name,
                    "stage_version": stage.version,
                    "format_version": FORMAT_VERSION,
                    "fields": plain(fields := stage.fields(self.config)),
                    "identity": self._identity(stage),
                    "inputs": {name: fingerprints[name] for name in self._inputs(stage)},
                }
            )
            fingerprints[stage.name] = fingerprint(made_from)
            names = {f"inputs.{name}": f"stage {name}" for name in made_from["inputs"]}
            names |= names_in(fields, "fields")
            steps.append(self._step(stage, fingerprints[stage.name], made_from, names))
        return steps

    def run(self) -> dict[str, Any] | None:
        """Run every stage that is not done and write report.json.

        Returns:
            The report; None on ranks above 0 where a launcher started several.
        """
        with self._leading("run") as leads:
            if not leads:
                return None
            self._refuse_missing_hosts(*self.stages)
            self.check()
            with self._owned():
                self.run_stages()
                return self._write_report()

    def built(self, stage: str | None = None, until: str | None = None) -> list[str]:
        """Names of the stages that are brought up to date: `stage` alone, those up to `until`,
        or all."""
        names = list(self.stages)
        if stage is not None:
            return [stage]
        return names[: names.index(until) + 1] if until in names else names

    def check(self, builds: Collection[str] | None = None) -> None:
        """Refuse what cannot work, before anything is written or removed.

        Args:
            builds: names of the stages that are to be brought up to date; default: all.

        Raises:
            ConfigError, DataError, ResourceError: see `check_run`.
            PlaceError: see `check_places`.
            ArtifactError: the run folder holds what no stage left there.
            LatentError: a finished stage is not within the limits that are set now.
        """
        from distpc.pipeline.preflight import check_run
        from distpc.pipeline.sharing import check_places

        check_places(self.config.artifacts, self.folder)
        steps = self.steps()
        needed = self._needed(self.built() if builds is None else builds)
        for step in steps:
            if step.state == "done" and step.stage.name in needed:
                self._judge(step.stage, Artifact.open(step.folder))
        if "shards" in self.stages and any(step.state != "done" for step in steps):
            is_written = steps[0].state == "done"
            shards = Artifact.open(steps[0].folder) if is_written else None
            check_run(self.config, shards, builds)

    def _needed(self, names: Collection[str]) -> set[str]:
        """Stages and all that they are made from."""
        needed = set(names) & self.stages.keys()
        for name in reversed(self.stages):
            if name in needed:
                needed |= set(self._inputs(self.stages[name]))
        return needed

    def run_stages(self) -> None:
        """Bring every stage up to date; the caller holds the lock."""
        from distpc.parallel.cluster import Cluster

        with Cluster.session():
            for step in self.steps():
                self._bring_up(step)

    def run_until(self, name: str) -> None:
        """Bring the stages up to `name` up to date, and no further.

        Raises:
            ArtifactError: the config needs no such stage.
        """
        from distpc.parallel.cluster import Cluster

        with self._leading(f"run --until {name}") as leads:
            if not leads:
                return
            self._refuse_unneeded(name)
            builds = self.built(until=name)
            self._refuse_missing_hosts(*builds)
            self.check(builds)
            with self._owned(), Cluster.session():
                for step in self.steps():
                    self._bring_up(step)
                    if step.stage.name == name:
                        return

    def run_stage(self, name: str) -> Artifact | None:
        """Run one stage, whose inputs must be done.

        Returns:
            Its result; None on ranks above 0 where a launcher started several.

        Raises:
            ArtifactError: an input is missing or stale, or the config needs no such stage.
        """
        with self._leading(name) as leads:
            if not leads:
                return None
            self._refuse_missing_hosts(name)
            self.check(self.built(name))
            with self._owned():
                return self._run_stage(name)

    def _run_stage(self, name: str) -> Artifact:
        self._refuse_unneeded(name)
        steps = {step.stage.name: step for step in self.steps()}
        for needed in self._inputs(self.stages[name]):
            if steps[needed].state != "done":
                raise ArtifactError(
                    f"stage '{name}' needs stage '{needed}', which is {steps[needed].state}",
                    where=steps[needed].folder,
                    fix=f"run `distpc {needed} CONFIG`, or `distpc run CONFIG` for all stages",
                )
        artifact = self._bring_up(steps[name])
        if name == "evaluate":
            self._write_report()
        return artifact

    def _refuse_unneeded(self, name: str) -> None:
        if name not in self.stages:
            raise ArtifactError(
                f"this configuration has no stage '{name}'",
                where=self.folder,
                found=f"teacher.kind={self.config.teacher.kind}, "
                f"finetune.initialization={self.config.finetune.initialization}",
            )

    def _refuse_missing_hosts(self, *names: str) -> None:
        """Refuse to start the ranks of several machines on this one, for any of these stages."""
        hosts, ranks = self.config.parallel.num_hosts, self.config.parallel.num_ranks
        if hosts == 1 or launcher_name() != "distpc":
            return
        needing = {step.stage.name for step in self.steps() if step.state != "done"}
        if self.config.teacher.training is None:
            needing.discard("teacher")
        if needing & set(RANKED) & set(names):
            raise ConfigError(
                "no launcher started this process, and a run of several machines needs one",
                where="parallel.num_hosts",
                found=f"{hosts} machines of {ranks} ranks",
                expected="torchrun, deepspeed or a Ray cluster (RAY_ADDRESS)",
                fix=f"on each machine: NNODES={hosts} NPROC={ranks} RDZV=HOST:29400 "
                "launch/torchrun.sh, with the same arguments and an --out that all see "
                "(launch/README.md); --dry-run says what they would do; "
                "parallel.num_hosts=1 trains on this machine alone",
            )

    @contextlib.contextmanager
    def _leading(self, command: str) -> Iterator[bool]:
        """Whether this process runs the stages: alone, or as rank 0 of those of a launcher.

        Ranks above 0 have done their part when the block begins.
        """
        if not is_rank():
            yield True
            return
        from distpc.inference.report import versions

        facts = {
            "command": command,
            "config": self.config.model_dump(mode="json"),
            "run folder": str(self.folder),
            "code of distpc": code_fingerprint(),
            "version of": versions(),
        }
        with World.joined(self.config.parallel, facts) as world:
            if not world.leads:
                world.follow()
            yield world.leads

    def _inputs(self, stage: Stage) -> list[str]:
        unread = stage.unread(self.config)
        return [name for name in stage.inputs if name in self.stages and name not in unread]

    def _identity(self, stage: Stage) -> Any:
        if stage.identity is None:
            return None
        return _function(stage.identity)(self.config, self.folder / stage.name)

    def _step(self, stage: Stage, wanted: str, made_from: Any, names: dict[str, str]) -> Step:
        folder = self.folder / stage.name
        step = Step(stage, folder, wanted, "missing", made_from, names)
        if not folder.is_dir() or not any(folder.iterdir()):
            return step
        try:
            artifact = Artifact.find(folder)
        except FormatVersionError:
            raise
        except ArtifactError as error:
            return replace(step, state="stale", reason=str(error))
        if artifact is not None:
            if artifact.fingerprint == wanted:
                return replace(step, state="done")
            why = step.differs(artifact.made_from, _SINCE)
            return replace(step, state="stale", reason=f"config or inputs changed: {why}")
        attempt = folder / ATTEMPT
        if not attempt.is_file():
            raise ArtifactError(
                "a folder that a stage would write into holds something else",
                where=folder,
                found=", ".join(sorted(path.name for path in folder.iterdir())[:3]),
                expected=f"nothing, or what the stage '{stage.name}' left there",
                fix="choose another --out, or move the folder away",
            )
        begun = read_json(attempt)
        if begun.get("fingerprint") == wanted:
            return replace(step, state="interrupted")
        why = step.differs(begun.get("made_from"), _SINCE)
        reason = f"an unfinished attempt with another config: {why}"
        return replace(step, state="stale", reason=reason)

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        """Hold the run folder, cleared of what dead owners left half done."""
        with RunLock(self.folder):
            for trash in self.folder.glob(f"{TRASH}*"):
                shutil.rmtree(trash)
            for name, stage in self.stages.items():
                remove_partials(self.folder / name)
                if (self.folder / name / MANIFEST).is_file():
                    self._refresh(stage)
            write_bytes(self.folder / RESOLVED, dump_config(self.config).encode())
            yield

    def _bring_up(self, step: Step) -> Artifact:
        name = step.stage.name
        if step.state == "done":
            self._skipped[name] = True
            _say(f"{name}: done before, skipped")
            return self._publish(Artifact.open(step.folder))
        if step.state == "stale":
            _say(f"{name}: redone ({step.reason})")
            self._discard(step.folder)
        if step.state != "interrupted":
            shutil.rmtree(self.folder / "tb" / name, ignore_errors=True)
            _begin(step)
        if (taken := self._take(step)) is not None:
            return taken
        _say(f"{name}: {'continued' if step.state == 'interrupted' else 'started'}")
        context = StageContext(
            config=self.config,
            out=step.folder,
            inputs={
                needed: Artifact.open(self.folder / needed) for needed in self._inputs(step.stage)
            },
            fingerprint=step.fingerprint,
            tensorboard=self.folder / "tb",
        )
        begun = time.monotonic()
        _function(step.stage.run)(context)
        seconds = time.monotonic() - begun
        artifact = Artifact.seal(
            step.folder, name, step.fingerprint, seconds, context.metadata, step.made_from
        )
        (step.folder / ATTEMPT).unlink()
        self._skipped[name] = False
        _say(f"{name}: finished in {seconds:.1f} s")
        return self._publish(artifact)

    def _take(self, step: Step) -> Artifact | None:
        """The stage's result from elsewhere, where the configuration names a place that has it."""
        from distpc.pipeline.sharing import take_from

        for place in self.config.artifacts.reuse:
            try:
                taken = take_from(Place.of(place), step.stage.name, step)
            except ArtifactError as error:
                _say(f"{step.stage.name}: not taken from {place}, damaged there: {error}")
                self._discard(step.folder)
                _begin(step)
                continue
            if taken is not None:
                (step.folder / ATTEMPT).unlink()
                self._refresh(step.stage)
                self._skipped[step.stage.name] = True
                self._judge(step.stage, taken)
                return self._publish(taken)
        return None

    def _publish(self, artifact: Artifact) -> Artifact:
        places = self.config.artifacts
        if places.url and (places.publish is None or artifact.stage in places.publish):
            from distpc.pipeline.sharing import publish_to

            publish_to(Place.of(places.url), artifact)
        return artifact

    def _judge(self, stage: Stage, artifact: Artifact) -> None:
        if stage.judge is not None:
            _function(stage.judge)(self.config, artifact)

    def _refresh(self, stage: Stage) -> None:
        if stage.refresh is not None:
            _function(stage.refresh)(self.config, self.folder / stage.name)

    def _discard(self, folder: Path) -> None:
        """Remove a stage's folder; renamed first, so that it is never found half removed."""
        trash = self.folder / f"{TRASH}{folder.name}"
        folder.rename(trash)
        shutil.rmtree(trash)

    def _write_report(self) -> dict[str, Any]:
        """Write report.json, and let RUN/model point to the best model."""
        from distpc.inference.report import build_report, write_report

        link = self.folder / ".model.link"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("finetune") / "model")
        link.replace(self.folder / "model")
        report = build_report(self.folder, self.config, self._stage_facts())
        report["ranks"] = {
            "started_by": launcher_name(),
            "num_ranks": self.config.parallel.total_ranks,
            "configured": self.configured_ranks,
        }
        for name in self.stages:
            if (place := Artifact.open(self.folder / name).taken_from) is not None:
                report["stages"][name]["taken_from"] = place
        write_report(self.folder / "report.json", report)
        return report

    def _stage_facts(self) -> dict[str, dict[str, Any]]:
        facts = {}
        for name in self.stages:
            artifact = Artifact.open(self.folder / name)
            facts[name] = {
                "seconds": artifact.seconds,
                "fingerprint": artifact.fingerprint,
                "skipped": self._skipped.get(name, True),
            }
        return facts


def _begin(step: Step) -> None:
    """Note whose folder it is from now on."""
    begun = {"fingerprint": step.fingerprint, "made_from": step.made_from}
    write_json(step.folder / ATTEMPT, begun)


def _function(name: str) -> Any:
    """The function that `module:function` names, imported now."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def _say(text: str) -> None:
    print(f"[distpc] {text}", file=sys.stderr, flush=True)
