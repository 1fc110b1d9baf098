"""Text models of Hugging Face transformers, causal or masked: their hidden states as features.

Shapes: B batch, V variables (tokens or bytes of a chunk), T tokens of the model, D feature width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.data.tokenizers import check_tokenizer, load_tokenizer
from distpc.errors import TeacherError
from distpc.teachers.pretrained import (
    Frozen,
    check_digest,
    folder_digest,
    hidden_layer,
    import_transformers,
    load_automatic,
    model_folder,
)
from distpc.teachers.texts import Sees, TextTeacher, windowed

_BYTES = 256
_MAX_TOKENS = 4096


class LanguageTeacher(TextTeacher):
    """A frozen language model or encoder; no special tokens are added to the text.

    Text of bytes goes through the model's own tokenizer, and a byte has the feature of the token
    that covers it, so that it also sees the rest of that token. Data whose vocabulary is the
    model's are its tokens already.

    Args:
        spec: the data set.
        patch_size: without meaning for text.
        folder: of the model and its tokenizer.
        digest: of their files.
        layer: hidden state that is the feature.
        sees: `prefix`, `suffix` or `both`; a side that the model would see all of is hidden by
            showing it every prefix or suffix by itself, V passes a chunk.
        gguf_file: name of the weights, where they are GGUF.
    """

    kind = "hf_text"
    place: Tensor

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        folder: str,
        digest: str,
        layer: int,
        sees: Sees,
        gguf_file: str | None,
    ) -> None:
        super().__init__(spec, sees)
        self.folder = Path(folder)
        check_digest(self.folder, digest)
        self._settings = {
            "folder": folder,
            "digest": digest,
            "layer": layer,
            "sees": sees,
            "gguf_file": gguf_file,
        }
        self.layer = layer
        self.register_buffer("place", torch.zeros(()), persistent=False)
        model = load_automatic(self.folder, gguf_file)
        self._check_model(model)
        self.model = Frozen(model)
        self.tokenizer = None
        if self.vocabulary != self._model_vocabulary():
            self.tokenizer = self._load_tokenizer(gguf_file)
        elif spec.tokenizer:
            check_tokenizer(spec, load_tokenizer(self.folder), self.folder)
        self._width = self._states(torch.zeros(1, 2).long(), torch.ones(1, 2).bool()).shape[2]
        self.causal = self._probe_causal()
        if self.causal and sees == "both":
            raise TeacherError(
                "a causal language model does not see both sides",
                where="teacher.sees",
                found=f"both, and {type(model).__name__} in {self.folder}",
                fix="set teacher.sees to prefix or suffix, or take a masked model",
            )

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> LanguageTeacher:
        """Folder and layer from `teacher.pretrained`, and `teacher.sees`."""
        settings = config.pretrained
        folder = model_folder(settings)
        return cls(
            spec,
            patch_size,
            folder=str(folder),
            digest=folder_digest(folder),
            layer=settings.layer,
            sees=config.sees,
            gguf_file=settings.gguf_file,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Folder, digest, layer, side and GGUF file."""
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
        """D, width of the layer."""
        return self._width

    @property
    def sees(self) -> str:
        """With a tokenizer, of its own tokens."""
        return super().sees + ("" if self.tokenizer is None else " (tokens of the model)")

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, V, D) float32."""
        ids, present = self.tokens(x)
        ids, present = ids.to(self.place.device), present.to(self.place.device)
        if not present.any():
            return torch.zeros(*x.shape, self._width, device=self.place.device)
        if self.tokenizer is None:
            return self._windows(ids, present)
        own, covered = self._retokenised(ids, present)
        features = self._windows(own, torch.arange(own.shape[1]) <= covered.max(1)[0][:, None])
        at = covered.clamp(min=0)[:, :, None].expand(-1, -1, self._width)
        return features.gather(1, at) * (covered >= 0)[:, :, None]

    def _windows(self, ids: Tensor, present: Tensor) -> Tensor:
        present = present.to(ids.device)
        return windowed(self._states, ids, present, self._sees, self.causal, _MAX_TOKENS)

    def _states(self, ids: Tensor, seen: Tensor) -> Tensor:
        """ids (N, T), seen (N, T): one run of tokens a row -> (N, T, D).

        A run is moved to the front, as a text of its own: masks with holes at the front are where
        models differ.
        """
        length = ids.shape[1]
        first = seen.int().argmax(dim=1, keepdim=True)
        order = torch.arange(length, device=ids.device)
        moved = (order + first) % length
        mask = seen.gather(1, moved)
        output = self.model(
            input_ids=ids.gather(1, moved) * mask,
            attention_mask=mask.long(),
            output_hidden_states=True,
        )
        state = hidden_layer(output.hidden_states, self.layer, self.folder)
        back = ((order - first) % length)[:, :, None].expand(-1, -1, state.shape[2])
        return state.gather(1, back)

    def _retokenised(self, ids: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes ids (B, V) -> the model's tokens (B, T), and (B, V) the token that covers each
        byte, -1 where there is none."""
        assert self.tokenizer is not None
        texts, places = [], []
        for row, there in zip(ids.cpu(), present.cpu(), strict=True):
            text, place = decoded(bytes(row[there].tolist()))
            texts.append(text)
            places.append(place)
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        longest = max(1, *(len(tokens) for tokens in found["input_ids"]))
        own = torch.zeros(len(texts), longest, dtype=torch.long)
        covered = torch.full(ids.shape, -1)
        for number, tokens in enumerate(found["input_ids"]):
            own[number, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            cover = covering(found["offset_mapping"][number], len(texts[number]))
            covered[number, : len(places[number])] = cover[places[number]]
        return own.to(ids.device), covered.to(ids.device)

    def _check_model(self, model: Any) -> None:
        is_text = getattr(model, "main_input_name", "") == "input_ids"
        if not is_text or getattr(model.config, "is_encoder_decoder", False):
            raise TeacherError(
                "a model is no plain text model",
                where=self.folder,
                found=type(model).__name__,
                expected="a causal or a masked language model, or an encoder of text",
                fix="correct teacher.kind or teacher.pretrained.folder",
            )

    def _model_vocabulary(self) -> int:
        config: Any = self.model.model.config
        return int(config.vocab_size)

    def _load_tokenizer(self, gguf_file: str | None) -> Any:
        transformers = import_transformers()
        if self.vocabulary != _BYTES:
            raise TeacherError(
                "the data's tokens are not the model's",
                where=self.folder,
                found=f"a vocabulary of {self.vocabulary} in data set {self.spec.name}",
                expected=f"{self._model_vocabulary()} tokens of the model, or bytes",
            )
        options = {} if gguf_file is None else {"gguf_file": gguf_file}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, **options
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise TeacherError(
                "a model's tokenizer cannot be read",
                where=self.folder,
                found=(str(error).strip().splitlines() or [repr(error)])[0],
                expected="tokenizer.json beside the weights",
            ) from error
        if not tokenizer.is_fast:
            raise TeacherError(
                "a tokenizer does not tell which bytes a token covers",
                where=self.folder,
                expected="a fast tokenizer (tokenizer.json)",
            )
        return tokenizer

    def _probe_causal(self) -> bool:
        # Tried, not looked up: configurations say it in too many ways.
        one = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) % self._model_vocabulary()
        with torch.no_grad():
            states = self._states(one, torch.ones_like(one).bool())
        return bool(torch.allclose(states[0, :3], states[1, :3], atol=1e-5))


def decoded(content: bytes) -> tuple[str, Tensor]:
    """Text of UTF-8 bytes, and (V,) the character that each byte belongs to.

    Bytes that are cut off from their character (at a chunk's ends) become U+FFFD, one each.
    """
    characters: list[str] = []
    place = []
    position = 0
    while position < len(content):
        first = content[position]
        size = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        try:
            character = content[position : position + size].decode("utf-8")
        except UnicodeDecodeError:
            character, size = "\ufffd", 1
        place += [len(characters)] * size
        characters.append(character)
        position += size
    return "".join(characters), torch.tensor(place, dtype=torch.long)


def covering(offsets: list[tuple[int, int]], num_characters: int) -> Tensor:
    """(num_characters,) the token that covers each character.

    Characters that no token covers (spaces that a tokenizer drops) go with the token before them,
    or with the first; -1 where there are no tokens.
    """
    cover = torch.full((num_characters,), -1)
    for token, (start, stop) in enumerate(offsets):
        cover[start:stop] = token
    last = 0 if offsets else -1
    for number in range(num_characters):
        last = int(cover[number]) if cover[number] >= 0 else last
        cover[number] = last
    return cover
