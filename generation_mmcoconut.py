"""`generate` for models that think: latents in the prefill, rows that stop, the kind of cache.

Shapes: B rows of the prompt, T columns.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin, GenerationMode

from .caches_mmcoconut import ThoughtState, chosen_cache, length_of, text_cache
from .compat_mmcoconut import CACHE, rename_cache
from .configuration_mmcoconut import TOKEN_ID_FIELDS
from .hiding_mmcoconut import check_one_turn
from .passes_mmcoconut import is_two_dimensional, position_limit, with_mask_of_left_out


def _check_new_positions(limit: int | None, attention_mask: torch.Tensor | None, *, num_columns: int, num_new: int):
    """Raise ValueError if `generate` would read past the end of a position table of `limit` rows.

    attention_mask (B, num_columns): of the prompts, if padding takes no positions; None if it does.
    num_new: the maximum number of generated tokens; the last is not read and needs no position.
    """
    length = num_columns if attention_mask is None else int(attention_mask.sum(dim=-1).max())
    if limit is None or length + num_new - 1 <= limit:
        return
    room = limit - length + 1
    remedy = f"lower max_new_tokens to at most {room}, or " if room > 0 else ""
    raise ValueError(
        f"The longest prompt has {length} tokens, images and latents included, and max_new_tokens={num_new} may "
        f"follow, but the language model has {limit} positions: {remedy}shorten the question, leave out earlier "
        "turns, ask with fewer thoughts (num_latents), or take a language model with more positions."
    )


class ThinkingGenerationMixin(GenerationMixin):
    """GenerationMixin of a model with a head that thinks in its prefill; `self.model` is the base model."""

    mask_name = "attention_mask"  # name of the argument with the decoder's mask

    def suppress_placeholders(self) -> None:
        """Suppress placeholder tokens, which would be thoughts without a cache, unless others are configured."""
        if self.generation_config.suppress_tokens is None:
            self.generation_config.suppress_tokens = [getattr(self.config, name) for name in TOKEN_ID_FIELDS]

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        """Read generation_config.json; suppress the placeholders if it is missing."""
        super().adjust_generation_fn(*args, **kwargs)
        self.suppress_placeholders()

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """Generate as transformers does.

        kwargs: also those of `forward`; with a stop head stop_threshold defaults to 0.5; 1.0 disables early exit.
        """
        rename_cache(kwargs)
        self.settle_stopping(kwargs)
        self.check_chunks(kwargs.get("input_ids") if inputs is None else inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, **kwargs) -> dict:
        """Prepare a step without left-out latents; `generate` requires inputs_embeds in this signature."""
        self.leave_out_of_step(kwargs)
        self.hide_in_step(input_ids, kwargs)
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, num_read):
        """Let transformers make the cache; replace a growing one by the chosen kind."""
        self.check_room(generation_config, model_kwargs.get(self.mask_name), num_read)
        may_choose = not self.is_assisted(generation_mode) and model_kwargs.get(CACHE) is None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, num_read)
        if may_choose and model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE] = self.chosen_in_place_of(model_kwargs[CACHE])

    @staticmethod
    def is_assisted(generation_mode) -> bool:
        return generation_mode == GenerationMode.ASSISTED_GENERATION

    def chosen_in_place_of(self, made: Cache) -> Cache:
        """Return the cache chosen for this decoder in place of an empty growing one."""
        own = text_cache(made)
        if self.config.thought_schedule != "sequential" or type(own) is not DynamicCache or own.offloading:
            return made
        kind = chosen_cache(self.get_decoder())
        if kind is None:
            return made
        return kind() if own is made else EncoderDecoderCache(kind(), made.cross_attention_cache)

    def settle_stopping(self, kwargs: dict) -> None:
        """Set the stop threshold and the mask of rows that stopped earlier in the arguments of `generate`."""
        mask = with_mask_of_left_out(kwargs.get(self.mask_name), kwargs.get(CACHE))
        if mask is not None:
            kwargs[self.mask_name] = mask
        if self.config.stop_head:
            kwargs.setdefault("stop_threshold", 0.5)
        if kwargs.get("stop_threshold") is None:
            return
        config = kwargs.get("generation_config") or self.generation_config
        for name in ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"):
            if kwargs.get(name, getattr(config, name, None)) is not None:
                problem = f"{name} splits the prompt, but rows of this model stop thinking by themselves"
                raise ValueError(f"{problem}: leave it out, or pass stop_threshold=None to think at all latents.")

    def check_chunks(self, input_ids: torch.Tensor | None, kwargs: dict) -> None:
        """Raise ValueError if chunks would hide columns from a turn's question, not only from its answer."""
        config, sees = kwargs.get("generation_config") or self.generation_config, self.config.answer_sees
        if sees == "all" or kwargs.get("prefill_chunk_size", config.prefill_chunk_size) is None:
            return
        hiding = ThoughtState.of(kwargs.get(CACHE)).hiding
        if hiding is not None and (hiding.last >= 0).any():
            raise ValueError(
                "prefill_chunk_size would split a later turn's question from its thoughts, and with answer_sees="
                f"{sees!r} it would see as little as the answer before it: leave prefill_chunk_size out."
            )
        if input_ids is not None:
            latents = input_ids == self.config.latent_token_id  # (B, T)
            check_one_turn(latents, torch.zeros_like(latents), sees)

    def leave_out_of_step(self, kwargs: dict) -> None:
        """Set a step's mask and positions after a prefill in which latents were left out."""
        past_key_values, mask = kwargs.get(CACHE), kwargs.get(self.mask_name)
        known = ThoughtState.of(past_key_values).attention_mask  # (B, filled)
        if known is None:
            return
        if mask is None:  # length: columns in the cache and in this step
            length = int(past_key_values.get_seq_length()) + (kwargs.get("next_sequence_length") or 1)
            mask = known.new_ones(len(known), length)
        without = with_mask_of_left_out(mask, past_key_values)
        positions = self.mask_name.replace("attention_mask", "position_ids")
        if kwargs.get(positions) is not None:
            kwargs[positions] = self.positions_without(kwargs[positions], mask, without)
        kwargs[self.mask_name] = without

    def hide_in_step(self, input_ids: torch.Tensor, kwargs: dict) -> None:
        """Set a mask that hides columns in the arguments of a one-token step whose mask is prepared in advance.

        Other calls hide columns themselves; their positions count this mask's tokens.
        """
        past_key_values, mask = kwargs.get(CACHE), kwargs.get(self.mask_name)
        hiding = ThoughtState.of(past_key_values).hiding
        if hiding is None or not past_key_values.is_compileable or not (mask is None or is_two_dimensional(mask)):
            return
        length = length_of(past_key_values) + 1
        if mask is None and kwargs.get("next_sequence_length") == 1:  # generate passes None for a mask without zeros
            mask = torch.ones_like(hiding.hidden_to(length), dtype=torch.long)
        is_step = mask is not None and mask.shape[1] == length
        if is_step and not (input_ids[:, -1] == self.config.latent_token_id).any():
            kwargs[self.mask_name] = mask.masked_fill(hiding.hidden_to(length), 0)

    def positions_without(self, position_ids: torch.Tensor, mask: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
        """Return the positions (…, B, T) of columns after latents that are in mask (B, T) but not in `without`.

        A model whose image positions differ from columns continues from its last position; see also StopEarly.
        """
        return position_ids - (mask - without).sum(dim=1, keepdim=True)

    def check_room(self, generation_config, mask: torch.Tensor | None, num_read: int) -> None:
        """Raise ValueError if num_read columns, prompts included, need more positions than the decoder has."""
        given = is_two_dimensional(mask)
        num_columns = mask.shape[1] if given else num_read + 1 - (generation_config.max_new_tokens or 1)
        counted = mask if given and not self.get_decoder().counts_columns else None
        limit, num_new = position_limit(self.get_decoder()), num_read + 1 - num_columns
        _check_new_positions(limit, counted, num_columns=num_columns, num_new=num_new)
