"""The integral circuit as a torch module: its parameters are the networks'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distpc.circuits.circuit import Circuit
from distpc.circuits.compiled import MAX_FOLD_BYTES, compile_graph
from distpc.circuits.inputs import TableBank
from distpc.circuits.integral.layout import layout_of
from distpc.circuits.integral.leaves import leaf_writer
from distpc.circuits.integral.networks import FunctionGroup, build_networks, slots_of
from distpc.circuits.integral.quadrature import jittered, quadrature
from distpc.circuits.integral.settings import IntegralSettings
from distpc.circuits.integral.writing import Points, Writer, Written
from distpc.circuits.share_out import share_units_
from distpc.circuits.sums import SumBank
from distpc.parallel.axis import Axis
from distpc.structures.region_graph import RegionGraph
from distpc.structures.resize import width_of, with_num_states, with_shared_inputs

_SUM_FLOOR = 1e-20
"""Smoothing of sums while networks are trained: too small to change a weight that matters, and
enough for sums to know that none of their units is 0."""


@dataclass
class _Skeleton:
    """A compiled circuit of one K without parameters of its own, and what writes them."""

    circuit: Circuit
    names: list[str]
    writer: Writer
    sizes: list[int]


class IntegralCircuit(nn.Module):
    """A probabilistic integral circuit over any structure of dense sums.

    Calling it gives log-likelihoods (B,) in nats of the circuit that its networks write: with
    gradients enabled that of the step's draw (see `begin_step`), otherwise of `num_states` points
    where the quadrature has them. Gradients are true ones, for Adam.

    Args:
        graph: the structure; its own number of states is the one that is evaluated.
        num_categories: of each variable.
        settings: see `IntegralSettings`.
        seed: of the initial parameters and of all draws in training.
        max_fold_bytes: as of `Circuit`.

    Attributes:
        graph: with inputs tied, where they share their function.
        schedule: of the circuit with the structure's own number of states.
        networks: the functions, by what they are functions of.
        any_rank: as of `Circuit`.

    Raises:
        StructureError: the structure has units that stand for no points of latents, cannot have
            another number of states, or has inputs that no network writes.
    """

    def __init__(
        self,
        graph: RegionGraph,
        num_categories: Sequence[int | None],
        settings: IntegralSettings | None = None,
        *,
        seed: int = 0,
        max_fold_bytes: int = MAX_FOLD_BYTES,
    ) -> None:
        super().__init__()
        self.settings = settings or IntegralSettings()
        if self.settings.leaf_sharing == "full":
            graph = with_shared_inputs(graph, num_categories)
        self.graph, self.num_states = graph, width_of(graph)
        self.check_states(max(2, self.num_states), *self.settings.train_states)
        self.num_categories = tuple(num_categories)
        self.seed = seed
        self.max_fold_bytes = max_fold_bytes
        self.any_rank: Callable[[bool], bool] = bool
        self.dataset: dict[str, Any] = {}
        self.training_facts: dict[str, Any] = {}
        self._axis: Axis | None = None
        self._skeletons: dict[tuple[int, torch.device, bool], _Skeleton] = {}
        self._step = 0
        self._evaluated: tuple[Any, list[Tensor]] | None = None
        self.schedule = compile_graph(self.graph, self.num_categories, max_fold_bytes)
        layout = layout_of(self.graph, self.schedule)
        self._slots = slots_of(layout, self.settings)
        self.networks = nn.ModuleDict(build_networks(layout, self.settings, seed))

    def forward(self, x: Any, latents: Any = None, observed: Any = None) -> Tensor:
        """Log-likelihoods (B,) in nats; arguments as of `Circuit`."""
        if torch.is_grad_enabled():
            num_states, points = self._draw()
            skeleton = self._skeleton(num_states)
            statistics = skeleton.writer(points)
        else:
            skeleton = self._skeleton(self.num_states)
            statistics = self._written(skeleton)
        skeleton.circuit.any_rank = self.any_rank
        named = dict(zip(skeleton.names, statistics, strict=True))
        log_prob: Tensor = functional_call(skeleton.circuit, named, (x, latents, observed))
        return log_prob

    def check_states(self, *states: int) -> None:
        """Refuse numbers of states that the structure cannot have.

        Raises:
            StructureError: naming the region, or the number.
        """
        for num_states in states:
            with_num_states(self.graph, num_states)

    def begin_step(self, step: int) -> None:
        """Draw K and the points of a training step, by the seed and the step's number alone: all
        micro-batches and ranks of a step have the same ones, and so has a resumed training."""
        self._step = step
        self._evaluated = None

    def share_units_(self, axis: Axis) -> None:
        """Write and evaluate this rank's units only, as `share_out.share_units_` says.

        The networks stay whole on every rank: each has a share of their gradient, and backward
        adds the shares up.

        Args:
            axis: the ranks that share the units; they are to be given the same samples.
        """
        self._axis = axis

    @torch.no_grad()
    def materialise(self, num_states: int | None = None) -> Circuit:
        """The ordinary circuit of K quadrature points in place of every latent.

        Its rows are normalised exactly (see `writing`), all smoothing is part of its statistics,
        and these are on the scale of flows, so that any rule can train it further.

        Args:
            num_states: K; default: the structure's own.
        """
        num_states = self.num_states if num_states is None else num_states
        skeleton = self._skeleton(num_states, is_shared=False)
        made = skeleton.writer.write(self._points(skeleton.sizes))
        circuit = self._empty_circuit(num_states)
        named = dict(zip(skeleton.names, made, strict=True))
        circuit.load_state_dict(named, strict=False, assign=True)
        circuit.to(self.device)
        circuit.set_smoothing(0.0, self.settings.leaf_floor, 1)
        circuit.rescale_to_uses_()
        circuit.set_smoothing(0.0, 0.0, 1)
        circuit.dataset = self.dataset
        return circuit

    @torch.no_grad()
    def start_near_(self, counts: Sequence[Tensor | None]) -> None:
        """Move input units to the data's marginals.

        Args:
            counts: of each variable (C,) counts of its values; None leaves its inputs alone.
        """
        shares: dict[str | int, tuple[int, Tensor]] = {}
        for index, region in enumerate(self.graph.regions):
            count = None if region.variable is None else counts[region.variable]
            if count is not None:
                owner = index if region.tie is None else region.tie
                first, pooled = shares.get(owner, (index, torch.zeros_like(count)))
                shares[owner] = first, pooled + count
        of_region = dict(shares.values())
        for use in layout_of(self.graph, self.schedule).inputs:
            network = self.networks[use.group]
            assert isinstance(network, FunctionGroup)
            for function in use.owners:
                if function[0] in of_region:
                    smoothed = of_region[function[0]] + 1.0 / use.size
                    bias = network.bias[self._slots[use.group, *function]]
                    leaf_writer(use.kind).start_near(smoothed / smoothed.sum(), bias)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Trainable parameters: entries of the networks'."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """ "network": all of them, whose `.grad` is the loss's gradient."""
        return {"network": list(self.parameters())}

    def _written(self, skeleton: _Skeleton) -> list[Tensor]:
        """Statistics of an evaluation, written once for all of its batches."""
        key = (id(skeleton), self._step, sum(p._version for p in self.parameters()))
        if self._evaluated is None or self._evaluated[0] != key:
            made = skeleton.writer.write(self._points(skeleton.sizes))
            self._evaluated = key, made
        return self._evaluated[1]

    def _draw(self) -> tuple[int, Points]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._step)
        choices = self.settings.train_states or (self.num_states,)
        chosen = int(torch.randint(len(choices), (), generator=generator))
        sizes = self._skeleton(choices[chosen]).sizes
        exact, jitter = self._points(sizes), self.settings.jitter
        moved = {size: jittered(rule, jitter, generator) for size, rule in exact.items()}
        return choices[chosen], moved

    def _points(self, sizes: Sequence[int]) -> Points:
        return {size: quadrature(self.settings.rule, size) for size in sizes}

    def _skeleton(self, num_states: int, is_shared: bool = True) -> _Skeleton:
        """The compiled circuit of that K, kept for the next time; of this rank's units, if any
        ranks share them and it is to be shared."""
        axis = self._axis if is_shared else None
        key = (num_states, self.device, axis is not None)
        if key not in self._skeletons:
            circuit = self._empty_circuit(num_states)
            layout = layout_of(circuit.graph, circuit.schedule)
            banks = [
                Written(tuple(bank.statistics.shape), range(plan.num_units))
                for bank, plan in zip(circuit.bank_list, circuit.schedule.banks, strict=True)
            ]
            if axis is not None:
                lines = share_units_(circuit, axis).banks
                banks = [
                    Written(tuple(bank.statistics.shape), line.units(axis.rank), bool(line.split))
                    for bank, line in zip(circuit.bank_list, lines, strict=True)
                ]
            for bank in circuit.bank_list:
                # Never read: every call brings statistics with it.
                bank.statistics = nn.Parameter(torch.empty(0), requires_grad=False)
                if isinstance(bank, SumBank):
                    bank.smoothing = _SUM_FLOOR
                elif isinstance(bank, TableBank):
                    bank.set_smoothing(self.settings.leaf_floor, 1)
            circuit.to(self.device)
            writer = Writer(
                layout,
                banks,
                dict(self.networks.items()),  # type: ignore[arg-type]
                self._slots,
                self.settings.leaf_floor,
                self.settings.block_points,
                axis,
            )
            names = [f"banks.{name}.statistics" for name in circuit.banks]
            self._skeletons[key] = _Skeleton(circuit, names, writer, layout.sizes)
        return self._skeletons[key]

    def _empty_circuit(self, num_states: int) -> Circuit:
        graph = self.graph
        if num_states != self.num_states:
            graph = with_num_states(graph, num_states)
        return Circuit(
            graph, self.num_categories, max_fold_bytes=self.max_fold_bytes, device="meta"
        )
