"""Whole documents under a tied hidden Markov model: what one chunk says starts the next.

Exact: the forward message of a chunk is the state distribution that the next one begins with, so
that a document's likelihood does not depend on where it was cut.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distpc.circuits.chain import Chain
from distpc.circuits.circuit import Circuit
from distpc.data.documents import has_documents, iterate_documents
from distpc.data.index import ShardIndex
from distpc.errors import EvidenceError
from distpc.parallel.progress import Progress
from distpc.structures.chain_layout import ChainLayout
from distpc.training.figures import count_values

_PARALLEL = 64
"""Documents that are read side by side."""


def can_stream(circuit: Circuit, shards: Path) -> bool:
    """Whether the model is a tied hidden Markov model, and the data are documents in chunks."""
    layout = ChainLayout.find(circuit.graph)
    return layout is not None and layout.is_tied and layout.length > 1 and has_documents(shards)


def measure_documents(
    circuit: Circuit, index: ShardIndex, shards: Path, split: str
) -> dict[str, Any]:
    """Bits of a token (or character) of whole documents, and how many there are.

    Raises:
        EvidenceError: a document is impossible under the model.
    """
    chain = Chain.of(circuit)
    documents = _collect(index, shards, split)
    nats = total = 0.0
    with Progress(f"documents of {split}", len(documents), "documents") as progress:
        for first in range(0, len(documents), _PARALLEL):
            batch = documents[first : first + _PARALLEL]
            found = _likelihoods(chain, [text for _, text in batch])
            if not bool(found.isfinite().all()):
                raise EvidenceError(
                    "a document is impossible under the model",
                    where=f"{split}, document {batch[int((~found.isfinite()).nonzero()[0])][0]}",
                    fix="train with finetune.leaf_pseudocount above 0",
                )
            nats += float(found.sum())
            counts = (count_values(text[None], index.spec.counted) for _, text in batch)
            total += float(sum(int(count) for count in counts))
            progress.advance(len(batch))
    return {"bits": -nats / total / math.log(2), "num_documents": len(documents)}


def _collect(index: ShardIndex, shards: Path, split: str) -> list[tuple[int, Tensor]]:
    """(document, its tokens (n,)), the longest first."""
    parts: dict[int, list[Tensor]] = {}
    for document, chunks in iterate_documents(index, shards, split):
        parts.setdefault(document, []).append(torch.from_numpy(chunks).long().flatten())
    whole = [(document, torch.cat(pieces)) for document, pieces in parts.items()]
    return sorted(whole, key=lambda pair: -len(pair[1]))


def _likelihoods(chain: Chain, texts: list[Tensor]) -> Tensor:
    """(B,) nats of texts of any lengths, longest first; what is missing is summed out."""
    longest = len(texts[0])
    x = torch.full((len(texts), longest), -1)
    for row, text in enumerate(texts):
        x[row, : len(text)] = text
    lengths = torch.tensor([len(text) for text in texts])
    states = None
    log_prob = torch.zeros(len(texts), dtype=torch.float64)
    for first in range(0, longest, 256):
        # Texts that have ended have nothing more to say.
        alive = int((lengths > first).sum())
        states = None if states is None else states[:alive]
        reading = chain.read(x[:alive, first : first + 256], states)
        log_prob[:alive] += reading.log_prob.cpu()
        states = reading.states
    return log_prob
