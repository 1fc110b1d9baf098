"""What a stage is, and what it is given when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distpc.artifacts.manifest import Artifact
from distpc.errors import ArtifactError

if TYPE_CHECKING:
    # Only annotations: what is imported with the artifacts stays free of pydantic.
    from distpc.config import RunConfig


@dataclass
class StageContext:
    """Everything a stage may depend on.

    A stage reads `config` and `inputs`, writes files into `out` (which may hold finished files of
    an earlier, interrupted attempt with the same fingerprint: those are kept, not redone) and
    leaves facts for later stages and the report in `metadata`.

    Attributes:
        config: the run's whole configuration.
        out: the stage's own folder, present.
        inputs: the artifacts of the stages it depends on, by stage name.
        fingerprint: of everything that this stage's result depends on.
        tensorboard: folder for TensorBoard logs of the run; a stage writes below its own name.
        metadata: JSON values to keep in the manifest.
    """

    config: RunConfig
    out: Path
    inputs: dict[str, Artifact]
    fingerprint: str
    tensorboard: Path
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Whoever works on a stage, in whatever process, keeps copies where the config says.
        from distpc.artifacts.cache import Cache, use

        places = self.config.artifacts
        use(Cache(places.cache_folder, places.cache_bytes))

    def input(self, stage: str) -> Artifact:
        """The artifact of an upstream stage.

        Raises:
            ArtifactError: that stage has not run.
        """
        if stage not in self.inputs:
            raise ArtifactError(
                f"stage '{stage}' has to run first",
                where=self.out.parent / stage,
                fix="run `distpc run CONFIG`, which runs every stage in order",
            )
        return self.inputs[stage]

    def to_json(self) -> dict[str, Any]:
        """The context as JSON, to hand to another process (training ranks, Ray workers)."""
        return {
            "config": self.config.model_dump(mode="json"),
            "out": str(self.out),
            "inputs": {name: str(artifact.path) for name, artifact in self.inputs.items()},
            "fingerprint": self.fingerprint,
            "tensorboard": str(self.tensorboard),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StageContext:
        """The context that `to_json` described; input artifacts are checked again."""
        from distpc.config import RunConfig

        return cls(
            config=RunConfig.model_validate(value["config"]),
            out=Path(value["out"]),
            inputs={name: Artifact.open(Path(path)) for name, path in value["inputs"].items()},
            fingerprint=value["fingerprint"],
            tensorboard=Path(value["tensorboard"]),
        )


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline: a pure map from config and input artifacts to an artifact.

    Attributes:
        name: its name on the command line and of its folder in the run.
        run: `module:function` taking a StageContext; imported only when the stage runs.
        inputs: names of the stages whose artifacts it reads.
        fields: what of the configuration its result depends on (JSON values, some `Named`).
        identity: `module:function(config, folder)` giving JSON values that change with whatever
            outside of the configuration the result depends on; `folder` is the stage's own.
        applies: whether this configuration needs the stage at all.
        unread: those of `inputs` that this configuration's result does not depend on.
        refresh: `module:function(config, folder)` that brings up to date what lies beside a
            finished result without being part of it.
        judge: `module:function(config, artifact)` that refuses a finished result which limits of
            the configuration do not allow, limits that are no part of `fields`.
        version: raised when the stage's code changes what it writes.
    """

    name: str
    run: str
    inputs: tuple[str, ...]
    fields: Callable[[RunConfig], Any]
    applies: Callable[[RunConfig], bool] = lambda config: True
    unread: Callable[[RunConfig], tuple[str, ...]] = lambda config: ()
    identity: str | None = None
    refresh: str | None = None
    judge: str | None = None
    version: int = 1
