"""Which teacher a run has, and the settings of each kind."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distpc.config.sources import Section


class MaeConfig(Section):
    """Masked autoencoder (vision transformer), trained on the run's own images."""

    width: int = Field(default=64, ge=8)
    """Width of the encoder's and decoder's token vectors."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads of every block."""
    encoder_blocks: int = Field(default=2, ge=1)
    """Transformer blocks of the encoder."""
    decoder_blocks: int = Field(default=1, ge=1)
    """Transformer blocks of the decoder."""
    feature_width: int = Field(default=16, ge=1)
    """Width D of a patch feature: a bottleneck between encoder and decoder."""
    neighbourhood: Literal[1, 3] = 1
    """Patches that are visible when a patch is encoded: itself, or the 3 x 3 around it."""
    mask_ratio_min: float = Field(default=0.1, ge=0, lt=1)
    """Masking ratios are drawn uniformly from min .. max for every batch."""
    mask_ratio_max: float = Field(default=0.9, gt=0, lt=1)
    """Upper end of the masking ratio."""
    num_epochs: int = Field(default=10, ge=1)
    """Passes over the training split."""
    batch_size: int = Field(default=128, ge=1)
    """Images in a global batch, over all ranks."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW; linear warm-up, cosine decay."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises."""

    @model_validator(mode="after")
    def _consistent(self) -> MaeConfig:
        if self.mask_ratio_min > self.mask_ratio_max:
            raise ValueError("mask_ratio_min is above mask_ratio_max")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        return self


class TeacherConfig(Section):
    """Which model's features are clustered into latent values."""

    kind: Literal["mae", "onehot", "pixels", "random", "none"] = "mae"
    """`mae`: masked autoencoder; `pixels` and `random`: controls (the patch itself, a random
    projection of it); `onehot`: the control for text (the token itself); `none`: no distillation
    (structures without latents of a teacher)."""
    shuffle_samples: bool = False
    """The control of every kind: each sample is given the features of another one, so that they
    say nothing about it."""
    shuffle_num_samples: int = Field(default=4096, ge=1)
    """Training samples whose features are given away (shuffle_samples): the first of them."""
    mae: MaeConfig = MaeConfig()
    """Used when kind is mae."""
    random_width: int = Field(default=16, ge=1)
    """Width of the random control's features."""
    extraction_batch_size: int = Field(default=256, ge=1)
    """Images encoded at once during feature extraction."""

    def of_kind(self) -> Any:
        """What of the settings counts for the configured kind (JSON values)."""
        if self.kind == "random":
            return self.random_width
        section = getattr(self, self.kind, None)
        return section.model_dump(mode="json") if isinstance(section, Section) else None
