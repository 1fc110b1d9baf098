"""The circuit: a torch module that evaluates a compiled region graph on one device."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distpc.circuits import families, queries
from distpc.circuits.bank import Bank
from distpc.circuits.compiled import MAX_FOLD_BYTES, compile_graph
from distpc.circuits.evidence import Evidence, EvidenceReader
from distpc.circuits.fill import fill_
from distpc.circuits.footprint import footprint
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.random_start import RandomStart
from distpc.circuits.scan import Scan
from distpc.circuits.schedule import BankPlan
from distpc.circuits.step import Exchange
from distpc.circuits.steps import Pass, build_step, run_steps
from distpc.circuits.sums import SumBank
from distpc.errors import StructureError
from distpc.structures.region_graph import RegionGraph

FLOAT = torch.float32


class Evaluation(NamedTuple):
    """A batch's log-likelihoods and how they came about.

    Attributes:
        log_prob: (B,) float32 nats.
        scaled: the pass over scaled values, of all samples.
        logs: the pass in the log domain, of the samples `again`; None where none needed it.
        again: indices of those samples.
    """

    log_prob: Tensor
    scaled: Pass
    logs: Pass | None
    again: Tensor


class Circuit(nn.Module):
    """A probabilistic circuit whose parameters are expected statistics (see `statistics`).

    Calling it gives log-likelihoods in nats; backward of a loss linear in them leaves *flows* in
    the `.grad` of the statistics: for the loss -log_prob.sum() / N, S.grad is minus the mean flow.

    Args:
        graph: the structure.
        num_categories: for each variable its number of categories; None for a real variable.
        seed: of the random initial weights.
        init_noise: 0 makes all weights uniform; 1 gives rows whose entries differ up to e^2-fold.
        max_fold_bytes: bound on the parameters that are evaluated, and gathered, together.
        device: where parameters are drawn and kept; a seed draws other ones on a GPU than here.
            "meta": parameters take no memory and have no values, see `fill`.

    Attributes:
        any_rank: given whether this process needs the log-domain pass, whether any does. Where
            parameters are partitioned over processes (ZeRO-3) every process has to take part in
            every pass: set it to an all-reduce there.
        units: those that each step of the schedule yields in this process.
        exchange: with processes that own other units, see `sharding`; None: all are here.
        stretches: of steps, whose messages training computes again in the backward pass instead of
            keeping them, see `recompute`; None: all are kept.
        last_impossible: number of samples of the last forward with likelihood 0 or NaN.
    """

    def __init__(
        self,
        graph: RegionGraph,
        num_categories: Sequence[int | None],
        *,
        seed: int = 0,
        init_noise: float = 1.0,
        max_fold_bytes: int = MAX_FOLD_BYTES,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.graph = graph
        self.num_categories = _categories(num_categories, graph.num_variables)
        self.max_fold_bytes = max_fold_bytes
        self.schedule = compile_graph(graph, self.num_categories, max_fold_bytes)
        self.banks = nn.ModuleDict(
            {
                f"{plan.kind}_{number:04d}": _build_bank(plan)
                for number, plan in enumerate(self.schedule.banks)
            }
        )
        self._build_steps()
        self._tables = {
            owner: (number, table)
            for number, plan in enumerate(self.schedule.banks)
            for table, owners in enumerate(plan.owners)
            for owner in owners
        }
        values = [0] * graph.num_latents
        for region in graph.regions:
            if region.latent is not None:
                values[region.latent] = max(values[region.latent], region.num_units)
        self.latent_sizes = tuple(values)
        self.reader = EvidenceReader(self.num_categories, self.latent_sizes)
        self.any_rank: Callable[[bool], bool] = bool
        self.exchange: Exchange | None = None
        self.stretches: Sequence[range] | None = None
        self.smoothing = (0.0, 0.0, 1)
        self.last_impossible = torch.zeros((), dtype=torch.int64)
        self.dataset: dict[str, Any] = {}
        self.training_facts: dict[str, Any] = {}
        self.scan = Scan.find(self)
        if torch.device(device).type != "meta":
            fill_(self, RandomStart(self, seed, init_noise, device=device), device=device)
            self.to(device)

    def __repr__(self) -> str:
        # torch's tree of modules shows the schedule, hundreds of lines that say little.
        return (
            f"Circuit({self.num_variables} variables, {self.num_latents} latents, "
            f"{len(self.graph.regions)} regions, {self.num_parameters:,} parameters)"
        )

    def forward(self, x: Any, latents: Any = None, observed: Any = None) -> Tensor:
        """Log-likelihoods (B,) in nats, float32; exactly -inf for impossible evidence.

        Args:
            x: (B, V) integers with -1, or floats with NaN, where missing; or evidence read before.
            latents: (B, Z) integers, -1 where unobserved: evidence on latent variables.
            observed: bool (V,) or (B, V); False sums the variable out.

        Raises:
            EvidenceError: values, mask or latents do not fit the circuit.
        """
        read = isinstance(x, Evidence)
        evidence = x if read else self.reader.read(x, latents, observed, self.device)
        log_prob = self.evaluate(evidence).log_prob
        self.last_impossible = (~log_prob.detach().isfinite()).sum()
        return log_prob

    def evaluate(self, evidence: Evidence, keep: bool = False) -> Evaluation:
        """Evaluate scaled values, then in logs the samples that those cannot represent.

        Args:
            evidence: checked observations.
            keep: keep the messages of every step, and make them differentiable.
        """
        if self.scan is not None and not keep and self._may_scan(evidence):
            return _scanned(self.scan.log_prob(evidence))
        scaled = self._run(evidence, in_logs=False, keep=keep)
        again = scaled.is_weak.nonzero()[:, 0]
        if not self.any_rank(len(again) > 0):
            return Evaluation(scaled.log_prob, scaled, None, again)
        logs = self._run(evidence.select(again), in_logs=True, keep=keep)
        log_prob = scaled.log_prob.index_copy(0, again, logs.log_prob)
        return Evaluation(log_prob, scaled, logs, again)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @property
    def num_variables(self) -> int:
        """V."""
        return self.graph.num_variables

    @property
    def num_latents(self) -> int:
        """Z."""
        return self.graph.num_latents

    @property
    def num_parameters(self) -> int:
        """Entries of the statistics; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """ "em": statistics, for the rule S <- (1 - step) * S - step * S.grad; "gradient": others,
        whose `.grad` is the loss's gradient."""
        groups: dict[str, list[nn.Parameter]] = {"em": [], "gradient": []}
        for bank in self.bank_list:
            groups[bank.learns_by] += bank.parameters()
        return groups

    def set_smoothing(self, pseudocount: float, leaf_pseudocount: float, num_samples: int) -> None:
        """Smooth the read-out of weights.

        Args:
            pseudocount: samples added to a sum row, spread over its entries.
            leaf_pseudocount: samples added to an input unit, spread over its categories.
            num_samples: N of the training data.
        """
        self.smoothing = (pseudocount, leaf_pseudocount, num_samples)
        for bank in self.bank_list:
            count = pseudocount if isinstance(bank, SumBank) else leaf_pseudocount
            bank.set_smoothing(count, num_samples)

    @property
    def matmul_dtype(self) -> torch.dtype:
        """Of the matrix products of sums in training, see `SumBank`; float32 unless set."""
        return next((b.matmul_dtype for b in self.bank_list if isinstance(b, SumBank)), FLOAT)

    @matmul_dtype.setter
    def matmul_dtype(self, dtype: torch.dtype) -> None:
        for bank in self.bank_list:
            if isinstance(bank, SumBank):
                bank.matmul_dtype = dtype

    @property
    def bank_list(self) -> list[Bank]:
        """The parameter modules, in the order of the schedule's banks."""
        return list(self.banks.values())  # type: ignore[arg-type]

    def statistics_of(self, region: int) -> Tensor:
        """A view of a region's statistics: (K', K) of a sum, (K, C) of a categorical input,
        (K, 3) of a Gaussian one; writing to it writes the parameter.

        Raises:
            ValueError: a product or concat region.
        """
        bank, table = self.bank_of(region)
        return bank.statistics_of(table)

    def weights_of(self, region: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalised weights of a region, shaped as `statistics_of`.

        Of a Gaussian input: mean and variance, (K, 2), in the variable's units.
        """
        bank, table = self.bank_of(region)
        return bank.weights_of(table, dtype)

    def bank_of(self, region: int) -> tuple[Bank, int]:
        """The parameter module of a region, and the number of its table there."""
        if region not in self._tables:
            raise ValueError(f"region {region} ({self.graph.regions[region].kind}) has no weights")
        number, table = self._tables[region]
        return self.bank_list[number], table

    def uses(self, *, smoothed: bool = True) -> list[Tensor]:
        """For each region (num_units,): how often a sample is expected to use each unit.

        Without smoothing: as far as data, and not pseudocounts, say so.
        """
        return queries.uses(self, smoothed=smoothed)

    @torch.no_grad()
    def rescale_to_uses_(self) -> None:
        """Bring statistics to the scale of flows: S <- theta * expected uses of the row.

        Needed after random initialisation, and after assembling a circuit from pieces that were
        trained alone; else the first steps of training are too small or too large.
        """
        uses = self.uses()
        for bank, plan in zip(self.bank_list, self.schedule.banks, strict=True):
            of_tables = [
                torch.stack([uses[owner] for owner in owners]).sum(0) for owners in plan.owners
            ]
            bank.rescale_(of_tables)

    def standardise(self, centre: Tensor, spread: Tensor) -> None:
        """Set about which values the statistics of real variables are kept; call before training.

        Initial means are drawn about the centre, on the scale of the spread.

        Args:
            centre: (V,) for instance training means; entries of categorical variables are unused.
            spread: (V,) for instance standard deviations, > 0.
        """
        for bank, plan in zip(self.bank_list, self.schedule.banks, strict=True):
            if not isinstance(bank, GaussianBank):
                continue
            for table, owners in enumerate(plan.owners):
                variables = [self.graph.regions[owner].variable for owner in owners]
                bank.centre[table] = centre[variables].double().mean()
                bank.spread[table] = spread[variables].double().mean()

    @torch.no_grad()
    def entropy_of_weights(self) -> dict[str, float]:
        """Mean entropy in bits of the rows of each sum fold, by its name."""
        entropies = {}
        for name, bank in self.banks.items():
            if isinstance(bank, SumBank):
                weights = bank.weights()
                bits = -torch.special.xlogy(weights, weights).sum(-1) / torch.log(torch.tensor(2.0))
                entropies[name] = float(bits.mean())
        return entropies

    def log_prob(
        self,
        x: Any,
        observed: Any = None,
        latents: Any = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """As calling the circuit, in batches and without gradients; see `queries.log_prob`."""
        return queries.log_prob(self, x, observed, latents, batch_size)

    def conditional(self, x: Any, observed: Any, variables: Sequence[int]) -> Tensor:
        """P(variable = c | observed), (B, len(variables), C); see `queries.conditional`."""
        return queries.conditional(self, x, observed, variables)

    def conditional_joint(self, x: Any, observed: Any, variables: Sequence[int]) -> Tensor:
        """P(variables | observed), (B, C1, ..., Cn); see `queries.conditional_joint`."""
        return queries.conditional_joint(self, x, observed, variables)

    def posterior(self, x: Any, observed: Any = None) -> Tensor:
        """P(latent = k | observed), (B, Z, K); see `queries.posterior`."""
        return queries.posterior(self, x, observed)

    def expectation(
        self, x: Any, observed: Any = None, variables: Sequence[int] | None = None
    ) -> queries.Moments:
        """Mean and variance of variables given the evidence; see `queries.expectation`."""
        return queries.expectation(self, x, observed, variables)

    def mpe(self, x: Any, observed: Any = None) -> queries.MostProbable:
        """The jointly most probable values and latents; see `queries.mpe`."""
        return queries.mpe(self, x, observed)

    def marginal_map_approximate(
        self,
        x: Any,
        observed: Any,
        variables: Sequence[int],
        num_candidates: int = 8,
        seed: int = 0,
        num_sweeps: int = 0,
    ) -> queries.ApproximateMarginalMap:
        """Good values of some variables, the rest summed out: approximate, see
        `queries.marginal_map_approximate`."""
        return queries.marginal_map_approximate(
            self, x, observed, variables, num_candidates, seed, num_sweeps
        )

    def entropy(self, num_samples: int = 0, seed: int = 0) -> queries.Entropy:
        """Entropies in nats: exact, bounds, and an estimate; see `queries.entropy`."""
        return queries.entropy(self, num_samples, seed)

    def mutual_information(self, variables: Sequence[int] | None = None) -> Tensor:
        """Of all pairs of variables, in nats; see `queries.mutual_information`."""
        return queries.mutual_information(self, variables)

    def sample(self, n: int = 1, seed: int = 0, x: Any = None, observed: Any = None) -> Tensor:
        """Samples (n, V); given evidence (B, n, V); see `queries.sample`."""
        return queries.sample(self, n, seed, x, observed)

    def _run(self, evidence: Evidence, *, in_logs: bool, keep: bool) -> Pass:
        return run_steps(
            self.schedule,
            self.step_list,
            self.bank_list,
            self.units,
            evidence,
            in_logs=in_logs,
            keep=keep,
            exchange=self.exchange,
            stretches=self.stretches if torch.is_grad_enabled() and not keep else None,
        )

    def _may_scan(self, evidence: Evidence) -> bool:
        assert self.scan is not None
        # A scan keeps all messages: no replacement where some are to be computed again.
        alone = self.exchange is None and self.stretches is None
        observed = evidence.latents is None and evidence.likelihoods is None
        return alone and observed and self.scan.is_exact()

    def blank(self) -> Circuit:
        """The same circuit without values (or with the same, if it has any already)."""
        shared = self.graph, self.schedule
        return copy.deepcopy(self, {id(part): part for part in shared})

    def recompute_messages_(self) -> None:
        """Let training keep some messages only, and compute the others again in the backward pass.

        Likelihoods and flows stay what they are, to the rounding of sums. Call it before
        `share_units_`.
        """
        self.schedule = compile_graph(
            self.graph, self.num_categories, self.max_fold_bytes, late_inputs=True
        )
        self._build_steps()
        if self.device.type != "meta":
            self.steps.to(self.device)
        self.stretches = footprint(self.graph, self.schedule, recompute=True).stretches

    def _build_steps(self) -> None:
        regions = self.graph.regions
        variables = [-1 if r.variable is None else r.variable for r in regions]
        self.step_list = [
            build_step(plan, fanout, self.schedule.banks, variables)
            for plan, fanout in zip(self.schedule.steps, self.schedule.fanouts, strict=True)
        ]
        self.steps = nn.ModuleList(self.step_list)
        units = [regions[plan.regions[0]].num_units for plan in self.schedule.steps]
        self.units = [range(count) for count in units]


def _categories(given: Any, num_variables: int) -> tuple[int | None, ...]:
    """`num_categories` as a checked tuple."""
    counts = tuple(given) if isinstance(given, Iterable) else ()
    if len(counts) != num_variables:
        raise StructureError(
            "the circuit's variables and their categories differ in number",
            where="num_categories",
            found=f"{len(counts)} entries" if counts else repr(given),
            expected=f"a list of {num_variables}: categories of each variable, None for a real one",
        )
    for variable, count in enumerate(counts):
        if count is not None and not (isinstance(count, Integral) and int(count) >= 1):
            raise StructureError(
                "a variable's number of categories is wrong",
                where=f"num_categories[{variable}]",
                found=repr(count),
                expected="a whole number above 0, or None for a real variable",
            )
    return tuple(None if count is None else int(count) for count in counts)


def _scanned(log_prob: Tensor) -> Evaluation:
    is_weak = torch.zeros(len(log_prob), dtype=torch.bool, device=log_prob.device)
    none = is_weak.nonzero()[:, 0]
    return Evaluation(log_prob, Pass(log_prob, is_weak, []), None, none)


def _build_bank(plan: BankPlan) -> Bank:
    if plan.kind == "sum":
        return SumBank(len(plan.owners), plan.num_units, plan.sizes[0], plan.blocks, plan.strided)
    return families.build_bank(plan)
