"""Training circuits: distillation on data and latents, fine-tuning by online EM on data alone."""
