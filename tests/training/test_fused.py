"""When fine-tuning takes the fused step; that it trains alike is in `test_finetune.py`."""

from typing import Any

import pytest
import torch
from hidden_trees import hidden_tree

from distpc.circuits.circuit import Circuit
from distpc.circuits.integral.circuit import IntegralCircuit
from distpc.circuits.kernels.step import FastStep
from distpc.config import parse_config
from distpc.config.schema import RunConfig
from distpc.errors import ConfigError
from distpc.parallel.mesh import Mesh
from distpc.training.fused import fused_step


def config(parallel: dict[str, Any] | None = None, **finetune: Any) -> RunConfig:
    return parse_config(
        {
            "name": "test",
            "data": {"source": {"kind": "digits"}},
            "teacher": {"kind": "none"},
            "structure": {"kind": "hclt"},
            "finetune": {"initialization": "random", **finetune},
            "parallel": parallel or {},
        },
        where="test",
    )


def circuit(pseudocount: float = 0.1) -> Circuit:
    made = Circuit(hidden_tree(6, 4), [5] * 6)
    made.set_smoothing(pseudocount, 1.0, 100)
    return made


def one_rank() -> Mesh:
    return Mesh(0, 1, 0, torch.device("cpu"))


def test_it_is_taken_where_it_is_asked_for_and_on_no_cpu_unasked() -> None:
    fast = fused_step(config(fused=True, batch_size=32), one_rank(), circuit())
    assert isinstance(fast, FastStep) and fast.batch_size == 32
    assert fused_step(config(), one_rank(), circuit()) is None
    assert fused_step(config(fused=False), one_rank(), circuit()) is None


@pytest.mark.parametrize(
    ("reason", "finetune", "parallel", "ranks", "pseudocount"),
    [
        ("2 ranks", {}, {}, 2, 0.1),
        ("the rule anemone", {"rule": "anemone"}, {}, 1, 0.1),
        ("in pieces of 16", {"batch_size": 32, "micro_batch_size": 16}, {}, 1, 0.1),
        ("parallel.zero_stage", {}, {"zero_stage": 1}, 1, 0.1),
        ("parallel.recompute_messages", {}, {"recompute_messages": True}, 1, 0.1),
        ("too small a pseudocount", {}, {}, 1, 0.0),
    ],
)
def test_what_stands_against_it_is_said(
    reason: str, finetune: dict[str, Any], parallel: dict[str, Any], ranks: int, pseudocount: float
) -> None:
    mesh = Mesh(0, ranks, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"finetune\.fused") as caught:
        fused_step(config(parallel, fused=True, **finetune), mesh, circuit(pseudocount))
    assert reason in str(caught.value)


def test_weights_that_networks_write_are_refused() -> None:
    wanted = config(fused=True, rule="adam").model_dump(mode="json")
    wanted["integral"] = {"enabled": True}
    networks = IntegralCircuit(hidden_tree(6, 4), [5] * 6)
    with pytest.raises(ConfigError, match=r"finetune\.fused") as caught:
        fused_step(parse_config(wanted, "test"), one_rank(), networks)
    assert "weights that networks write" in str(caught.value)
