"""One row of the table of a GPU: our training step against PyJuice's, and against the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from circuit_bench import peer_pyjuice
from circuit_bench.cases import Case
from circuit_bench.gpu_clock import (
    TooSlow,
    at_most,
    free,
    held,
    is_out_of_memory,
    medians,
    peak,
    start_peak,
)
from circuit_bench.ours_gpu import OursGpu
from circuit_bench.traffic import step_bytes, step_flops
from distpc.circuits.circuit import Circuit

TOLERANCE = 1e-3
"""Of the two sides' likelihoods, relative."""
INPUT_SETS = 4
OUT_OF_MEMORY = f"{peer_pyjuice.NAME} cannot hold it: out of memory, alone on the device"

Row = dict[str, Any]
Save = Callable[[Row], None]


class GpuCase:
    """Measures a case in stages, and saves its row after each: what is there is never lost.

    Args:
        case: what to measure.
        device: where.
        ceilings: of the device, see `ceilings`.
        limits: seconds: `case` in all, `peer` for PyJuice's compilation and first steps, `timing`
            for the interleaved rounds.
        rounds: at most.
        fused: whether our side uses its fused step.
    """

    def __init__(
        self,
        case: Case,
        device: str,
        ceilings: dict[str, float],
        limits: dict[str, float],
        rounds: int = 15,
        fused: bool = True,
    ) -> None:
        self.case, self.device, self.ceilings = case, device, ceilings
        self.limits, self.rounds, self.fused = limits, rounds, fused
        self.batches = case.batches(INPUT_SETS, device)
        self.row: Row = {**key_of(case), "num_categories": case.num_categories}
        self.ours: OursGpu | None = None
        self.peer: peer_pyjuice.PyJuicePeer | None = None
        self.outline: peer_pyjuice.Outline | None = None
        self.no_outline: str | None = None

    def prepare(self) -> None:
        """Compile the structure of the peer: this computes nothing on the device."""
        begun = time.perf_counter()
        try:
            with at_most(self.limits["peer"]):
                self.outline = peer_pyjuice.compile_outline(self.case.outline())
        except Exception as error:
            self.no_outline = reason_of(error, time.perf_counter() - begun)

    def run(self, save: Save, with_peer: bool = True) -> None:
        """Our side alone, then both in turn; the peer alone where they do not fit together.

        `prepare` comes first where the peer is tried.

        Args:
            save: is given the row after each stage.
            with_peer: whether PyJuice is tried.
        """
        begun = time.perf_counter()
        try:
            with at_most(self.limits["case"]):
                self.ours = self._ours()
                save(self.row)
                if with_peer:
                    self._both(save)
        except TooSlow as error:
            self.row["note"] = f"the case was given up: {error}"
        except Exception as error:
            is_full = is_out_of_memory(error)
            self.row["note"] = "out of memory" if is_full else _short(error)
        self.row["case_seconds"] = round(time.perf_counter() - begun, 1)
        save(self.row)
        self.ours = self.peer = None
        free(self.device)

    def _ours(self) -> OursGpu:
        begun, before = time.perf_counter(), held(self.device)
        circuit = self.case.circuit(device=self.device)
        self.row["num_parameters"] = circuit.num_parameters
        built = time.perf_counter() - begun
        start_peak(self.device)
        ours = OursGpu(circuit, self.batches, self.case.dtype, self.fused)
        self.row |= {
            "setting": ours.setting,
            "build_seconds": round(built, 2),
            "warm_seconds": round(ours.warm_seconds, 2),
            "peak_bytes": peak(self.device) - before,
        }
        self._time({"ours": ours.step})
        return ours

    def _both(self, save: Save) -> None:
        assert self.ours is not None
        self.row["peer"] = peer_pyjuice.NAME
        if self.no_outline:
            self.row["peer_note"] = self.no_outline
            return
        self.row["peer_note"] = "the process ended while PyJuice was being tried"
        save(self.row)
        # What the peer is given is what our side has by now.
        expected = [self.ours.log_prob(x).clone() for x in self.batches[:2]]
        circuit = self.ours.circuit
        reason = self._try_peer(circuit)
        together = reason is None
        if reason == OUT_OF_MEMORY:
            self.ours = None
            free(self.device)
            reason = self._try_peer(circuit, and_drop=True)
        if reason is not None:
            self.row["peer_note"] = reason
            return
        del circuit
        self._check(expected)
        works = {"peer": self._peer_step()}
        if together and self.ours is not None:
            works = {"ours": self.ours.step, **works}
        else:
            self.row["peer_note"] = "one after the other: both do not fit in memory together"
        self._time(works)

    def _try_peer(self, circuit: Circuit, and_drop: bool = False) -> str | None:
        """Build and warm up PyJuice; the reason where that fails.

        Args:
            circuit: what to copy.
            and_drop: give the circuit's memory back once it is copied.
        """
        begun, before = time.perf_counter(), held(self.device)
        try:
            with at_most(self.limits["peer"]):
                outline, self.outline = self.outline, None
                self.peer = peer_pyjuice.PyJuicePeer(circuit, self.batches, self.device, outline)
                self.row["peer_compile_seconds"] = round(self.peer.compile_seconds, 2)
                if and_drop:
                    before -= _drop(circuit)
                    free(self.device)
                start_peak(self.device)
                self.peer.warm_up()
        except Exception as error:
            self.peer = None
            reason = reason_of(error, time.perf_counter() - begun)
        else:
            self.row |= {
                "peer_note": None,
                "peer_setting": self.peer.setting,
                "peer_warm_seconds": round(self.peer.warm_seconds, 2),
                "peer_peak_bytes": peak(self.device) - before,
            }
            return None
        # Outside of the handler: the traceback no longer holds what it made.
        free(self.device)
        return reason

    def _check(self, expected: list[Tensor]) -> None:
        """The two sides are one model: compare before the peer's first step."""
        assert self.peer is not None
        pairs = zip(self.batches, expected, strict=False)
        error = max(relative_error(self.peer.log_prob(x), log_prob) for x, log_prob in pairs)
        self.row["likelihood_error"] = float(f"{error:.3g}")
        self.row["likelihoods_agree"] = error <= TOLERANCE

    def _peer_step(self) -> Callable[[], None]:
        assert self.peer is not None
        self.peer.step()
        return self.peer.step

    def _time(self, works: dict[str, Callable[[], object]]) -> None:
        taken = medians(works, self.device, self.rounds, self.limits["timing"])
        if "ours" in taken:
            step, spread = taken["ours"]
            rate = step_flops(self.case) / step
            moved = step_bytes(self.case, self.row["num_parameters"]) / step
            self.row |= {
                "step_ms": round(1e3 * step, 4),
                "step_spread_ms": round(1e3 * spread, 4),
                "tflops": round(rate / 1e12, 3),
                "fraction_of_gemm": round(rate / 1e12 / self.ceilings["bf16_tflops"], 4),
                "fraction_of_bandwidth": round(moved / 1e9 / self.ceilings["copy_gbs"], 4),
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        if "peer" in taken:
            theirs, spread = taken["peer"]
            memory = self.row["peer_peak_bytes"] / max(1, self.row["peak_bytes"])
            self.row |= {
                "peer_step_ms": round(1e3 * theirs, 4),
                "peer_step_spread_ms": round(1e3 * spread, 4),
                "ratio_to_peer": round(1e3 * theirs / self.row["step_ms"], 3),
                "ratio_of_memory": round(memory, 3),
            }


def key_of(case: Case) -> Row:
    """What tells rows apart."""
    return {
        "structure": case.structure,
        "num_variables": case.num_variables,
        "num_states": case.num_states,
        "batch": case.batch,
        "dtype": case.dtype,
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest of |found - expected| / |expected|; infinite where one is not finite."""
    error = ((found.double() - expected.double()) / expected.double()).abs()
    return float(torch.where(error.isnan(), torch.inf, error).max())


def reason_of(error: Exception, seconds: float) -> str:
    """Why PyJuice has no figure."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, TooSlow):
        return f"skipped: compilation and first steps of {peer_pyjuice.NAME} {error}"
    if isinstance(error, ImportError):
        return f"{peer_pyjuice.NAME} is not installed"
    return f"after {seconds:.0f} s: {_short(error)}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _drop(circuit: Circuit) -> int:
    """Give back the memory of a circuit's parameters, which it loses; bytes."""
    size = 0
    for parameter in circuit.parameters():
        size += parameter.numel() * parameter.element_size()
        parameter.data = parameter.data.new_empty(0)
    return size
