"""Digits with latents made by plain clustering: all that the structure and distill stages read."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans

from distpc.artifacts import Artifact, StageContext
from distpc.config import parse_config
from distpc.data import index as data_index
from distpc.data import shards as data_shards
from distpc.data.patches import PatchGrid
from distpc.data.reader import read_shard
from distpc.latents.store import shard_path, write_shard
from distpc.training import structure
from distpc.training.pieces import PieceWorker

NUM_CLUSTERS = 12


class Runs:
    """Variants of one run that share their data and latents.

    Args:
        folder: of the shared artifacts; `variant` folders lie beside them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs: dict[str, Artifact] = {}
        self._stage("shards", data_shards.run)
        self._stage("index", data_index.run)
        self._stage("assign", cluster_patches)
        self._stage("features", keep_patches)

    def variant(self, name: str, **sections: Any) -> StageContext:
        """The context of the distill stage of a variant whose structure stage has run."""
        config = make_config(**sections)
        inputs = dict(self.inputs)
        ctx = StageContext(
            config,
            self.folder / name / "structure",
            inputs,
            f"{name}-structure",
            self.folder / "tb",
        )
        ctx.out.mkdir(parents=True)
        structure.run(ctx)
        inputs["structure"] = Artifact.seal(
            ctx.out, "structure", ctx.fingerprint, 0.0, ctx.metadata
        )
        out = self.folder / name / "distill"
        out.mkdir()
        return StageContext(config, out, inputs, f"{name}-distill", self.folder / "tb")

    def _stage(self, stage: str, run: Any) -> None:
        out = self.folder / stage
        out.mkdir()
        ctx = StageContext(make_config(), out, dict(self.inputs), stage, self.folder / "tb")
        run(ctx)
        self.inputs[stage] = Artifact.seal(out, stage, stage, 0.0, ctx.metadata)


def make_config(**sections: Any) -> Any:
    """Digits in 2 x 2 patches, few clusters."""
    values: dict[str, Any] = {
        "name": "test",
        "data": {"source": {"kind": "digits"}, "samples_per_shard": 400},
        "teacher": {"kind": "pixels"},
        "latents": {"num_clusters": NUM_CLUSTERS},
        "parallel": {"num_workers": 2, "cpus_per_worker": 0.5, "max_worker_restarts": 1},
    }
    return parse_config({**values, **sections}, where="test")


class CountedWorker(PieceWorker):
    """Notes which pieces are begun and finished.

    A file `die-in-PIECE` with a number and a piece has it die so many times in PIECE, always
    after the other piece was finished.
    """

    def __call__(self, item: dict[str, Any]) -> None:
        self._folder = self._ctx.out.parent
        name = item["name"]
        note(self._folder / "begun.txt", name)
        deaths = self._folder / f"die-in-{name}"
        if deaths.is_file():
            left, _, other = deaths.read_text().partition(" ")
            if int(left) > 0:
                deaths.write_text(f"{int(left) - 1} {other}")
                self._die_after(other)
        super().__call__(item)
        note(self._folder / "finished.txt", name)

    def _die_after(self, piece: str) -> None:
        finished = self._folder / "finished.txt"
        for _ in range(1200):
            if finished.is_file() and piece in finished.read_text().split():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)


def note(path: Path, line: str) -> None:
    """Append a line, whole, whoever else does."""
    with path.open("a") as file:
        file.write(f"{line}\n")


def cluster_patches(ctx: StageContext) -> None:
    """Latent shards as the assign stage writes them; the last cluster stays unused."""
    index = data_index.ShardIndex.load(ctx.input("index").path)
    variables = PatchGrid.of(index.spec, 2).variables()
    shards = [read_shard(entry, index.spec) for entry in index.shards("train")]
    patches = np.concatenate([shard.x[:, variables].reshape(-1, 4) for shard in shards])
    means = KMeans(NUM_CLUSTERS - 1, n_init=1, max_iter=10, random_state=0).fit(patches[:4000])
    for shard in shards:
        latents = means.predict(shard.x[:, variables].reshape(-1, 4).astype(np.float64))
        rows = torch.from_numpy(latents.astype(np.int32)).reshape(len(shard.keys), -1)
        facts = {"fingerprint": ctx.fingerprint, "num_clusters": NUM_CLUSTERS}
        write_shard(shard_path(ctx.out, shard.name), "latents", rows, shard.keys, facts)


def keep_patches(ctx: StageContext) -> None:
    """Features as the features stage writes them: a patch's own values."""
    index = data_index.ShardIndex.load(ctx.input("index").path)
    variables = PatchGrid.of(index.spec, 2).variables()
    for entry in index.shards("train"):
        shard = read_shard(entry, index.spec)
        rows = torch.from_numpy(shard.x[:, variables]).to(torch.float16)
        path = shard_path(ctx.out, shard.name)
        write_shard(path, "features", rows, shard.keys, {"fingerprint": ctx.fingerprint})
