"""Parts of tools/bench_hmm.py."""
