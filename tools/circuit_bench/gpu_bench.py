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
from circuit_bench.gpu_clock import TooSlow, at_most, free, held, is_out_of_memory, medians, peak
from circuit_bench.ours_gpu import OursGpu
from circuit_bench.traffic import step_bytes, step_flops
from distpc.circuits.circuit import Circuit

TOLERANCE = 1e-3
"""Of the two sides' likelihoods, relative."""
INPUT_SETS = 4

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
        self.peer: peer_pyjuice.PyJuicePeer | None = None

    def run(self, save: Save, with_peer: bool = True) -> None:
        """Our side alone, then both in turn.

        Args:
            save: is given the row after each stage.
            with_peer: whether PyJuice is tried.
        """
        begun = time.perf_counter()
        try:
            with at_most(self.limits["case"]):
                ours = self._ours()
                save(self.row)
                if with_peer and self._try_peer(ours.circuit, save):
                    self._check(ours)
                    self._time({"ours": ours.step, "peer": self._peer_step()})
                    save(self.row)
        except TooSlow as error:
            self.row["note"] = f"the case was given up: {error}"
        except Exception as error:
            if not is_out_of_memory(error):
                self.row["note"] = f"{type(error).__name__}: {str(error)[:300]}"
            else:
                self.row["note"] = "out of memory"
        self.row["case_seconds"] = round(time.perf_counter() - begun, 1)
        save(self.row)
        self.peer = None
        free(self.device)

    def _ours(self) -> OursGpu:
        begun, before = time.perf_counter(), held(self.device)
        circuit = self.case.circuit(device=self.device)
        self.row["num_parameters"] = circuit.num_parameters
        built = time.perf_counter() - begun
        ours = OursGpu(circuit, self.batches, self.case.dtype, self.fused)
        self.row |= {
            "setting": ours.setting,
            "build_seconds": round(built, 2),
            "warm_seconds": round(ours.warm_seconds, 2),
            "peak_bytes": peak(self.device) - before,
        }
        self._time({"ours": ours.step})
        return ours

    def _try_peer(self, circuit: Circuit, save: Save) -> bool:
        """Build and warm up PyJuice; False with the reason in the row where that fails."""
        self.row["peer"] = peer_pyjuice.NAME
        self.row["peer_note"] = "the process ended while PyJuice was being tried"
        save(self.row)
        begun, before = time.perf_counter(), held(self.device)
        try:
            with at_most(self.limits["peer"]):
                self.peer = peer_pyjuice.PyJuicePeer(circuit, self.batches, self.device)
                self.row["peer_compile_seconds"] = round(self.peer.compile_seconds, 2)
                self.row["peer_likelihood_before"] = float(
                    self.peer.log_prob(self.batches[0]).double().mean()
                )
                self.peer.warm_up()
        except Exception as error:
            self.peer = None
            self.row["peer_note"] = reason_of(error, time.perf_counter() - begun)
            free(self.device)
            return False
        self.row |= {
            "peer_note": None,
            "peer_setting": self.peer.setting,
            "peer_warm_seconds": round(self.peer.warm_seconds, 2),
            "peer_peak_bytes": peak(self.device) - before,
        }
        return True

    def _check(self, ours: OursGpu) -> None:
        """The two sides are one model, until they train: compare before the peer's first step."""
        assert self.peer is not None
        errors = [relative_error(ours.log_prob(x), self.peer.log_prob(x)) for x in self.batches[:2]]
        self.row["likelihood_error"] = float(f"{max(errors):.3g}")
        if max(errors) > TOLERANCE:
            self.row["peer_note"] = f"likelihoods differ by {max(errors):.2g} relative"

    def _peer_step(self) -> Callable[[], None]:
        assert self.peer is not None
        self.peer.step()
        return self.peer.step

    def _time(self, works: dict[str, Callable[[], object]]) -> None:
        taken = medians(works, self.device, self.rounds, self.limits["timing"])
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
            self.row |= {
                "peer_step_ms": round(1e3 * theirs, 4),
                "peer_step_spread_ms": round(1e3 * spread, 4),
                "ratio_to_peer": round(theirs / step, 3),
                "ratio_of_memory": round(
                    self.row["peer_peak_bytes"] / max(1, self.row["peak_bytes"]), 3
                ),
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
        return f"{peer_pyjuice.NAME} cannot hold it: out of memory beside our side"
    if isinstance(error, TooSlow):
        return f"skipped: compilation and first steps of {peer_pyjuice.NAME} {error}"
    if isinstance(error, ImportError):
        return f"{peer_pyjuice.NAME} is not installed"
    return f"{type(error).__name__} after {seconds:.0f} s: {str(error)[:300]}"
