"""PyJuice's side: the same circuit with the same parameters, as its own examples run it.

From its sources, 2.6.3: blocks as large as its structures make them (`HCLT`, `HMM`: up to 1,024
units), a CUDA graph recorded by a dry run (`record_cudagraph`, its tutorial), matrix products in
half precision (its default), its CUTLASS kernels where `nvidia-cutlass` and nvcc are there, and
`optim.MiniBatchEM`, the optimizer of its examples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.exchange.pyjuice import skeleton

NAME = "PyJuice 2.6.3"
MAX_BLOCK_SIZE = 1024
STEP_SIZE, PSEUDOCOUNT = 0.1, 0.1


class PyJuicePeer:
    """Forward, backward and update on one batch after another.

    Args:
        circuit: what to copy; its sums have to be dense.
        batches: (B, V) integers on the device, taken in turn.
        device: where the circuit is.
        outline: of the same structure, compiled beforehand; None: compile it here.

    Attributes:
        compile_seconds: of Python making nodes and compiling them.
        warm_seconds: of its first steps: Triton's and nvcc's compilers, tuning, the CUDA graph.
        setting: what it runs with, in words.
    """

    def __init__(
        self,
        circuit: Circuit,
        batches: Sequence[Tensor],
        device: str,
        outline: Outline | None = None,
    ) -> None:
        outline = outline or compile_outline(circuit)
        self.compile_seconds = outline.seconds
        self.model = filled(outline, circuit, device)
        self.batches = cycle(batches)
        self.graphs = False
        self.warm_seconds = 0.0
        self.optimizer: Any = None

    @property
    def setting(self) -> str:
        """Optimizer, products, graph, kernels."""
        kernels = "CUTLASS+Triton" if has_cutlass() else "Triton"
        graphs = "CUDA graphs" if self.graphs else "no CUDA graphs"
        name = type(self.optimizer).__name__
        return f"{name}, half precision, {graphs}, {kernels}, blocks of {MAX_BLOCK_SIZE}"

    def warm_up(self, optimizer: str = "MiniBatchEM", **settings: Any) -> None:
        """Make the optimizer; run once plainly, once to record CUDA graphs, once with those.

        An optimizer's own kernels are compiled in its first step, which is taken on a copy of the
        parameters that is put back.
        """
        from pyjuice import optim

        begun = time.perf_counter()
        settings = settings or {"step_size": STEP_SIZE, "pseudocount": PSEUDOCOUNT}
        self.optimizer = getattr(optim, optimizer)(self.model, **settings)
        x = next(self.batches)
        if x.is_cuda and optimizer != "MiniBatchEM":
            kept = [tensor.clone() for tensor in self.parameters()]
            self.step(x)
            for tensor, value in zip(self.parameters(), kept, strict=True):
                tensor.copy_(value)
            self.optimizer = getattr(optim, optimizer)(self.model, **settings)
        if x.is_cuda:
            # Kernels are tuned in plain passes; what these leave in the flows is dropped.
            self.model(x).mean().backward()
            torch.cuda.synchronize()
            _scratch.clear()
            self.model(x, record_cudagraph=True).mean().backward()
            torch.cuda.synchronize()
            self.graphs = True
            # Not `zero_flows`, which multiplies by 0 what may be infinite.
            for flows in (self.model.param_flows, *self._input_flows()):
                flows.zero_()
            self.model._cum_flow = 0.0
        self.warm_seconds = time.perf_counter() - begun

    def _input_flows(self) -> list[Tensor]:
        return [layer.param_flows for layer in self.model.input_layer_group]

    def parameters(self) -> list[Tensor]:
        """Its own, to be read or written in place."""
        return [self.model.params.data, *(i.params.data for i in self.model.input_layer_group)]

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) nats."""
        return self.model(x)[:, 0]

    def step(self, x: Tensor | None = None, step_size: float | None = None) -> None:
        """A whole training step."""
        x = next(self.batches) if x is None else x
        self.model(x).mean().backward()
        self.optimizer.step(step_size)


class Outline(NamedTuple):
    """A compiled structure without parameters.

    Attributes:
        model: a `TensorCircuit`.
        owners: nodes with parameters of their own, and the regions that those are of.
        seconds: that compiling took.
    """

    model: Any
    owners: dict[Any, int]
    seconds: float


def compile_outline(circuit: Circuit) -> Outline:
    """Compile the structure of a circuit, whose parameters are not looked at."""
    from pyjuice.io.serialization import deserialize_nodes
    from pyjuice.model import TensorCircuit

    class OnDevice(TensorCircuit):
        """Leaves parameters empty, to be copied into."""

        def _init_parameters(self, perturbation: float = 4.0, pseudocount: float = 0.0) -> None:
            self.params = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    begun = time.perf_counter()
    _compare_scopes_fast()
    _share_scratch()
    records, regions = skeleton(circuit, MAX_BLOCK_SIZE)
    with redirect_stdout(StringIO()):
        root = deserialize_nodes(records)
        model = OnDevice(root, verbose=False)
    owners = {node: regions[n] for n, node in _numbered(root, records) if n in regions}
    return Outline(model, owners, time.perf_counter() - begun)


def filled(outline: Outline, circuit: Circuit, device: str) -> Any:
    """The `TensorCircuit` of an outline with the parameters of a circuit, on its device.

    Parameters go from device to device: by way of the host, as `TensorCircuit` makes them, a
    circuit of some billions takes minutes.
    """
    model = outline.model
    model.to(torch.device(device))
    model.params.data = torch.zeros(model.num_sum_params, device=device)
    _copy_inputs(model, circuit, outline.owners)
    for node, region in outline.owners.items():
        if not node.is_input():
            _copy_sum(model, node, circuit.weights_of(region))
    return model


_scratch: dict[str, Any] = {}


def _share_scratch() -> None:
    """One buffer for the tuning of all sum layers, which else keep one each, as large as all flows.

    Without this it needs tens of GB more, and large cases do not fit; no step is affected.
    """
    from pyjuice.layer.sum_layer import SumLayer

    SumLayer._bk_ele_scratch = property(
        lambda layer: _scratch.get("it"), lambda layer, value: _scratch.update(it=value)
    )


def _compare_scopes_fast() -> None:
    """Compare sets of variables in one go instead of byte by byte.

    Of 3,072 variables PyJuice compares millions of pairs when it compiles; no step is affected.
    """
    from pyjuice.utils import BitSet

    def equal(one: Any, other: Any) -> bool:
        return bool(one.values.rstrip(b"\0") == other.values.rstrip(b"\0"))

    BitSet.__eq__ = equal


def _numbered(root: Any, records: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """Nodes with the numbers of the records that they were made from."""
    waiting, seen = [(len(records) - 1, root)], set()
    while waiting:
        number, node = waiting.pop()
        if number not in seen:
            seen.add(number)
            yield number, node
            waiting += zip(records[number]["chs"], node.chs, strict=True)


def _copy_inputs(model: Any, circuit: Circuit, regions: dict[Any, int]) -> None:
    for layer in model.input_layer_group:
        for node in layer.nodes:
            if not node.is_tied():
                start, end = node._param_range
                layer.params.data[start:end] = circuit.weights_of(regions[node]).flatten()


def _copy_sum(model: Any, node: Any, theta: Tensor) -> None:
    """(K', K) into the blocks of a node: in the order that it wants them, each transposed."""
    rows, columns = node.block_size, node.ch_block_size
    blocks = theta.view(node.num_node_blocks, rows, node.num_ch_node_blocks, columns)
    blocks = blocks.permute(0, 2, 1, 3).flatten(0, 1)
    start, end = node._param_range
    order = node._inverse_param_ids.to(blocks.device)
    model.params.data[start:end] = blocks[order].mT.flatten()


def has_cutlass() -> bool:
    """Whether its CUTLASS kernels were built (on a GPU they are built when first asked for)."""
    from pyjuice.layer.kernels import c

    return bool(torch.cuda.is_available() and c.is_available())


def build_kernels() -> None:
    """Build its CUDA kernels, a process each, for processes to come: a minute of compilers."""
    import subprocess
    import sys

    names = ["is_available", "ele_is_available", "par_is_available"]
    lines = [f"from pyjuice.layer.kernels import c; assert c.{name}()" for name in names]
    lines.append(
        "from pyjuice.layer.kernels.c import input_layers as c; c.cat_backward_is_available()"
    )
    running = [subprocess.Popen([sys.executable, "-c", line]) for line in lines]
    for process in running:
        process.wait()


if __name__ == "__main__":
    build_kernels()
