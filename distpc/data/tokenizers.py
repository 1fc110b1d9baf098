"""Tokenizers: text to values and back, each with a digest by which shards know it again.

A tokenizer is written as a folder beside the data that it made: tokenizer.json in the format of the
library `tokenizers`, or characters.json. Bytes need no file and have no digest.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distpc.artifacts.files import write_bytes
from distpc.config.sources import TokenizerConfig
from distpc.data.spec import DatasetSpec
from distpc.errors import DataError

FOLDER = "tokenizer"
LIBRARY_FILE = "tokenizer.json"
CHARACTERS_FILE = "characters.json"
DOCUMENTS = "documents.npy"
"""Where documents begin, see `documents`."""


class Tokenizer(ABC):
    """Base of the tokenizers.

    Attributes:
        makes: what a token is, for `DatasetSpec.tokens`.
        size: tokens are 0 .. size - 1.
        digest: of what it does; empty for bytes.
    """

    makes: Literal["bytes", "characters", "tokens"]
    size: int
    digest: str = ""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """(n,) tokens of a text, nothing added.

        Raises:
            DataError: a character that it does not know.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is cut off from its character becomes U+FFFD."""

    def save(self, folder: Path) -> None:  # noqa: B027 - bytes need no file
        """Write its file, if it needs one, into `folder`."""

    def id_of(self, token: str) -> int:
        """The number of a token by its name in the vocabulary.

        Raises:
            DataError: there is no such token.
        """
        raise DataError(
            "a tokenizer has no names for its tokens", where="tokenizer.end_token", found=token
        )


class Bytes(Tokenizer):
    """UTF-8."""

    makes = "bytes"
    size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Characters(Tokenizer):
    """A fixed list of characters, in order of code point."""

    makes = "characters"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = sorted(set(characters))
        self.size = len(self.characters)
        self.digest = _digest("characters", self.characters)
        self._codes = np.array([ord(c) for c in self.characters], dtype=np.uint32)

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        tokens = np.searchsorted(self._codes, codes).clip(max=self.size - 1)
        unknown = np.flatnonzero(self._codes[tokens] != codes)
        if len(unknown):
            raise DataError(
                "a character is not in the tokenizer's vocabulary",
                where=f"character {unknown[0]} of the text",
                found=repr(text[unknown[0]]),
                expected=f"one of {self.size} characters",
                fix="leave it out, or make the shards again with a source that has it",
            )
        return tokens.astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.characters[token] for token in tokens)

    def save(self, folder: Path) -> None:
        write_bytes(folder / CHARACTERS_FILE, json.dumps(self.characters).encode())


class Library(Tokenizer):
    """A tokenizer of the library `tokenizers`; special tokens are decoded to nothing.

    Args:
        content: of a tokenizer.json.
        where: named in errors.
    """

    makes = "tokens"

    def __init__(self, content: str, where: object) -> None:
        try:
            self._own = import_tokenizers().Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                "a tokenizer cannot be read",
                where=where,
                found=error,
                expected="tokenizer.json in the format of the library tokenizers",
            ) from error
        # A text is encoded as it is, whatever a model would like to see around it or cut off.
        self._own.no_padding()
        self._own.no_truncation()
        self.size = int(self._own.get_vocab_size(with_added_tokens=True))
        # Without spacing and order of keys, so that a copy by another library version is known.
        self.digest = _digest("library", json.loads(self._own.to_str()))

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._own.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        found: str = self._own.decode([int(token) for token in tokens])
        return found

    def save(self, folder: Path) -> None:
        write_bytes(folder / LIBRARY_FILE, self._own.to_str().encode())

    def id_of(self, token: str) -> int:
        found = self._own.token_to_id(token)
        if found is None:
            raise DataError(
                "a tokenizer has no such token",
                where="tokenizer.end_token",
                found=token,
                expected=f"one of its {self.size} tokens",
            )
        return int(found)


def make_tokenizer(config: TokenizerConfig, texts: Sequence[str]) -> Tokenizer:
    """The configured tokenizer, trained on `texts` where its kind is.

    Raises:
        DataError: a file is missing, or the texts hold too little for the vocabulary.
    """
    if config.kind == "bytes":
        return Bytes()
    if config.kind == "characters":
        return Characters(set().union(*map(set, texts)))
    if config.kind == "folder":
        return load_tokenizer(Path(config.folder or "").expanduser())
    return train_bpe(texts, config.vocabulary_size)


def train_bpe(texts: Iterable[str], vocabulary_size: int) -> Library:
    """Byte-pair encoding of bytes, so that no text is outside it (Radford et al. 2019).

    Raises:
        DataError: the texts do not hold that many pairs.
    """
    library = import_tokenizers()
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    found = made.get_vocab_size()
    if found != vocabulary_size:
        raise DataError(
            "the text is too small for its vocabulary",
            where="data.source.tokenizer.vocabulary_size",
            found=f"{found} tokens can be learnt",
            expected=vocabulary_size,
            fix="lower vocabulary_size, or give more text",
        )
    return Library(made.to_str(), "a trained tokenizer")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder: of shards, of samples, or of a pretrained model.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    for name in (LIBRARY_FILE, CHARACTERS_FILE):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = path.read_text(encoding="utf-8")
            if name == LIBRARY_FILE:
                return Library(content, path)
            return Characters(json.loads(content))
        except (OSError, ValueError, TypeError) as error:
            raise DataError("a tokenizer cannot be read", where=path, found=error) from error
    raise DataError(
        "there is no tokenizer",
        where=folder,
        expected=f"{LIBRARY_FILE} or {CHARACTERS_FILE}",
    )


def tokenizer_of(spec: DatasetSpec, folder: Path) -> Tokenizer:
    """The tokenizer that made a data set's values.

    Args:
        spec: of the data set.
        folder: of its shards or its model, which holds `tokenizer/`.

    Raises:
        DataError: it is missing, or another one.
    """
    if not spec.tokenizer:
        return Bytes()
    found = load_tokenizer(folder / FOLDER)
    check_tokenizer(spec, found, folder / FOLDER)
    return found


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put the tokenizer beside the shards in `source` beside the model in `target` too."""
    for file in sorted((source / FOLDER).glob("*.json")):
        write_bytes(target / FOLDER / file.name, file.read_bytes())


def check_tokenizer(spec: DatasetSpec, tokenizer: Tokenizer, where: object) -> None:
    """Refuse a tokenizer other than the data's: its numbers would mean other tokens.

    Raises:
        DataError: naming both.
    """
    if tokenizer.digest != spec.tokenizer:
        raise DataError(
            "a tokenizer is not the one that the data were made with",
            where=where,
            found=f"{tokenizer.makes}, digest {tokenizer.digest or 'none (bytes)'}",
            expected=f"{spec.tokens}, digest {spec.tokenizer or 'none (bytes)'} ({spec.name})",
            fix="take the tokenizer beside the shards, or make shards with this one",
        )


def import_tokenizers() -> Any:
    """The library `tokenizers`.

    Raises:
        DataError: it is not installed.
    """
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise DataError(
            "the library tokenizers is not installed",
            where="data.source.tokenizer.kind",
            found=error,
            fix="pip install distpc[text]",
        ) from error
    return tokenizers


def _digest(*facts: Any) -> str:
    content = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
