"""One set of networks at several numbers of states: figures of each circuit that they write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distpc.circuits.circuit import Circuit
from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.integral.io import load_networks
from distpc.circuits.io import save_model
from distpc.data.index import ShardIndex
from distpc.data.tokenizers import copy_tokenizer
from distpc.errors import ModelFileError
from distpc.inference.likelihood import measure


def measure_states(
    networks: IntegralCircuit, index: ShardIndex, states: Sequence[int], *, batch_size: int
) -> dict[str, Any]:
    """Materialise a circuit for each K and evaluate the test split, or valid where there is none.

    Args:
        networks: trained.
        index: of the shards.
        states: numbers of quadrature points; repeats count once.
        batch_size: samples at once.

    Returns:
        JSON values: `num_trainable_parameters`, and under `states` for each K `num_parameters` of
        the circuit, and the figures of `SplitFigures`.
    """
    split = "test" if index.num_samples("test") else "valid"
    found: dict[str, Any] = {}
    for num_states in sorted(set(states)):
        circuit = networks.materialise(num_states)
        figures = measure(circuit, index, split, batch_size=batch_size).to_json()
        found[str(num_states)] = {"num_parameters": circuit.num_parameters, **figures}
    return {
        "num_trainable_parameters": networks.num_parameters,
        "split": split,
        "unit": index.spec.unit,
        "states": found,
    }


def materialise_command(model_dir: Path, num_states: int, out: Path) -> Circuit:
    """Write the ordinary circuit of K states that a model's networks make into the folder `out`.

    Args:
        model_dir: a model folder of a run with integral.enabled, or its folder of networks.
        num_states: K, 2 or more.
        out: made where it is missing.

    Raises:
        ModelFileError: there are no networks, they are damaged, or `out` is the model itself.
        StructureError: the structure cannot have that many states.
    """
    networks = load_networks(model_dir)
    if Path(out).resolve() in (Path(model_dir).resolve(), Path(model_dir).resolve().parent):
        raise ModelFileError(
            "a model would be written over the one that it is made from",
            where=out,
            fix="name another folder with --out",
        )
    circuit = networks.materialise(num_states)
    training = {**networks.training_facts, "num_states": num_states}
    copy_tokenizer(Path(model_dir), Path(out))
    save_model(circuit, Path(out), dataset=networks.dataset, training=training)
    return circuit
