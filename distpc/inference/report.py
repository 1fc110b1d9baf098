"""report.json: the one file that says what a run was and what came out of it."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import distpc
from distpc.artifacts.files import write_json
from distpc.artifacts.manifest import Artifact
from distpc.config import RunConfig
from distpc.data.spec import DatasetSpec
from distpc.errors import ArtifactError

PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "numpy")
KEYS = (
    "config",
    "dataset",
    "seed",
    "num_parameters",
    "teacher",
    "latents",
    "distillation",
    "stages",
    "peak_memory_bytes",
    "versions",
)
OF_DOCUMENTS = tuple(
    f"{split}_{name}"
    for split in ("valid", "test")
    for name in ("bpc_documents", "bpt_documents", "characters_per_token")
)
"""Figures that a text may have beside the others: of whole documents, with carried state."""
LATENT_KEYS = ("num_clusters", "used", "usage_entropy_bits")
DISTILLATION_KEYS = ("num_samples", "num_parameters", "states_never_used", "num_heads")
"""Of the distilled circuit, beside its figures; the last only where heads were grown."""
STAGE_KEYS = ("seconds", "fingerprint", "skipped")


def build_report(
    run_dir: Path, config: RunConfig, stages: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The report of a finished run, from its configuration and its stages' metadata.

    Args:
        run_dir: the run's folder, which holds a folder a stage.
        config: the run's configuration.
        stages: of every stage that applied, by name: seconds, fingerprint, skipped.

    Returns:
        JSON values: config, dataset, seed, num_parameters, {train,valid,test}_bpd (text: _bpc
        or _bpt, perplexity, and `OF_DOCUMENTS`), integral (of integral circuits: figures for each
        number of states), teacher, latents (None where the run has no teacher), distillation (of
        the circuit that fine-tuning started from, None where it started from random parameters),
        stages, peak_memory_bytes, versions.

    Raises:
        ArtifactError: a stage whose facts are needed has not run, or left a fact out.
    """
    run_dir = Path(run_dir)
    evaluation = Artifact.open(run_dir / "evaluate").metadata
    spec = DatasetSpec.load(run_dir / "shards")
    figures = [f"{split}_{spec.unit}" for split in ("train", "valid", "test")]
    figures += ["perplexity"] if spec.kind == "text" else []
    needed = [*figures, "num_parameters", "splits"]
    _require(evaluation, needed, run_dir / "evaluate")
    report = {
        "config": config.model_dump(mode="json"),
        "dataset": _dataset(spec, evaluation),
        "seed": config.seed,
        "num_parameters": evaluation["num_parameters"],
        **{name: evaluation[name] for name in figures},
        **{name: evaluation[name] for name in (*OF_DOCUMENTS, "integral") if name in evaluation},
        "teacher": _teacher(run_dir, config, stages),
        "latents": _latents(run_dir, stages),
        "distillation": _distillation(run_dir, config, spec, stages),
        "stages": {name: {key: stage[key] for key in STAGE_KEYS} for name, stage in stages.items()},
        "peak_memory_bytes": _peak_memory(run_dir, stages),
        "versions": versions(),
    }
    _require(report, [*KEYS, *figures], run_dir)
    return report


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report as JSON, whole or not at all; figures of impossible data are Infinity."""
    write_json(path, dict(report))


def versions() -> dict[str, str | None]:
    """Versions of Python and the packages that results depend on; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["distpc"] = distpc.__version__
    return found


def peak_memory_bytes() -> int:
    """Largest resident set of this process and of any ended process that it started."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    whom = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whom) * unit


def _dataset(spec: DatasetSpec, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    splits = evaluation["splits"]
    return {
        "name": spec.name,
        "kind": spec.kind,
        "num_variables": spec.num_variables,
        "image_shape": spec.image_shape,
        "color": spec.color,
        "caveat": spec.caveat,
        "has_missing": spec.has_missing,
        "num_samples": {name: split["num_samples_in_split"] for name, split in splits.items()},
    }


def _teacher(
    run_dir: Path, config: RunConfig, stages: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    if "teacher" not in stages:
        return None
    artifact = Artifact.open(run_dir / "teacher")
    return {
        "kind": config.teacher.kind,
        "fingerprint": artifact.fingerprint,
        **artifact.metadata,
    }


def _latents(run_dir: Path, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    if "assign" not in stages:
        return None
    metadata = Artifact.open(run_dir / "assign").metadata
    _require(metadata, LATENT_KEYS, run_dir / "assign")
    return {name: metadata[name] for name in LATENT_KEYS}


def _distillation(
    run_dir: Path, config: RunConfig, spec: DatasetSpec, stages: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    if "distill" not in stages:
        return None
    metadata = Artifact.open(run_dir / "distill").metadata
    names = (*DISTILLATION_KEYS, f"train_{spec.unit}", f"valid_{spec.unit}")
    found = {name: metadata[name] for name in names if name in metadata}
    return {"kind": config.distill.kind, **found}


def _peak_memory(run_dir: Path, stages: Mapping[str, Mapping[str, Any]]) -> int:
    """Of this process, its children, and what stages recorded of theirs."""
    recorded = [Artifact.open(run_dir / name).metadata for name in stages]
    peaks = [int(facts.get("peak_memory_bytes") or 0) for facts in recorded]
    return max([peak_memory_bytes(), *peaks])


def _require(facts: Mapping[str, Any], names: list[str] | tuple[str, ...], where: Path) -> None:
    absent = [name for name in names if name not in facts]
    if absent:
        raise ArtifactError(
            "a stage's result lacks facts that the report needs",
            where=where,
            found=f"no {', '.join(absent)}",
            expected=", ".join(names),
            fix="remove the stage's folder and run the same command again",
        )
