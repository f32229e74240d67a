"""GRPO and RLOO of trl over a policy that thinks, with this library's data, evaluation, checkpoints and trackers.

trl is the engine: which rows are repeated how often, rewards, advantages, clipping, KL, their logs. What it asks of
the model and the processor is answered by `policy`: prompts are those of the curriculum's last stage, answers are
sampled with thoughts, and their log-probabilities think again. The methods of trl that are overridden for that are not
public: `tests/test_policy.py` compares them with a plain forward pass, and constraints.txt pins trl.

Sources: Shao et al. 2024, https://arxiv.org/abs/2402.03300 (GRPO); Ahmadian et al. 2024,
https://arxiv.org/abs/2402.14740 (RLOO).
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

from mmcoconut.data import question_text
from mmcoconut.rl.policy import Likelihood, Rollout, Sampling, likelihood, read_prompts, sample
from mmcoconut.training.lora import has_lora, without_adapters
from mmcoconut.training.trainer import CurriculumTrainer


# Of trl's settings for generation; what else a model's own generation_config says stays.
SAMPLING_OPTIONS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


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
    """What the policy is held near to: itself as it is now, with its weights kept, or without its adapters."""
    if has_lora(model):
        return WithoutAdapters(model)
    return copy.deepcopy(model).eval().requires_grad_(False)


def columns_of(row: Mapping) -> dict:
    """What reward functions are given of a row: all but its pictures, and the question under trl's name."""
    return {"prompt": question_text(row), **{name: value for name, value in row.items() if name != "images"}}


def without_dropout(model) -> None:
    """Switch off all dropout of a model, that of layers and that which is a number in a module or a configuration.

    trl's `disable_dropout` knows layers only, and Marian, BART and Qwen2 have numbers.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name.endswith(("dropout", "_pdrop")) or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)


class ThinkingPolicy:
    """What a trainer of trl asks of a policy, answered for one that thinks; before one of trl's trainers.

    Args:
        data_collator: of the run, at its last stage.
        thought_noise: see policy.Sampling.
        kwargs: of trl's trainer.
    """

    entropy_gradients = False

    def __init__(self, *, data_collator, thought_noise: float = 0.0, **kwargs):
        self.curriculum_collator = data_collator
        args, model = kwargs["args"], kwargs["model"]
        beta, args.beta = args.beta, 0.0  # else trl would load a reference by the model's name
        reference = reference_of(model) if beta else None
        without_dropout(model)
        super().__init__(**kwargs)
        del model.forward  # trl's own, for a head that answers without logits
        args.beta = self.beta = beta
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("objective: grpo and rloo sample from whole weights: use DDP, not FSDP or DeepSpeed.")
        if isinstance(reference, torch.nn.Module):
            reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.ref_model = reference
        options = {name: self.generation_kwargs[name] for name in SAMPLING_OPTIONS}
        self.sampling = Sampling(thought_noise, {name: value for name, value in options.items() if value is not None})
        self.rows, self.prompts, self.rollouts, self.stop_log_probs = [], [], [], None

    @property
    def policy(self):
        return self.accelerator.unwrap_model(self.model)

    def _generate_and_score_completions(self, inputs: Sequence[Mapping]) -> dict:
        """As trl's, and the rollouts of all rows, which are shuffled and split with the rest."""
        self.rows = inputs
        output = super()._generate_and_score_completions([columns_of(row) for row in inputs])
        counts = torch.tensor([float(rollout.num_thoughts) for rollout in self.rollouts])
        mean = self.accelerator.gather(counts.to(self.accelerator.device)).mean().item()
        self._metrics["train"]["num_thoughts"].append(mean)
        return {**output, "rollouts": self.rollouts}

    def _tokenize_prompts(self, prompts: list):
        self.prompts = read_prompts(self.curriculum_collator, self.rows)
        return [prompt.begun for prompt in self.prompts], None, {}

    def write_answers(self) -> list[list[int]]:
        """Ids of an answer to each row; sets `rollouts`."""
        with self.compute_loss_context_manager():
            answers, self.rollouts = sample(
                self.policy, self.curriculum_collator.processor, self.prompts, self.sampling
            )
        return answers

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rows = [{**row, "num_thoughts": rollout.num_thoughts} for row, rollout in zip(inputs, self.rollouts)]
        return super()._calculate_rewards(rows, prompts, completions, completion_ids_list)

    def likelihood_of(self, model, rows: slice, ids, mask, num_written: int) -> Likelihood:
        return likelihood(
            model,
            self.curriculum_collator.processor,
            self.rollouts[rows],
            ids=ids[rows],
            mask=mask[rows],
            num_written=num_written,
            temperature=self.temperature,
            entropy_gradients=self.entropy_gradients and torch.is_grad_enabled(),
        )

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
        """Log-probabilities and entropies (B, C) of the last C = logits_to_keep tokens, by so many rows at a time."""
        num_rows = len(input_ids)
        size = batch_size or num_rows
        with self.accelerator.autocast():
            parts = [
                self.likelihood_of(model, slice(start, start + size), input_ids, attention_mask, logits_to_keep)
                for start in range(0, num_rows, size)
            ]
        log_probs = torch.cat([part.log_probs for part in parts])
        if parts[0].stop_log_probs is not None and model is not self.ref_model:
            self.stop_log_probs = torch.cat([part.stop_log_probs for part in parts])  # (B,)
            if not self.stop_log_probs.requires_grad:  # of the policy that sampled, before it learns from it
                for rollout, value in zip(self.rollouts, self.stop_log_probs.tolist()):
                    rollout.stop_log_prob = value
        return log_probs, torch.cat([part.entropies for part in parts]) if compute_entropy else None, None

    def stop_loss(self, advantages: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """The clipped loss of where rows stopped thinking, as trl's of a token, meaned over the counted rows (B,)."""
        kept = [rollout.stop_log_prob for rollout in self.rollouts]
        old = self.stop_log_probs.detach() if None in kept else self.stop_log_probs.new_tensor(kept)
        ratio = (self.stop_log_probs - old).exp()  # (B,)
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        losses = -torch.min(ratio * advantages, clipped * advantages)  # (B,)
        return (losses * counted).sum() / counted.sum().clamp(min=1)

    def _compute_loss(self, model, inputs: dict) -> torch.Tensor:
        self.rollouts: list[Rollout] = inputs["rollouts"]
        loss = super()._compute_loss(model, inputs)
        if self.stop_log_probs is None:
            return loss
        steps = self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1
        counted = inputs["completion_mask"].any(dim=1).to(loss.dtype)  # (B,), without cut answers that are masked
        return loss + self.stop_loss(inputs["advantages"], counted) / steps

    def _prepare_inputs(self, inputs):
        """As trl's in training; evaluation brings batches of its own."""
        return super()._prepare_inputs(inputs) if self.model.training else Trainer._prepare_inputs(self, inputs)

    def _save_checkpoint(self, *args, **kwargs):
        """Save a checkpoint without the card that trl writes into it."""
        Trainer._save_checkpoint(self, *args, **kwargs)

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


class GRPO(ThinkingPolicy, GRPOTrainer):
    """trl's GRPO over a policy that thinks."""

    @property
    def entropy_gradients(self) -> bool:
        """Whether an entropy bonus is part of the loss."""
        return self._entropy_bonus_enabled

    def _generate_single_turn(self, *args, **kwargs):
        return self.write_answers(), None


class RLOO(ThinkingPolicy, RLOOTrainer):
    """trl's RLOO, whose baseline is the mean of a row's other answers, over a policy that thinks."""

    def _generate_single_turn(self, *args, **kwargs):
        return self.write_answers()


class GRPOPolicyTrainer(CurriculumTrainer, GRPO):
    """CurriculumTrainer whose updates are GRPO's: evaluation, checkpoints, cards and uploads are the same."""


class RLOOPolicyTrainer(CurriculumTrainer, RLOO):
    """CurriculumTrainer whose updates are RLOO's: evaluation, checkpoints, cards and uploads are the same."""


POLICY_TRAINERS = {"grpo": GRPOPolicyTrainer, "rloo": RLOOPolicyTrainer}
