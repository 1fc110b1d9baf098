"""Running single stages in a folder, and workers that die once."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from distpc.artifacts import Artifact, StageContext
from distpc.config import RunConfig
from distpc.latents.extract import Extractor
from distpc.latents.holder import FeatureHolder

DYING_HOLDER = f"{__name__}:DyingHolder"
DYING_EXTRACTOR = f"{__name__}:DyingExtractor"
KILLED_EXTRACTOR = f"{__name__}:KilledExtractor"


class Run:
    """A run folder whose stages are called one by one."""

    def __init__(self, folder: Path, inputs: dict[str, Artifact] | None = None, **config: Any):
        self.folder = folder
        self.artifacts = dict(inputs or {})
        self.config = RunConfig.model_validate(
            {
                "name": "test",
                "data": {"source": {"kind": "digits"}, "samples_per_shard": 256},
                "teacher": {"kind": "pixels"},
                **config,
            }
        )

    def context(self, stage: str, fingerprint: str | None = None) -> StageContext:
        """What the stage is given."""
        out = self.folder / stage
        out.mkdir(parents=True, exist_ok=True)
        return StageContext(
            self.config,
            out,
            self.artifacts,
            fingerprint or f"{stage}-fingerprint",
            self.folder / "tb",
        )

    def stage(self, name: str, function: Any, fingerprint: str | None = None) -> Artifact:
        """Run a stage and seal its folder."""
        ctx = self.context(name, fingerprint)
        function(ctx)
        return self.seal(ctx, name)

    def seal(self, ctx: StageContext, name: str) -> Artifact:
        """Seal a folder as the result of a stage."""
        artifact = Artifact.seal(ctx.out, name, ctx.fingerprint, 0.0, ctx.metadata)
        self.artifacts[name] = artifact
        return artifact


def die_once(folder: Path) -> None:
    """Kill this process the way the kernel does when memory runs out; later calls return."""
    marker = folder / ".died"
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class DyingHolder(FeatureHolder):
    """Dies over a shard in the middle of a Lloyd round."""

    asked = 0

    def totals(self, item: Any) -> Any:
        self.asked += 1
        if self.asked == 4:
            die_once(self._folder.parent)
        return super().totals(item)


class DyingExtractor(Extractor):
    """Dies after encoding its second shard, before a byte of it is written."""

    shards = 0

    def _encode(self, *arguments: Any) -> Any:
        encoded = super()._encode(*arguments)
        self.shards += 1
        if self.shards == 2:
            die_once(self._out.parent)
        return encoded


class KilledExtractor(Extractor):
    """Dies whenever it encodes the sample that the file `killer` beside its folder names."""

    def _encode_batch(self, x: Any, keys: Any, bad: Any) -> Any:
        if (self._out.parent / "killer").read_text() in keys:
            with (self._out.parent / "deaths").open("a") as deaths:
                deaths.write(f"{len(keys)}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._encode_batch(x, keys, bad)


def serve() -> None:
    """Be a cluster of two CPUs, such as a user may have, until standard input ends."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder)
        print(ray.get_runtime_context().gcs_address, flush=True)
        sys.stdin.read()
        ray.shutdown()


def run_fit(context: str) -> None:
    """Run the fit stage on a context that was saved as JSON."""
    import json

    from distpc.latents import fit

    fit.run(StageContext.from_json(json.loads(Path(context).read_text())))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
