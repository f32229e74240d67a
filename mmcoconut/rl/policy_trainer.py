"""GRPO and RLOO of trl over a policy that thinks, with this library's data, evaluation, checkpoints and trackers.

trl is the engine: which rows are repeated how often, rewards, advantages, clipping, KL, their logs. `policy` answers
what it asks of the model and the processor: prompts are those of the curriculum's last stage, answers are sampled with
thoughts, and their log-probabilities think again.

    questions_of(rows) -> Rollouts(prompts, trainer) -> rewards -> batch -> compute_loss -> Rollouts.likelihood

trl's batches have no place for how a row was answered: a number in their ids stands for it (`Rollouts`). The methods
in OVERRIDDEN_METHODS are not public: `tests/test_policy.py` fails by name when one of them moves and compares what
they return with a plain forward pass, and constraints.txt pins trl.

Sources: Shao et al. 2024, https://arxiv.org/abs/2402.03300 (GRPO); Ahmadian et al. 2024,
https://arxiv.org/abs/2402.14740 (RLOO).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import count
from statistics import fmean

import torch
from torch import nn
from trl import GRPOTrainer, RLOOTrainer

from mmcoconut.data import question_text, without_pictures
from mmcoconut.rl.policy import Likelihood, Rollout, Sampling, likelihood, read_prompts, sample, stop_loss
from mmcoconut.training.lora import has_lora, without_adapters
from mmcoconut.training.trainer import CurriculumTrainer


# Of trl's settings for generation; what else a model's own generation_config says stays.
SAMPLING_OPTIONS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")

# Private methods of trl that are overridden here, with the reason for each.
OVERRIDDEN_METHODS = {
    # Its public hooks say what is written, not how likely that is; its own way knows no thoughts, noise or stop head.
    "_get_per_token_logps_and_entropies": "log-probabilities think again",
    # The public switch, HF_HUB_DISABLE_TELEMETRY, is for the whole process and read before this is imported.
    "_send_telemetry": "nothing is sent",
    # GRPOTrainer calls a `rollout_func`; RLOOTrainer has none and takes prompts and answers from these two.
    "_tokenize_prompts": "RLOO answers with thoughts",
    "_generate_single_turn": "RLOO answers with thoughts",
}


class WithoutAdapters:
    """The model as it was before its adapters, which is the reference that they are held near to."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, **inputs):
        with without_adapters(self.model):
            return self.model(**inputs)


def reference_of(model):
    """Return what the policy is held near to: itself as it is now, with its weights kept, or without its adapters."""
    if has_lora(model):
        return WithoutAdapters(model)
    return copy.deepcopy(model).eval().requires_grad_(False)


class Question(str):
    """The question of a row, as trl hands it on and logs it, with the `index` that the row is found by."""

    def __new__(cls, text: str, index: int | None = None):
        question = super().__new__(cls, text)
        question.index = index  # copies and pickles set it afterwards
        return question


def questions_of(rows: Sequence[Mapping]) -> list[dict]:
    """Return rows as trl reads them: with the question as `prompt`; their columns go to reward functions."""
    return [{"prompt": Question(question_text(row), row["index"]), **row} for row in rows]


class Answer(list):
    """The ids of an answer, which trl hands on to reward functions, with the number of thoughts before it."""

    def __init__(self, ids: Sequence[int], num_thoughts: int):
        super().__init__(ids)
        self.num_thoughts = num_thoughts


def with_thoughts(reward: Callable) -> Callable:
    """Return a reward function that also takes `num_thoughts` of the answers, and logs their mean."""

    @wraps(reward, updated=())
    def called(completion_ids: Sequence[Answer], log_metric: Callable, **columns):
        num_thoughts = [answer.num_thoughts for answer in completion_ids]
        log_metric("num_thoughts", fmean(num_thoughts))
        return reward(completion_ids=completion_ids, num_thoughts=num_thoughts, log_metric=log_metric, **columns)

    return called


class Rollouts:
    """A `rollout_func` of trl that answers with thoughts, and says later how likely its answers are.

    trl's batches hold ids alone. In them the last id of a prompt is therefore a number, by which the rest of its
    rollout, such as pictures and noise, is found for as long as trl learns from it: until the next call.

    Args:
        rows: that questions are about, with their pictures.
        collator: of the run, at its last stage.
        sampling: how answers are drawn.
        entropy_gradients: see policy.likelihood.
    """

    def __init__(self, rows, collator, sampling: Sampling, *, entropy_gradients: bool = False):
        self.rows, self.positions = rows, {index: position for position, index in enumerate(rows["index"])}
        self.collator, self.sampling, self.entropy_gradients = collator, sampling, entropy_gradients
        self.kept: dict[int, Rollout] = {}
        self.numbers = count()

    def __call__(self, prompts: Sequence[Question], trainer) -> dict:
        """Answer each question; return the ids of prompts and answers."""
        rows = {index: self.rows[self.positions[index]] for index in {prompt.index for prompt in prompts}}
        read = read_prompts(self.collator, [rows[prompt.index] for prompt in prompts])
        with trainer.compute_loss_context_manager():
            model = trainer.accelerator.unwrap_model(trainer.model)
            answers, rollouts = sample(model, self.collator.processor, read, self.sampling)
        self.kept = {number: rollout for rollout, number in zip(rollouts, self.numbers)}
        return {
            "prompt_ids": [[*rollout.prompt.begun[:-1], number] for number, rollout in self.kept.items()],
            "completion_ids": [Answer(ids, rollout.num_thoughts) for ids, rollout in zip(answers, rollouts)],
            "logprobs": None,
        }

    def of(self, prompt_ids: torch.Tensor) -> list[Rollout]:
        """Return the rollouts whose prompts (B, P), padded in front, stand in a batch."""
        return [self.kept[number] for number in prompt_ids[:, -1].tolist()]

    def likelihood(self, model, ids: torch.Tensor, mask: torch.Tensor, num_written: int, size: int) -> Likelihood:
        """Return how likely the last C = num_written tokens of a batch (B, P + C) are, by `size` rows at a time."""
        rollouts, ids = self.of(ids[:, :-num_written]), ids.clone()
        ids[:, -num_written - 1] = ids.new_tensor([rollout.prompt.begun[-1] for rollout in rollouts])
        return Likelihood.join(
            likelihood(
                model,
                self.collator.processor,
                rollouts[start : start + size],
                ids=ids[start : start + size],
                mask=mask[start : start + size],
                num_written=num_written,
                temperature=self.sampling.options["temperature"],
                entropy_gradients=self.entropy_gradients,
            )
            for start in range(0, len(rollouts), size)
        )


class Asked:
    """A model for trl to form its loss with; `likelihood` is all that it said of the batch, also what trl leaves."""

    def __init__(self, model):
        self.model = model
        self.likelihood: Likelihood | None = None


def without_dropout(model) -> None:
    """Switch off all dropout of a model, that of layers and that which is a number in a module or a configuration.

    trl's `disable_dropout` knows layers only, and Marian, BART and Qwen2 have numbers.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name.endswith(("dropout", "_pdrop")) or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)


class ThinkingPolicy:
    """Give a trainer of trl, which stands after this class, a policy that thinks.

    Args:
        data_collator: of the run, at its last stage.
        train_dataset: rows with their `index`.
        reward_funcs: as trl's; they are given `num_thoughts`, too.
        thought_noise: see policy.Sampling.
        kwargs: of trl's trainer.
    """

    def __init__(self, *, data_collator, train_dataset, reward_funcs, thought_noise: float = 0.0, **kwargs):
        args, model = kwargs["args"], kwargs["model"]
        beta, args.beta = args.beta, 0.0  # else trl would load a reference by the model's name
        reference = reference_of(model) if beta else None
        without_dropout(model)
        super().__init__(
            train_dataset=without_pictures(train_dataset),  # trl would read them as its own
            reward_funcs=[with_thoughts(reward) for reward in reward_funcs],
            **kwargs,
        )
        del model.forward  # trl's own, for a head that answers without logits
        args.beta = self.beta = beta
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("objective: grpo and rloo sample from whole weights: use DDP, not FSDP or DeepSpeed.")
        if isinstance(reference, torch.nn.Module):
            reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.ref_model = reference
        self.data_collator = questions_of
        options = {name: self.generation_kwargs[name] for name in SAMPLING_OPTIONS}
        sampling = Sampling(thought_noise, {name: value for name, value in options.items() if value is not None})
        bonus = bool(getattr(args, "entropy_coef", 0.0))  # of GRPO alone
        self.rollout_func = Rollouts(train_dataset, data_collator, sampling, entropy_gradients=bonus)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return trl's loss () and, of a model with a stop head, that of where rows stopped thinking."""
        asked = Asked(model)
        loss = super().compute_loss(asked, inputs, return_outputs, num_items_in_batch)
        if asked.likelihood.stop_log_probs is None:
            return loss
        steps = self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1
        counted = inputs["completion_mask"].any(dim=1).to(loss.dtype)  # (B,), without cut answers that are masked
        stopping = stop_loss(
            asked.likelihood.stop_log_probs,
            [rollout.stop_log_prob for rollout in self.rollout_func.of(inputs["prompt_ids"])],
            advantages=inputs["advantages"],
            counted=counted,
            limits=(1 - self.epsilon_low, 1 + self.epsilon_high),
        )
        return loss + stopping / steps

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs,
    ) -> tuple:
        """Return log P and entropies (B, C) of the last C = logits_to_keep tokens, by batch_size rows at a time."""
        asked = model if isinstance(model, Asked) else Asked(model)
        size = batch_size or len(input_ids)
        with self.accelerator.autocast():
            found = self.rollout_func.likelihood(asked.model, input_ids, attention_mask, logits_to_keep, size)
        asked.likelihood = found
        if model is self.model and found.stop_log_probs is not None:  # the policy that sampled, before it learns
            rollouts = self.rollout_func.of(input_ids[:, :-logits_to_keep])
            for rollout, value in zip(rollouts, found.stop_log_probs.tolist()):
                rollout.stop_log_prob = value
        return found.log_probs, found.entropies if compute_entropy else None, None

    def _send_telemetry(self) -> None:
        """Send nothing."""


class GRPO(ThinkingPolicy, GRPOTrainer):
    """trl's GRPO over a policy that thinks."""


class RLOO(ThinkingPolicy, RLOOTrainer):
    """trl's RLOO, whose baseline is the mean of a row's other answers, over a policy that thinks.

    It does not call a `rollout_func` itself: its first step of generation does, and its second takes the answers.
    """

    def _tokenize_prompts(self, prompts: list) -> tuple:
        rollouts = self.rollout_func(prompts, self)
        return rollouts["prompt_ids"], None, rollouts

    def _generate_single_turn(self, prompt_ids: list, images: None, rollouts: dict) -> list[Answer]:
        return rollouts["completion_ids"]


class PolicyTrainer(CurriculumTrainer):
    """CurriculumTrainer, before one of trl's trainers: evaluation, checkpoints, cards and uploads are the same."""

    def create_model_card(self, *args, model_name: str | None = None, **kwargs) -> None:
        """Write a card as CurriculumTrainer does; trl asks by `model_name` for one in each checkpoint: write none."""
        if model_name is None:
            super().create_model_card(*args, **kwargs)


class GRPOPolicyTrainer(PolicyTrainer, GRPO):
    """PolicyTrainer whose updates are GRPO's."""


class RLOOPolicyTrainer(PolicyTrainer, RLOO):
    """PolicyTrainer whose updates are RLOO's."""


POLICY_TRAINERS = {"grpo": GRPOPolicyTrainer, "rloo": RLOOPolicyTrainer}
