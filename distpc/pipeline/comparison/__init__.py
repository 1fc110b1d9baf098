"""`distpc compare`: one circuit and one budget, trained in several ways.

variants    which runs there are: variants x sizes x seeds, and what they may not differ in
schedule    runs them side by side on one Ray cluster, shared stages once
job         one of those runs, in a process of its own
table       what came out: means, spreads, best of a group, text and JSON
plot        the curves over passes and over size
"""

from distpc.pipeline.comparison.command import compare, describe_runs

__all__ = ["compare", "describe_runs"]
