"""PyJuice: its node groups and `.jpc` files (github.com/Tractables/pyjuice, 2.6), both ways.

A `.jpc` file is a pickled list of records, children first and the root last: "type" Input, Product
or Sum; "num_node_blocks" and "block_size" (their product is the number of units); "chs", records
below; "source_node", the record that a tied one shares parameters with; and

* Input: "scope", "params" (flat), "dist", a distribution object pickled once more;
* Product: "edge_ids" (blocks or units, children): unit i multiplies unit edge_ids[i, j] of child j;
* Sum: "edge_ids" (2, edges), pairs of a block of units and a block of the children's units side by
  side; "params" (edges, block size, children's block size).

Pickles can run any code. Files are read by an unpickler that makes arrays and plain values and
calls nothing else, and only if the caller says so. PyJuice itself is not needed for files.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.exchange.weights import write_weights
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.inputs import TableBank
from distpc.errors import ModelFileError, StructureError
from distpc.structures.builder import GraphBuilder
from distpc.structures.region_graph import RegionGraph

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

Record = dict[str, Any]

DISTRIBUTIONS = "pyjuice.nodes.distributions"
ARRAYS = {"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"}
MAX_BLOCK_SIZE = 64


def load_jpc(path: Path | str, *, allow_pickle: bool = False) -> Circuit:
    """Read a model that `pyjuice.save` wrote.

    Args:
        path: the `.jpc` file.
        allow_pickle: a `.jpc` file is a pickle, and a pickle may run any code on this machine; True
            reads it all the same, with an unpickler that makes nothing but arrays.

    Raises:
        ModelFileError: not allowed, not a `.jpc` file, or one that holds other things than arrays.
        StructureError: naming the layer that has no counterpart here.
    """
    path = Path(path)
    if not allow_pickle:
        raise ModelFileError(
            "a .jpc file is a pickle, which may run any code: it is not read unasked",
            where=path,
            fix="if you trust where it comes from: load_jpc(path, allow_pickle=True)",
        )
    try:
        records = _Arrays(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise ModelFileError("a file cannot be read", where=path, found=error) from error
    except Exception as error:
        # Damage makes unpicklers raise nearly anything.
        raise ModelFileError(
            "not a .jpc file", where=path, found=repr(error), expected="arrays and plain values"
        ) from error
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise ModelFileError("not a .jpc file", where=path, found=type(records).__name__)
    return from_records(records)


def save_jpc(circuit: Circuit, path: Path | str) -> None:
    """Write a file for `pyjuice.load`; raises as `to_records`."""
    Path(path).write_bytes(pickle.dumps(to_records(circuit), protocol=4))


def from_pyjuice(root: Any) -> Circuit:
    """The circuit of PyJuice nodes in memory, given their root (`CircuitNodes`).

    Parameters that a compiled `TensorCircuit` trained have to be back in the nodes
    (`TensorCircuit.update_parameters()`).

    Raises:
        StructureError: naming the layer that has no counterpart here.
    """
    nodes = list(root)
    number = {id(node): index for index, node in enumerate(nodes)}
    records = []
    for node in nodes:
        kind = "Input" if node.is_input() else "Product" if node.is_prod() else "Sum"
        record: Record = {
            "type": kind,
            "num_node_blocks": node.num_node_blocks,
            "block_size": node.block_size,
            "chs": tuple(number[id(child)] for child in node.chs),
        }
        if kind == "Input":
            record["scope"] = node.scope.to_list()
            record["dist"] = type(node.dist).__name__, vars(node.dist)
        else:
            record["edge_ids"] = node.edge_ids.detach().cpu().numpy()
        if getattr(node, "external_params", None) is not None:
            record["external_params"] = node.external_params
        if getattr(node, "_params", None) is not None:
            record["params"] = node._params.detach().cpu().numpy()
        if getattr(node, "_source_node", None) is not None:
            record["source_node"] = number[id(node._source_node)]
        records.append(record)
    return from_records(records)


def from_records(records: list[Record]) -> Circuit:
    """The circuit of records as in a `.jpc` file; raises as `load_jpc`."""
    return _Import(records).run()


def to_records(circuit: Circuit) -> list[Record]:
    """The records of a circuit, as in a `.jpc` file.

    Block-diagonal sums turn dense, their zeros written out; inputs of any family over categories
    turn categorical.

    Raises:
        StructureError: naming the region that PyJuice cannot represent.
    """
    return _Export(circuit).run()


def skeleton(circuit: Circuit, max_block_size: int) -> tuple[list[Record], dict[int, int]]:
    """The records of a circuit without its parameters, for nodes that are filled on their device.

    Args:
        circuit: see `to_records`.
        max_block_size: bound on the side of the blocks of parameters, a power of two; PyJuice's
            own structures use up to 1,024.

    Returns:
        The records, and for each one that owns parameters the region that those belong to.

    Raises:
        StructureError: as `to_records`.
    """
    export = _Export(circuit, max_block_size, with_parameters=False)
    return export.run(), export.regions


class _Import:
    """One import: a region for each record, and more where units are re-ordered."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.builder = GraphBuilder()
        self.region_of: list[int] = []
        self.weights: dict[int, Tensor] = {}
        self.categories: dict[int, int | None] = {}
        self.sources = {r["source_node"] for r in records if "source_node" in r}

    def run(self) -> Circuit:
        from distpc.circuits.circuit import Circuit

        add = {"Input": self._input, "Product": self._product, "Sum": self._sum}
        for number, record in enumerate(self.records):
            if record.get("type") not in add:
                raise self._refused(number, f"type {record.get('type')!r}")
            try:
                self.region_of.append(add[record["type"]](number))
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
                raise self._refused(number, f"a damaged layer: {error!r}") from error
        if self.builder.regions[-1].num_units != 1:
            raise self._refused(len(self.records) - 1, "a root of several units")
        graph = RegionGraph(self.builder.regions, 1 + max(self.categories, default=-1))
        counts = [self.categories[v] for v in range(graph.num_variables)]
        circuit = Circuit(graph, counts)
        write_weights(circuit, self.weights)
        return circuit

    def _input(self, number: int) -> int:
        record = self.records[number]
        scope, units = record["scope"], _units(record)
        if len(scope) != 1:
            raise self._refused(number, f"an input over variables {list(scope)}")
        name, state = _distribution(record["dist"])
        params = self._params(number).double().reshape(units, -1)
        categories: int | None
        if name == "Gaussian":
            categories, value = None, torch.stack([params[:, 0], params[:, 1].square()], dim=-1)
        elif name == "Categorical":
            categories, value = int(state["num_cats"]), params
        elif name == "Bernoulli":
            categories, value = 2, torch.cat([1 - params, params], dim=1)
        else:
            raise self._refused(number, f"inputs of distribution {name}")
        (variable,) = scope
        if self.categories.setdefault(variable, categories) != categories:
            raise self._refused(
                number, f"variable {variable} with {categories} categories, elsewhere with others"
            )
        region = self.builder.input(units, variable, self._tie(number))
        self.weights[region] = value
        return region

    def _product(self, number: int) -> int:
        record = self.records[number]
        edges = torch.as_tensor(record["edge_ids"])
        size = 1 if len(edges) == _units(record) else int(record["block_size"])
        units = (edges.unsqueeze(1) * size + torch.arange(size).view(1, -1, 1)).flatten(0, 1)
        children = [self.region_of[child] for child in record["chs"]]
        counts = [self.builder.regions[child].num_units for child in children]
        if len(children) == 2 and len(units) == counts[0] * counts[1] > max(counts):
            pairs = torch.cartesian_prod(*map(torch.arange, counts))
            if torch.equal(units, pairs):
                return self.builder.kronecker(*children)
        chosen = [
            self._select(child, of_child) for child, of_child in zip(children, units.T, strict=True)
        ]
        return chosen[0] if len(chosen) == 1 else self.builder.product(chosen)

    def _select(self, child: int, units: Tensor) -> int:
        """Units of a region in another order or number, as a sum with one weight of 1 a row."""
        count = self.builder.regions[child].num_units
        if torch.equal(units, torch.arange(count)):
            return child
        region = self.builder.sum(len(units), child)
        self.weights[region] = torch.eye(count, dtype=torch.float64)[units]
        return region

    def _sum(self, number: int) -> int:
        record = self.records[number]
        if record.get("external_params") is not None:
            raise self._refused(number, "a sum whose weights come from outside")
        below = [self.region_of[child] for child in record["chs"]]
        child = below[0] if len(below) == 1 else self.builder.concat(below)
        params = self._params(number).double()
        edges = torch.as_tensor(record["edge_ids"])
        _, rows, columns = params.shape
        units, fan_in = _units(record), self.builder.regions[child].num_units
        blocks = params.new_zeros(units // rows, fan_in // columns, rows, columns)
        blocks[edges[0], edges[1]] = params
        region = self.builder.sum(units, child, self._tie(number))
        self.weights[region] = blocks.permute(0, 2, 1, 3).reshape(units, fan_in)
        return region

    def _params(self, number: int) -> Tensor:
        source = self.records[number].get("source_node", number)
        params = self.records[source].get("params")
        if params is None:
            raise self._refused(number, "no parameters (call init_parameters in PyJuice first)")
        return torch.as_tensor(np.array(params))

    def _tie(self, number: int) -> str | None:
        source = self.records[number].get("source_node", number)
        return f"pyjuice/{source}" if source in self.sources else None

    def _refused(self, number: int, found: str) -> StructureError:
        kind = self.records[number].get("type")
        return StructureError(
            "a layer of PyJuice has no counterpart here",
            where=f"layer {number} ({kind})",
            found=found,
            expected="categorical, Bernoulli or Gaussian inputs, products, sums of own weights",
        )


class _Export:
    """One export. Products are factors (record, its unit for each unit) until a sum reads them:
    PyJuice's products take inputs and sums alone, its sums products."""

    def __init__(
        self,
        circuit: Circuit,
        max_block_size: int = MAX_BLOCK_SIZE,
        with_parameters: bool = True,
    ) -> None:
        self.circuit = circuit
        self.graph = circuit.graph
        self.with_parameters = with_parameters
        self.regions: dict[int, int] = {}
        self.records: list[Record] = []
        self.factors: list[list[tuple[int, np.ndarray]]] = []
        self.products: dict[int, int] = {}
        self.sources: dict[tuple[int, int], int] = {}
        self.block_size = self._block_size(max_block_size)

    def run(self) -> list[Record]:
        for index, region in enumerate(self.graph.regions):
            if region.kind == "concat":
                # Sums read its parts; nothing else can.
                self.factors.append([])
            elif region.kind in ("input", "sum"):
                number = self._input(index) if region.kind == "input" else self._sum(index)
                self.factors.append([(number, np.arange(region.num_units))])
            else:
                self.factors.append(self._multiplied(index))
        root = self.graph.root
        if self.graph.regions[root].kind != "sum":
            self._add_sum([root], 1, lambda: np.ones((1, 1)), None)
        return self.records

    def _block_size(self, most: int) -> int:
        """The largest block that fits every region but the root: sums over concats need equal ones.

        Kronecker products number single units.
        """
        if any(region.kind == "kronecker" for region in self.graph.regions):
            return 1
        counts = [region.num_units for region in self.graph.regions[:-1]]
        common = int(np.gcd.reduce(counts)) if counts else 1
        return min(most, common & -common)

    def _multiplied(self, index: int) -> list[tuple[int, np.ndarray]]:
        region = self.graph.regions[index]
        for child in region.children:
            if self.graph.regions[child].kind == "concat":
                raise self._refused(index, f"a product of units side by side (region {child})")
        parts = [self.factors[child] for child in region.children]
        if region.kind == "product":
            return [factor for part in parts for factor in part]
        left, right = (self.graph.regions[child].num_units for child in region.children)
        return [(number, np.repeat(units, right)) for number, units in parts[0]] + [
            (number, np.tile(units, left)) for number, units in parts[1]
        ]

    def _input(self, index: int) -> int:
        region = self.graph.regions[index]
        bank, table = self.circuit.bank_of(index)
        if isinstance(bank, GaussianBank):
            value = self.circuit.weights_of(index, torch.float64).cpu()
            value = torch.stack([value[:, 0], value[:, 1].sqrt()], dim=-1)
            # Below its `min_sigma` PyJuice would clamp a unit in training.
            least = min(0.01, float(value[:, 1].min()))
            dist = _pickled("Gaussian", {"mu": None, "sigma": None, "min_sigma": least})
            make = lambda: value  # noqa: E731
        elif isinstance(bank, TableBank):
            dist = _pickled("Categorical", {"num_cats": bank.statistics_of(table).shape[1]})
            make = lambda: self.circuit.weights_of(index, torch.float64).cpu()  # noqa: E731
        else:
            raise self._refused(index, f"inputs of {type(bank).__name__}")
        record = self._record("Input", region.num_units, ())
        record.update(scope=[region.variable], dist=dist)
        return self._own(index, record, lambda: make().flatten().float().numpy())

    def _sum(self, index: int) -> int:
        region = self.graph.regions[index]
        below = self._parts(region.children[0])

        def dense() -> np.ndarray:
            theta = self.circuit.weights_of(index, torch.float64).cpu().numpy()
            made = np.zeros((region.num_units, self.graph.regions[region.children[0]].num_units))
            np.put_along_axis(made, self.graph.mixed_units(index), theta, axis=1)
            return made

        return self._add_sum(below, region.num_units, dense, index)

    def _parts(self, region: int) -> list[int]:
        if self.graph.regions[region].kind != "concat":
            return [region]
        return [
            part for child in self.graph.regions[region].children for part in self._parts(child)
        ]

    def _add_sum(
        self, below: list[int], units: int, dense: Callable[[], np.ndarray], index: int | None
    ) -> int:
        children = tuple(self._product(region) for region in below)
        record = self._record("Sum", units, children)
        rows, columns = record["block_size"], self.records[children[0]]["block_size"]
        num_blocks = units // rows, sum(_units(self.records[c]) for c in children) // columns
        record["edge_ids"] = np.indices(num_blocks).reshape(2, -1)

        def blocks() -> np.ndarray:
            parts: np.ndarray = dense().reshape(num_blocks[0], rows, num_blocks[1], columns)
            parts = parts.transpose(0, 2, 1, 3).reshape(-1, rows, columns)
            return np.ascontiguousarray(parts, dtype=np.float32)

        return self._own(index, record, blocks)

    def _product(self, region: int) -> int:
        """The record of a region as a product, made when it is first read."""
        if region not in self.products:
            factors = self.factors[region]
            units = self.graph.regions[region].num_units
            record = self._record("Product", units, tuple(number for number, _ in factors))
            size = record["block_size"]
            edges = np.stack([of_child for _, of_child in factors], axis=1)
            record["edge_ids"] = edges[::size] // size
            self.records.append(record)
            self.products[region] = len(self.records) - 1
        return self.products[region]

    def _record(self, kind: str, units: int, children: tuple[int, ...]) -> Record:
        size = self.block_size if units % self.block_size == 0 else 1
        return {
            "type": kind,
            "num_node_blocks": units // size,
            "block_size": size,
            "chs": children,
        }

    def _own(self, index: int | None, record: Record, make: Callable[[], np.ndarray]) -> int:
        """Append a record with parameters of its own, or those of the first that it is tied to."""
        number = len(self.records)
        self.records.append(record)
        if index is not None:
            bank, table = self.circuit.bank_of(index)
            source = self.sources.setdefault((id(bank), table), number)
            if source != number:
                record["source_node"] = source
                return number
            self.regions[number] = index
        if self.with_parameters:
            record["params"] = make()
        return number

    def _refused(self, index: int, found: str) -> StructureError:
        return StructureError(
            "PyJuice has no nodes for a region",
            where=f"region {index} ({self.graph.regions[index].kind})",
            found=found,
            expected="categorical or Gaussian inputs, products, sums",
        )


class _Arrays(pickle.Unpickler):
    """Makes numpy arrays and plain values; every other name in the file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ARRAYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused to make a {module}.{name}")


class _Distributions(pickle.Unpickler):
    """Makes a stand-in, which holds what the object held, for PyJuice's distributions."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(DISTRIBUTIONS):
            return type(name, (), {})
        raise pickle.UnpicklingError(f"refused to make a {module}.{name}")


def _distribution(dist: bytes | tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Name and attributes of a pickled distribution, or of one that was taken apart already."""
    if isinstance(dist, tuple):
        return dist
    try:
        made = _Distributions(io.BytesIO(dist)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error
    return type(made).__name__, vars(made)


def _pickled(name: str, state: dict[str, Any]) -> bytes:
    """The pickle of one of PyJuice's distributions, written without it.

    Opcodes: the class by name, an empty tuple, a new object of both, its state, build, stop.
    """
    hooks: dict[str, Iterable[Any]] = {"post_fw_fns": [], "post_bp_fns": [], "sampling_fns": []}
    body = pickle.dumps({**hooks, **state}, protocol=2)[2:-1]
    module = f"{DISTRIBUTIONS}.{name.lower()}"
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")\x81" + body + b"b."


def _units(record: Record) -> int:
    return int(record["num_node_blocks"]) * int(record["block_size"])
