"""libcirkit's circuits: its likelihoods equal ours, both ways (where libcirkit is installed)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import log_prob_exact
from distpc.circuits.exchange.cirkit import from_cirkit, to_cirkit
from distpc.errors import DistpcError, StructureError

from .graphs import SMALL, hclt, random_evidence, small_circuit

pytest.importorskip("cirkit", reason="libcirkit is not installed: pip install -e '.[bench]'")

from cirkit.pipeline import PipelineContext
from cirkit.symbolic import circuit, layers
from cirkit.templates import data_modalities, utils
from cirkit.utils.scope import Scope

REFUSED = {"grouped-patches": "concat", "tucker": "kronecker", "tied-tucker": "kronecker"}


def context(fold: bool = True) -> PipelineContext:
    return PipelineContext(backend="torch", semiring="lse-sum", fold=fold, optimize=fold)


def check_back(symbolic, compiled_in: PipelineContext, x: torch.Tensor) -> Circuit:
    """Import, and compare with libcirkit's own likelihoods."""
    with torch.no_grad():
        expected = compiled_in.get_compiled_circuit(symbolic)(x)[:, 0, 0]
    again = from_cirkit(symbolic, compiled_in)
    assert torch.allclose(log_prob_exact(again, x).float(), expected, rtol=1e-5)
    return again


@pytest.mark.parametrize("weights", ["softmax", "linear"])
@pytest.mark.parametrize("name", sorted(set(SMALL) - set(REFUSED)))
def test_both_ways(name: str, weights) -> None:
    ours = small_circuit(name, seed=3)
    x, _ = random_evidence(ours, 40, 0, missing=0.0)
    symbolic = to_cirkit(ours, weights)
    for fold in (False, True):
        place = context(fold)
        with torch.no_grad():
            theirs = place.compile(symbolic)(x)[:, 0, 0]
        assert torch.allclose(theirs, log_prob_exact(ours, x).float(), rtol=1e-5)
        check_back(symbolic, place, x)


def test_ties_stay_ties() -> None:
    ours = small_circuit("tied-chain", seed=1)
    place, symbolic = context(), to_cirkit(ours)
    model = place.compile(symbolic)
    assert sum(p.numel() for p in model.parameters()) == ours.num_parameters
    assert from_cirkit(symbolic, place).num_parameters == ours.num_parameters


def test_gaussian_inputs() -> None:
    ours = Circuit(hclt([-1, 0, 0], 3), [None, 3, None], seed=2)
    x = torch.tensor([[0.3, 1.0, -2.0], [1.5, 0.0, 0.1]])
    place, symbolic = context(), to_cirkit(ours)
    with torch.no_grad():
        theirs = place.compile(symbolic)(x)[:, 0, 0]
    assert torch.allclose(theirs, ours(x), rtol=1e-5)
    check_back(symbolic, place, x)


@pytest.mark.parametrize("sums", ["cp", "tucker", "cp-t"])
def test_a_circuit_of_their_own_making(sums: str) -> None:
    torch.manual_seed(0)
    softmax = utils.Parameterization(activation="softmax", initialization="normal")
    symbolic = data_modalities.image_data(
        (1, 3, 3),
        region_graph="quad-graph",
        input_layer="categorical",
        num_input_units=3,
        sum_product_layer=sums,
        num_sum_units=3,
        sum_weight_param=softmax,
        use_mixing_weights=True,
    )
    place = context()
    place.compile(symbolic)
    check_back(symbolic, place, torch.randint(0, 256, (20, 9)))


def test_training_over_there_comes_back() -> None:
    ours = small_circuit("hclt")
    x, _ = random_evidence(ours, 64, 1, missing=0.0)
    place, symbolic = context(), to_cirkit(ours)
    model = place.compile(symbolic)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (-model(x).mean()).backward()
        optimizer.step()
    again = check_back(symbolic, place, x)
    assert again(x).mean() > ours(x).mean()


@pytest.mark.parametrize(("name", "kind"), sorted(REFUSED.items()))
def test_a_region_that_libcirkit_lacks_is_named(name: str, kind: str) -> None:
    with pytest.raises(StructureError) as caught:
        to_cirkit(small_circuit(name))
    assert f"({kind})" in str(caught.value.where)


def test_what_has_no_counterpart_is_named() -> None:
    leaf = partial(layers.CategoricalLayer, num_categories=3)
    loose = layers.SumLayer(2, 1)
    below = leaf(Scope([0]), 2)
    place = context()
    symbolic = circuit.Circuit([below, loose], {loose: [below]}, [loose])
    with pytest.raises(StructureError, match="compiled"):
        from_cirkit(symbolic, place)
    place.compile(symbolic)
    with pytest.raises(StructureError, match="distribution"):
        from_cirkit(symbolic, place)
    strange = layers.PolynomialLayer(Scope([0]), 1, degree=2)
    symbolic = circuit.Circuit([strange], {}, [strange])
    place.compile(symbolic)
    with pytest.raises(StructureError) as caught:
        from_cirkit(symbolic, place)
    assert caught.value.where == "layer 0 (PolynomialLayer)"
    wide = leaf(Scope([0]), 2)
    symbolic = circuit.Circuit([wide], {}, [wide])
    place.compile(symbolic)
    with pytest.raises(DistpcError, match="one output unit"):
        from_cirkit(symbolic, place)
