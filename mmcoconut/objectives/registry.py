"""The objectives by the names that recipes give them."""

from mmcoconut.objectives.image_alignment import ImageAlignment
from mmcoconut.objectives.self_distillation import SelfDistillation
from mmcoconut.objectives.step_decoder import StepDecoder
from mmcoconut.objectives.step_tokens import StepTokens


OBJECTIVES = {objective.name: objective for objective in (StepTokens, StepDecoder, SelfDistillation, ImageAlignment)}
