"""Probabilistic integral circuits: latents are continuous, light networks are the weights.

An integral unit of a region with latent z computes the integral over z' in [-1, 1] of
f(z, z') c(z') with c the child's unit function; input units are p(x | z). Put K quadrature points
in place of every latent and the integral becomes a sum of K weights: an ordinary circuit, of any K.
Gala, de Campos, Peharz, Vergari and Quaeghebeur, "Probabilistic integral circuits", AISTATS 2024;
Gala, de Campos, Vergari and Quaeghebeur, "Scaling continuous latent variable models as
probabilistic integral circuits", NeurIPS 2024 (functional sharing).
"""
