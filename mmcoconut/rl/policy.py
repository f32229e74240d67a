"""A model that thinks as the policy of reinforcement learning: it answers rows, and says how likely its answers were.

A rollout is one answer: what the model read, how it thought, what it wrote. Thoughts belong to the context of what is
written, not to the actions: given the row and the noise they are deterministic, so that

    log P(answer) = Σ_t log P(token_t | row, thoughts, tokens before)

is differentiated through the thoughts. Gaussian noise on thoughts, drawn anew for each answer, is kept and read again
when the log-probability is formed: its distribution does not depend on the weights, so the gradient of the expected
reward is still that of the log-probability. Where a row stops thinking is an action; `schedules_mmcoconut` has its
log-probability.

Shapes: B rollouts, P tokens of a prompt, C tokens written, N latents, D hidden, V vocabulary.
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
    """What the model reads of a row before it writes.

    ids: all of it; begun: the part that thoughts stand in and the answer follows; encoded: of an encoder-decoder what
    its encoder reads, else empty. pixels: the tensors of this row's pictures, by the model's arguments. images: these
    pictures, of a vision-language model in its own class, whose processor says how several rows' are batched.
    """

    ids: list[int]
    begun: list[int]
    encoded: list[int]
    pixels: dict[str, torch.Tensor]
    images: list = field(default_factory=list)


@dataclass
class Rollout:
    """How one answer came about: its prompt, at which of its latents it thought, the noise (N, D) on the thoughts.

    stop_log_prob: log P of thinking just there, of the policy that did, where that was kept.
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
    """Of tokens written: log_probs and entropies (B, C), and log P (B,) of where rows stopped thinking, or None."""

    log_probs: torch.Tensor
    entropies: torch.Tensor
    stop_log_probs: torch.Tensor | None = None

    @classmethod
    def join(cls, parts: Iterable["Likelihood"]) -> "Likelihood":
        """Return that of all rows from those of parts of them."""
        columns = zip(*((part.log_probs, part.entropies, part.stop_log_probs) for part in parts))
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


@dataclass
class Sampling:
    """How answers are drawn.

    thought_noise: standard deviation of the noise on thoughts, in units of a thought's root mean square; 0: none.
    options: of `generate`, such as max_new_tokens and temperature.
    """

    thought_noise: float = 0.0
    options: dict = field(default_factory=dict)


def read_prompts(collator: CurriculumCollator, rows: Sequence[Mapping]) -> list[Prompt]:
    """The prompts of rows at the collator's stage; a row that recurs is read once.

    Raises:
        ValueError: a prompt that leaves no room for the answer.
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
    """The tensors of all rows' pictures.

    Those of a vision-language model in its own class are joined where all have the same kinds and sizes; else they are
    encoded anew together, as only its processor knows what it pads, and what stands for a row without pictures.
    """
    kinds = {tuple((name, tensor.shape[1:]) for name, tensor in prompt.pixels.items()) for prompt in prompts}
    if len(kinds) > 1 and isinstance(processor, ThinkingVLMProcessor):
        return processor.encode_images([prompt.images for prompt in prompts], return_tensors="pt")[0]
    names = dict.fromkeys(name for prompt in prompts for name in prompt.pixels)
    return {name: torch.cat([prompt.pixels[name] for prompt in prompts if name in prompt.pixels]) for name in names}


def joined(
    prompts: Sequence[Prompt], processor, *, ids: torch.Tensor, mask: torch.Tensor, num_written: int = 0
) -> dict[str, torch.Tensor]:
    """What the model reads beside ids and mask (B, T): pixels of all rows, what has an entry for each of these ids, of
    which the last num_written are an answer's, and encoders' ids (B, S)."""
    inputs = joined_pixels(prompts, processor)
    written = torch.zeros_like(mask, dtype=torch.bool)  # (B, T)
    written[:, written.shape[1] - num_written :] = True
    inputs |= processor.column_inputs(ids, mask, inputs, written)
    if prompts[0].encoded:
        encoded = {"input_ids": [prompt.encoded for prompt in prompts]}
        inputs |= processor.tokenizer.pad(encoded, padding_side="right", return_tensors="pt")
    return inputs


def placed(inputs: Mapping[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    """Tensors on the model's device, numbers with a point in its dtype."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


@torch.no_grad()
def sample(model, processor, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[list[list[int]], list[Rollout]]:
    """An answer to each prompt, and how it came about; a model with a stop head draws where it stops.

    The ids of an answer end with the end token if it was written.
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
    """(B, T), True at those of the latents (B, T) at which the rollouts thought."""
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
    """How likely the last C = num_written tokens of ids (B, P + C) are, thought again, with gradients.

    It is that of the model's distribution at this temperature, without what `generate` may leave out (top_p, top_k,
    suppressed placeholders, …).

    Args:
        model: the model, or it inside of DDP; its mode says whether there is dropout.
        mask (B, P + C): 0 at padding; where rows did not think is put into it here.
        temperature: that answers were sampled with.
        entropy_gradients: whether the entropies have gradients, which takes the memory of the logits once more.
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
        most = int(latent_mask.sum(dim=1).max())  # of these rows, which may be fewer than of those sampled together
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
    """Return the clipped loss () of where rows stopped thinking, meaned over the rows that count.

    Args:
        log_probs (B,): of stopping there, with gradients.
        kept: the same of the policy that sampled, for each row; with None in it, it is this one.
        advantages (B,): of the rows' answers.
        counted (B,): 1 for rows that count, else 0.
        limits: of the ratio of both probabilities.
    """
    old = log_probs.detach() if None in kept else log_probs.new_tensor(kept)  # (B,)
    ratio = (log_probs - old).exp()  # (B,)
    losses = -torch.min(ratio * advantages, ratio.clamp(*limits) * advantages)  # (B,)
    return (losses * counted).sum() / counted.sum().clamp(min=1)
