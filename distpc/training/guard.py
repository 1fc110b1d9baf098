"""Stops a training that went wrong, and says at which step and in which row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from distpc.errors import TrainingError
from distpc.parallel.places import Place
from distpc.training.figures import Figures

LOWER_STEP_SIZE = "lower finetune.step_size and run again"


class Guard:
    """Checks losses, statistics and validation figures; every check raises or does nothing.

    Args:
        max_divergence_bits: how much worse than the best validation may become, in bits per
            dimension.
        check_every_steps: steps between two looks at the statistics.
    """

    def __init__(self, max_divergence_bits: float, check_every_steps: int = 50) -> None:
        self.max_divergence_bits = max_divergence_bits
        self.check_every_steps = check_every_steps

    def wants_statistics(self, step: int) -> bool:
        """Whether the statistics are to be checked after this step."""
        return step % self.check_every_steps == 0

    def check_batch(self, step: int, *, not_a_number: int, impossible: int, size: int) -> None:
        """Refuse a batch with NaN likelihoods, or one that the circuit rules out as a whole.

        Args:
            step: number of the step.
            not_a_number: samples of the global batch whose log-likelihood is NaN or +infinity.
            impossible: samples of likelihood 0; a few are counted and left out of the flows.
            size: samples of the global batch.

        Raises:
            TrainingError: naming the step.
        """
        if not_a_number:
            raise TrainingError(
                "log-likelihoods are not finite",
                where=f"step {step}",
                found=f"{not_a_number} of {size} samples are NaN or +infinity",
                expected="finite log-likelihoods",
                fix=f"look for infinite values in the data, or {LOWER_STEP_SIZE}",
            )
        if impossible == size:
            raise TrainingError(
                "the circuit rules out every sample of a batch",
                where=f"step {step}",
                found=f"{impossible} of {size} samples have likelihood 0",
                expected="at least one possible sample",
                fix="raise finetune.pseudocount and finetune.leaf_pseudocount above 0",
            )

    def check_statistics(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Refuse parameters that hold a NaN or an infinity.

        Raises:
            TrainingError: naming the step, the layer's parameter and the row.
        """
        place = locate_nonfinite(state)
        if place is not None:
            raise self.nonfinite(step, *place)

    def nonfinite(self, step: int, name: str, row: tuple[int, ...], value: float) -> TrainingError:
        """The error for a NaN or an infinity in a parameter."""
        return TrainingError(
            "a circuit's statistics are not finite",
            where=f"step {step}, parameter '{name}', row {list(row)}",
            found=value,
            expected="finite numbers",
            fix=LOWER_STEP_SIZE,
        )

    def check_figures(self, where: str, figures: Figures) -> None:
        """Refuse a validation in which log-likelihoods are not numbers.

        Args:
            where: names the validation.
            figures: of the whole split.

        Raises:
            TrainingError: naming the validation and how many samples are concerned.
        """
        if figures.not_a_number:
            raise TrainingError(
                "log-likelihoods of the validation split are not finite",
                where=where,
                found=f"{figures.not_a_number} of {figures.samples} samples are NaN or +infinity",
                expected="finite log-likelihoods",
                fix=f"look for infinite values in the data, or {LOWER_STEP_SIZE}",
            )

    def check_validation(
        self, step: int, figures: Figures, best: Mapping[str, float] | None
    ) -> None:
        """Refuse a model that is far worse than the best so far, or of no finite figure.

        Two models are compared only where they rule out equally many samples: those samples are
        left out of the bits, so that a model which allows more of them may well show more bits.

        Args:
            step: number of the step.
            figures: of the validation split.
            best: `bits` and `impossible` of the best validation so far, None at the first one.

        Raises:
            TrainingError: naming the step and both figures.
        """
        self.check_figures(f"validation after step {step}", figures)
        if best is None or figures.impossible != best["impossible"]:
            return
        if figures.bits <= best["bits"] + self.max_divergence_bits:
            return
        raise TrainingError(
            "training diverges",
            where=f"step {step}",
            found=f"{figures.bits:.4f} bits per dimension on the validation split",
            expected=f"at most finetune.max_divergence_bits = {self.max_divergence_bits:g} above "
            f"the best, {best['bits']:.4f}",
            fix=LOWER_STEP_SIZE,
        )


def locate_in_places(places: Iterable[Place]) -> tuple[str, tuple[int, ...], float] | None:
    """As `locate_nonfinite`, among what one rank holds; rows are those of whole parameters."""
    for place in places:
        found = locate_nonfinite({place.name: place.values.reshape(-1, 1)})
        if found is not None:
            _, (number,), value = found
            return place.name, place.index_of(number)[:-1], value
    return None


def locate_nonfinite(state: Mapping[str, Tensor]) -> tuple[str, tuple[int, ...], float] | None:
    """Parameter, row (all indices but the last) and value of the first NaN or infinity, or None."""
    for name, parameter in state.items():
        tensor = parameter.detach()
        if bool(torch.isfinite(tensor.sum())):
            continue
        places = (~torch.isfinite(tensor)).nonzero()
        # Large finite entries can overflow in the sum alone.
        if len(places):
            place = tuple(int(i) for i in places[0])
            return name, place[:-1], float(tensor[place])
    return None
