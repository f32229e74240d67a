"""What a model learns from: objectives for thoughts, the alignment of images with texts, the rewards of answers."""

from mmcoconut.objectives.registry import OBJECTIVES


__all__ = ["OBJECTIVES"]
