"""What a training shows of itself: TensorBoard scalars, histograms and picture grids."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.transforms import count_dead
from distpc.data.pictures import to_display, to_grid
from distpc.data.spec import DatasetSpec
from distpc.errors import ResourceError
from distpc.parallel.event_files import Curves

NUM_SAMPLES = 36
NUM_COMPLETED_IMAGES = 6
COMPLETIONS_PER_IMAGE = 4


class Monitor(Curves):
    """Shows a circuit that is trained in TensorBoard; silent where not enabled.

    Args:
        folder: of the event files; of one training alone, because resuming purges in it.
        spec: of the data, for units and pictures.
        enabled: whether this process reports (rank 0).
        first_step: steps from here on are dropped from an earlier attempt's event files.
        picture_seconds: least time between two sets of pictures.
    """

    def __init__(
        self,
        folder: Path,
        spec: DatasetSpec,
        *,
        enabled: bool,
        first_step: int = 0,
        picture_seconds: float = 20.0,
    ) -> None:
        super().__init__(folder, enabled=enabled, first_step=first_step)
        self.spec = spec
        self.picture_seconds = picture_seconds
        self._last_pictures = -math.inf

    def health(self, step: int, circuit: Circuit) -> dict[str, float]:
        """Write latent usage, dead states and weight entropies; return them.

        Args:
            step: number of the step.
            circuit: with whole parameters (not ZeRO-3's shards).
        """
        if not self.enabled:
            return {}
        figures = {"latents/dead_states": float(count_dead(circuit).number)}
        for name, bits in circuit.entropy_of_weights().items():
            figures[f"sum_weight_entropy_bits/{name}"] = float(bits)
        usage = latent_usage(circuit)
        if usage is not None:
            entropy = -(usage * usage.clamp_min(1e-30).log2()).sum(-1).mean()
            figures["latents/usage_entropy_bits"] = float(entropy)
            self.histogram(step, "latents/usage", usage)
        self.scalars(step, figures)
        return figures

    def pictures(
        self, step: int, circuit: Circuit, examples: np.ndarray, *, force: bool = False
    ) -> None:
        """Draw samples and completions of images, unless that was done a moment ago.

        Args:
            step: number of the step.
            circuit: with whole parameters.
            examples: (n, V) images of which the lower half is hidden and completed.
            force: draw in any case.
        """
        due = time.monotonic() - self._last_pictures >= self.picture_seconds
        if not self.enabled or self.spec.kind != "image" or not (due or force):
            return
        drawn = _as_array(circuit.sample(NUM_SAMPLES, seed=0))
        self.image(step, "samples", to_grid(to_display(drawn, self.spec)))
        completions = completion_grid(circuit, examples, self.spec)
        if completions is not None:
            self.image(step, "completions", completions)
        self._last_pictures = time.monotonic()


def note_stop(folder: Path, error: BaseException) -> None:
    """Say in a training's event files what stopped it: a rank that was lost, for one."""
    # Where the disk is full, the error itself is what matters.
    with contextlib.suppress(OSError, ResourceError), Curves(folder) as curves:
        curves.text("stopped", str(error))


def completion_grid(circuit: Circuit, examples: np.ndarray, spec: DatasetSpec) -> np.ndarray | None:
    """Rows of: original, lower half hidden, completions drawn by the circuit.

    Args:
        circuit: with whole parameters.
        examples: (n, V) images; the first few whose shown half is possible are used.
        spec: of the images.

    Returns:
        (H', W', C) uint8; None where the circuit rules out the shown half of every example.
    """
    observed = lower_half_hidden(spec)
    # Nothing can be drawn given what a circuit rules out, and a picture must not end a training.
    log_prob = circuit.log_prob(
        torch.from_numpy(examples.astype(np.int64)), observed=torch.from_numpy(observed)
    )
    chosen = examples[torch.isfinite(log_prob).cpu().numpy()][:NUM_COMPLETED_IMAGES]
    if not len(chosen):
        return None
    drawn = _as_array(
        circuit.sample(
            COMPLETIONS_PER_IMAGE,
            seed=0,
            x=torch.from_numpy(chosen.astype(np.int64)),
            observed=torch.from_numpy(observed),
        )
    )
    hidden = np.where(observed, chosen, -1)
    rows = np.concatenate([chosen[:, None], hidden[:, None], drawn], axis=1)
    flat = rows.reshape(-1, rows.shape[-1])
    return to_grid(to_display(flat, spec), columns=COMPLETIONS_PER_IMAGE + 2)


def latent_usage(circuit: Circuit) -> torch.Tensor | None:
    """(Z', K) share of each state in each latent region's use; None if no region has a latent.

    Only latents with the most common number of states are shown.
    """
    uses = circuit.uses()
    rows = [
        uses[index].float().cpu()
        for index, region in enumerate(circuit.graph.regions)
        if region.latent is not None
    ]
    if not rows:
        return None
    widths = [len(row) for row in rows]
    width = max(set(widths), key=widths.count)
    usage = torch.stack([row for row in rows if len(row) == width])
    return usage / usage.sum(-1, keepdim=True).clamp_min(1e-30)


def _as_array(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def lower_half_hidden(spec: DatasetSpec) -> np.ndarray:
    """(V,) bool: which variables are observed when the lower half of the image is not."""
    if spec.image_shape is None:
        raise ValueError("only images have a lower half")
    observed = np.ones(spec.image_shape, dtype=bool)
    observed[spec.image_shape[0] // 2 :] = False
    return observed.reshape(-1)
