"""Triton twins of the ops: `@triton.jit` kernels, which need no torch to be compiled, and their launchers."""
