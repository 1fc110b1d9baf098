"""The training step of a circuit on a GPU: a static program of fused kernels.

What it is for and what it covers is said in `step.FastStep`. `plan` lays a circuit out, `reference`
holds every kernel as plain PyTorch, the modules `triton_*` hold the same in Triton, and `launch`
chooses between the two. Triton is imported where it is used.
"""
