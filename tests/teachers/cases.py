"""Every kind of teacher as the contract tests build it: one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import MISSING, DatasetSpec
from distpc.teachers import Teacher, build_teacher
from distpc.teachers.aligned import AlignedTeacher
from distpc.teachers.shuffled import ShuffledTeacher

from .tiny_models import tiny

GREY = DatasetSpec("grey", "image", 8 * 12, (17,) * 96, image_shape=(8, 12, 1))
COLOUR = DatasetSpec(
    "colour", "image", 192, (256, 512, 512) * 64, image_shape=(8, 8, 3), color="ycocg_r"
)
TEXT = DatasetSpec("letters", "text", 12, (256,) * 12, has_missing=True)
TOKENS = DatasetSpec("tokens", "text", 12, (64,) * 12)
PATCH = 2


@dataclass(frozen=True)
class Case:
    """One teacher of the battery.

    Attributes:
        kind: registered name.
        config: its settings.
        specs: data sets that it reads; the first is used where one is enough.
        sees: latents that the feature of latent z depends on: `(z, rows, columns) -> set`.
        is_random: whether another seed gives other features.
        wrap: applied to what the configuration builds.
        model: name of the tiny pretrained model that it reads.
        reaches_all: whether features depend on all that they may.
    """

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    specs: tuple[DatasetSpec, ...] = (GREY, COLOUR)
    sees: Callable[[int, int, int], set[int]] = lambda z, rows, columns: {z}
    is_random: bool = True
    wrap: Callable[[Teacher, int], Teacher] = lambda teacher, seed: teacher
    model: str | None = None
    reaches_all: bool = True

    def build(self, spec: DatasetSpec | None = None, seed: int = 3) -> Teacher:
        """A fresh teacher of `spec`."""
        kind = {} if self.kind in ("aligned", "shuffled") else {"kind": self.kind}
        config = TeacherConfig.model_validate({**kind, **self.config, **self._pretrained()})
        spec = spec or self.specs[0]
        return self.wrap(build_teacher(config, spec, PATCH, seed), seed).eval()

    def _pretrained(self) -> dict[str, Any]:
        if self.model is None:
            return {}
        layer = 10 if self.kind == "efficientnet" else -1
        size = 32 if self.kind == "efficientnet" else None
        folder = str(tiny(self.model))
        return {"pretrained": {"folder": folder, "layer": layer, "image_size_pixels": size}}


def around(z: int, rows: int, columns: int) -> set[int]:
    """The 3 x 3 units around z."""
    row, column = divmod(z, columns)
    return {
        i * columns + j
        for i in range(max(0, row - 1), min(rows, row + 2))
        for j in range(max(0, column - 1), min(columns, column + 2))
    }


def everything(z: int, rows: int, columns: int) -> set[int]:
    """All units."""
    return set(range(rows * columns))


def before(z: int, rows: int, columns: int) -> set[int]:
    """Tokens up to z."""
    return set(range(z + 1))


def in_front(z: int, rows: int, columns: int) -> set[int]:
    """Tokens before z."""
    return set(range(z))


def behind(z: int, rows: int, columns: int) -> set[int]:
    """Tokens from z on."""
    return set(range(z, columns))


def samples(spec: DatasetSpec, num: int, seed: int = 0) -> torch.Tensor:
    """(num, V) random values; where values may be missing, the last sample ends early."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([count for count in spec.num_categories if count is not None])
    if spec.kind == "text":
        sizes = sizes.clamp(max=128)
    x = (torch.rand(num, spec.num_variables, generator=generator) * sizes).long()
    if spec.has_missing and num:
        x[-1, spec.num_variables * 2 // 3 :] = MISSING
    return x


def _shuffled(teacher: Teacher, seed: int) -> Teacher:
    return ShuffledTeacher.wrap(teacher, samples(teacher.spec, 64, seed=9), seed)


def _text(
    sees: str, allowed: Callable[[int, int, int], set[int]], model: str, spec: DatasetSpec = TEXT
) -> Case:
    return Case("hf_text", {"sees": sees}, (spec,), allowed, is_random=False, model=model)


_SMALL = {"width": 16, "num_heads": 2}
_CODER = {"width": 8, "encoder_blocks": 1}
_MAE = {"width": 16, "num_heads": 2, "feature_width": 5}

CASES: dict[str, Case] = {
    "pixels": Case("pixels", is_random=False),
    "pixels-around": Case("pixels", {"pixels": {"radius": 1}}, sees=around, is_random=False),
    "random": Case("random", {"random_width": 7}),
    "random-prefix": Case("random", {"sees": "prefix"}, (TEXT, TOKENS), sees=before),
    "random-suffix": Case("random", {"sees": "suffix"}, (TEXT,), sees=behind),
    "random-both": Case("random", {"sees": "both"}, (TEXT,), sees=everything),
    "mae-1": Case("mae", {"mae": {**_MAE, "neighbourhood": 1}}),
    "mae-3": Case("mae", {"mae": {**_MAE, "neighbourhood": 3}}, sees=around),
    "onehot": Case("onehot", specs=(TEXT,), is_random=False),
    "vit": Case("hf_vision", sees=everything, is_random=False, model="vit"),
    "lite0": Case(
        "efficientnet", sees=everything, is_random=False, model="lite0", reaches_all=False
    ),
    "gpt2-prefix": _text("prefix", before, "gpt2"),
    "gpt2-suffix": _text("suffix", behind, "gpt2"),
    "gpt2-tokens": _text("suffix", behind, "tokens", TOKENS),
    "bert-prefix": _text("prefix", before, "bert"),
    "bert-suffix": _text("suffix", behind, "bert"),
    "bert-both": _text("both", everything, "bert"),
    "vqvae": Case(
        "vqvae",
        {"vqvae": {**_CODER, "code_width": 4, "num_codes": 16}},
        sees=everything,
        reaches_all=False,
    ),
    "vae": Case("vae", {"vae": {**_CODER, "feature_width": 5}}, sees=around),
    "data2vec": Case("data2vec", {"data2vec": _SMALL}, sees=everything),
    "causal-prefix": Case(
        "causal_lm", {"causal_lm": _SMALL, "sees": "prefix"}, (TEXT,), sees=before
    ),
    "causal-suffix": Case(
        "causal_lm", {"causal_lm": _SMALL, "sees": "suffix"}, (TEXT, TOKENS), sees=behind
    ),
    "aligned-producing": Case(
        "aligned",
        {"kind": "causal_lm", "causal_lm": _SMALL, "sees": "prefix"},
        (TEXT,),
        sees=in_front,
        wrap=lambda teacher, seed: AlignedTeacher.wrap(teacher, "producing"),
    ),
    "aligned-both": Case(
        "aligned",
        {"kind": "causal_lm", "causal_lm": _SMALL, "sees": "prefix"},
        (TOKENS,),
        sees=before,
        wrap=lambda teacher, seed: AlignedTeacher.wrap(teacher, "both"),
    ),
    "masked-prefix": Case(
        "masked_lm", {"masked_lm": _SMALL, "sees": "prefix"}, (TEXT,), sees=before
    ),
    "masked-suffix": Case(
        "masked_lm", {"masked_lm": _SMALL, "sees": "suffix"}, (TEXT,), sees=behind
    ),
    "masked-both": Case(
        "masked_lm", {"masked_lm": _SMALL, "sees": "both"}, (TEXT, TOKENS), sees=everything
    ),
    "shuffled-random": Case(
        "shuffled", {"kind": "random", "random_width": 7}, sees=everything, wrap=_shuffled
    ),
    "shuffled-onehot": Case(
        "shuffled", {"kind": "onehot"}, specs=(TEXT,), sees=everything, wrap=_shuffled
    ),
}
