"""What a recipe's `objective: grpo` or `rloo` says to trl: `rl`, a mapping of fields of trl's own configuration.

Only those are passed on that this library's policy follows; the rest describe other engines of generation, tools or
other models.
"""

import dataclasses
from typing import get_type_hints

from trl import GRPOConfig, RLOOConfig

from mmcoconut.arguments import RunArguments


@dataclasses.dataclass(repr=False)  # the inherited __repr__ hides tokens
class GRPOArguments(RunArguments, GRPOConfig):
    """RunArguments with what trl's GRPO needs beside them."""


@dataclasses.dataclass(repr=False)
class RLOOArguments(RunArguments, RLOOConfig):
    """RunArguments with what trl's RLOO needs beside them."""


ARGUMENTS = {"grpo": GRPOArguments, "rloo": RLOOArguments}
CONFIGS = {"grpo": GRPOConfig, "rloo": RLOOConfig}
PASSED_ON = ("num_generations", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "beta")
PASSED_ON += ("num_iterations", "steps_per_generation", "generation_batch_size", "epsilon", "epsilon_high")
PASSED_ON += ("delta", "loss_type", "scale_rewards", "importance_sampling_level", "use_bias_correction_kl")
PASSED_ON += ("mask_truncated_completions", "top_entropy_quantile", "entropy_coef", "multi_objective_aggregation")
PASSED_ON += ("normalize_advantages", "reward_clip_range", "log_completions", "num_completions_to_print")


def passed_on(objective: str) -> dict[str, object]:
    """The fields that `rl` may set, and their types."""
    types = get_type_hints(CONFIGS[objective])
    return {name: types[name] for name in PASSED_ON if name in types}


def policy_arguments(objective: str, values: dict, *, rl: dict, rewards: dict[str, float], max_new_tokens: int):
    """The run's arguments as trl takes them.

    values: of RunArguments. Dropout is switched off, so that the policy that answers is the one that learns.

    Raises:
        ValueError: what trl refuses, such as batches that do not hold whole groups of answers.
    """
    return ARGUMENTS[objective](
        **values,
        **rl,
        max_completion_length=max_new_tokens,
        reward_weights=[float(weight) for weight in rewards.values()],
        disable_dropout=True,
        num_generations_eval=1,  # evaluation answers once, and greedily
    )
