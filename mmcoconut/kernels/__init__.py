"""What makes thinking faster and changes no result: latent attention, and columns that ragged rows share.

Importing mmcoconut registers both; a checkpoint's own code runs without.
"""

from mmcoconut.kernels import shared_columns  # noqa: F401  (registers itself)
from mmcoconut.kernels.latent import choose_attention


__all__ = ["choose_attention"]
