"""Parts of `tools/bench_kmeans.py`."""
