"""distpc: distributed training of probabilistic circuits by latent variable distillation."""

__version__ = "0.1.0"
