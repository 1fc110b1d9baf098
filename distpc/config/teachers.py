"""Which teacher a run has, and the settings of each kind."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distpc.config.sources import Section


class TrainingConfig(Section):
    """What every teacher that is trained here has."""

    num_epochs: int = Field(default=10, ge=1)
    """Passes over the training split; the last batch is full, and goes on into the next pass."""
    batch_size: int = Field(default=128, ge=1)
    """Samples in a global batch, over all ranks."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW; linear warm-up, cosine decay."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises."""


class AttentionConfig(TrainingConfig):
    """A transformer that is trained here."""

    width: int = Field(default=64, ge=8)
    """Width of the token vectors."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads of every block."""

    @model_validator(mode="after")
    def _heads_fit(self) -> AttentionConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        return self


class MaskedConfig(AttentionConfig):
    """A transformer that fills in what is hidden."""

    mask_ratio_min: float = Field(default=0.1, ge=0, lt=1)
    """Masking ratios are drawn uniformly from min .. max for every batch."""
    mask_ratio_max: float = Field(default=0.9, gt=0, lt=1)
    """Upper end of the masking ratio."""

    @model_validator(mode="after")
    def _ratios_fit(self) -> MaskedConfig:
        if self.mask_ratio_min > self.mask_ratio_max:
            raise ValueError("mask_ratio_min is above mask_ratio_max")
        return self


class MaeConfig(MaskedConfig):
    """Masked autoencoder (vision transformer), trained on the run's own images."""

    encoder_blocks: int = Field(default=2, ge=1)
    """Transformer blocks of the encoder."""
    decoder_blocks: int = Field(default=1, ge=1)
    """Transformer blocks of the decoder."""
    feature_width: int = Field(default=16, ge=1)
    """Width D of a patch feature: a bottleneck between encoder and decoder."""
    neighbourhood: Literal[1, 3] = 1
    """Patches that are visible when a patch is encoded: itself, or the 3 x 3 around it."""


class PatchCoderConfig(TrainingConfig):
    """Convolutions over the patches, and a decoder that sees one patch's code only."""

    width: int = Field(default=64, ge=8)
    """Channels of the encoder, hidden width of the decoder."""
    encoder_blocks: int = Field(default=2, ge=0)
    """Residual blocks of the encoder; each sees one patch further around."""
    num_mixtures: int = Field(default=3, ge=1)
    """Discretised logistics that are mixed for a value."""


class VqVaeConfig(PatchCoderConfig):
    """Two-level vector-quantised autoencoder, trained on the run's own images."""

    code_width: int = Field(default=16, ge=1)
    """Width of a code vector; a feature is two of them, of the patch and of 2 x 2 patches."""
    num_codes: int = Field(default=256, ge=2)
    """Code vectors of each level."""
    commitment: float = Field(default=0.25, ge=0)
    """Weight of the loss that pulls encodings towards their code vectors."""


class VaeConfig(PatchCoderConfig):
    """Variational autoencoder with a Gaussian code a patch, trained on the run's own images."""

    feature_width: int = Field(default=16, ge=1)
    """Width D of a patch's code; its mean is the feature."""


class Data2vecConfig(MaskedConfig):
    """Self-distillation: hidden patches' features are predicted, not their pixels."""

    mask_ratio_min: float = Field(default=0.4, ge=0, lt=1)
    """Masking ratios are drawn uniformly from min .. max for every batch."""
    mask_ratio_max: float = Field(default=0.7, gt=0, lt=1)
    """Upper end of the masking ratio."""
    num_blocks: int = Field(default=3, ge=1)
    """Transformer blocks."""
    num_averaged: int = Field(default=2, ge=1)
    """Last blocks whose outputs are averaged to the target, and to the feature."""
    decay_first: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the averaged weights that make the targets, at the first step; it rises."""
    decay_last: float = Field(default=0.999, ge=0, lt=1)
    """The same at the last step."""

    @model_validator(mode="after")
    def _blocks_fit(self) -> Data2vecConfig:
        if self.num_averaged > self.num_blocks:
            raise ValueError("num_averaged is above num_blocks")
        return self


class CausalLmConfig(AttentionConfig):
    """Transformer that predicts the next token (of reversed text, where sees is suffix)."""

    num_blocks: int = Field(default=2, ge=1)
    """Transformer blocks."""


class MaskedLmConfig(MaskedConfig):
    """Transformer that predicts hidden tokens."""

    mask_ratio_max: float = Field(default=0.5, gt=0, lt=1)
    """Upper end of the masking ratio."""
    num_blocks: int = Field(default=2, ge=1)
    """Transformer blocks."""


class PixelsConfig(Section):
    """The data's own values."""

    radius: int = Field(default=0, ge=0)
    """Pixels on every side of a patch that its feature shows as well, edges repeated."""
    sigma: float = Field(default=1.0, gt=0)
    """Weight of those: exp(-d^2 / (2 sigma^2)) at d pixels from the patch, 1 inside it (radius
    above 0)."""


class PretrainedConfig(Section):
    """A model that was trained elsewhere, read from a local folder."""

    folder: str | None = None
    """Folder with config.json and weights (safetensors, or a GGUF file); nothing is downloaded.
    What `save_pretrained` of transformers writes."""
    gguf_file: str | None = None
    """Name of a GGUF file in the folder that transformers reads (kind hf_text)."""
    layer: int = -1
    """Hidden state that is the feature: number of a transformer's layer, 0 for embeddings, -1 for
    the last; of an EfficientNet, of its block (0 .. 15; 10 has 112 channels)."""
    image_size_pixels: int | None = Field(default=None, ge=8)
    """Side of the square that images are resized to; default: the model's own (kind hf_vision),
    128 (kind efficientnet)."""


PRETRAINED = ("hf_vision", "hf_text", "efficientnet")
TEXT_ONLY = ("causal_lm", "masked_lm", "hf_text", "onehot")
"""Kinds that read nothing else."""


class TeacherConfig(Section):
    """Which model's features are clustered into latent values."""

    kind: Literal[
        "mae",
        "vqvae",
        "vae",
        "data2vec",
        "causal_lm",
        "masked_lm",
        "hf_vision",
        "efficientnet",
        "hf_text",
        "onehot",
        "pixels",
        "random",
        "none",
    ] = "mae"
    """Trained here, of images: `mae`: masked autoencoder; `vqvae`: two-level vector-quantised
    autoencoder; `vae`: variational autoencoder; `data2vec`: self-distillation. Trained here, of
    text: `causal_lm`, `masked_lm`: transformer language models. Pretrained: `hf_vision`: a Hugging
    Face vision model; `efficientnet`: EfficientNet-Lite0; `hf_text`: a Hugging Face language model
    or encoder. Controls: `pixels`: the patch itself (or with what is around it, which teaches
    latents of single pixels); `random`: a random projection of it, of text
    random vectors of a token and its context; `onehot`: the token itself. `none`: no distillation
    (structures without latents of a teacher)."""
    sees: Literal["prefix", "suffix", "both"] = "suffix"
    """What the feature of a token depends on (teachers of text that read context): the token and
    those before it, the token and those behind it (what the state of a hidden Markov model has to
    know), or all."""
    state: Literal["token", "producing", "both"] = "token"
    """Which feature stands for a token of text: its own, what the teacher knows once it has read
    the token; that of the token in front, the state that produced it (with sees prefix); or both
    side by side."""
    shuffle_samples: bool = False
    """The control of every kind: each sample is given the features of another one, so that they
    say nothing about it."""
    shuffle_num_samples: int = Field(default=4096, ge=1)
    """Training samples whose features are given away (shuffle_samples): the first of them."""
    mae: MaeConfig = MaeConfig()
    """Used when kind is mae."""
    vqvae: VqVaeConfig = VqVaeConfig()
    """Used when kind is vqvae."""
    vae: VaeConfig = VaeConfig()
    """Used when kind is vae."""
    data2vec: Data2vecConfig = Data2vecConfig()
    """Used when kind is data2vec."""
    causal_lm: CausalLmConfig = CausalLmConfig()
    """Used when kind is causal_lm."""
    masked_lm: MaskedLmConfig = MaskedLmConfig()
    """Used when kind is masked_lm."""
    pretrained: PretrainedConfig = PretrainedConfig()
    """Used when kind is hf_vision, hf_text or efficientnet."""
    pixels: PixelsConfig = PixelsConfig()
    """Used when kind is pixels."""
    random_width: int = Field(default=16, ge=1)
    """Width of the random control's features."""
    extraction_batch_size: int = Field(default=256, ge=1)
    """Samples encoded at once during feature extraction."""
    extraction_mixed_precision: bool = True
    """On GPUs, multiply matrices in bfloat16 during feature extraction (torch.autocast); features
    are kept in float16 anyway. CPUs always compute in float32."""

    @property
    def training(self) -> TrainingConfig | None:
        """The section of a kind that is trained here; None for the others."""
        section = getattr(self, self.kind, None)
        return section if isinstance(section, TrainingConfig) else None

    def of_kind(self) -> Any:
        """What of the settings counts for the configured kind (JSON values)."""
        if self.kind == "random":
            return {"width": self.random_width, "sees": self.sees}
        if self.kind == "pixels":
            return self.pixels.model_dump(mode="json") if self.pixels.radius else None
        if self.kind in PRETRAINED:
            # Which folder does not matter: the digest of its files counts.
            chosen = self.pretrained.model_dump(mode="json", exclude={"folder"})
            return {**chosen, "sees": self.sees} if self.kind == "hf_text" else chosen
        if self.training is None:
            return None
        chosen = self.training.model_dump(mode="json")
        return {**chosen, "sees": self.sees} if self.kind.endswith("_lm") else chosen
