"""Where a run's data comes from: one model a kind of source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from distpc.config.urls import require_place


class Section(BaseModel):
    """Base of all config sections: unknown keys are refused, values cannot change later."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DigitsSource(Section):
    """scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels with 17 values."""

    kind: Literal["digits"]


class IdxSource(Section):
    """Images in IDX files, the format of MNIST and Fashion-MNIST, gzipped or not."""

    kind: Literal["idx"]
    train_images: str
    """Path of the IDX file whose images are split into train and valid."""
    test_images: str | None = None
    """Path of the IDX file of the published test images; if absent, test is split from train."""


class ImageFolderSource(Section):
    """A folder or tar archive of image files (png, jpeg, webp, bmp)."""

    kind: Literal["image_folder"]
    path: str
    """Folder (searched recursively) or .tar / .tar.gz archive."""
    test_path: str | None = None
    """Folder or archive of published test images; if absent, test is split from `path`."""
    mode: Literal["grey", "rgb"] = "rgb"
    """Colour mode that images are converted to when they are read."""
    crop_size_pixels: int | None = Field(default=None, ge=1)
    """Side of a square cut out, before any resize."""
    crop_at: Literal["centre", "random"] = "centre"
    """Where the square is cut; random: anywhere, drawn from the image's name, so that every run
    sees the same crops."""
    crop_step_pixels: int = Field(default=1, ge=1)
    """Random squares begin at multiples of this (crop_at random)."""
    crops_per_image: int = Field(default=1, ge=1)
    """Samples made of every image of `path`, all in the same split (crop_at random); one is made
    of every test image."""
    resize_pixels: int | None = Field(default=None, ge=1)
    """Side of the square that images are resized to (area filter)."""

    @model_validator(mode="after")
    def _crops_fit(self) -> ImageFolderSource:
        if self.crop_at == "random" and self.crop_size_pixels is None:
            raise ValueError("crop_at random needs crop_size_pixels")
        if self.crops_per_image > 1 and self.crop_at != "random":
            raise ValueError("crops_per_image above 1 needs crop_at random")
        return self


class TokenizerConfig(Section):
    """What a token of text is."""

    kind: Literal["bytes", "characters", "bpe", "folder"] = "bytes"
    """`bytes`: of UTF-8; `characters`: those that occur in the source; `bpe`: byte-pair encoding of
    bytes, trained on the training split's documents; `folder`: a tokenizer.json that was made
    elsewhere."""
    vocabulary_size: int = Field(default=8192, ge=257)
    """Tokens of a trained byte-pair encoding (kind bpe)."""
    folder: str | None = None
    """Folder with tokenizer.json, such as that of a pretrained model (kind folder)."""
    end_token: str | None = None
    """Token of that vocabulary that ends documents (kind folder, with end_of_document); default: a
    token of its own behind the others."""

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerConfig:
        if (self.kind == "folder") != (self.folder is not None):
            raise ValueError("tokenizer.folder goes with tokenizer.kind folder, and with no other")
        if self.end_token is not None and self.kind != "folder":
            raise ValueError("tokenizer.end_token goes with tokenizer.kind folder")
        return self


class TextSource(Section):
    """UTF-8 text: a file, several, or a folder of .txt files; one file is one document."""

    kind: Literal["text"]
    path: str
    """File or folder; a folder is searched recursively for *.txt."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """What a token is."""
    chunk_length_tokens: int = Field(
        default=32,
        ge=2,
        validation_alias=AliasChoices("chunk_length_tokens", "chunk_length_bytes"),
    )
    """Documents are cut into chunks of this many tokens (bytes, characters); a short last chunk is
    padded as missing. `chunk_length_bytes` is another name of it."""
    end_of_document: bool = False
    """Whether every document ends in a token of its own, which distillation gives a state of its
    own: the last of the structure's states."""


class TokenSamplesSource(Section):
    """Token sequences of one length: what `distpc sample-teacher` writes."""

    kind: Literal["token_samples"]
    path: str
    """Folder with samples.json, tokenizer/ and samples-*.npy."""


class ArraysSource(Section):
    """Rows of a table: .npy, or .csv with or without a header line; empty, NA or NaN is missing."""

    kind: Literal["arrays"]
    path: str
    """The .npy or .csv file."""
    test_path: str | None = None
    """A file of published test rows; if absent, test is split from `path`."""
    num_categories: int | None = Field(default=None, ge=2)
    """Values of every integer column are 0 .. num_categories - 1; default: found in the data."""


class ShardsSource(Section):
    """Shards that exist already, for example those of another run; they are read where they lie.
    Splits, shard sizes and bad samples are theirs: data.split and its like are not used."""

    kind: Literal["shards"]
    url: str
    """Folder or s3://bucket/prefix that holds dataset.json and train-000000.tar ..., valid-...,
    test-...; credentials come from the environment."""

    @model_validator(mode="after")
    def _is_place(self) -> ShardsSource:
        require_place(self.url)
        return self


class SizesSource(Section):
    """Sizes without samples, for `distpc plan` alone: what a run would take, before data exist."""

    kind: Literal["sizes"]
    num_variables: int = Field(default=1, ge=1)
    """Values in a sample: V. Steps of an hmm. Not used with image_shape."""
    num_categories: int | None = Field(default=256, ge=2)
    """Values of every variable; null for real ones."""
    image_shape: tuple[int, int, int] | None = None
    """Height, width and channels, where samples are images."""


Source = Annotated[
    DigitsSource
    | IdxSource
    | ImageFolderSource
    | TextSource
    | TokenSamplesSource
    | ArraysSource
    | ShardsSource
    | SizesSource,
    Field(discriminator="kind"),
]
