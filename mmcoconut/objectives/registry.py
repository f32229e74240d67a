"""The objectives by the names that recipes give them."""

from mmcoconut.objectives.step_tokens import StepTokens


OBJECTIVES = {objective.name: objective for objective in (StepTokens,)}
