"""Vision models of Hugging Face transformers, and CNNs: feature maps resampled to the patch grid.

Shapes: B batch, V variables, Z patches, D feature width, h x w the model's own grid.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distpc.artifacts.files import read_json
from distpc.config.teachers import PretrainedConfig, TeacherConfig
from distpc.data.pictures import three_channels, to_display
from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError
from distpc.teachers.images import ImageTeacher
from distpc.teachers.pretrained import (
    Frozen,
    check_digest,
    folder_digest,
    hidden_layer,
    load_automatic,
    model_folder,
    read_config,
)


class PretrainedImages(ImageTeacher):
    """A frozen model that sees the picture, enlarged, in RGB.

    Args:
        spec: the data set; grey images are shown as RGB, colour spaces turned back.
        patch_size: side of a patch in pixels.
        folder: of the model.
        digest: of its files.
        layer: hidden state that is the feature.
        image_size: side in pixels to which images are resized (bilinear, to a square).
    """

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        folder: str,
        digest: str,
        layer: int,
        image_size: int,
    ) -> None:
        super().__init__(spec, patch_size)
        self.folder = Path(folder)
        check_digest(self.folder, digest)
        self._settings = {
            "folder": folder,
            "digest": digest,
            "layer": layer,
            "image_size": image_size,
        }
        self.layer, self.image_size = layer, image_size
        self.model = Frozen(self.load_model())
        side = torch.zeros(1, 3, image_size, image_size)
        self._width = int(self.feature_map(side).shape[1])

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> PretrainedImages:
        """Folder, layer and image size from `teacher.pretrained`."""
        settings = config.pretrained
        folder = model_folder(settings)
        return cls(
            spec,
            patch_size,
            folder=str(folder),
            digest=folder_digest(folder),
            layer=settings.layer,
            image_size=settings.image_size_pixels or cls.usual_size(folder, settings),
        )

    @classmethod
    @abstractmethod
    def usual_size(cls, folder: Path, config: PretrainedConfig) -> int:
        """Side in pixels that the model was trained with."""

    @abstractmethod
    def load_model(self) -> nn.Module:
        """The model in `self.folder`."""

    @abstractmethod
    def feature_map(self, pictures: Tensor) -> Tensor:
        """pictures (B, 3, side, side) in [0, 1] -> (B, D, h, w)."""

    @property
    def settings(self) -> dict[str, Any]:
        """Folder, digest, layer and image size."""
        return dict(self._settings)

    @property
    def name(self) -> str:
        """Kind and folder."""
        return f"{self.kind}:{self.folder.name}"

    @property
    def num_parameters(self) -> int:
        """Weights of the model."""
        return self.model.num_parameters

    @property
    def feature_width(self) -> int:
        """D, channels of the layer."""
        return self._width

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, Z, D) float32."""
        self.patches(x)
        shown = three_channels(to_display(x.cpu().numpy(), self.spec))
        pictures = torch.from_numpy(shown).to(self.largest_values.device).permute(0, 3, 1, 2)
        if not len(x):
            return pictures.new_zeros((0, self.num_latents, self._width), dtype=torch.float32)
        pictures = _resized(pictures.float() / 255, (self.image_size, self.image_size))
        found = _resized(self.feature_map(pictures).float(), (self.grid.rows, self.grid.columns))
        return found.flatten(2).transpose(1, 2).contiguous()


class VisionTeacher(PretrainedImages):
    """Patch tokens of a vision transformer, or the feature map of another vision model."""

    kind = "hf_vision"
    mean: Tensor
    spread: Tensor

    @classmethod
    def usual_size(cls, folder: Path, config: PretrainedConfig) -> int:
        """The configuration's image_size."""
        size = read_config(folder).get("image_size", 224)
        return int(max(size)) if isinstance(size, list) else int(size)

    @property
    def sees(self) -> str:
        """Attention looks everywhere."""
        return "the whole image"

    def load_model(self) -> nn.Module:
        """The model, and the means and spreads by which it wants pixels normalised."""
        model = load_automatic(self.folder, None)
        reads = getattr(model, "main_input_name", "")
        if reads != "pixel_values":
            raise TeacherError(
                "a model does not read images",
                where=self.folder,
                found=f"{type(model).__name__}, which reads {reads}",
                expected="a vision model",
                fix="set teacher.kind to hf_text, or another folder",
            )
        file = self.folder / "preprocessor_config.json"
        norm = read_json(file) if file.is_file() else {}
        mean, spread = (norm.get(name, [0.5] * 3) for name in ("image_mean", "image_std"))
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(spread).view(3, 1, 1), persistent=False)
        return model

    def feature_map(self, pictures: Tensor) -> Tensor:
        """pictures (B, 3, side, side) in [0, 1] -> (B, D, h, w)."""
        shown = (pictures - self.mean) / self.spread
        options = {"output_hidden_states": True}
        config = getattr(self.model.model, "config", None)
        if getattr(config, "image_size", self.image_size) != self.image_size:
            options["interpolate_pos_encoding"] = True
        try:
            output = self.model(pixel_values=shown, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TeacherError(
                "a vision model cannot read pictures of this size",
                where=self.folder,
                found=f"{self.image_size} pixels: {error}",
                fix="set teacher.pretrained.image_size_pixels to the model's own size",
            ) from error
        state = hidden_layer(output.hidden_states, self.layer, self.folder)
        if state.ndim == 4:
            return state
        side = self.image_size // int(getattr(config, "patch_size", self.image_size))
        # Class and register tokens come first.
        tokens = state[:, state.shape[1] - side * side :]
        return tokens.transpose(1, 2).unflatten(2, (side, side))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[2:]) == size:
        return maps
    # Enlarged maps are the same with and without antialiasing, which takes much longer.
    shrinks = any(old > new for old, new in zip(maps.shape[2:], size, strict=True))
    return interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
