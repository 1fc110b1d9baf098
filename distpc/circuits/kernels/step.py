"""Online EM as one static program on a device: likelihoods, flows and update of a batch.

What makes it fast on a GPU:

* messages and weights are bfloat16, statistics float32 (Hopper's matrix units, and half the bytes);
* weights are kept, not read out of statistics in every pass: W = S + eps without a norm, which a
  product takes in as one number a unit;
* flows never exist: their matrix product ends in the update of the statistics it is for. A table
  that many nodes share (a hidden Markov model's) gets one long product instead of many short ones;
* everything is one CUDA graph, without a single synchronisation with the host.

Where the pseudocounts are as small as `plan.why_not` allows no message can lose anything that
matters to underflow: a product rescales after every factor, a sum's smallest weight bounds its
units from below. So there is no pass in logs here, and what `lost` guards against is refused
beforehand. A sample whose likelihood is 0 or not finite gets no flow and is counted, as elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from distpc.circuits.circuit import Circuit
from distpc.circuits.kernels import launch
from distpc.circuits.kernels.layout import Layout
from distpc.circuits.kernels.plan import make_plan, why_not

_CHUNKS = (16, 64)
"""Values of a leaf that a program of its update owns: of small and of large vocabularies. A chunk's
tokens are few where values are seen often."""


class FastStep:
    """Training steps of a circuit in batches of a fixed size; the circuit's statistics are updated
    in place, and what the rest of the library reads stays up to date.

    Covered: trees of sums over categorical leaves, tied or not, of any shape, trained by online EM
    with pseudocounts above 0; `plan.why_not` says what of a circuit is not.

    Args:
        circuit: on the device where it is trained. Its smoothing has to be set.
        batch_size: B.
        dtype: of messages and weights, bfloat16 or float32.
        graph: whether steps are recorded as CUDA graphs; on CUDA alone.
        statistics: type that statistics of sums are kept in between steps. bfloat16 rounds them at
            random, right on average, and saves 6 of the 10 bytes an entry that the update moves;
            `write` then brings the circuit's own up to date. CUDA alone.

    Raises:
        ValueError: the circuit is not covered.
    """

    def __init__(
        self,
        circuit: Circuit,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        graph: bool = True,
        statistics: torch.dtype = torch.float32,
    ) -> None:
        reason = why_not(circuit)
        if reason is not None:
            raise ValueError(f"the fused step does not cover this circuit: {reason}")
        self.circuit = circuit
        self.batch_size = batch_size
        largest = max((c or 0 for c in circuit.num_categories), default=0)
        chunk = _CHUNKS[0] if largest <= 512 else _CHUNKS[1]
        chunk = min(chunk, max(16, 1 << (largest - 1).bit_length()))
        at_random = statistics == torch.bfloat16
        if at_random and not launch.uses_triton(circuit.device):
            raise ValueError("statistics are rounded at random on CUDA alone")
        self.layout = Layout(circuit, make_plan(circuit), batch_size, dtype, chunk, at_random)
        self.step_size = torch.zeros(1, device=self.layout.device)
        self.log_prob = torch.zeros(batch_size, device=self.layout.device)
        is_cuda = self.layout.device.type == "cuda"
        self._side = torch.cuda.Stream(self.layout.device) if is_cuda else None
        self._uses_graph = graph and is_cuda
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._number_stages()
        self.read()

    def _here(self) -> AbstractContextManager[object]:
        """Inside, launches go to the circuit's device, whichever is the current one."""
        device = self.layout.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    @torch.no_grad()
    def read(self) -> None:
        """Take the weights from the circuit's statistics; needed after those were changed."""
        with self._here():
            for tables in self.layout.tables.values():
                launch.read_weights(self.layout, tables)
        for leaves in self.layout.leaves:
            leaves.read_totals()
            self._invert(leaves.totals, leaves.pseudocount, leaves.inverse)

    @torch.no_grad()
    def write(self) -> None:
        """Bring the circuit's statistics up to date: needed where they are kept in bfloat16."""
        if not self.layout.at_random:
            return
        for tables in self.layout.tables.values():
            for table in range(tables.count):
                weights = tables.weights[table].float()
                tables.statistics_of(table).copy_((weights - tables.floor).clamp_min_(0.0))

    def step(self, x: Tensor, step_size: float) -> Tensor:
        """Train on a batch.

        Args:
            x: (B, V) integers, -1 where missing, all of them in range.
            step_size: in (0, 1].

        Returns:
            Log-likelihoods (B,) before the update, nats; overwritten by the next call.
        """
        self.step_size.fill_(step_size)
        self.layout.seed.add_(0x2545F491)
        return self._run(x, learns=True)

    def evaluate(self, x: Tensor) -> Tensor:
        """Log-likelihoods (B,) in nats; overwritten by the next call."""
        return self._run(x, learns=False)

    @torch.no_grad()
    def _run(self, x: Tensor, *, learns: bool) -> Tensor:
        with self._here():
            return self._run_here(x, learns)

    def _run_here(self, x: Tensor, learns: bool) -> Tensor:
        self.layout.codes.copy_(x.t())
        if not self._uses_graph:
            self._work(learns)
            return self.log_prob
        if learns not in self._graphs:
            self._graphs[learns] = self._record(learns)
        self._graphs[learns].replay()
        return self.log_prob

    def _record(self, learns: bool) -> torch.cuda.CUDAGraph:
        """Compile the kernels in a run that learns nothing, then record one."""
        kept = self.step_size.clone()
        self.step_size.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._work(learns)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._work(learns)
        self.step_size.copy_(kept)
        return graph

    def _work(self, learns: bool) -> None:
        if not learns:
            self._forward()
            return
        layout = self.layout
        # Beside the sums, which on their own leave much of a GPU idle where the circuit is narrow.
        with self._aside():
            tokens = [launch.order_tokens(layout, leaves) for leaves in layout.leaves]
        self._forward()
        self._backward()
        with self._aside():
            for leaves, ordered in zip(layout.leaves, tokens, strict=True):
                launch.learn_leaves(layout, leaves, self.step_size, ordered)
                self._invert(leaves.totals, leaves.pseudocount, leaves.inverse)
        for tables in layout.tables.values():
            launch.learn_sums(layout, tables, self.step_size)
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside, work is queued beside the current stream, after what is there already."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def _forward(self) -> None:
        for products, groups in self._stages:
            for nodes in products:
                launch.multiply(self.layout, nodes)
            for group in groups:
                torch.bmm(group.u, group.weights.mT, out=group.y)
        root = self._root
        values = self.layout.message(self.layout.y, root)[:, 0].float()
        owner = self.layout.plan.nodes[root].bank, self.layout.plan.nodes[root].table
        norm = self.layout.inverse[self.layout.inverse_at[owner]]
        logs = (values * norm).log().double() + self.layout.log_top.sum(0, dtype=torch.float64)
        self.log_prob.copy_(logs)

    def _backward(self) -> None:
        root = self.layout.message(self.layout.y, self._root)
        is_finite = self.log_prob.isfinite().unsqueeze(1)
        # The root's flow is 1, so what its product gets is 1 / y.
        root.copy_(torch.where(is_finite, root.float().reciprocal(), 0.0))
        for _, groups in reversed(self._stages):
            for group in groups:
                launch.descend(self.layout, group)

    @staticmethod
    def _invert(totals: Tensor, pseudocount: Tensor, out: Tensor) -> None:
        torch.reciprocal(totals.sum(1).add_(pseudocount), out=out)

    def _number_stages(self) -> None:
        """For each stage: products of units to launch, and matrix products."""
        layout, plan = self.layout, self.layout.plan
        self._stages = []
        for stage, groups in enumerate(plan.stages):
            of_units: dict[int, list[int]] = defaultdict(list)
            for i, node in enumerate(plan.nodes):
                if node.stage == stage:
                    of_units[node.shape[1]].append(i)
            products = [launch.Nodes(layout, nodes) for nodes in of_units.values()]
            self._stages.append((products, [launch.Products(layout, g) for g in groups]))
        (last,) = plan.stages[-1]
        self._root = last.node
