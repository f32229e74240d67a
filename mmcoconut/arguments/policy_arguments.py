"""What a recipe's `objective: grpo` or `rloo` says to trl: `rl`, a mapping of fields of trl's own configuration.

Only those are passed on that this library's policy follows; the rest describe other engines of generation, tools or
other models.
"""

import dataclasses
import math
from typing import get_type_hints

from trl import GRPOConfig, RLOOConfig

from mmcoconut.arguments.fields import RunArguments


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


# Least and greatest values, both allowed, of what trl takes as it comes.
RL_LIMITS = {
    **dict.fromkeys(("beta", "epsilon", "epsilon_high", "delta", "entropy_coef", "top_k"), (0, math.inf)),
    **dict.fromkeys(("num_iterations", "steps_per_generation", "generation_batch_size"), (1, math.inf)),
    **dict.fromkeys(("temperature", "repetition_penalty"), (1e-3, math.inf)),
    **dict.fromkeys(("top_p", "top_entropy_quantile"), (1e-3, 1)),
    "min_p": (0, 1),
    "num_generations": (2, math.inf),
}
RL_CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}


def check_value(name: str, value) -> None:
    """Check whether trl will take a value of the right type.

    Raises:
        ValueError: one outside of its limits or choices.
    """
    low, high = RL_LIMITS.get(name, (-math.inf, math.inf))
    if name in RL_LIMITS and value is not None and not low <= value <= high:
        raise ValueError(f"must lie between {low:g} and {high:g}")
    if value not in RL_CHOICES.get(name, (value,)):
        raise ValueError(f"choose one of {', '.join(map(str, RL_CHOICES[name]))}")


def passed_on(objective: str) -> dict[str, object]:
    """Return the fields that `rl` may set, and their types."""
    types = get_type_hints(CONFIGS[objective])
    return {name: types[name] for name in PASSED_ON if name in types}


def batch_problems(run: RunArguments, rl: dict):
    """What is wrong with the size of a batch, which must hold whole groups of answers, as (key, value, remedy)."""
    group = rl.get("num_generations", GRPOConfig.num_generations)
    steps = rl.get("steps_per_generation", run.gradient_accumulation_steps)
    batch = run.per_device_train_batch_size * run.world_size * steps
    if "generation_batch_size" not in rl and batch % group:
        remedy = (
            f"{run.per_device_train_batch_size} rows × {run.world_size} process(es) × {steps} batches are {batch} "
            f"answers, and `rl.num_generations` {group} does not divide that: set a multiple of it"
        )
        yield "per_device_train_batch_size", run.per_device_train_batch_size, remedy


def check_checkpoints(arguments) -> None:
    """A run goes on exactly only where answers are sampled anew: those before are not kept.

    Raises:
        ValueError: `save_steps` that fall elsewhere.
    """
    updates = arguments.steps_per_generation * arguments.num_iterations / arguments.gradient_accumulation_steps
    if arguments.save_strategy == "steps" and updates > 1 and arguments.save_steps % updates:
        raise ValueError(
            f"{updates:g} updates learn from the same answers, and save_steps={arguments.save_steps:g} is no multiple "
            "of that, so that a run could not be resumed there exactly: set save_steps to one."
        )


def policy_arguments(objective: str, values: dict, *, rl: dict, rewards: dict[str, float], max_new_tokens: int):
    """Return the run's arguments as trl takes them.

    values: of RunArguments.

    Raises:
        ValueError: what trl refuses, such as batches that do not hold whole groups of answers; checkpoints that would
            fall between two updates which learn from the same answers.
    """
    made = ARGUMENTS[objective](
        **values,
        **rl,
        max_completion_length=max_new_tokens,
        reward_weights=[float(weight) for weight in rewards.values()],
        num_generations_eval=1,  # evaluation answers once, and greedily
    )
    check_checkpoints(made)
    return made
