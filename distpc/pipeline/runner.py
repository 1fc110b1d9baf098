"""Runs stages: skips what is done, continues what was interrupted, redoes what is stale."""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distpc.artifacts import (
    FORMAT_VERSION,
    Artifact,
    RunLock,
    Stage,
    StageContext,
    fingerprint,
    read_json,
    remove_partials,
    write_bytes,
    write_json,
)
from distpc.config import RunConfig, dump_config
from distpc.errors import ArtifactError
from distpc.pipeline.stages import STAGES

ATTEMPT = ".attempt.json"
State = Literal["done", "interrupted", "stale", "missing"]


@dataclass(frozen=True)
class Step:
    """A stage within one run: its folder, what its result must be made from, its state."""

    stage: Stage
    folder: Path
    fingerprint: str
    state: State
    reason: str = ""


class Pipeline:
    """All stages of one configuration in one run folder.

    Args:
        config: the run's configuration.
        folder: the run folder; made when a stage first runs.
        stages: the stages in order, inputs before the stages that read them.
    """

    def __init__(self, config: RunConfig, folder: Path, stages: tuple[Stage, ...] = STAGES) -> None:
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
            made_from = {
                "stage": stage.name,
                "stage_version": stage.version,
                "format_version": FORMAT_VERSION,
                "fields": stage.fields(self.config),
                "inputs": {name: fingerprints[name] for name in self._inputs(stage)},
            }
            fingerprints[stage.name] = fingerprint(made_from)
            steps.append(self._step(stage, fingerprints[stage.name]))
        return steps

    def run(self) -> dict[str, Any]:
        """Run every stage that is not done and write report.json.

        Returns:
            The report.
        """
        from distpc.inference.report import build_report, write_report

        with RunLock(self.folder):
            self._prepare()
            self.run_stages()
            self._publish_model()
            report = build_report(self.folder, self.config, self._stage_facts())
            write_report(self.folder / "report.json", report)
        return report

    def run_stages(self) -> None:
        """Bring every stage up to date; the caller holds the lock."""
        from distpc.parallel.cluster import Cluster

        with Cluster.session():
            for step in self.steps():
                self._bring_up(step)

    def run_stage(self, name: str) -> Artifact:
        """Run one stage, whose inputs must be done.

        Raises:
            ArtifactError: an input is missing or stale, or the config needs no such stage.
        """
        with RunLock(self.folder):
            self._prepare()
            steps = {step.stage.name: step for step in self.steps()}
            if name not in steps:
                raise ArtifactError(
                    f"this configuration has no stage '{name}'",
                    where=self.folder,
                    found=f"teacher.kind={self.config.teacher.kind}, "
                    f"finetune.initialization={self.config.finetune.initialization}",
                )
            for needed in self._inputs(self.stages[name]):
                if steps[needed].state != "done":
                    raise ArtifactError(
                        f"stage '{name}' needs stage '{needed}', which is {steps[needed].state}",
                        where=steps[needed].folder,
                        fix=f"run `distpc {needed} CONFIG`, or `distpc run CONFIG` for all stages",
                    )
            return self._bring_up(steps[name])

    def _inputs(self, stage: Stage) -> list[str]:
        return [name for name in stage.inputs if name in self.stages]

    def _step(self, stage: Stage, wanted: str) -> Step:
        folder = self.folder / stage.name
        if not folder.is_dir():
            return Step(stage, folder, wanted, "missing")
        try:
            artifact = Artifact.find(folder)
        except ArtifactError as error:
            return Step(stage, folder, wanted, "stale", str(error))
        if artifact is not None:
            if artifact.fingerprint == wanted:
                return Step(stage, folder, wanted, "done")
            return Step(stage, folder, wanted, "stale", "config or inputs changed")
        attempt = folder / ATTEMPT
        if attempt.is_file() and read_json(attempt) == {"fingerprint": wanted}:
            return Step(stage, folder, wanted, "interrupted")
        return Step(stage, folder, wanted, "stale", "an unfinished attempt with another config")

    def _prepare(self) -> None:
        remove_partials(self.folder)
        write_bytes(self.folder / "config.yaml", dump_config(self.config).encode())

    def _bring_up(self, step: Step) -> Artifact:
        name = step.stage.name
        if step.state == "done":
            self._skipped[name] = True
            _say(f"{name}: done before, skipped")
            return Artifact.open(step.folder)
        tensorboard = self.folder / "tb" / name
        if step.state == "stale":
            _say(f"{name}: redone ({step.reason})")
            shutil.rmtree(step.folder)
        if step.state != "interrupted":
            shutil.rmtree(tensorboard, ignore_errors=True)
            write_json(step.folder / ATTEMPT, {"fingerprint": step.fingerprint})
        _say(f"{name}: {'continued' if step.state == 'interrupted' else 'started'}")
        context = StageContext(
            config=self.config,
            out=step.folder,
            inputs={
                needed: Artifact.open(self.folder / needed) for needed in self._inputs(step.stage)
            },
            fingerprint=step.fingerprint,
            tensorboard=tensorboard,
        )
        begun = time.monotonic()
        module, function = step.stage.run.split(":")
        getattr(importlib.import_module(module), function)(context)
        seconds = time.monotonic() - begun
        artifact = Artifact.seal(step.folder, name, step.fingerprint, seconds, context.metadata)
        (step.folder / ATTEMPT).unlink()
        self._skipped[name] = False
        _say(f"{name}: finished in {seconds:.1f} s")
        return artifact

    def _publish_model(self) -> None:
        """Let RUN/model point to the best model, whole at every moment."""
        link = self.folder / ".model.link"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("finetune") / "model")
        link.replace(self.folder / "model")

    def _stage_facts(self) -> dict[str, dict[str, Any]]:
        facts = {}
        for name, skipped in self._skipped.items():
            artifact = Artifact.open(self.folder / name)
            facts[name] = {
                "seconds": artifact.seconds,
                "fingerprint": artifact.fingerprint,
                "skipped": skipped,
            }
        return facts


def _say(text: str) -> None:
    print(f"[distpc] {text}", file=sys.stderr, flush=True)
