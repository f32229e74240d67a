"""Training objectives: losses on thoughts, image–text alignment, and rewards of answers."""

from mmcoconut.objectives.registry import OBJECTIVES


__all__ = ["OBJECTIVES"]
