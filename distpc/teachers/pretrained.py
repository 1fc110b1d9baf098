"""Models that were trained elsewhere: read from a local folder, never fetched, never copied.

A teacher of this sort keeps the folder's path and the digest of its files; weights stay where they
are. Whoever loads the teacher needs the same files at the same path.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distpc.artifacts.files import file_digest, fingerprint, read_json
from distpc.config.teachers import PretrainedConfig
from distpc.errors import DistpcError, TeacherError

CONFIG = "config.json"
_SUFFIXES = (".json", ".safetensors", ".gguf", ".txt", ".model")


def model_folder(config: PretrainedConfig) -> Path:
    """The configured folder, as an absolute path.

    Raises:
        TeacherError: none is configured, or there is no model in it.
    """
    if config.folder is None:
        raise TeacherError(
            "a pretrained teacher needs a model folder",
            where="teacher.pretrained.folder",
            expected="a local folder with config.json and model.safetensors",
            fix="set it to a folder that save_pretrained of transformers wrote",
        )
    folder = Path(config.folder).expanduser().absolute()
    needed = CONFIG if config.gguf_file is None else config.gguf_file
    if not (folder / needed).is_file():
        raise TeacherError(
            "there is no model in the folder of a pretrained teacher",
            where=folder,
            found=f"no {needed}" if folder.is_dir() else "no such folder",
            expected=f"a folder with {needed}",
            fix="correct teacher.pretrained.folder, a folder that save_pretrained wrote, or fetch "
            "a public model: python tools/get_models.py NAME",
        )
    return folder


def folder_digest(folder: Path) -> str:
    """16 hexadecimal digits over names and contents of the files that a model is read from."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    return fingerprint([[file.name, file_digest(file)] for file in files])


def check_digest(folder: Path, digest: str) -> None:
    """Refuse a folder whose files are not those that the teacher was made with.

    Raises:
        TeacherError: the folder is gone or its files have changed.
    """
    found = folder_digest(folder) if folder.is_dir() else "no such folder"
    if found != digest:
        raise TeacherError(
            "the model of a pretrained teacher is missing or has changed",
            where=folder,
            found=found,
            expected=f"files of digest {digest}",
            fix="restore the folder, or run the teacher stage again",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        TeacherError: it is no JSON object.
    """
    try:
        config = read_json(folder / CONFIG)
    except DistpcError as error:
        raise TeacherError(
            "a model's configuration cannot be read", where=folder / CONFIG, found=error.what
        ) from error
    if not isinstance(config, dict):
        raise TeacherError("a model's configuration is no JSON object", where=folder / CONFIG)
    return config


def import_transformers() -> Any:
    """The library transformers, told to stay off the network.

    Raises:
        TeacherError: it is not installed.
    """
    try:
        return import_module("transformers")
    except ImportError as error:
        raise TeacherError(
            "Hugging Face transformers is not installed",
            where="teacher.kind",
            found=str(error),
            fix="pip install distpc[teachers]",
        ) from error


def load_automatic(folder: Path, gguf_file: str | None) -> nn.Module:
    """The bare model (without a head) in `folder`, float32, frozen.

    Raises:
        TeacherError: transformers cannot read it, or has no such architecture.
    """
    transformers = import_transformers()
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        model: nn.Module = transformers.AutoModel.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise TeacherError(
            "transformers cannot read a model",
            where=folder,
            found=(str(error).strip().splitlines() or [repr(error)])[0],
            expected="the folder of a model that this transformers knows",
            fix="check teacher.pretrained, or upgrade transformers",
        ) from error
    return model.eval().requires_grad_(False)


class Frozen(nn.Module):
    """Holds a model whose weights are no part of the teacher's own: moved, but not saved."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a tuple it is no submodule: the state dict leaves it out.
        self._held = (model,)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._held[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        self.model._apply(fn)
        super()._apply(fn, recurse)
        return self

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's forward pass, without gradients, in evaluation mode."""
        with torch.no_grad():
            return self.model(*inputs, **keywords)

    @property
    def num_parameters(self) -> int:
        """Weights of the model."""
        return sum(weight.numel() for weight in self.model.parameters())


def hidden_layer(states: Any, layer: int, folder: Path) -> Tensor:
    """One of a model's hidden states.

    Raises:
        TeacherError: the model gives none, or has fewer layers.
    """
    if isinstance(states, Mapping) or not states or not -len(states) <= layer < len(states):
        raise TeacherError(
            "a model has no such hidden layer",
            where=folder,
            found=f"layer {layer} of {len(states or ())}",
            fix="correct teacher.pretrained.layer",
        )
    state: Tensor = states[layer]
    return state
