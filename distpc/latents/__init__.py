"""Latents: teacher features clustered into values of the circuit's patch latents."""

from distpc.latents.store import load_latents

__all__ = ["load_latents"]
