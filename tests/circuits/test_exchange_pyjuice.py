"""PyJuice's records and files: equal likelihoods after a round trip, refused where nothing fits.

PyJuice runs on GPUs alone, so that its tensors are judged by the slow evaluator; what a file of
its own making looks like is written down here field by field.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import enumerate_worlds, log_prob_exact
from distpc.circuits.exchange.pyjuice import (
    from_records,
    load_jpc,
    save_jpc,
    skeleton,
    to_records,
)
from distpc.errors import ModelFileError, StructureError

from .graphs import SMALL, hclt, random_evidence, small_circuit

REFUSED = {"grouped-patches"}


@pytest.mark.parametrize("name", sorted(set(SMALL) - REFUSED))
def test_a_round_trip_keeps_likelihoods(name: str, tmp_path: Path) -> None:
    circuit = small_circuit(name, seed=3)
    save_jpc(circuit, tmp_path / "model.jpc")
    again = load_jpc(tmp_path / "model.jpc", allow_pickle=True)
    x, _ = random_evidence(circuit, 40, 0)
    assert torch.allclose(log_prob_exact(again, x), log_prob_exact(circuit, x), rtol=1e-6)
    assert torch.allclose(again(x), circuit(x), rtol=1e-5)


def test_gaussian_units_and_ties_come_back(tmp_path: Path) -> None:
    circuit = Circuit(hclt([-1, 0, 0], 4), [None, 3, None], seed=2)
    circuit.standardise(torch.tensor([40.0, 0.0, -3.0]), torch.tensor([5.0, 1.0, 0.5]))
    save_jpc(circuit, tmp_path / "model.jpc")
    again = load_jpc(tmp_path / "model.jpc", allow_pickle=True)
    x = torch.tensor([[41.0, 2.0, -3.1], [30.0, 0.0, torch.nan]])
    assert torch.allclose(log_prob_exact(again, x), log_prob_exact(circuit, x), rtol=1e-5)
    tied = small_circuit("tied-chain")
    assert from_records(to_records(tied)).num_parameters == tied.num_parameters


def categorical(num_cats: int) -> bytes:
    """What pickle.dumps gives for PyJuice's Categorical, whose hooks are empty lists."""
    state = pickle.dumps({"num_cats": num_cats, "sampling_fns": []}, protocol=2)[2:-1]
    name = b"pyjuice.nodes.distributions.categorical\nCategorical\n"
    return b"\x80\x02c" + name + b")\x81" + state + b"b."


def record(kind: str, blocks: int, size: int, children: tuple[int, ...] = (), **more) -> dict:
    common = {"type": kind, "num_node_blocks": blocks, "block_size": size, "chs": children}
    return {**common, **more}


def by_hand() -> list[dict]:
    """Two variables; blocks of two units; a product that crosses blocks; a sum without one edge."""
    emission = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]], dtype=np.float32)
    edges = np.array([[0, 0, 1], [0, 1, 1]])
    inner = np.array([[[0.1, 0.2], [0.3, 0.1]], [[0.4, 0.3], [0.1, 0.5]], [[0.5, 0.5], [0.2, 0.8]]])
    one = {"scope": [0], "dist": categorical(2), "params": emission.ravel()}
    two = {"scope": [1], "dist": categorical(2), "source_node": 0}
    top = np.array([[[0.1, 0.2]], [[0.3, 0.4]]])
    return [
        record("Input", 2, 2, **one),
        record("Input", 2, 2, **two),
        record("Product", 2, 2, (1,), edge_ids=np.array([[0], [1]])),
        record("Sum", 2, 2, (2,), edge_ids=edges, params=inner),
        record("Product", 2, 2, (0, 3), edge_ids=np.array([[0, 1], [1, 0]])),
        record("Sum", 1, 1, (4,), edge_ids=np.array([[0, 0], [0, 1]]), params=top),
    ]


def test_records_mean_what_pyjuice_means() -> None:
    emission = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    inner = np.array(
        [[0.1, 0.2, 0.4, 0.3], [0.3, 0.1, 0.1, 0.5], [0, 0, 0.5, 0.5], [0, 0, 0.2, 0.8]]
    )
    mixed = inner @ emission
    crossed = np.array([0.1, 0.2, 0.3, 0.4]) @ np.array(
        [emission[unit][:, None] * mixed[(unit + 2) % 4][None] for unit in range(4)]
    ).reshape(4, 4)
    found = log_prob_exact(from_records(by_hand()), enumerate_worlds((2, 2))).exp()
    assert np.allclose(found.numpy(), crossed, atol=1e-7)


def broken(number: int, **changes) -> list[dict]:
    records = by_hand()
    records[number] = {**records[number], **changes}
    return records


@pytest.mark.parametrize(
    ("records", "layer"),
    [
        (broken(0, scope=[0, 1]), "layer 0"),
        (broken(0, dist=categorical(2).replace(b"Categorical\n", b"Indicators0\n")), "layer 0"),
        (broken(0, dist=pickle.dumps(np.float64)), "layer 0"),
        (broken(0, params=None), "layer 0"),
        (broken(3, external_params=b"anything"), "layer 3"),
        (broken(3, params=np.ones((3, 2, 3))), "layer 3"),
        (broken(4, edge_ids=np.array([[0, 1], [1, 9]])), "layer 4"),
        (broken(5, type="Integral"), "layer 5"),
        (broken(3, params=np.full((3, 2, 2), np.nan)), "region"),
        (broken(3, params=np.full((3, 2, 2), 0.7)), "row 0"),
        (by_hand()[:4], "layer 3"),
    ],
)
def test_what_does_not_fit_is_named(records: list[dict], layer: str) -> None:
    with pytest.raises(StructureError) as caught:
        from_records(records)
    assert layer in str(caught.value.where)


def test_a_region_that_pyjuice_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match="region") as caught:
        save_jpc(small_circuit("grouped-patches"), tmp_path / "model.jpc")
    assert "product" in str(caught.value.where)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_pickles_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good, bad = tmp_path / "good.jpc", tmp_path / "bad.jpc"
    good.write_bytes(pickle.dumps(by_hand()))
    with pytest.raises(ModelFileError, match="pickle") as caught:
        load_jpc(good)
    assert "allow_pickle=True" in str(caught.value)
    assert load_jpc(good, allow_pickle=True).num_variables == 2
    bad.write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(ModelFileError, match="jpc"):
        load_jpc(bad, allow_pickle=True)
    with pytest.raises(StructureError):
        from_records(broken(0, dist=pickle.dumps(Bomb())))
    assert not Path("exploded").exists()
    good.write_bytes(good.read_bytes()[:100])
    with pytest.raises(ModelFileError):
        load_jpc(good, allow_pickle=True)
    with pytest.raises(ModelFileError, match="read"):
        load_jpc(tmp_path / "none.jpc", allow_pickle=True)


def test_a_skeleton_is_the_records_without_parameters() -> None:
    circuit = small_circuit("hclt")
    records, regions = skeleton(circuit, 64)
    full = to_records(circuit)
    assert {number for number, record in enumerate(full) if "params" in record} == set(regions)
    for record, whole in zip(records, full, strict=True):
        assert "params" not in record
        assert record.keys() == whole.keys() - {"params"}
        assert record["chs"] == whole["chs"] and record["block_size"] == whole["block_size"]
    for number, region in regions.items():
        assert full[number]["params"].size == circuit.weights_of(region).numel()


def test_blocks_of_a_skeleton_are_bounded() -> None:
    records, _ = skeleton(small_circuit("hclt"), 1)
    assert {record["block_size"] for record in records} == {1}
