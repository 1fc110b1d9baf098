"""Samples through the coder and back, at the model's own likelihood."""

from __future__ import annotations

import builtins
import dataclasses

import numpy as np
import pytest
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.exact import log_prob_exact
from distpc.errors import DataError, DistpcError, EvidenceError, FormatVersionError, ResourceError
from distpc.inference import compress as module
from distpc.inference.coder import quantise
from distpc.inference.compress import compress, decompress
from distpc.inference.compressed_file import from_bytes, to_bytes
from distpc.structures import Tree, hclt, patch_graph
from distpc.structures.region_graph import Region, RegionGraph
from distpc.training.fit import fit
from tests.circuits.graphs import SMALL, chain, random_evidence, small_circuit

from .conftest import load_split

SHAPES = ("hclt", "patches", "chain")


@pytest.fixture(scope="module")
def digits(digits_run):
    return load_split(digits_run, "train")[:400], load_split(digits_run, "test")[:70]


def graph_of(shape: str, x: torch.Tensor) -> RegionGraph:
    if shape == "hclt":
        return hclt(x.numpy(), 6, num_categories=[17] * 64)
    if shape == "patches":
        pixels = np.arange(64).reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4)
        return patch_graph(pixels, Tree.balanced(16), 10)
    return chain(64, 8, tied=True)


@pytest.fixture(scope="module", params=SHAPES)
def fitted(request, digits):
    circuit = Circuit(graph_of(request.param, digits[0]), [17] * 64)
    fit(circuit, digits[0], epochs=2, batch_size=100, progress=False)
    return circuit


@pytest.fixture(scope="module")
def patches(digits):
    circuit = Circuit(graph_of("patches", digits[0]), [17] * 64)
    fit(circuit, digits[0], epochs=2, batch_size=100, progress=False)
    return circuit


def test_digits_come_back_at_the_models_rate(fitted, digits):
    x = digits[1]
    result = compress(fitted, x, batch_size=32)
    found, header = decompress(fitted, result.content)
    assert torch.equal(found, x)
    bits = float(-log_prob_exact(fitted, x).sum() / np.log(2))
    assert result.model_bits == pytest.approx(bits, rel=1e-9)
    # Three batches, each ended on a whole word.
    assert bits - 1 < result.code_bits < bits * 1.0002 + 3 * 64
    assert len(result.content) == result.header_bytes + result.code_bits // 8
    assert header.batch_size == 32 and len(header.batches) == 3


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 256), (5, 1), (7, 3), (64, 64)])
def test_any_count_and_batch(patches, digits, count, batch_size):
    x = digits[1][:count]
    content = compress(patches, x, batch_size=batch_size).content
    assert torch.equal(decompress(patches, content)[0], x)


def test_threads_do_not_matter(patches, digits):
    before = torch.get_num_threads()
    content = compress(patches, digits[1]).content
    torch.set_num_threads(2)
    try:
        assert torch.equal(decompress(patches, content)[0], digits[1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_structure_and_missing_values(name):
    circuit = small_circuit(name)
    x, _ = random_evidence(circuit, 40, seed=5, missing=0.3)
    result = compress(circuit, x, batch_size=25)
    assert torch.equal(decompress(circuit, result.content)[0], x)
    observed = float(-log_prob_exact(circuit, x).sum() / np.log(2))
    assert result.model_bits == pytest.approx(observed, rel=1e-9)


def test_values_that_the_model_calls_impossible():
    circuit = small_circuit("tied-chain")
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "input":
            circuit.statistics_of(index)[:, 2] = 0.0
    x, _ = random_evidence(circuit, 30, seed=1, missing=0.0)
    result = compress(circuit, x)
    assert torch.equal(decompress(circuit, result.content)[0], x)
    # 24 bits for each of them, and the others at their own rate.
    impossible = int((x == 2).sum())
    assert result.model_bits == np.inf
    assert 24 * impossible < result.code_bits < 24 * impossible + 3 * int((x < 2).sum())


def test_nearly_impossible_values_cost_their_logarithm():
    circuit = Circuit(RegionGraph([Region("input", 1, variable=0)], 1), [3])
    circuit.statistics_of(0)[:] = torch.tensor([[1.0, 1e-5, 1e-30]])
    bits = compress(circuit, torch.tensor([[1]] * 1000)).code_bits / 1000
    assert bits == pytest.approx(np.log2(1e5), abs=0.1)
    x = torch.tensor([[2], [0], [1]])
    assert torch.equal(decompress(circuit, compress(circuit, x).content)[0], x)


def test_a_variable_of_one_category_needs_no_bits():
    circuit = Circuit(RegionGraph([Region("input", 1, variable=0)], 1), [1])
    x = torch.zeros(9, 1, dtype=torch.int64)
    result = compress(circuit, x)
    assert result.code_bits == 0
    assert torch.equal(decompress(circuit, result.content)[0], x)


def test_counts_are_whole_positive_and_sum_up():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50, 300, generator=generator, dtype=torch.float64).pow(30)
    p[0], p[0, 7] = 0.0, 1.0
    p /= p.sum(1, keepdim=True)
    counts = quantise(p)
    assert torch.equal(counts, counts.round()) and bool((counts >= 1).all())
    assert (counts.sum(1) == 2**24).all()
    assert ((counts / 2**24 - p).abs() < 301 / 2**24).all()


def test_other_data_or_models_are_refused(patches, digits):
    with pytest.raises(EvidenceError, match="does not fit its variable"):
        compress(patches, torch.full((2, 64), 17))
    with pytest.raises(EvidenceError, match="no samples"):
        compress(patches, torch.zeros(0, 64, dtype=torch.int64))
    with pytest.raises(EvidenceError, match="batch size"):
        compress(patches, digits[1], batch_size=0)
    real = Circuit(RegionGraph([Region("input", 1, variable=0)], 1), [None])
    with pytest.raises(EvidenceError, match="codes categories"):
        compress(real, torch.zeros(2, 1))


def test_another_model_is_refused(patches, digits):
    content = compress(patches, digits[1][:3]).content
    with pytest.raises(DataError, match="another model") as caught:
        decompress(small_circuit("hub"), content)
    assert "num_variables" in str(caught.value)
    region = patches.graph.root
    before = patches.statistics_of(region).clone()
    patches.statistics_of(region)[0, 0] *= 1.0001
    with pytest.raises(DataError, match="another model") as caught:
        decompress(patches, content)
    assert "'model'" in str(caught.value)
    patches.statistics_of(region)[:] = before
    assert torch.equal(decompress(patches, content)[0], digits[1][:3])


@pytest.mark.parametrize("name", sorted(module.numerics(small_circuit("hub"))))
def test_another_machine_is_refused_unless_forced(patches, digits, name):
    content = compress(patches, digits[1][:3]).content
    header, words = from_bytes(content, "file")
    odd = dataclasses.replace(header, numerics={**header.numerics, name: "odd"})
    content = to_bytes(odd, words)[0]
    with pytest.raises(DataError, match="rounded in another way") as caught:
        decompress(patches, content, where="file.dpcz")
    assert f"numerics.{name}" in str(caught.value) and "odd" in str(caught.value)
    assert torch.equal(decompress(patches, content, force=True)[0], digits[1][:3])


def test_other_tables_are_noticed(patches, digits):
    content = compress(patches, digits[1][:8], batch_size=4).content
    header, words = from_bytes(content, "file")
    # As if the decoder went another way: one that computes other numbers under the same digest.
    for odd in (
        dataclasses.replace(header, order=header.order[1:] + header.order[:1]),
        dataclasses.replace(header, num_missing=1),
        dataclasses.replace(header, batches=[header.batches[0], [header.batches[1][0], 1]]),
        dataclasses.replace(header, values_sha256="0" * 64),
    ):
        with pytest.raises(DataError, match="came out otherwise"):
            decompress(patches, to_bytes(odd, words)[0], where="file")


def test_cut_and_damaged_files_are_refused(patches, digits):
    content = compress(patches, digits[1][:3]).content
    for end in range(0, len(content), 41):
        with pytest.raises(DataError):
            decompress(patches, content[:end])
    for position in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        with pytest.raises((DataError, FormatVersionError)):
            decompress(patches, bytes(damaged))
    with pytest.raises(DataError, match="cut or damaged"):
        decompress(patches, content + b"more")
    with pytest.raises(DataError, match="not a file of compressed samples"):
        decompress(patches, b"PK\x03\x04" + content)
    newer = bytearray(content)
    newer[4] = 2
    with pytest.raises(FormatVersionError, match="format version"):
        decompress(patches, bytes(newer))


def test_headers_that_make_no_sense_are_refused(patches, digits):
    header, words = from_bytes(compress(patches, digits[1][:3]).content, "file")
    for field, value in (
        ("order", [0] * 64),
        ("order", "abc"),
        ("num_samples", 0),
        ("num_samples", 10**9),
        ("batch_size", "3"),
        ("batches", [[len(words)]]),
        ("batches", 7),
        ("numerics", None),
    ):
        odd = dataclasses.replace(header, **{field: value})
        with pytest.raises(DataError, match="damaged"):
            decompress(patches, to_bytes(odd, words)[0])


def test_without_the_library_the_extra_is_named(patches, digits, monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "constriction":
            raise ModuleNotFoundError("No module named 'constriction'", name=name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError) as caught:
        compress(patches, digits[1])
    assert isinstance(caught.value, DistpcError)
    assert "distpc[compress]" in str(caught.value)
