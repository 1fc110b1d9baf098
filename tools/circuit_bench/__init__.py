"""Parts of `tools/bench_circuit.py`."""
