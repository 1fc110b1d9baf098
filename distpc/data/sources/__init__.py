"""Sources: named kinds of raw data, turned into samples."""

from __future__ import annotations

from pathlib import Path

from distpc.config.sources import (
    DigitsSource,
    IdxSource,
    ImageFolderSource,
    ShardsSource,
    SizesSource,
    TextSource,
    TokenSamplesSource,
)
from distpc.config.sources import Source as SourceConfig
from distpc.data.sources.base import BadSampleError, Source, TrainingGroups
from distpc.errors import DataError

__all__ = ["BadSampleError", "Source", "TrainingGroups", "open_source"]


def open_source(
    config: SourceConfig,
    scratch: Path,
    training: TrainingGroups | None = None,
) -> Source:
    """The source that `data.source` describes, checked as far as its headers go.

    Args:
        config: the section `data.source`.
        scratch: folder on whose disk compressed archives may be unpacked while they are read.
        training: says which groups are the training split's, for what is learnt from them (the
            tokenizer of texts); None: all are.

    Raises:
        DataError: it is missing, or not what its kind promises.
    """
    if isinstance(config, DigitsSource):
        from distpc.data.sources.digits import Digits

        return Digits(config)
    if isinstance(config, IdxSource):
        from distpc.data.sources.idx import Idx

        return Idx(config)
    if isinstance(config, ImageFolderSource):
        from distpc.data.sources.image_folder import ImageFolder

        return ImageFolder(config, scratch)
    if isinstance(config, TextSource):
        from distpc.data.sources.text import Text

        return Text(config, training)
    if isinstance(config, TokenSamplesSource):
        from distpc.data.sources.token_samples import TokenSamples

        return TokenSamples(config)
    if isinstance(config, SizesSource):
        raise DataError(
            "the source states sizes and holds no samples",
            where="data.source.kind",
            found="sizes",
            fix="plan it with distpc plan; to run, name a source of samples",
        )
    if isinstance(config, ShardsSource):
        raise DataError(
            "shards that exist already are no source of single samples",
            where="data.source.kind",
            found="shards",
            fix="run the stages; or name what the shards were written from",
        )
    from distpc.data.sources.arrays import Arrays

    return Arrays(config)
