"""GRPO and RLOO of trl for a policy that thinks, with mmcoconut's data, evaluation, checkpoints and trackers.

trl repeats rows and computes rewards, advantages, clipping, KL and their logs. `policy` supplies what trl needs from
the model and the processor: the prompts of the curriculum's last stage, answers sampled with thoughts, and
log-probabilities that compute the thoughts again.

    questions_of(rows) -> Rollouts(prompts, trainer) -> rewards -> batch -> compute_loss -> Rollouts.likelihood

trl's batches cannot hold how a row was answered, so a number in their ids refers to it (`Rollouts`). The methods
in OVERRIDDEN_METHODS are not public: `tests/test_policy.py` names the one that changed, and compares what
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


# trl's fields for generation; other fields of a model's own generation_config stay.
SAMPLING_OPTIONS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")

# Private methods of trl that are overridden here, with the reason for each.
OVERRIDDEN_METHODS = {
    # Its public hooks return the generated text, not its likelihood; its method ignores thoughts, noise, stop head.
    "_get_per_token_logps_and_entropies": "log-probabilities think again",
    # The public switch, HF_HUB_DISABLE_TELEMETRY, applies to the whole process and is read before this import.
    "_send_telemetry": "nothing is sent",
    # GRPOTrainer calls a `rollout_func`; RLOOTrainer has none and takes prompts and answers from these two.
    "_tokenize_prompts": "RLOO answers with thoughts",
    "_generate_single_turn": "RLOO answers with thoughts",
}


class WithoutAdapters:
    """The model without its adapters, the reference of the KL term."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, **inputs):
        with without_adapters(self.model):
            return self.model(**inputs)


def reference_of(model):
    """Return the reference of the KL term: a copy of the current model, or the model without its adapters."""
    if has_lora(model):
        return WithoutAdapters(model)
    return copy.deepcopy(model).eval().requires_grad_(False)


class Question(str):
    """The question of a row as trl passes it on and logs it, with the row's `index`."""

    def __new__(cls, text: str, index: int | None = None):
        question = super().__new__(cls, text)
        question.index = index  # copies and pickles set it afterwards
        return question


def questions_of(rows: Sequence[Mapping]) -> list[dict]:
    """Return rows in trl's format, with the question as `prompt`; their columns are passed to reward functions."""
    return [{"prompt": Question(question_text(row), row["index"]), **row} for row in rows]


class Answer(list):
    """The ids of an answer, which trl passes to reward functions, with the number of thoughts before it."""

    def __init__(self, ids: Sequence[int], num_thoughts: int):
        super().__init__(ids)
        self.num_thoughts = num_thoughts


def with_thoughts(reward: Callable) -> Callable:
    """Return a reward function that also receives `num_thoughts` of the answers, and logs their mean."""

    @wraps(reward, updated=())
    def called(completion_ids: Sequence[Answer], log_metric: Callable, **columns):
        num_thoughts = [answer.num_thoughts for answer in completion_ids]
        log_metric("num_thoughts", fmean(num_thoughts))
        return reward(completion_ids=completion_ids, num_thoughts=num_thoughts, log_metric=log_metric, **columns)

    return called


class Rollouts:
    """A `rollout_func` of trl that answers with thoughts, and later computes the likelihood of the answers.

    trl's batches hold only ids. The last id of a prompt is therefore a number that refers to the rest of its rollout,
    such as pictures and noise. It is valid until the next call.

    Args:
        rows: the rows of the questions, with their pictures.
        collator: of the run, at its last stage.
        sampling: settings of sampling.
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
        """Return the rollouts of a batch, whose prompts (B, P) are left-padded."""
        return [self.kept[number] for number in prompt_ids[:, -1].tolist()]

    def likelihood(self, model, ids: torch.Tensor, mask: torch.Tensor, num_written: int, size: int) -> Likelihood:
        """Return the likelihood of the last C = num_written tokens of a batch (B, P + C), by `size` rows at a time."""
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
    """The model that trl computes its loss with; `likelihood` keeps everything computed for the batch."""

    def __init__(self, model):
        self.model = model
        self.likelihood: Likelihood | None = None


def without_dropout(model) -> None:
    """Disable all dropout of a model: layers, and dropout rates in modules and configurations.

    trl's `disable_dropout` only finds layers, and Marian, BART and Qwen2 use rates.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name.endswith(("dropout", "_pdrop")) or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)


class ThinkingPolicy:
    """Mixin before a trl trainer that makes its policy think.

    Args:
        data_collator: of the run, at its last stage.
        train_dataset: rows with their `index`.
        reward_funcs: as in trl; they also receive `num_thoughts`.
        thought_noise: see policy.Sampling.
        kwargs: arguments of trl's trainer.
    """

    def __init__(self, *, data_collator, train_dataset, reward_funcs, thought_noise: float = 0.0, **kwargs):
        args, model = kwargs["args"], kwargs["model"]
        beta, args.beta = args.beta, 0.0  # otherwise trl would load a reference by the model's name
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
            raise ValueError("objective: grpo and rloo need whole weights to sample. Use DDP, not FSDP or DeepSpeed.")
        if isinstance(reference, torch.nn.Module):
            reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.ref_model = reference
        self.data_collator = questions_of
        options = {name: self.generation_kwargs[name] for name in SAMPLING_OPTIONS}
        sampling = Sampling(thought_noise, {name: value for name, value in options.items() if value is not None})
        bonus = bool(getattr(args, "entropy_coef", 0.0))  # GRPO only
        self.rollout_func = Rollouts(train_dataset, data_collator, sampling, entropy_gradients=bonus)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return trl's loss (), plus the stopping loss of a model with a stop head."""
        asked = Asked(model)
        loss = super().compute_loss(asked, inputs, return_outputs, num_items_in_batch)
        if asked.likelihood.stop_log_probs is None:
            return loss
        steps = self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1
        counted = inputs["completion_mask"].any(dim=1).to(loss.dtype)  # (B,), 0 for truncated, masked answers
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
        if model is self.model and found.stop_log_probs is not None:  # the policy that sampled, before its update
            rollouts = self.rollout_func.of(input_ids[:, :-logits_to_keep])
            for rollout, value in zip(rollouts, found.stop_log_probs.tolist()):
                rollout.stop_log_prob = value
        return found.log_probs, found.entropies if compute_entropy else None, None

    def _send_telemetry(self) -> None:
        """Send nothing."""


class GRPO(ThinkingPolicy, GRPOTrainer):
    """trl's GRPO for a policy that thinks."""


class RLOO(ThinkingPolicy, RLOOTrainer):
    """trl's RLOO, whose baseline is the mean of a row's other answers, for a policy that thinks.

    RLOO does not call a `rollout_func`: its first generation step does here, and its second takes the answers.
    """

    def _tokenize_prompts(self, prompts: list) -> tuple:
        rollouts = self.rollout_func(prompts, self)
        return rollouts["prompt_ids"], None, rollouts

    def _generate_single_turn(self, prompt_ids: list, images: None, rollouts: dict) -> list[Answer]:
        return rollouts["completion_ids"]


class PolicyTrainer(CurriculumTrainer):
    """CurriculumTrainer, before a trl trainer: evaluation, checkpoints, cards and uploads are the same."""

    def create_model_card(self, *args, model_name: str | None = None, **kwargs) -> None:
        """Write a card as CurriculumTrainer does; do nothing if trl asks with `model_name`, as in each checkpoint."""
        if model_name is None:
            super().create_model_card(*args, **kwargs)


class GRPOPolicyTrainer(PolicyTrainer, GRPO):
    """PolicyTrainer with GRPO's updates."""


class RLOOPolicyTrainer(PolicyTrainer, RLOO):
    """PolicyTrainer with RLOO's updates."""


POLICY_TRAINERS = {"grpo": GRPOPolicyTrainer, "rloo": RLOOPolicyTrainer}
