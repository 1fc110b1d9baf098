"""The peers' side: one iteration of EM on some sequences, as each library does it.

hmmlearn runs in this process; dynamax (JAX) in an environment of its own, one iteration a request,
so that all sides can take turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from circuit_bench.peer import Peer, Setting, check_equal

from distpc.circuits.circuit import Circuit


class HmmLearn:
    """CategoricalHMM of hmmlearn, `fit` with one iteration from given parameters."""

    def __init__(self, x: np.ndarray, states: int, vocabulary: int, threads: int) -> None:
        from hmmlearn.hmm import CategoricalHMM

        rng = np.random.default_rng(0)
        self.model = CategoricalHMM(
            states, n_iter=1, tol=-np.inf, init_params="", n_features=vocabulary
        )
        self.model.startprob_ = _rows(rng, 1, states)[0]
        self.model.transmat_ = _rows(rng, states, states)
        self.model.emissionprob_ = _rows(rng, states, vocabulary)
        self.values = x.reshape(-1, 1)
        self.lengths = [x.shape[1]] * len(x)

    def step(self) -> None:
        """One iteration."""
        self.model.fit(self.values, self.lengths)

    def close(self) -> None:
        """Nothing is open."""


class Cirkit:
    """The same circuit in libcirkit, whose parameters are tied: Adam, folded and optimized."""

    def __init__(self, x: np.ndarray, circuit: Circuit, device: str) -> None:
        self.texts = torch.from_numpy(x)
        self.peer = Peer(self, circuit, Setting("adam"), device)  # type: ignore[arg-type]
        check_equal(circuit, self.peer, self.texts.to(device))

    def batches(self, count: int, device: str) -> list[torch.Tensor]:
        """What `Peer` asks a case for."""
        return [self.texts.to(device)]

    def step(self) -> None:
        """A training step."""
        self.peer.step()

    def close(self) -> None:
        """Nothing is open."""


class Dynamax:
    """CategoricalHMM of dynamax, one jitted E-step and its M-step."""

    def __init__(
        self, x: np.ndarray, states: int, vocabulary: int, threads: int, python: str
    ) -> None:
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("dynamax_steps.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        facts = {"x": x.tolist(), "states": states, "vocabulary": vocabulary, "threads": threads}
        self._ask(json.dumps(facts))

    def _ask(self, line: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise RuntimeError("dynamax has ended; see above")

    def step(self) -> None:
        """One iteration."""
        self._ask("step")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _rows(rng: np.random.Generator, num: int, size: int) -> np.ndarray:
    rows = rng.random((num, size)) + 0.1
    return rows / rows.sum(1, keepdims=True)


def version(name: str, python: str = sys.executable) -> str:
    """Of an installed library, or why there is none."""
    code = f"import importlib.metadata as m; print(m.version('{name}'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not installed"
