"""Integral circuits: quadrature, normalisation at every K, true gradients, saved both ways."""

import copy
import json
import math

import pytest
import torch

import distpc
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.circuits.integral import io
from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.integral.quadrature import RULES, jittered, quadrature
from distpc.circuits.integral.settings import IntegralSettings
from distpc.circuits.io import save_model
from distpc.errors import ConfigError, ModelFileError, StructureError
from distpc.structures import Tree, hclt_graph, mixture, quad_graph, with_family
from distpc.structures.registry import STRUCTURES
from distpc.structures.resize import width_of, with_num_states

CATEGORIES = [3, 2, 3, 3]
TREE = Tree((-1, 0, 0, 1))
GRAPHS = {
    "hclt": hclt_graph(TREE, 5),
    "quad_graph": quad_graph((2, 2), 4),
    "tucker": quad_graph((2, 2), 3, layer="tucker"),
    "mixture": mixture([hclt_graph(TREE, 3), quad_graph((2, 2), 3)]),
}
NO_LATENTS = {"chow_liu/mixed", "chow_liu/one", "factorised/own", "factorised/tied"}
SMALL = [(name, small) for name, entry in STRUCTURES.items() for small in entry.small]


def model(graph, categories=None, **settings):
    settings = {"width": 6, "num_frequencies": 3, "train_states": (3, 4, 6), **settings}
    made = IntegralCircuit(graph, categories or CATEGORIES, IntegralSettings(**settings), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("num_points", [1, 2, 5, 64])
@pytest.mark.parametrize("rule", RULES)
def test_quadrature_integrates(rule, num_points):
    """Polynomials exactly up to the rule's degree, exp within the textbook bounds of errors."""
    points, weights = quadrature(rule, num_points)
    assert (points[1:] > points[:-1]).all() and (weights > 0).all()
    degree = 2 * num_points - 1 if rule == "gauss_legendre" else 1
    for power in range(degree + 1):
        exact = 2.0 / (power + 1) if power % 2 == 0 else 0.0
        assert float(weights @ points**power) == pytest.approx(exact, abs=1e-12)
    error = abs(float(weights @ points.exp()) - (math.e - 1 / math.e))
    n = num_points
    if rule == "gauss_legendre" or n == 1:
        factorials = math.factorial(n) ** 4 / math.factorial(2 * n) ** 3
        bound = math.e * 2.0 ** (2 * n + 1) * factorials / (2 * n + 1)
    else:
        bound = math.e * (2 / (n - 1)) ** 2 / 6
    assert error < bound + 1e-14


@pytest.mark.parametrize("rule", RULES)
def test_jittered_points_stay_in_their_cells_and_are_unbiased(rule):
    """The mean over many draws is the integral itself, even of what few points cannot resolve."""
    exact, generator = quadrature(rule, 4), torch.Generator().manual_seed(0)
    ends = exact.weights.cumsum(0) - 1.0
    draws = [jittered(exact, 1.0, generator) for _ in range(4000)]
    points = torch.stack([draw.points for draw in draws])
    assert (points <= ends + 1e-12).all() and (points >= ends - exact.weights - 1e-12).all()
    estimates = (points * 9.0).cos() @ exact.weights
    integral = 2 * math.sin(9.0) / 9.0
    assert float(estimates.mean()) == pytest.approx(integral, abs=4 * float(estimates.std()) / 63)
    assert abs(float(exact.weights @ (exact.points * 9.0).cos()) - integral) > 0.1
    still = jittered(exact, 0.0, generator)
    assert torch.equal(still.points, exact.points)


@pytest.mark.parametrize(("name", "small"), SMALL)
def test_any_structure_sums_to_one_at_any_number_of_states(name, small):
    """Or is refused by the region that has no latents to put points in place of."""
    arguments = STRUCTURES[name].small[small]
    graph = STRUCTURES[name].build(**arguments)
    categories = list(arguments.get("num_categories", [2] * graph.num_variables))
    settings = {"rule": "gauss_legendre", "train_states": (), "leaf_floor": 0.01, "jitter": 0.0}
    if arguments.get("layer") == "monarch" or name == "chow_liu":
        with pytest.raises(StructureError, match="another number of states") as caught:
            model(graph, categories, **settings)
        assert caught.value.where.startswith("region ") and caught.value.fix
        return
    made, worlds = model(graph, categories, **settings), enumerate_worlds(tuple(categories))
    expected = made.materialise()(worlds).detach()
    torch.testing.assert_close(made(worlds).detach(), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(made(worlds), expected, rtol=0, atol=1e-5)
    if f"{name}/{small}" == "patches/hclt":
        # The leaves of a group of two clusters and of a single one, which stays single.
        with pytest.raises(StructureError, match="cannot be scaled") as caught:
            made.materialise(6)
        assert "multiples of 3" in caught.value.expected
        with pytest.raises(StructureError, match="cannot be scaled"):
            model(graph, categories, train_states=(3, 6))
        return
    for num_states in (6, 9) if name == "patches" else (2, 7):
        circuit = made.materialise(num_states)
        total = log_prob_exact(circuit, worlds).exp().sum()
        assert float(total) == pytest.approx(1.0, abs=1e-12)
        if f"{name}/{small}" not in NO_LATENTS:
            assert width_of(circuit.graph) == num_states


@pytest.mark.parametrize("family", [None, "binomial", "logistic"])
@pytest.mark.parametrize("sharing", [("heads", "full"), ("full", "heads")])
@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_are_those_of_finite_differences(name, sharing, family):
    """Of the likelihood of a jittered draw, against the float64 judge of what is written."""
    graph = GRAPHS[name] if family is None else with_family(GRAPHS[name], family)
    made = model(
        graph, leaf_floor=0.1, sum_sharing=sharing[0], leaf_sharing=sharing[1], block_points=7
    )
    made.begin_step(3)
    x = enumerate_worlds(tuple(CATEGORIES))[::2]
    log_prob = made(x)
    log_prob.sum().backward()
    generator = torch.Generator().manual_seed(1)
    moves = [torch.randn(p.shape, generator=generator).double() for p in made.parameters()]
    pairs = zip(made.parameters(), moves, strict=True)
    slope = sum(float((p.grad.double() * move).sum()) for p, move in pairs)
    ends = [judged(made, moves, sign * 1e-5, x) for sign in (1, -1)]
    assert slope == pytest.approx(float((ends[0].sum() - ends[1].sum()) / 2e-5), rel=2e-5, abs=1e-4)
    torch.testing.assert_close(log_prob.double(), judged(made, moves, 0.0, x), rtol=0, atol=5e-6)


def judged(made, moves, size, x):
    """Float64 log-likelihoods of the step's draw after a move of the networks' parameters."""
    moved = copy.deepcopy(made).double()
    moved._skeletons = {}
    with torch.no_grad():
        for parameter, move in zip(moved.parameters(), moves, strict=True):
            parameter += size * move
    num_states, points = moved._draw()
    skeleton = moved._skeleton(num_states)
    weights = {}
    statistics = skeleton.writer.write(points)
    for bank, plan, of_bank in zip(
        skeleton.circuit.bank_list, skeleton.circuit.schedule.banks, statistics, strict=True
    ):
        bank.statistics = torch.nn.Parameter(of_bank, requires_grad=False)
        for table, owners in enumerate(plan.owners):
            weights |= dict.fromkeys(owners, bank.weights_of(table, torch.float64))
    return log_prob_exact(skeleton.circuit, x, weights=weights)


@pytest.mark.parametrize("name", GRAPHS)
def test_blocks_change_nothing_and_materialising_twice_is_equal_bit_by_bit(name):
    x = enumerate_worlds(tuple(CATEGORIES))
    whole, blocks = (model(GRAPHS[name], block_points=size) for size in (10**6, 5))
    most = []
    for made in (whole, blocks):
        points = []
        for network in made.networks.values():
            network.trunk.register_forward_hook(lambda _, at, out, p=points: p.append(len(at[0])))
        made.begin_step(2)
        made(x).sum().backward()
        most.append(max(points))
    # A row at least.
    rows = [grid.shape[1] for grid, _ in made._skeleton(made._draw()[0]).writer.layout.sums]
    assert most[1] <= max(5, *rows) < most[0]
    for ours, theirs in zip(blocks.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-4, atol=2e-4)
    first, again = whole.materialise(6), whole.materialise(6)
    for ours, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(blocks.materialise(6)(x), first(x), rtol=0, atol=1e-5)


def test_evaluation_is_the_materialised_circuit_and_follows_the_parameters():
    made, x = model(GRAPHS["hclt"]), enumerate_worlds(tuple(CATEGORIES))
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(made(x), made.materialise()(x), rtol=0, atol=2e-6)
            next(iter(made.parameters())).mul_(1.5)


def test_a_step_draws_by_its_number_alone():
    made, x = model(GRAPHS["hclt"]), enumerate_worlds(tuple(CATEGORIES))
    values = []
    for step in (1, 2, 1, *range(3, 20)):
        made.begin_step(step)
        values.append(float(made(x[:3]).detach().sum()))
    assert values[0] == values[2] != values[1]
    drawn = {made._draw()[0] for step in range(40) if made.begin_step(step) is None}
    assert drawn == {3, 4, 6}


def test_learns_and_holds_at_other_numbers_of_states():
    """Random K and jittered points: what is learnt is a function, not weights at some points."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(400, generator=generator) * 2 - 1
    noise = torch.rand(400, 4, generator=generator)
    x = ((hidden.unsqueeze(1) + noise) > torch.tensor([0.2, 0.4, 0.6, 0.8])).long()
    graph = hclt_graph(TREE, 8)
    sizes = {"width": 24, "num_frequencies": 12, "leaf_sharing": "heads"}
    made = model(graph, [2] * 4, train_states=(6, 8, 12), **sizes)
    made.start_near_([torch.bincount(column, minlength=2).double() for column in x.T])
    optimizer = torch.optim.Adam(made.parameters(), 0.02)
    with torch.no_grad():
        before = float(made(x).mean())
    for step in range(100):
        made.begin_step(step)
        optimizer.param_groups[0]["lr"] = 0.02 if step < 60 else 0.004
        optimizer.zero_grad()
        (-made(x).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        reached = [float(made.materialise(k)(x).mean()) for k in (6, 8, 16, 32)]
    assert min(reached) > before + 0.1
    # More points than in training do no harm; fewer may.
    assert max(reached[1:]) - min(reached[1:]) < 0.1
    assert reached[-1] > reached[0] - 0.01


def test_saved_both_ways(tmp_path):
    made, x = model(GRAPHS["quad_graph"]), enumerate_worlds(tuple(CATEGORIES))
    circuit = made.materialise()
    save_model(circuit, tmp_path, dataset={}, training={})
    io.save_networks(made, tmp_path / io.FOLDER, dataset={"a": 1}, training={"b": 2})
    plain = distpc.load(tmp_path)
    assert torch.equal(plain(x), circuit(x))
    assert plain.sample(5, seed=0).shape == (5, 4)
    observed = torch.tensor([True, False, True, False])
    assert plain.conditional(x[:2], observed, [1]).sum(-1) == pytest.approx(1.0)
    for folder in (tmp_path, tmp_path / io.FOLDER):
        again = io.load_networks(folder)
        assert (again.dataset, again.training_facts) == ({"a": 1}, {"b": 2})
        assert torch.equal(again.materialise(9)(x), made.materialise(9)(x))


def test_damaged_networks_are_refused_by_name(tmp_path):
    io.save_networks(model(GRAPHS["hclt"]), tmp_path, dataset={}, training={})
    description = json.loads((tmp_path / io.DESCRIPTION).read_text())
    tensors = (tmp_path / io.TENSORS).read_bytes()
    for change, what in (
        ({"format_version": 99}, "format version"),
        ({"settings": {"rule": "simpson"}}, "description of networks is damaged"),
        ({"settings": {"depth": 3}}, "description of networks is damaged"),
        ({"settings": {"width": 7}}, "do not fit their region graph"),
    ):
        (tmp_path / io.DESCRIPTION).write_text(json.dumps({**description, **change}))
        with pytest.raises(ModelFileError, match=what):
            io.load_networks(tmp_path)
    (tmp_path / io.DESCRIPTION).write_text(json.dumps(description))
    (tmp_path / io.TENSORS).write_bytes(tensors[:-1])
    with pytest.raises(ModelFileError, match="cut"):
        io.load_networks(tmp_path)
    (tmp_path / io.DESCRIPTION).unlink()
    with pytest.raises(ModelFileError, match="no networks") as caught:
        io.load_networks(tmp_path)
    assert "integral.enabled" in caught.value.fix


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rule", "simpson"),
        ("width", 0),
        ("train_states", (4, 1)),
        ("jitter", 1.5),
        ("leaf_floor", 0.0),
        ("sum_sharing", "none"),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        IntegralSettings(**{field: value})
    assert caught.value.where == field


def test_what_no_network_writes_is_refused():
    with pytest.raises(StructureError, match="no network writes") as caught:
        model(GRAPHS["hclt"], [None] * 4)
    assert caught.value.found == "gaussian"
    with pytest.raises(ConfigError, match="no points"):
        quadrature("trapezoid", 0)
    with pytest.raises(ConfigError, match="no such quadrature"):
        quadrature("simpson", 3)
    with pytest.raises(StructureError) as caught:
        model(GRAPHS["hclt"]).materialise(1)
    assert caught.value.where == "num_states"


def test_resizing_keeps_shares_of_smaller_regions():
    graph = STRUCTURES["quad_tree"].build(image_shape=(2, 2), num_states=8, num_input_units=4)
    larger = with_num_states(graph, 24)
    assert {r.num_units for r in larger.regions if r.kind == "input"} == {12}
    assert width_of(larger) == 24
    assert with_num_states(larger, 8).regions == graph.regions
