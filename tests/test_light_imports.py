"""What needs torch, triton and numpy alone runs where nothing else of ours is installed."""

import json
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parent.parent / "tools"
ABSENT = ["deepspeed", "ray", "webdataset", "pydantic", "yaml", "tensorboard"]
MODULES = [
    "distpc.circuits",
    "distpc.circuits.circuit",
    "distpc.circuits.exact",
    "distpc.circuits.io",
    "distpc.circuits.kernels.step",
    "distpc.circuits.queries",
    "distpc.structures",
    "distpc.structures.registry",
    "distpc.training.fit",
    "distpc.training.optimizer",
    "bench_circuit",
    "bench_gpu_bpd",
    "bench_gpu_largest",
    "bench_kernels",
    "circuit_bench.gpu_bench",
    "circuit_bench.kernels",
    "circuit_bench.peer_pyjuice",
]
CODE = f"""
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ImportError(f"{{name}} is absent here")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(TOOLS)!r})
failed = {{}}
for name in {MODULES!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
import torch, distpc
graph = distpc.structures.hmm(4, 3)
circuit = distpc.Circuit(graph, [5] * 4)
data = torch.randint(0, 5, (64, 4))
distpc.fit(circuit, data.numpy(), epochs=1, progress=False)
print(json.dumps(failed))
"""


def test_circuits_and_benchmarks_need_little() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {}
