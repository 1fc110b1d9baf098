"""libcirkit: a circuit as its symbolic circuit, and back.

What fits: categorical and Gaussian inputs, Hadamard and Kronecker products, sums of any arity
(dense "CP" and "Tucker" sums, mixing layers). libcirkit (github.com/april-tools/cirkit, 0.3)
evaluates and trains symbolic circuits once they are compiled in a `PipelineContext`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from distpc.circuits.exchange.weights import write_weights
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.inputs import TableBank
from distpc.errors import DistpcError, StructureError
from distpc.structures.builder import GraphBuilder
from distpc.structures.region_graph import RegionGraph

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

Weights = Literal["softmax", "linear"]


def to_cirkit(circuit: Circuit, weights: Weights = "softmax") -> Any:
    """A `cirkit.symbolic.circuit.Circuit` with the parameters of `circuit`.

    Compile it with `PipelineContext(backend="torch", semiring="lse-sum", ...)`: its output is
    log-likelihoods (B, 1, 1).

    Args:
        circuit: tied regions share tensors there as well; inputs of any family over categories
            turn categorical; block-diagonal sums turn dense, their zeros written out.
        weights: "softmax": learnable logits, for gradient methods; "linear": probabilities
            themselves, for libcirkit's EM.

    Raises:
        StructureError: naming the region that libcirkit cannot represent.
        DistpcError: libcirkit is not installed.
    """
    return _Export(circuit, weights).run()


def from_cirkit(symbolic: Any, context: Any) -> Circuit:
    """The circuit of a symbolic circuit with the parameters that it has in `context`.

    Args:
        symbolic: a `cirkit.symbolic.circuit.Circuit` of one output unit.
        context: the `PipelineContext` in which it was compiled (and trained).

    Raises:
        StructureError: naming the layer that has no counterpart here, or whose weights are no
            distributions.
        DistpcError: libcirkit is not installed.
    """
    return _Import(symbolic, context).run()


def _cirkit() -> Any:
    """The modules of libcirkit that are used here."""
    try:
        import cirkit.symbolic.circuit as circuit
        import cirkit.symbolic.initializers as initializers
        import cirkit.symbolic.layers as layers
        import cirkit.symbolic.parameters as parameters
        import cirkit.utils.scope as scope
    except ImportError as error:
        raise DistpcError(
            "libcirkit is not installed",
            found=error,
            fix="pip install 'libcirkit>=0.3,<0.4'",
        ) from error
    return _Names(
        circuit,
        initializers.ConstantTensorInitializer,
        layers,
        parameters,
        scope.Scope,
    )


class _Names:
    def __init__(self, circuit: Any, constant: Any, layers: Any, parameters: Any, scope: Any):
        self.circuit, self.Circuit = circuit, circuit.Circuit
        self.Constant, self.Scope = constant, scope
        self.layers, self.parameters = layers, parameters


class _Export:
    """One export: layers made so far, and the parameter graph of each table of weights."""

    def __init__(self, circuit: Circuit, weights: Weights) -> None:
        self.circuit = circuit
        self.graph = circuit.graph
        self.is_softmax = weights == "softmax"
        self.names = _cirkit()
        self.inputs_of: dict[Any, list[Any]] = {}
        self.layers: list[Any] = []
        self.made: list[Any] = []
        self.shared: dict[tuple[int, int, str], Any] = {}
        self.holders: list[Any] = []

    def run(self) -> Any:
        add = {
            "input": self._input,
            "product": self._product,
            "kronecker": self._kronecker,
            "sum": self._sum,
            "concat": self._concat,
        }
        for index, region in enumerate(self.graph.regions):
            self.made.append(add[region.kind](index))
        # libcirkit folds a circuit's own tensors but not references to them: tensors that regions
        # share live in a circuit apart, an operand, which the compiler compiles first.
        kind = self.names.circuit
        operation = None
        if self.holders:
            holder = self.names.Circuit(self.holders, {}, self.holders)
            operation = kind.CircuitOperation(kind.CircuitOperator.CONCATENATE, (holder,))
        return self.names.Circuit(self.layers, self.inputs_of, [self.made[-1]], operation=operation)

    def _add(self, layer: Any, inputs: list[Any]) -> Any:
        self.layers.append(layer)
        if inputs:
            self.inputs_of[layer] = inputs
        return layer

    def _input(self, index: int) -> Any:
        region = self.graph.regions[index]
        bank, _ = self.circuit.bank_of(index)
        scope = self.names.Scope([region.variable])
        value = self.circuit.weights_of(index, torch.float64)
        layers = self.names.layers
        if isinstance(bank, GaussianBank):
            mean, stddev = value[:, 0], value[:, 1].sqrt()
            layer = layers.GaussianLayer(
                scope,
                region.num_units,
                mean=self._parameter(index, "mean", mean),
                stddev=self._parameter(index, "stddev", stddev),
            )
        elif isinstance(bank, TableBank) and value.shape[1] >= 2:
            layer = layers.CategoricalLayer(
                scope,
                region.num_units,
                num_categories=value.shape[1],
                probs=self._distribution(index, value),
            )
        else:
            raise self._refused(
                index, f"inputs of {type(bank).__name__}, {value.shape[1]} categories"
            )
        return self._add(layer, [])

    def _product(self, index: int) -> Any:
        region = self.graph.regions[index]
        inputs = [self._whole(child) for child in region.children]
        if len(inputs) == 1:
            return inputs[0]
        return self._add(self.names.layers.HadamardLayer(region.num_units, len(inputs)), inputs)

    def _kronecker(self, index: int) -> Any:
        inputs = [self._whole(child) for child in self.graph.regions[index].children]
        units = [layer.num_output_units for layer in inputs]
        if len(set(units)) > 1:
            raise self._refused(index, f"a Kronecker product of {units[0]} and {units[1]} units")
        return self._add(self.names.layers.KroneckerLayer(units[0], 2), inputs)

    def _sum(self, index: int) -> Any:
        region = self.graph.regions[index]
        child = self.made[region.children[0]]
        inputs = child if isinstance(child, list) else [child]
        theta = self.circuit.weights_of(index, torch.float64)
        mixed = torch.from_numpy(self.graph.mixed_units(index)).to(theta.device)
        dense = theta.new_zeros(
            region.num_units, self.graph.regions[region.children[0]].num_units
        ).scatter_(1, mixed, theta)
        layer = self.names.layers.SumLayer(
            inputs[0].num_output_units,
            region.num_units,
            arity=len(inputs),
            weight=self._distribution(index, dense),
        )
        return self._add(layer, inputs)

    def _concat(self, index: int) -> list[Any]:
        # No layer: sums read several layers side by side.
        inputs = [self._whole(child) for child in self.graph.regions[index].children]
        units = [layer.num_output_units for layer in inputs]
        if len(set(units)) > 1:
            raise self._refused(index, f"a concatenation of {units} units")
        return inputs

    def _whole(self, region: int) -> Any:
        """A region as one layer; a concat that no sum reads goes through a constant identity."""
        made = self.made[region]
        if not isinstance(made, list):
            return made
        units = self.graph.regions[region].num_units
        names = self.names
        identity = names.parameters.Parameter.from_input(
            names.parameters.ConstantParameter(units, units, value=np.eye(units))
        )
        layer = names.layers.SumLayer(units // len(made), units, len(made), weight=identity)
        self.made[region] = self._add(layer, made)
        return layer

    def _distribution(self, index: int, value: Tensor) -> Any:
        if not self.is_softmax:
            return self._parameter(index, "linear", value)
        softmax = self.names.parameters.SoftmaxParameter(tuple(value.shape))
        return self._parameter(index, "logits", value.log(), softmax)

    def _parameter(self, index: int, name: str, value: Tensor, *operators: Any) -> Any:
        """A learnable tensor; for tied regions a reference to the first one's."""
        bank, table = self.circuit.bank_of(index)
        key = (id(bank), table, name)
        if key in self.shared:
            return self.shared[key].ref()
        owners = self.circuit.schedule.banks[self.circuit.bank_list.index(bank)].owners[table]
        parameters = self.names.parameters
        tensor = parameters.TensorParameter(
            *value.shape, initializer=self.names.Constant(value.cpu().numpy())
        )
        graph = parameters.Parameter.from_input(tensor)
        if operators:
            graph = parameters.Parameter.from_sequence(tensor, *operators)
        if len(owners) == 1:
            return graph
        self.shared[key] = graph
        self.holders.append(self._holder(tensor))
        return graph.ref()

    def _holder(self, tensor: Any) -> Any:
        """A layer that does nothing but own a tensor."""
        rows = tensor.shape[0]
        parameter = self.names.parameters.Parameter.from_input(tensor)
        scope = self.names.Scope([0])
        if len(tensor.shape) == 1:
            return self.names.layers.BinomialLayer(scope, rows, logits=parameter)
        return self.names.layers.EmbeddingLayer(
            scope, rows, num_states=tensor.shape[1], weight=parameter
        )

    def _refused(self, index: int, found: str) -> StructureError:
        return StructureError(
            "libcirkit has no layer for a region",
            where=f"region {index} ({self.graph.regions[index].kind})",
            found=found,
            expected="layers of equally many units; inputs of two categories or more",
        )


class _Import:
    """One import: a region for each layer, then a circuit with the layers' weights."""

    def __init__(self, symbolic: Any, context: Any) -> None:
        self.names = _cirkit()
        self.symbolic = symbolic
        # The parameters' values live in the context's compiler; it has no public way to read one.
        self.compiler = context._compiler
        if not context.is_compiled(symbolic):
            raise StructureError(
                "a symbolic circuit has no parameters before it is compiled",
                where="symbolic circuit",
                fix="compile it in the context that is given: context.compile(symbolic)",
            )
        self.layers = list(symbolic.topological_ordering())
        self.builder = GraphBuilder()
        self.region_of: dict[Any, int] = {}
        self.weights: dict[int, Tensor] = {}
        self.categories: dict[int, int | None] = {}
        self.ties = self._find_ties()

    def run(self) -> Circuit:
        from distpc.circuits.circuit import Circuit

        outputs = list(self.symbolic.outputs)
        if len(outputs) != 1 or outputs[0].num_output_units != 1:
            raise StructureError(
                "a circuit has one output unit",
                where="symbolic circuit",
                found=f"outputs of {[layer.num_output_units for layer in outputs]} units",
                expected="one layer of one unit",
            )
        for number, layer in enumerate(self.layers):
            self.region_of[layer] = self._region(number, layer)
        graph = RegionGraph(self.builder.regions, 1 + max(self.categories))
        circuit = Circuit(graph, [self.categories[v] for v in range(graph.num_variables)])
        write_weights(circuit, self.weights)
        return circuit

    def _region(self, number: int, layer: Any) -> int:
        layers = self.names.layers
        children = [self.region_of[below] for below in self.symbolic.layer_inputs(layer)]
        if isinstance(layer, layers.CategoricalLayer):
            probs = layer.probs if layer.logits is None else layer.logits
            value = self._value(probs)
            if layer.logits is not None:
                value = value.exp()
            return self._input(number, layer, value, layer.num_categories)
        if isinstance(layer, layers.GaussianLayer) and layer.log_partition is None:
            mean, stddev = self._value(layer.mean), self._value(layer.stddev)
            return self._input(number, layer, torch.stack([mean, stddev.square()], -1), None)
        if isinstance(layer, layers.HadamardLayer):
            return self.builder.product(children)
        if isinstance(layer, layers.KroneckerLayer):
            region = children[0]
            for child in children[1:]:
                region = self.builder.kronecker(region, child)
            return region
        if isinstance(layer, layers.SumLayer):
            return self._sum(number, layer, children)
        raise StructureError(
            "a layer of libcirkit has no counterpart here",
            where=self._where(number),
            found=f"{type(layer).__name__}({dict(layer.config)})",
            expected="normalised categorical or Gaussian inputs, Hadamard, Kronecker, sums",
        )

    def _input(self, number: int, layer: Any, value: Tensor, categories: int | None) -> int:
        (variable,) = layer.scope
        if self.categories.setdefault(variable, categories) != categories:
            raise StructureError(
                "two input layers disagree about a variable",
                where=self._where(number),
                found=f"variable {variable} with {categories} categories",
                expected=f"{self.categories[variable]} categories",
            )
        region = self.builder.input(layer.num_output_units, variable, self.ties[number])
        self.weights[region] = value
        return region

    def _sum(self, number: int, layer: Any, children: list[int]) -> int:
        value, tie = self._value(layer.weight), self.ties[number]
        units = layer.num_output_units
        if isinstance(layer.weight.output, self.names.parameters.MixingWeightParameter):
            region = self.builder.mixing(children, tie)
            # Column h * K + k belongs to unit k of child h.
            value = value.unflatten(1, (len(children), units)).diagonal(dim1=0, dim2=2).T
        else:
            child = children[0] if len(children) == 1 else self.builder.concat(children)
            region = self.builder.sum(units, child, tie)
        if value.is_complex():
            raise StructureError("weights are complex numbers", where=self._where(number))
        self.weights[region] = value
        return region

    def _value(self, parameter: Any) -> Tensor:
        """What a parameter's graph computes now, with the tensors of the compiled circuit."""
        with torch.no_grad():
            value = self.compiler.compile_parameter(parameter.ref())()[0].detach()
        return value if value.is_complex() else value.double().cpu()

    def _find_ties(self) -> list[str | None]:
        """For each layer a name that it shares with the layers of the same tensors."""
        parameters = self.names.parameters
        keys = []
        for layer in self.layers:
            key = []
            for name, parameter in sorted(layer.params.items()):
                for node in parameter.topological_ordering():
                    if isinstance(node, parameters.ReferenceParameter):
                        node = node.deref()
                    is_tensor = isinstance(node, parameters.TensorParameter)
                    key.append((name, type(node).__name__, id(node) if is_tensor else None))
            keys.append(tuple(key))
        numbers = {key: number for number, key in reversed(list(enumerate(keys))) if key}
        return [f"cirkit/{numbers[key]}" if key and keys.count(key) > 1 else None for key in keys]

    def _where(self, number: int) -> str:
        layer = self.layers[number]
        return f"layer {number} ({type(layer).__name__})"
