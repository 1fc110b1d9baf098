"""`distpc sample-teacher`: token sequences drawn from a causal language model, on Ray workers.

A folder of samples-*.npy (n, V) int32, -1 behind the token that ends a text, the model's tokenizer,
and samples.json. Every file is drawn from a seed of its own, whole or absent: what is there when
the command runs again is kept, and the result does not depend on the number of workers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.artifacts.files import atomic_path, read_json, write_json
from distpc.artifacts.lock import RunLock
from distpc.config.schema import ParallelConfig
from distpc.data.sources.token_samples import DESCRIPTION
from distpc.data.spec import MISSING
from distpc.data.tokenizers import FOLDER, Tokenizer, load_tokenizer
from distpc.errors import ArtifactError, ConfigError, TeacherError
from distpc.parallel.cluster import Cluster
from distpc.teachers.pretrained import folder_digest, import_transformers

WORKER = "distpc.teachers.sampling:SampleWorker"


@dataclass(frozen=True)
class SampleSettings:
    """What is drawn.

    Attributes:
        num_samples: sequences.
        length: V, tokens of each.
        seed: of everything random.
        temperature: logits are divided by it; 1 is the model itself.
        start_token: what sequences begin after, by name; None: the model's own. It is no part of
            them.
        end_token: what ends a sequence, by name; None: the model's own.
        samples_per_file: sequences of one file, the unit of work.
        batch_size: sequences drawn side by side.
    """

    num_samples: int
    length: int = 32
    seed: int = 0
    temperature: float = 1.0
    start_token: str | None = None
    end_token: str | None = None
    samples_per_file: int = 256
    batch_size: int = 64

    def check(self) -> None:
        """Refuse sizes that are none.

        Raises:
            ConfigError: naming the option.
        """
        for name in ("num_samples", "length", "samples_per_file", "batch_size"):
            if getattr(self, name) < (2 if name == "length" else 1):
                raise ConfigError(
                    "a size is too small",
                    where=f"--{name.replace('_', '-')}",
                    found=getattr(self, name),
                    expected="at least 2" if name == "length" else "at least 1",
                )
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                "a temperature is a number above 0", where="--temperature", found=self.temperature
            )


def sample_teacher(
    model: Path, out: Path, settings: SampleSettings, parallel: ParallelConfig
) -> dict[str, Any]:
    """Draw what is missing of the samples in `out`.

    Returns:
        what samples.json says.

    Raises:
        ConfigError, TeacherError: settings or a model that do not fit.
        ArtifactError: `out` holds other samples, or something else.
        ResourceError: the cluster is too small, or keeps losing workers.
    """
    settings.check()
    if not (model / "config.json").is_file():
        raise TeacherError(
            "there is no language model",
            where=model,
            expected="a folder that save_pretrained of transformers wrote",
        )
    tokenizer = load_tokenizer(model)
    out.mkdir(parents=True, exist_ok=True)
    with RunLock(out):
        facts = _describe(model, settings, tokenizer)
        kept = _claim(out, facts)
        tokenizer.save(out / FOLDER)
        items = _missing(out, settings)
        if items:
            kwargs = {"model": str(model), "out": str(out), "settings": asdict(settings), **kept}
            with Cluster.connect(parallel) as cluster:
                for _ in cluster.map(WORKER, kwargs, items, label="samples"):
                    pass
        facts["complete"] = True
        write_json(out / DESCRIPTION, facts)
    return facts


def start_and_end(
    model: Path,
    tokenizer: Tokenizer,
    start_token: str | None = None,
    end_token: str | None = None,
) -> tuple[int, int | None]:
    """The token that texts of a language model begin after, and the one that ends them, if any.

    Args:
        model: its folder.
        tokenizer: its tokenizer.
        start_token, end_token: names of other tokens to begin after, and to end with.

    Raises:
        DataError: there is no token of that name.
        TeacherError: the model does not say.
    """
    config = read_json(model / "config.json")
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    start = config.get("bos_token_id")
    start = end if start is None else start
    if start_token is not None:
        start = tokenizer.id_of(start_token)
    if end_token is not None:
        end = tokenizer.id_of(end_token)
    if start is None:
        raise TeacherError(
            "a language model does not say what texts begin with",
            where=model / "config.json",
            expected="bos_token_id or eos_token_id",
            fix="name a token: --start-token NAME",
        )
    return int(start), None if end is None else int(end)


def _describe(model: Path, settings: SampleSettings, tokenizer: Tokenizer) -> dict[str, Any]:
    start, end = start_and_end(model, tokenizer, settings.start_token, settings.end_token)
    size = read_json(model / "config.json").get("vocab_size", 0)
    return {
        "model": folder_digest(model),
        "length": settings.length,
        "num_samples": settings.num_samples,
        "samples_per_file": settings.samples_per_file,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "temperature": settings.temperature,
        "start_token": start,
        "end_token": end,
        "vocabulary_size": max(tokenizer.size, int(size)),
        "tokenizer": tokenizer.digest,
        "complete": False,
    }


def _claim(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Note in `out` what it will hold, or see that it holds the same; start and end token."""
    path = out / DESCRIPTION
    if path.is_file():
        found = read_json(path)
        # More samples of the same kind go on where fewer stopped.
        same = [name for name in facts if name not in ("complete", "num_samples")]
        other = [name for name in same if found.get(name) != facts[name]]
        if other or found.get("num_samples", 0) > facts["num_samples"]:
            name = other[0] if other else "num_samples"
            raise ArtifactError(
                "a folder holds other samples",
                where=f"{path}, {name}",
                found=found.get(name),
                expected=facts[name],
                fix="choose another --out",
            )
    elif any(path.suffix == ".npy" for path in out.iterdir()):
        raise ArtifactError(
            "a folder that samples would be written into holds something else",
            where=out,
            fix="choose another --out",
        )
    write_json(path, facts)
    return {"start": facts["start_token"], "end": facts["end_token"]}


def _missing(out: Path, settings: SampleSettings) -> list[tuple[str, int, int]]:
    """(name, number, samples) of the files that are not there or too short."""
    items = []
    for number, first in enumerate(range(0, settings.num_samples, settings.samples_per_file)):
        count = min(settings.samples_per_file, settings.num_samples - first)
        path = out / f"samples-{number:06d}.npy"
        if not path.is_file() or len(np.load(path, mmap_mode="r", allow_pickle=False)) != count:
            items.append((path.name, number, count))
    return items


class SampleWorker:
    """Draws files of samples; lives in a process of its own.

    Args:
        model: folder of the language model.
        out: folder of the samples.
        settings: of `SampleSettings`.
        start, end: tokens that texts begin behind and end with.
    """

    def __init__(
        self, model: str, out: str, settings: dict[str, Any], start: int, end: int | None
    ) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_causal(Path(model)).to(self._device)
        self._out = Path(out)
        self._settings = SampleSettings(**settings)
        self._start, self._end = start, end

    def __call__(self, item: tuple[str, int, int]) -> int:
        """Draw one file (name, number, samples); the number of samples."""
        name, number, count = item
        generator = torch.Generator(self._device)
        generator.manual_seed(self._settings.seed * 1_000_003 + number)
        size = self._settings.batch_size
        parts = [self._draw(min(size, count - first), generator) for first in range(0, count, size)]
        rows = torch.cat(parts).cpu().numpy().astype(np.int32)
        with atomic_path(self._out / name) as partial, partial.open("wb") as handle:
            np.save(handle, rows)
        return count

    @torch.no_grad()
    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, V) tokens, MISSING behind the end."""
        token = torch.full((count, 1), self._start, device=self._device)
        ended = torch.zeros(count, dtype=torch.bool, device=self._device)
        cache, drawn = None, []
        for _ in range(self._settings.length):
            output = self._model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            weights = (output.logits[:, -1].float() / self._settings.temperature).softmax(-1)
            token = torch.multinomial(weights, 1, generator=generator)
            drawn.append(torch.where(ended, MISSING, token[:, 0]))
            if self._end is not None:
                ended |= token[:, 0] == self._end
        return torch.stack(drawn, 1)


def load_causal(folder: Path) -> Any:
    """The causal language model in a folder, float32, for evaluation.

    Raises:
        TeacherError: transformers cannot read it.
    """
    transformers = import_transformers()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise TeacherError(
            "transformers cannot read a causal language model",
            where=folder,
            found=(str(error).strip().splitlines() or [repr(error)])[0],
            expected="a folder that save_pretrained of transformers wrote",
        ) from error
    return model.eval().requires_grad_(False)
