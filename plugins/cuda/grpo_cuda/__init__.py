"""Kernels, memory and collectives for NVIDIA GPUs: flash-attn, Transformer Engine, Triton and torch."""
