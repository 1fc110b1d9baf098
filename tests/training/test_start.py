from pathlib import Path

import numpy as np
import torch
from hidden_trees import hidden_tree
from runs import prepare

from distpc.circuits.circuit import Circuit
from distpc.circuits.fill import fill_
from distpc.data.index import ShardIndex
from distpc.data.spec import DatasetSpec
from distpc.parallel.mesh import Mesh
from distpc.training.checkpoint import Checkpoints, Piece, Saver, TrainingFacts
from distpc.training.finetune import beginning
from distpc.training.start import marginals_of, start_near_data_


def test_marginals_leave_out_missing_values() -> None:
    batches = [np.array([[0, 2.5], [2, 1.5]]), np.array([[2, np.nan], [np.nan, 2.0]])]
    marginals = marginals_of(batches, [3, None])
    assert marginals.counts[1] is None and marginals.counts[0] is not None
    assert marginals.counts[0].tolist() == [1, 0, 2]
    assert marginals.centre.tolist() == [0.0, 2.0]
    assert marginals.spread[0] == 1.0
    torch.testing.assert_close(marginals.spread[1].item(), np.std([2.5, 1.5, 2.0]))


def test_real_variables_are_standardised() -> None:
    circuit = Circuit(hidden_tree(3, 2), [None] * 3, seed=0)
    x = np.random.default_rng(0).normal(200.0, 0.1, size=(500, 3))
    before = float(circuit.log_prob(x).mean())
    start_near_data_(circuit, [x])
    assert float(circuit.log_prob(x).mean()) > before + 1000
    assert abs(float(circuit.sample(500).mean()) - 200.0) < 0.5


def test_rows_start_near_the_marginal_of_their_tied_variables() -> None:
    circuit = Circuit(hidden_tree(6, 4), [3] * 6, seed=0, init_noise=0.01)
    x = np.zeros((100, 6), dtype=np.int64)
    # Variables 0 and 3 share their emissions: half of their values are 1.
    x[:, 3] = 1
    start_near_data_(circuit, [x])
    for index, region in enumerate(circuit.graph.regions):
        if region.variable in (0, 3):
            rows = circuit.weights_of(index)
            torch.testing.assert_close(
                rows, torch.tensor([0.5, 0.5, 0.0]).expand_as(rows), atol=0.02, rtol=0
            )


def test_statistics_are_on_the_scale_of_their_uses() -> None:
    circuit = Circuit(hidden_tree(6, 4), [3] * 6, seed=0)
    x = np.random.default_rng(0).integers(0, 3, (50, 6))
    start_near_data_(circuit, [x])
    root = len(circuit.graph.regions) - 1
    assert float(circuit.statistics_of(root).sum()) == 1.0
    emission = circuit.graph.regions.index(
        next(region for region in circuit.graph.regions if region.tie == "emission/0")
    )
    # Tied at two positions, so used twice a sample.
    torch.testing.assert_close(circuit.statistics_of(emission).sum(), torch.tensor(2.0))


def test_a_resumed_run_spreads_flows_as_a_new_one_does(tmp_path: Path) -> None:
    ctx = prepare(tmp_path, leaf_width=1.5)
    spec = DatasetSpec.load(ctx.input("shards").path)
    index = ShardIndex.load(ctx.input("index").path)
    new = beginning(ctx, spec, index, None)
    fill_(new.circuit, new.source)
    saver = Saver(Checkpoints(tmp_path / "saved", {}), Mesh(0, 1, 0, torch.device("cpu")))
    values = new.circuit.state_dict().items()
    saver.save(TrainingFacts(), [Piece(k, tuple(v.shape), 0, v.reshape(-1)) for k, v in values])
    saver.wait()
    again = beginning(ctx, spec, index, saver.checkpoints.newest())
    kernels = [begin.circuit.bank_list[-1].kernel for begin in (new, again)]
    assert kernels[0].shape == (17, 17) and float(kernels[0].diagonal().min()) < 0.5
    assert torch.equal(*kernels)
