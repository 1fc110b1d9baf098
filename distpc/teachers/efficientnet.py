"""EfficientNet-Lite0's feature maps (Tan & Le 2019; the Lite variant: ReLU6, no squeezing).

Reads a folder with config.json {"architecture": "efficientnet-lite0"} and model.safetensors under
the names of the efficientnet_pytorch family.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, relu6

from distpc.artifacts.tensors import read_tensors
from distpc.config.teachers import PretrainedConfig
from distpc.errors import TeacherError
from distpc.teachers.hf_vision import PretrainedImages
from distpc.teachers.pretrained import read_config

ARCHITECTURE = "efficientnet-lite0"
# (blocks, kernel, stride of the first, expansion, output channels)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
NUM_BLOCKS = sum(stage[0] for stage in _STAGES)


class _SameConv(nn.Conv2d):
    """Padded as TensorFlow does: ceil(n / stride) outputs, the odd pixel below and right."""

    def forward(self, x: Tensor) -> Tensor:
        missing = [
            max((-(-side // stride) - 1) * stride + kernel - side, 0)
            for side, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        ]
        if any(pixels % 2 for pixels in missing):
            x = pad(x, [side for pixels in missing[::-1] for side in _halves(pixels)])
            missing = [0, 0]
        # The convolution pads without a copy where both sides are alike.
        padding = [pixels // 2 for pixels in missing]
        return conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)


def _halves(pixels: int) -> tuple[int, int]:
    return pixels // 2, pixels - pixels // 2


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted residual: expand, depthwise convolution, project."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        self.expands = expansion != 1
        self.is_residual = stride == 1 and before == after
        if self.expands:
            self._expand_conv = _SameConv(before, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = _SameConv(inner, after, 1, bias=False)
        self._bn2 = _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        hidden = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + x if self.is_residual else hidden


class EfficientNetLite(nn.Module):
    """Stem, blocks and ImageNet head of EfficientNet-Lite0."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks, before = [], 32
        for count, kernel, stride, expansion, after in _STAGES:
            for number in range(count):
                blocks.append(
                    _Block(before, after, kernel, stride if number == 0 else 1, expansion)
                )
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConv(320, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def feature_map(self, x: Tensor, last_block: int) -> Tensor:
        """x (B, 3, H, W), values (0 .. 255 - 127) / 128 -> (B, C, h, w) behind `last_block`."""
        x = relu6(self._bn0(self._conv_stem(x)))
        for block in itertools.islice(self._blocks, last_block + 1):
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """x as above -> (B, 1000) logits of ImageNet's classes."""
        x = relu6(self._bn1(self._conv_head(self.feature_map(x, NUM_BLOCKS - 1))))
        logits: Tensor = self._fc(x.mean(dim=(2, 3)))
        return logits


class EfficientNetTeacher(PretrainedImages):
    """The map behind one of the 16 blocks: 4 has 40 channels and stride 8, 10 has 112 and 16."""

    kind = "efficientnet"

    @classmethod
    def usual_size(cls, folder: Path, config: PretrainedConfig) -> int:
        """128 pixels: small images gain nothing from the 224 that it was trained with."""
        return 128

    @property
    def sees(self) -> str:
        """Convolutions reach beyond the patch."""
        return f"its patch and what block {self.layer}'s receptive field covers around it"

    def load_model(self) -> nn.Module:
        """Weights from model.safetensors."""
        config = read_config(self.folder)
        found = config.get("architecture", config.get("model_type", "config.json names none"))
        if found != ARCHITECTURE:
            raise TeacherError(
                "a model folder is of another architecture",
                where=self.folder,
                found=found,
                expected=ARCHITECTURE,
                fix=f'a folder whose config.json says {{"architecture": "{ARCHITECTURE}"}}',
            )
        if not 0 <= self.layer < NUM_BLOCKS:
            raise TeacherError(
                "a model has no such block",
                where="teacher.pretrained.layer",
                found=self.layer,
                expected=f"0 .. {NUM_BLOCKS - 1}",
            )
        model = EfficientNetLite()
        weights, _ = read_tensors(
            self.folder / "model.safetensors", holds="model weights", error=TeacherError
        )
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise TeacherError(
                "a model's weights do not fit its architecture",
                where=self.folder,
                found=str(error).splitlines()[0],
                expected=ARCHITECTURE,
            ) from error
        return model.eval().requires_grad_(False)

    def feature_map(self, pictures: Tensor) -> Tensor:
        """pictures (B, 3, side, side) in [0, 1] -> (B, D, h, w)."""
        model = self.model.model
        assert isinstance(model, EfficientNetLite)
        return model.feature_map((pictures * 255 - 127) / 128, self.layer)
