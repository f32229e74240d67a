"""Generate answers and count their tokens and thoughts."""

from collections.abc import Mapping, Sequence

import torch

from mmcoconut.caches_mmcoconut import ThoughtState


def count_generated(tokens: Sequence[int], eos_token_ids: Sequence[int]) -> int:
    """Return the number of new tokens in a row up to and including its first eos; the rest is padding.

    >>> count_generated([5, 6, 0, 9, 9], [0]), count_generated([5, 6], [0])
    (3, 2)
    """
    ends = [position for position, token in enumerate(tokens) if token in eos_token_ids]
    return ends[0] + 1 if ends else len(tokens)


def keeping(model, columns: int | torch.Tensor) -> dict:
    """Return the argument that restricts a model's logits to these columns; empty if it always computes all."""
    return {"logits_to_keep": columns} if getattr(model, "keeps_logits", True) else {}


def thought_latents(past_key_values, latent_mask: torch.Tensor) -> torch.Tensor:
    """Return which latents (B, P) of their prompts rows thought at, (B, P), according to a filled cache."""
    stopped = ThoughtState.of(past_key_values).attention_mask
    if stopped is None:
        return latent_mask
    num_beams = len(stopped) // len(latent_mask)
    return latent_mask & stopped[::num_beams, : latent_mask.shape[1]].bool()


def generate_and_count(model, processor, inputs: Mapping, *, stop_threshold: float | None, **options):
    """Return the output of `generate`, (B, P + new), and the number of thoughts per prompt (B,).

    stop_threshold: for a model with a stop head.
    """
    latent_mask = inputs[processor.prompt_names[0]] == model.config.latent_token_id  # (B, P)
    if not model.config.stop_head:
        return model.generate(**inputs, **options), latent_mask.sum(dim=1)
    options |= {"stop_threshold": stop_threshold, "return_dict_in_generate": True}
    outputs = model.generate(**inputs, **options)
    return outputs.sequences, thought_latents(outputs.past_key_values, latent_mask).sum(dim=1)
