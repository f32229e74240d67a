"""Latent attention: `attn_implementation="latent"`, and the default of training runs where it is leaner.

Importing mmcoconut registers it with transformers; a checkpoint's own code runs without.
"""

from mmcoconut.kernels.latent import choose_attention


__all__ = ["choose_attention"]
