"""Progressive growing of one leaf circuit, and the top level over soft likelihoods."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.config.distillation import DistillConfig
from distpc.config.growing import GrowingConfig
from distpc.errors import EvidenceError, LatentError
from distpc.latents.local import cluster_points
from distpc.structures import Tree
from distpc.structures.composed import top_graph
from distpc.structures.joined import joined_graph
from distpc.training import growing
from distpc.training.composition import compose
from distpc.training.growing import Grower
from distpc.training.refinement import choose_refinement, head_likelihoods, move_heads
from distpc.training.soft_top import counted_top, fit_top

CHAIN, STAR = Tree((-1, 0, 1)), Tree((-1, 0, 0))
VARIABLES = np.array([[0, 1, 2], [5, 4, 3]])
TREE = Tree((1, -1))
SETTINGS = GrowingConfig(epochs=4, batch_size=64, covered_fraction=0.5)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parts():
    """Two leaf circuits of 3 + 2 heads over three bits, and a top level over two patches."""
    leaves = [
        Circuit(joined_graph([CHAIN, STAR], 4, 3), [2] * 3, seed=1),
        Circuit(joined_graph([CHAIN], 2, 2), [2] * 3, seed=2),
    ]
    leaves[0].set_smoothing(5.0, 3.0, 20)
    top = Circuit(top_graph(TREE, 5), [5] * 2, seed=3)
    return leaves, top


def soft_of(leaves, worlds):
    patches = worlds[:, torch.from_numpy(VARIABLES)].reshape(-1, 3)
    soft = torch.cat([head_likelihoods(leaf, patches, 7) for leaf in leaves], dim=1)
    return soft.view(len(worlds), 2, -1)


def test_likelihoods_of_heads_are_those_of_the_circuit_given_each(parts):
    leaves, _ = parts
    worlds = enumerate_worlds((2, 2, 2))
    for leaf in leaves:
        found = head_likelihoods(leaf, worlds, 3)
        prior = leaf.weights_of(leaf.graph.root)[0]
        for head, share in enumerate(prior):
            latents = torch.full((len(worlds), 1), head)
            expected = log_prob_exact(leaf, worlds, latents=latents) - share.log()
            torch.testing.assert_close(found[:, head].double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.allclose(found.exp().sum(0), torch.ones(len(prior)), atol=1e-5)


def test_the_soft_top_is_the_composed_circuit_in_every_world(parts):
    leaves, top = parts
    whole = compose(VARIABLES, TREE, leaves, top, [2] * 6, 2**20)
    worlds = enumerate_worlds((2,) * 6)
    judged = log_prob_exact(whole, worlds)
    assert float(judged.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    soft = top(top.reader.read_soft(soft_of(leaves, worlds)))
    torch.testing.assert_close(soft.double(), judged, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(whole.log_prob(worlds).double(), judged, atol=2e-5, rtol=1e-5)
    # Statistics are on the scale of flows: row sums are the model's own expected uses.
    uses = whole.uses()
    for index, region in enumerate(whole.graph.regions):
        if region.kind == "sum" and region.tie is None:
            torch.testing.assert_close(whole.statistics_of(index).sum(-1), uses[index].float())


def test_soft_evidence_of_one_category_is_the_value_and_ruled_out_is_impossible():
    top = Circuit(top_graph(TREE, 3), [3] * 2, seed=3)
    values = enumerate_worlds((3, 3))
    logs = torch.full((9, 2, 3), -torch.inf).scatter(2, values[:, :, None], 0.7)
    soft = top(top.reader.read_soft(logs))
    torch.testing.assert_close(soft, top(values) + 1.4, atol=1e-5, rtol=1e-5)
    logs[4, 1] = -torch.inf
    assert top(top.reader.read_soft(logs))[4] == -torch.inf
    far = torch.zeros(1, 2, 3) - torch.tensor([0.0, 900.0, 4000.0])
    assert torch.isfinite(top(top.reader.read_soft(far))).all()


@pytest.mark.parametrize("logs", [torch.zeros(2, 2, 4), torch.zeros(2, 3, 3),
                                  torch.zeros(2, 2, 3, dtype=torch.int64),
                                  torch.full((2, 2, 3), torch.nan),
                                  torch.full((2, 2, 3), torch.inf)])  # fmt: skip
def test_wrong_soft_evidence_is_refused(logs):
    top = Circuit(top_graph(TREE, 3), [3] * 2)
    with pytest.raises(EvidenceError, match="soft evidence"):
        top.reader.read_soft(logs)


def test_soft_evidence_on_inputs_that_do_not_read_it_is_refused(parts):
    leaf = parts[0][0]
    with pytest.raises(EvidenceError, match="indicator"):
        leaf(leaf.reader.read_soft(torch.zeros(2, 3, 2)))


def clustered(number=600, seed=0):
    """Patches of five values around six centres, of which two are far away from the others."""
    rng = np.random.default_rng(seed)
    centres = np.array([[1, 1, 1], [1, 1, 6], [1, 6, 1], [6, 1, 1], [14, 14, 3], [14, 3, 14]])
    patches = centres[rng.integers(6, size=number)] + rng.integers(0, 2, (number, 3))
    patches = torch.from_numpy(patches)
    return patches, patches.float()


def grower(**more):
    patches, features = clustered()
    return Grower(patches, features, [16] * 3, 3, SETTINGS, 0.01, (0, 5), **more)


def test_growing_adds_heads_and_likelihood_and_goes_on_after_any_round(monkeypatch):
    kept = []
    whole = grower(keep=kept.append).run()
    assert [facts["heads"] for facts in whole.rounds] == [2, 3, 4]
    assert whole.num_heads == whole.circuit.latent_sizes[0] == len(whole.centroids) == 4
    assert set(whole.heads.tolist()) == {0, 1, 2, 3}
    curves = [facts["nats_by_epoch"] for facts in whole.rounds]
    assert all(len(curve) == SETTINGS.epochs for curve in curves)
    # Patches that are told apart by more heads are explained better.
    assert curves[-1][-1] > curves[0][-1] + 0.1
    assert whole.rounds[-1]["states"] > whole.rounds[0]["states"]
    x = clustered(400, seed=1)[0]
    start = grower()._start().circuit
    assert whole.circuit.log_prob(x).mean() > start.log_prob(x).mean() + 1
    trained = []
    fit = growing.fit_heads
    monkeypatch.setattr(growing, "fit_heads", lambda *a, **k: trained.append(1) or fit(*a, **k))
    again = grower().run(kept[1])
    assert len(trained) == 1
    assert again.rounds == whole.rounds
    for name, tensor in whole.circuit.state_dict().items():
        assert torch.equal(tensor, again.circuit.state_dict()[name])


def test_alike_patches_keep_one_head():
    patches = torch.ones(40, 3, dtype=torch.int64)
    alone = replace(grower(), patches=patches, features=patches.float()).run()
    assert alone.rounds[0]["heads"] == 1
    assert torch.isfinite(alone.circuit.log_prob(patches)).all()


def test_patches_move_to_a_head_that_is_better_by_more_than_the_reluctance():
    likelihoods = torch.tensor([[-5.0, -4.5], [-5.0, -3.0], [-2.0, -9.0]])
    heads = torch.tensor([0, 0, 1])
    assert move_heads(likelihoods, heads, 1.0).tolist() == [0, 1, 0]
    assert move_heads(likelihoods, heads, 0.0).tolist() == [1, 1, 0]


def test_the_worst_heads_are_refined_until_they_cover_enough():
    heads = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    likelihoods = torch.tensor([[-1.0, -9, -9]] * 5 + [[-9.0, -3, -9]] * 3 + [[-9.0, -9, -6]] * 2)
    rng = np.random.default_rng(0)
    few = choose_refinement(likelihoods, heads, SETTINGS, rng)
    assert few is not None and (few.refined, few.cloned) == ((0, 1, 2), (2,))
    least = SETTINGS.model_copy(update={"covered_fraction": 0.15})
    found = choose_refinement(likelihoods, heads, least, rng)
    assert found is not None and (found.refined, found.cloned) == ((2,), (2,))
    many = SETTINGS.model_copy(update={"final_heads": 20, "patches_per_head": 2})
    found = choose_refinement(likelihoods, heads, many, rng)
    assert found is not None and 1 <= len(found.cloned) <= 2
    none = many.model_copy(update={"patches_per_head": 100})
    assert choose_refinement(likelihoods, heads, none, rng) is None


def test_the_top_learns_from_soft_likelihoods(parts):
    leaves, _ = parts
    rng = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (300, 1), generator=rng)
    # The second patch is a copy of the first: only the top level can know.
    worlds = torch.cat([bits, bits, bits, bits, bits, bits], dim=1)
    soft = soft_of(leaves, worlds)
    settings = DistillConfig(growing=GrowingConfig(top_epochs=20, top_batch_size=100))
    shares = torch.full((5,), 0.2)
    top = counted_top(TREE, [soft[:100], soft[100:]], shares, settings, 0)
    said = []
    curve = fit_top(top, [soft[:100], soft[100:]], settings, 0, lambda *at: said.append(at))
    assert said == list(enumerate(curve, start=1))
    assert curve[-1] > curve[0]
    whole = compose(VARIABLES, TREE, leaves, top, [2] * 6, 2**20)
    expected = top(top.reader.read_soft(soft)).detach().mean()
    assert float(whole.log_prob(worlds).mean()) == pytest.approx(float(expected), abs=1e-4)


def test_clustering_goes_on_from_given_centroids():
    points = clustered()[1]
    start = cluster_points(points, 3, 10, [1])
    more = cluster_points(points, 6, 10, [2], start=start)
    assert more.shape == (6, 3)
    assert torch.equal(cluster_points(points, 3, 0, [2], start=start), start)
    inertias = [float(torch.cdist(points, c).min(1).values.square().sum()) for c in (start, more)]
    assert inertias[1] < inertias[0] / 2
    assert torch.equal(cluster_points(points, 3, 10, [1]), start)
    same = cluster_points(torch.ones(9, 2), 2, 3, [0], start=torch.ones(1, 2))
    assert torch.equal(same, torch.ones(2, 2))
    with pytest.raises(LatentError, match="no points"):
        cluster_points(torch.zeros(0, 3), 2, 3, [0])
