"""Small models with random weights, saved as pretrained ones are."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from distpc.artifacts.tensors import write_tensors
from distpc.teachers.efficientnet import ARCHITECTURE, EfficientNetLite


@cache
def tiny(name: str) -> Path:
    """Folder of a tiny model: vit, gpt2, bert (both of bytes), tokens or lite0."""
    root = Path(tempfile.mkdtemp(prefix="distpc-models-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root / name
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        {"vit": _vit, "gpt2": _gpt2, "bert": _bert, "tokens": _tokens, "lite0": _lite0}[name](
            folder
        )
    return folder


def _vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
    )
    _spread(ViTModel(config)).save_pretrained(folder)
    norm = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(norm))


def _gpt2(folder: Path, vocabulary: int = 300) -> None:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=vocabulary)
    _spread(GPT2Model(config)).save_pretrained(folder)
    _byte_tokenizer(folder)


def _tokens(folder: Path) -> None:
    _gpt2(folder, vocabulary=64)


def _bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        vocab_size=300,
    )
    _spread(BertModel(config)).save_pretrained(folder)
    _byte_tokenizer(folder)


def _lite0(folder: Path) -> None:
    model = EfficientNetLite()
    for module in model.modules():
        # Where every activation is cut off at 0, features would be constant.
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.05)
            module.bias.data.normal_(1.0, 0.5)
    write_tensors(folder / "model.safetensors", model.state_dict())
    (folder / "config.json").write_text(json.dumps({"architecture": ARCHITECTURE}))


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Larger random weights than usual, so that everything that is seen shows."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.3)
    return model


def _byte_tokenizer(folder: Path) -> None:
    """A fast tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
