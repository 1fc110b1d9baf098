"""Messages computed again in the backward pass: the same flows, from fewer messages."""

import warnings
from typing import Any

import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.compiled import compile_graph
from distpc.circuits.footprint import backward_peak, footprint
from distpc.circuits.stretches import between, stretches
from distpc.structures.hmm import hmm
from distpc.structures.registry import STRUCTURES
from distpc.training.optimizer import CircuitOptimizer


def circuits(graph: Any, categories: list[int | None]) -> tuple[Circuit, Circuit]:
    """The same circuit twice, one that computes messages again."""
    kept, again = (Circuit(graph, categories, max_fold_bytes=400) for _ in range(2))
    again.recompute_messages_()
    for circuit in (kept, again):
        circuit.set_smoothing(0.1, 0.1, 100)
    return kept, again


@pytest.mark.parametrize("kind", sorted(STRUCTURES))
def test_flows_are_those_of_kept_messages(kind: str) -> None:
    for arguments in STRUCTURES[kind].small.values():
        graph = STRUCTURES[kind].build(**arguments)
        categories = [graph.indicated.get(v, 3) for v in range(graph.num_variables)]
        kept, again = circuits(graph, categories)
        generator = torch.Generator().manual_seed(0)
        x = torch.stack([torch.randint(c, (9,), generator=generator) for c in categories], dim=1)
        nats = [circuit(x) for circuit in (kept, again)]
        torch.testing.assert_close(nats[1], nats[0])
        for of_circuit in nats:
            of_circuit.sum().backward()
        again_named = dict(again.named_parameters())
        for name, parameter in kept.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(again_named[name].grad, parameter.grad)
        torch.testing.assert_close(again.log_prob(x), kept.log_prob(x))


def test_every_row_sum_becomes_its_use() -> None:
    """Where a stretch learnt nothing, as with the reentrant kind, its rows would keep theirs."""
    _, circuit = circuits(hmm(8, 4, tied=False), [3] * 8)
    for bank in circuit.bank_list:
        bank.statistics.data *= 7.0
    optimizer = CircuitOptimizer(circuit.parameter_groups(), step_size=0.5)
    x = torch.randint(3, (64, 8), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            optimizer.zero_grad()
            (-circuit(x).sum() / len(x)).backward()
            optimizer.step()
    uses = circuit.uses()
    for region, of_units in enumerate(uses):
        if circuit.graph.regions[region].kind in ("sum", "input"):
            found = circuit.statistics_of(region).sum(-1)
            torch.testing.assert_close(found, of_units, rtol=0.02, atol=2e-3)


def test_a_long_chain_keeps_about_the_root_of_its_length() -> None:
    graph = hmm(400, 32, tied=True)
    plain = footprint(graph, compile_graph(graph, [5] * 400))
    late = footprint(graph, compile_graph(graph, [5] * 400, late_inputs=True), recompute=True)
    options: dict[str, Any] = {"bank_copies": 0, "keeps_flows": False, "has_flows": False}
    assert backward_peak(late, 100, **options) < 0.15 * backward_peak(plain, 100, **options)
    assert [number for numbers in late.stretches for number in numbers] == list(
        range(len(late.steps))
    )


def test_cuts_weigh_what_passes_against_what_is_inside() -> None:
    chain = [[number + 1] for number in range(8)] + [[]]
    assert stretches([10] * 9, [6] * 9, chain) == tuple(
        range(first, first + 3) for first in (0, 3, 6)
    )
    # A message that everyone reads passes once.
    assert between([5, 1, 1], [[1, 2], [2], []], [range(0, 1), range(1, 2), range(2, 3)]) == 6
    # Messages that cost more to pass on than to keep are kept.
    assert len(stretches([10] * 9, [1000] * 9, chain)) == 1
