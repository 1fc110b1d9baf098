"""Circuits made in parts are the circuits that one process makes, bit by bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distpc import structures
from distpc.circuits import random_start
from distpc.circuits.circuit import Circuit
from distpc.circuits.fill import Source, fill_
from distpc.circuits.io import ModelFile, load_model, save_model
from distpc.circuits.random_start import RandomStart
from distpc.circuits.sharding import node_table
from distpc.parallel.places import Split
from distpc.structures.hclt import hclt_graph
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree
from distpc.training.start import marginals_of, random_near_data, start_near_data_

STATES = 12
KINDS: dict[str, tuple[Callable[[], RegionGraph], list[int | None]]] = {
    "hclt": (lambda: hclt_graph(Tree.balanced(5), STATES), [5, 5, 4, 5, 7]),
    "hmm": (lambda: structures.hmm(6, STATES), [5] * 6),
    "monarch": (lambda: structures.hmm(6, 16, layer="monarch"), [5] * 6),
    "quad_graph": (lambda: structures.quad_graph((4, 4), STATES), [5] * 16),
    "gaussian": (lambda: hclt_graph(Tree.balanced(4), STATES), [None, 3, None, 4]),
    "binomial": (lambda: hclt_graph(Tree.balanced(4), STATES, family="binomial"), [7] * 4),
    "logistic": (lambda: hclt_graph(Tree.balanced(4), STATES, family="logistic"), [7] * 4),
}


def made(kind: str, device: str = "cpu") -> Circuit:
    build, categories = KINDS[kind]
    return Circuit(build(), categories, seed=4, max_fold_bytes=2**11, device=device)


def joined(circuit: Circuit, source: Source, num_ranks: int) -> dict[str, Tensor]:
    """What all ranks of a node axis are given, put together again."""
    lines = node_table(circuit.schedule, num_ranks).banks
    found = {}
    for line in lines:
        name = f"banks.{line.name}.statistics"
        if name not in circuit.state_dict():
            continue
        ranks = range(num_ranks if line.split else 1)
        parts = [source.part(name, line.split, rank) for rank in ranks]
        assert all(part is not None for part in parts)
        found[name] = torch.cat(parts, line.split.dim) if line.split else parts[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_parts_of_a_random_circuit(
    kind: str, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made(kind).state_dict()
    if in_blocks:
        # Several blocks a table, each drawn again when it is asked for.
        monkeypatch.setattr(random_start, "BLOCK_ENTRIES", 5 * STATES)
        monkeypatch.setattr(random_start, "KEPT_ENTRIES", 7 * STATES)
    circuit = made(kind, "meta")
    assert all(parameter.is_meta for parameter in circuit.parameters())
    start = RandomStart(circuit, 4, 1.0)
    whole = joined(circuit, start, 1)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, expected[name], rtol=3e-7, atol=0.0)
    assert in_blocks or all(torch.equal(whole[name], expected[name]) for name in whole)
    for num_ranks in (2, 4):
        parts = joined(circuit, start, num_ranks)
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", ["hmm", "gaussian", "binomial", "logistic"])
def test_a_start_near_the_data_in_parts(kind: str) -> None:
    """The same as moving a whole random circuit there."""
    expected, circuit = made(kind), made(kind, "meta")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, (50, circuit.num_variables), generator=generator)
    x = x if None not in circuit.num_categories else x.double()
    start_near_data_(expected, [x])
    start = random_near_data(circuit, [x], 4, 1.0)
    for name, tensor in joined(circuit, start, 4).items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-6, atol=1e-9)
    fill_(circuit, start)
    torch.testing.assert_close(circuit.log_prob(x), expected.log_prob(x), rtol=1e-5, atol=0.0)
    assert marginals_of([x], circuit.num_categories).centre.shape == (circuit.num_variables,)


def test_large_tables_hand_on_their_uses_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = made("hmm")
    monkeypatch.setattr(random_start, "EVEN_ENTRIES", STATES * STATES - 1)
    circuit = made("hmm", "meta")
    fill_(circuit, RandomStart(circuit, 4, 1.0))
    ours, theirs = (c.bank_list[1].statistics.detach().sum(-1)[0] for c in (circuit, exact))
    # Of the five transitions the first follows the root's row, whose weights differ.
    root = circuit.bank_list[0].weights()[0, 0]
    torch.testing.assert_close(ours, root + 4 / STATES)
    assert not torch.allclose(ours, theirs) and abs(float(ours.sum() - theirs.sum())) < 1e-5
    x = torch.zeros(3, 6, dtype=torch.int64)
    # Weights are what they are, whatever the scale of statistics.
    torch.testing.assert_close(circuit.log_prob(x), exact.log_prob(x), rtol=1e-5, atol=0.0)


def test_a_circuit_beyond_memory_is_only_described() -> None:
    circuit = Circuit(structures.hmm(4, 131_072), [50_257] * 4, device="meta")
    assert circuit.num_parameters == 131_072 * (1 + 131_072 + 50_257)
    assert circuit.blank().num_parameters == circuit.num_parameters


def test_parts_of_a_model_file(tmp_path: Path) -> None:
    circuit = made("gaussian")
    circuit.bank_list[1].register_buffer(
        "mask", torch.rand(circuit.bank_list[1].statistics.shape) < 0.7
    )
    save_model(circuit, tmp_path, dataset={}, training={})
    state, file = circuit.state_dict(), ModelFile(tmp_path, verify=False)
    blank = file.circuit()
    assert all(parameter.is_meta for parameter in blank.parameters())
    assert blank.state_dict().keys() == state.keys()
    again = load_model(tmp_path).state_dict()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor)
    for number in range(3):
        name = "banks.sum_0001.mask"
        split = Split(1, 3)
        assert torch.equal(file.part(name, split, number), split.part(state[name], number))
