"""Runs in the environment of dynamax: reads sequences, then does an iteration of EM a line."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Answer every line of the standard input with one."""
    facts = json.loads(sys.stdin.readline())
    if facts["threads"] == 1:
        os.environ["XLA_FLAGS"] = (
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import CategoricalHMM

    x = jnp.asarray(facts["x"])[..., None]
    model = CategoricalHMM(facts["states"], emission_dim=1, num_classes=facts["vocabulary"])
    params, properties = model.initialize(jax.random.PRNGKey(0))

    @jax.jit
    def expectations(params):  # type: ignore[no-untyped-def]
        return jax.vmap(lambda one: model.e_step(params, one))(x)

    state = model.initialize_m_step_state(params, properties)
    print("ready", flush=True)
    for _ in sys.stdin:
        statistics, likelihoods = expectations(params)
        params, state = model.m_step(params, properties, statistics, state)
        jax.block_until_ready(likelihoods)
        print(float(likelihoods.sum()), flush=True)


if __name__ == "__main__":
    main()
