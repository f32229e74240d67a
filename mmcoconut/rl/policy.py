"""The policy of reinforcement learning: sample answers with thoughts, and compute their log-probabilities.

A rollout is one answer: the prompt, the thoughts and the generated tokens. Thoughts belong to the context of the
tokens, not to the actions: given the row and the noise they are deterministic, so that

    log P(answer) = Σ_t log P(token_t | row, thoughts, tokens before)

is differentiated through the thoughts. Gaussian noise on thoughts, drawn per answer, is stored and reused when the
log-probability is computed: its distribution does not depend on the weights, so the gradient of the expected
reward is still that of the log-probability. The number of thoughts before a row stops is an action;
`schedules_mmcoconut` computes its log-probability.

Shapes: B rollouts, P tokens of a prompt, C generated tokens, N latents, D hidden, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mmcoconut.data import open_images
from mmcoconut.passes_mmcoconut import take_columns
from mmcoconut.rl.stops import stop_log_probs
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.generating import count_generated, keeping, thought_latents
from mmcoconut.vlm_processing_mmcoconut import ThinkingVLMProcessor


@dataclass
class Prompt:
    """The model inputs of a row before generation.

    ids: the whole prompt; begun: the part with thoughts that the answer follows; encoded: the encoder's input of an
    encoder-decoder, else empty. pixels: the tensors of this row's pictures, by the model's argument names. images: the
    pictures, for a vision-language model in its own class, whose processor batches the pictures of several rows.
    """

    ids: list[int]
    begun: list[int]
    encoded: list[int]
    pixels: dict[str, torch.Tensor]
    images: list = field(default_factory=list)


@dataclass
class Rollout:
    """How an answer was generated: its prompt, the latents at which it thought, the noise (N, D) on the thoughts.

    stop_log_prob: log P of thinking at exactly these latents under the sampling policy, if it was kept.
    """

    prompt: Prompt
    thought: list[bool]
    noise: torch.Tensor | None = None
    stop_log_prob: float | None = None

    @property
    def num_thoughts(self) -> int:
        return sum(self.thought)


@dataclass
class Likelihood:
    """log_probs and entropies (B, C) of the generated tokens; log P (B,) of where rows stopped thinking, or None."""

    log_probs: torch.Tensor
    entropies: torch.Tensor
    stop_log_probs: torch.Tensor | None = None

    @classmethod
    def join(cls, parts: Iterable["Likelihood"]) -> "Likelihood":
        """Return the concatenation of several parts of a batch."""
        columns = zip(*((part.log_probs, part.entropies, part.stop_log_probs) for part in parts))
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


@dataclass
class Sampling:
    """The settings of sampling.

    thought_noise: standard deviation of the noise on thoughts, relative to a thought's root mean square; 0: none.
    options: arguments of `generate`, such as max_new_tokens and temperature.
    """

    thought_noise: float = 0.0
    options: dict = field(default_factory=dict)


def read_prompts(collator: CurriculumCollator, rows: Sequence[Mapping]) -> list[Prompt]:
    """Return the prompts of rows at the collator's stage; a repeated row is encoded once.

    Raises:
        ValueError: a prompt that leaves no positions for the answer.
    """
    num_latents, known = collator.curriculum.num_latents(collator.stage), {}
    for row in rows:
        if row["index"] in known:
            continue
        pixels, [num_tiles] = collator.pixels([row])
        ids = collator.encode_prompt(row, num_tiles, num_latents)
        collator.check_length(
            row, collator.longest_part(ids, collator.max_new_tokens), "the prompt with max_new_tokens"
        )
        encoded, begun = collator.processor.split_prompt(ids)
        images = open_images(row) if isinstance(collator.processor, ThinkingVLMProcessor) else []
        known[row["index"]] = Prompt(ids, begun, encoded, pixels, images)
    return [known[row["index"]] for row in rows]


def joined_pixels(prompts: Sequence[Prompt], processor) -> dict[str, torch.Tensor]:
    """Return the tensors of all rows' pictures.

    Those of a vision-language model in its own class are concatenated if all have the same kinds and sizes. Otherwise
    they are encoded again together: only its processor knows the padding, and what to pass for a row without pictures.
    """
    kinds = {tuple((name, tensor.shape[1:]) for name, tensor in prompt.pixels.items()) for prompt in prompts}
    if len(kinds) > 1 and isinstance(processor, ThinkingVLMProcessor):
        return processor.encode_images([prompt.images for prompt in prompts], return_tensors="pt")[0]
    names = dict.fromkeys(name for prompt in prompts for name in prompt.pixels)
    return {name: torch.cat([prompt.pixels[name] for prompt in prompts if name in prompt.pixels]) for name in names}


def joined(
    prompts: Sequence[Prompt], processor, *, ids: torch.Tensor, mask: torch.Tensor, num_written: int = 0
) -> dict[str, torch.Tensor]:
    """Return the model inputs other than ids and mask (B, T): pixels of all rows, tensors with an entry per id, of
    which the last num_written are the answer's, and encoders' ids (B, S)."""
    inputs = joined_pixels(prompts, processor)
    written = torch.zeros_like(mask, dtype=torch.bool)  # (B, T)
    written[:, written.shape[1] - num_written :] = True
    inputs |= processor.column_inputs(ids, mask, inputs, written)
    if prompts[0].encoded:
        encoded = {"input_ids": [prompt.encoded for prompt in prompts]}
        inputs |= processor.tokenizer.pad(encoded, padding_side="right", return_tensors="pt")
    return inputs


def placed(inputs: Mapping[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    """Move tensors to the model's device, and floating-point ones to its dtype."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


@torch.no_grad()
def sample(model, processor, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[list[list[int]], list[Rollout]]:
    """Sample an answer to each prompt; a model with a stop head samples where it stops. Return ids and rollouts.

    The ids of an answer end with the end token if it was generated.
    """
    ids_name, mask_name = processor.prompt_names
    batch = placed(processor.pad_prompts([prompt.ids for prompt in prompts], padding=True, return_tensors="pt"), model)
    latent_mask = batch[ids_name] == model.config.latent_token_id  # (B, P)
    read = joined(prompts, processor, ids=batch[ids_name], mask=batch[mask_name])
    inputs = {**batch, **placed(read, model)}
    shape, noise = (len(prompts), int(latent_mask.sum(dim=1).max())), None
    if sampling.thought_noise and shape[1]:
        width = model.config.get_text_config(decoder=True).hidden_size
        noise = sampling.thought_noise * torch.randn(*shape, width, device=model.device)  # (B, N, D)
        inputs["thought_noise"] = noise
    if model.config.stop_head:
        inputs["stop_threshold"] = torch.rand(shape, device=model.device)  # (B, N)
    training = model.training
    outputs = model.eval().generate(**inputs, use_cache=True, return_dict_in_generate=True, **sampling.options)
    model.train(training)
    thought = thought_latents(outputs.past_key_values, latent_mask)  # (B, P)
    eos = model.generation_config.eos_token_id
    written = outputs.sequences[:, batch[mask_name].shape[1] :].tolist()
    answers = [row[: count_generated(row, eos if isinstance(eos, list) else [eos])] for row in written]
    noises = [None] * len(prompts) if noise is None else noise
    rollouts = [
        Rollout(prompt, of_row[latents].tolist(), noise)
        for prompt, of_row, latents, noise in zip(prompts, thought, latent_mask, noises)
    ]
    return answers, rollouts


def where_thought(rollouts: Sequence[Rollout], latent_mask: torch.Tensor) -> torch.Tensor:
    """Return a mask (B, T), True at those of the latents (B, T) at which the rollouts thought."""
    most = int(latent_mask.sum(dim=1).max())
    lists = [[*rollout.thought, *[False] * (most - len(rollout.thought))] for rollout in rollouts]
    thought = torch.tensor(lists, dtype=torch.bool, device=latent_mask.device).view(len(rollouts), most)  # (B, N)
    order = (latent_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
    return latent_mask & take_columns(thought, order) if most else latent_mask


def likelihood(
    model,
    processor,
    rollouts: Sequence[Rollout],
    *,
    ids: torch.Tensor,
    mask: torch.Tensor,
    num_written: int,
    temperature: float = 1.0,
    entropy_gradients: bool = False,
) -> Likelihood:
    """Compute the likelihood of the last C = num_written tokens of ids (B, P + C), thoughts included, with gradients.

    It uses the model's distribution at this temperature, without the restrictions of `generate` (top_p, top_k,
    suppressed placeholders, …).

    Args:
        model: the model, or its DDP wrapper; its mode decides about dropout.
        mask (B, P + C): 0 at padding; latents at which rows did not think are masked here.
        temperature: the temperature of sampling.
        entropy_gradients: whether entropies have gradients, which needs the memory of the logits a second time.
    """
    ids_name, mask_name = processor.prompt_names
    own = getattr(model, "module", model)
    latent_mask = (ids == own.config.latent_token_id) & mask.bool()  # (B, P + C)
    latent_mask[:, -num_written:] = False
    thought = where_thought(rollouts, latent_mask)  # (B, P + C)
    prompts = [rollout.prompt for rollout in rollouts]
    inputs = placed(joined(prompts, processor, ids=ids, mask=mask, num_written=num_written), own)
    inputs |= {ids_name: ids, mask_name: mask.masked_fill(latent_mask & ~thought, 0)}
    if rollouts[0].noise is not None:
        most = int(latent_mask.sum(dim=1).max())  # in these rows, which may be fewer than those sampled together
        inputs["thought_noise"] = torch.stack([rollout.noise[:most] for rollout in rollouts])  # (B, N, D)
    if own.config.stop_head:
        inputs["output_stop_logits"] = True
    outputs = model(**inputs, **keeping(own, num_written + 1))
    log_probs = (outputs.logits[:, -num_written - 1 : -1].float() / temperature).log_softmax(dim=-1)  # (B, C, V)
    of_tokens = log_probs.gather(2, ids[:, -num_written:, None])[..., 0]  # (B, C)
    if not entropy_gradients:
        log_probs = log_probs.detach()
    entropies = -(log_probs.exp() * log_probs).sum(dim=-1)  # (B, C)
    stops = stop_log_probs(outputs.stop_logits, thought, latent_mask) if own.config.stop_head else None  # (B,)
    return Likelihood(of_tokens, entropies, stops)


def stop_loss(
    log_probs: torch.Tensor,
    kept: Sequence[float | None],
    *,
    advantages: torch.Tensor,
    counted: torch.Tensor,
    limits: tuple[float, float],
) -> torch.Tensor:
    """Return the clipped loss () of where rows stopped thinking, averaged over the counted rows.

    Args:
        log_probs (B,): of stopping there, with gradients.
        kept: the same under the sampling policy, per row; if it contains None, the current policy is used.
        advantages (B,): of the rows' answers.
        counted (B,): 1 for rows that count, else 0.
        limits: clipping limits of the probability ratio.
    """
    old = log_probs.detach() if None in kept else log_probs.new_tensor(kept)  # (B,)
    ratio = (log_probs - old).exp()  # (B,)
    losses = -torch.min(ratio * advantages, ratio.clamp(*limits) * advantages)  # (B,)
    return (losses * counted).sum() / counted.sum().clamp(min=1)
