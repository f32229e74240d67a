"""Options of `objective: grpo` or `rloo` for trl: `rl`, a mapping of fields of trl's own configuration.

Only fields that mmcoconut's policy follows are passed on; the others configure other generation engines, tools or
other models.
"""

import dataclasses
import math
from typing import get_type_hints

from trl import GRPOConfig, RLOOConfig

from mmcoconut.arguments.fields import RunArguments


@dataclasses.dataclass(repr=False)  # the inherited __repr__ hides tokens
class GRPOArguments(RunArguments, GRPOConfig):
    """RunArguments with the fields of trl's GRPO."""


@dataclasses.dataclass(repr=False)
class RLOOArguments(RunArguments, RLOOConfig):
    """RunArguments with the fields of trl's RLOO."""


ARGUMENTS = {"grpo": GRPOArguments, "rloo": RLOOArguments}
CONFIGS = {"grpo": GRPOConfig, "rloo": RLOOConfig}
PASSED_ON = ("num_generations", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "beta")
PASSED_ON += ("num_iterations", "steps_per_generation", "generation_batch_size", "epsilon", "epsilon_high")
PASSED_ON += ("delta", "loss_type", "scale_rewards", "importance_sampling_level", "use_bias_correction_kl")
PASSED_ON += ("mask_truncated_completions", "top_entropy_quantile", "entropy_coef", "multi_objective_aggregation")
PASSED_ON += ("normalize_advantages", "reward_clip_range", "log_completions", "num_completions_to_print")


# Minimum and maximum, both allowed, of fields that trl does not check.
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
    """Check that trl accepts a value of the right type.

    Raises:
        ValueError: the value is outside its limits or choices.
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
    """Yield problems of the batch size, which must hold whole groups of answers, as (key, value, remedy)."""
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
    """Check that checkpoints are saved only where answers are sampled anew: earlier answers are not saved.

    Raises:
        ValueError: `save_steps` between these updates.
    """
    updates = arguments.steps_per_generation * arguments.num_iterations / arguments.gradient_accumulation_steps
    if arguments.save_strategy == "steps" and updates > 1 and arguments.save_steps % updates:
        raise ValueError(
            f"{updates:g} updates learn from the same answers, and save_steps={arguments.save_steps:g} is not a "
            "multiple of that, so a run could not resume exactly. Set save_steps to a multiple."
        )


def policy_arguments(objective: str, values: dict, *, rl: dict, rewards: dict[str, float], max_new_tokens: int):
    """Return the run's arguments for trl.

    values: values of RunArguments.

    Raises:
        ValueError: trl refuses them, as with batches that do not hold whole groups of answers; or checkpoints would
            fall between two updates that learn from the same answers.
    """
    made = ARGUMENTS[objective](
        **values,
        **rl,
        max_completion_length=max_new_tokens,
        reward_weights=[float(weight) for weight in rewards.values()],
        num_generations_eval=1,  # evaluation answers once, greedily
    )
    check_checkpoints(made)
    return made
