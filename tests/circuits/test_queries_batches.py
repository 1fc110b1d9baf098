"""Joint conditionals, and what all queries share: batches, odd shapes, refused evidence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from distpc.circuits import queries
from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.errors import EvidenceError
from distpc.structures.region_graph import Region, RegionGraph

from .graphs import SMALL, hclt, random_evidence, small_circuit, tree_parents


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"one-input"}))
def test_joint_conditionals_match_enumeration(name: str) -> None:
    circuit = small_circuit(name, seed=7, noise=3.0)
    x, _ = random_evidence(circuit, 4, 1, missing=0.0)
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    variables = [2, 0, 1]
    found = circuit.conditional_joint(x, observed, variables)
    sizes = [int(circuit.num_categories[v] or 0) for v in variables]
    assert found.shape == (4, *sizes)
    worlds = enumerate_worlds(circuit.num_categories)
    log_prob = log_prob_exact(circuit, worlds)
    for row in range(len(x)):
        agree = ((worlds == x[row]) | ~observed[row]).all(1)
        shares = torch.softmax(torch.where(agree, log_prob, -torch.inf), 0)
        expected = torch.zeros(sizes, dtype=torch.float64)
        expected.index_put_(tuple(worlds[:, v] for v in variables), shares, accumulate=True)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_joint_conditional_of_one_variable_is_its_conditional() -> None:
    circuit = small_circuit("hclt", noise=3.0)
    x, _ = random_evidence(circuit, 5, 1)
    joint = circuit.conditional_joint(x, None, [4])
    torch.testing.assert_close(joint, circuit.conditional(x, None, [4])[:, 0])


def test_joint_conditionals_that_are_too_large_say_so() -> None:
    circuit = Circuit(hclt([-1, 0, 0, 0], 2), [200] * 4)
    with pytest.raises(EvidenceError, match="too large") as caught:
        circuit.conditional_joint(torch.full((3, 4), -1), None, [0, 1, 2, 3])
    assert "= 4,800,000,000 probabilities" in str(caught.value)
    for variables in ([], [1, 1]):
        with pytest.raises(EvidenceError, match="different variables"):
            circuit.conditional_joint(torch.full((3, 4), -1), None, variables)


QUERIES: dict[str, Callable] = {
    "log_prob": lambda c, x, o: c.log_prob(x, o),
    "conditional": lambda c, x, o: c.conditional(x, o, [1, 0]),
    "conditional_joint": lambda c, x, o: c.conditional_joint(x, o, [1, 0]),
    "posterior": lambda c, x, o: c.posterior(x, o),
    "expectation": lambda c, x, o: c.expectation(x, o),
    "mpe": lambda c, x, o: c.mpe(x, o),
    "marginal_map": lambda c, x, o: c.marginal_map_approximate(x, o, [1, 0], num_candidates=3),
    "sample": lambda c, x, o: c.sample(2, x=x, observed=o),
}


def parts(result: object) -> list[torch.Tensor]:
    values = result if isinstance(result, tuple) else (result,)
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", QUERIES)
def test_rows_are_answered_alike_in_any_company(name: str, monkeypatch) -> None:
    """Alone, in batches, as numpy or torch, with everything or nothing observed."""
    query = QUERIES[name]
    circuit = small_circuit("grouped-patches", seed=1, noise=2.0)
    x, _ = random_evidence(circuit, 5, 1, missing=0.0)
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    observed[0], observed[1] = True, False
    together = parts(query(circuit, x, observed))
    monkeypatch.setattr("distpc.circuits.queries.batches.MAX_ROWS", 2)
    for a, b in zip(together, parts(query(circuit, x, observed)), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    marked = np.where(observed, x, -1)
    for as_array in (marked, marked.astype(np.float32), marked.astype(np.int8)):
        if as_array.dtype == np.float32:
            as_array[as_array < 0] = np.nan
        for a, b in zip(together, parts(query(circuit, as_array, None)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    mask = observed[2]
    shared = parts(query(circuit, x, mask))
    for a, b in zip(together, shared, strict=True):
        torch.testing.assert_close(a[2], b[2], rtol=1e-5, atol=1e-6)
    if name not in ("sample", "marginal_map"):
        for row in range(5):
            alone = parts(query(circuit, x[row : row + 1], observed[row : row + 1]))
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[row], b[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", QUERIES)
def test_no_rows_give_no_answers(name: str) -> None:
    circuit = small_circuit("grouped-patches")
    nothing = torch.zeros(0, circuit.num_variables, dtype=torch.int64)
    for value in parts(QUERIES[name](circuit, nothing, None)):
        assert len(value) == 0


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_refuses_bad_evidence_by_name(name: str, monkeypatch) -> None:
    query = QUERIES[name]
    circuit = small_circuit("grouped-patches")
    x = torch.zeros(5, circuit.num_variables, dtype=torch.int64)
    bad = x.clone()
    bad[3, 2] = 2
    monkeypatch.setattr("distpc.circuits.queries.batches.MAX_ROWS", 2)
    with pytest.raises(EvidenceError, match="does not fit") as caught:
        query(circuit, bad, None)
    assert "variable 2, row 3 of x" in str(caught.value)
    for wrong in (x.double() + 0.5, x.double() + torch.inf):
        with pytest.raises(EvidenceError, match="variable 0, row 0"):
            query(circuit, wrong, None)
    for mask in (torch.ones(5, dtype=torch.bool), torch.ones(5, 6), torch.ones(4, 6).bool()):
        with pytest.raises(EvidenceError, match="mask"):
            query(circuit, x, mask)
    with pytest.raises(EvidenceError, match="another shape"):
        query(circuit, x[:, :3], None)
    with pytest.raises(EvidenceError, match="no array of numbers"):
        query(circuit, "nonsense", None)


@pytest.mark.parametrize("name", ["conditional", "conditional_joint"])
def test_tables_of_real_variables_are_refused(name: str) -> None:
    graph = RegionGraph(
        [
            Region("input", 1, variable=0),
            Region("input", 1, variable=1),
            Region("product", 1, (0, 1)),
        ],
        2,
    )
    circuit = Circuit(graph, [2, None])
    with pytest.raises(EvidenceError, match="tables over categories") as caught:
        QUERIES[name](circuit, torch.zeros(1, 2), None)
    assert "real variable" in str(caught.value)


def test_batches_shrink_with_the_circuit() -> None:
    small = Circuit(hclt(tree_parents(10, 0), 4), [2] * 10)
    large = Circuit(hclt(tree_parents(300, 0), 64), [2] * 300)
    rows = [queries.batches.rows_at_once(circuit, 12) for circuit in (small, large)]
    assert rows[0] == 1024
    held = sum(region.num_units for region in large.graph.regions if region.kind != "input")
    assert rows[1] * held * 12 <= queries.batches.MESSAGE_BYTES
    assert queries.batches.rows_at_once(large, 12, 2**40) == 1


@pytest.mark.parametrize("what", ["conditional", "sample", "posterior", "expectation"])
def test_no_batch_holds_more_rows_than_fit(what: str, monkeypatch) -> None:
    circuit = small_circuit("hclt")
    seen = []
    run = Circuit.evaluate

    def evaluate(self, evidence, keep=False):
        seen.append(evidence.codes.shape[1])
        return run(self, evidence, keep)

    monkeypatch.setattr(Circuit, "evaluate", evaluate)
    monkeypatch.setattr("distpc.circuits.queries.batches.MESSAGE_BYTES", 4000)
    x, _ = random_evidence(circuit, 50, 1)
    QUERIES[what](circuit, x, None)
    assert max(seen) < 10
    assert sum(seen) == 50
