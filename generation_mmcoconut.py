"""`generate` for models that think: images, prefixes, rows that stop, and caches that leave a prompt's keys in place.

Releases of transformers share images out to beams and chunks in different ways, some wrongly for rows with several
images. Here they are encoded once, before the prompt is repeated or cut; the features of each row are kept beside its
placeholders, and every step gets those that belong to the columns it reads.

Shapes: B rows of the prompt, E rows that a prompt was repeated to, T columns of the prompt, P features, D hidden.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .compat_mmcoconut import CACHE, RELEASE, rename_cache
from .configuration_mmcoconut import TOKEN_ID_FIELDS
from .passes_mmcoconut import (
    ThoughtState,
    check_new_positions,
    chosen_cache,
    position_limit,
    positions_from_mask,
    text_cache,
    with_mask_of_left_out,
)
from .prefixes_mmcoconut import Maker, PromptPrefix, prompts_of, shared_length
from .vision_mmcoconut import check_num_features, check_one_source, check_whole_images


IMAGE_INPUTS = ("pixel_values", "image_features", "num_tiles")
IMAGES_OF_CALL: ContextVar = ContextVar("IMAGES_OF_CALL", default=None)


class EncodedImages:
    """The features that the placeholders of prompts stand for.

    placeholders (B, T): True at the `<image>` columns that are not in a cache yet; first: the column of the first.
    features: (P, D), as many as there are placeholders, row by row.
    inputs: the images that they were made of, which an assistant model encodes again.
    """

    def __init__(self, placeholders: torch.Tensor, first: int, features: torch.Tensor, inputs: dict):
        self.placeholders, self.first, self.inputs = placeholders, first, inputs
        self.features = features.split(placeholders.sum(dim=1).tolist())

    def of_columns(self, start: int, num_columns: int, num_rows: int) -> torch.Tensor | None:
        """Return the features (P, D) of columns start, start + 1, … in E rows; None where they have no placeholder."""
        start = max(start - self.first, 0)
        before = self.placeholders[:, :start].sum(dim=1).tolist()  # (B,)
        here = self.placeholders[:, start : start + num_columns].sum(dim=1).tolist()  # (B,)
        if not any(here):
            return None
        repeats = num_rows // len(self.features)
        rows = [part[skip : skip + count] for part, skip, count in zip(self.features, before, here)]
        return torch.cat([row for row in rows for _ in range(repeats)])


@contextmanager
def images_of_call(encoded: EncodedImages | None):
    """Inside, every step of `generate` reads these images; no keyword, as transformers repeats and drops those."""
    token = IMAGES_OF_CALL.set(encoded)
    try:
        yield
    finally:
        IMAGES_OF_CALL.reset(token)


def with_prompts(outputs, input_ids: torch.Tensor, *, moved: bool):
    """What `generate` gave for (B, T) prompts behind a prefix, with the prompts (B, T) as they were passed.

    moved: whether padding stood in the middle, so that a cache, if returned, fits no mask of these prompts; it is left
    out.
    """
    sequences = outputs.sequences if isinstance(outputs, ModelOutput) else outputs  # (B · returned, T + new)
    given = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)  # (B · returned, T)
    sequences = torch.cat([given, sequences[:, input_ids.shape[1] :]], dim=1)
    if not isinstance(outputs, ModelOutput):
        return sequences
    outputs.sequences = sequences
    if moved:
        outputs.past_key_values = None
    return outputs


class ThinkingGenerationMixin(GenerationMixin):
    """GenerationMixin of a model with a head that thinks in its prefill; `self.model` is the model without it."""

    def suppress_placeholders(self) -> None:
        """Let generation leave out the placeholders and markers, unless something else was chosen.

        One that is sampled would be read as an ordinary token by the cache and as a thought without.
        """
        if self.generation_config.suppress_tokens is None:
            self.generation_config.suppress_tokens = [getattr(self.config, field) for field in TOKEN_ID_FIELDS]

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        """Read generation_config.json, and suppress the placeholders where it is missing."""
        super().adjust_generation_fn(*args, **kwargs)
        self.suppress_placeholders()

    def generate(self, inputs: torch.Tensor | None = None, *args, image_features=None, prefix=None, **kwargs):
        """Generate as transformers does, with images encoded before any forward pass could see whose they are.

        prefix: what `prefill` gave of the beginning of all prompts; input_ids are whole prompts all the same, and the
            result is what it would be without. Images in it need not be passed again; if they are, they are compared.
            While prompts of different lengths are generated, padding stands between the prefix and the rest, which
            `no_repeat_ngram_size` sees; no cache is returned for them.
        kwargs: also stop_threshold, see `settle_stopping`, and thought_noise, as `forward` takes it.
        """
        rename_cache(kwargs)
        if prefix is not None:
            return self.generate_behind(prefix, inputs, *args, image_features=image_features, **kwargs)
        self.settle_stopping(kwargs)
        kwargs["image_features"] = image_features
        with images_of_call(self.encode_prompts(inputs, kwargs)):
            return super().generate(inputs, *args, **kwargs)

    def encode_prompts(self, inputs: torch.Tensor | None, kwargs: dict) -> EncodedImages | None:
        """Take the images out of the arguments of `generate` and encode them; return None where there are none.

        A model that assists another is given no images, and encodes those of the other.

        Raises:
            ValueError: images given twice; placeholders and features differ in number; rows with parts of images.
        """
        past_key_values, encoded = kwargs.get(CACHE), kwargs.pop("mm_encoder_outputs", None) or None
        # A prefix, which is no Cache yet, has its placeholders taken out of the prompts.
        past_length = int(past_key_values.get_seq_length()) if isinstance(past_key_values, Cache) else 0
        images = {name: value for name in IMAGE_INPUTS if (value := kwargs.pop(name, None)) is not None}
        assisted = IMAGES_OF_CALL.get()
        if not images and encoded is None and assisted is not None and past_length == 0:
            images = assisted.inputs
        pixels = {name: images.get(name) for name in ("pixel_values", "image_features")}
        check_one_source(**pixels, mm_encoder_outputs=encoded)
        if encoded is None and all(value is None for value in pixels.values()):
            return None
        ids = kwargs.get("input_ids") if inputs is None else inputs
        embeds = None if ids is not None else kwargs["inputs_embeds"]
        image_mask = self.model.get_token_mask(self.config.image_token_id, ids, embeds)  # (B, T)
        if assisted is not None and not image_mask.any():  # a call inside another one, about something else
            return None
        check_whole_images(image_mask, images.get("num_tiles"), self.config)
        if encoded is None:
            with torch.no_grad():
                encoded = {"image": self.get_image_features(**images, return_dict=True)}
        features = torch.cat(list(encoded["image"].pooler_output))  # (P, D)
        mask = kwargs.get("attention_mask")
        has_past = mask is None or mask.shape[1] == image_mask.shape[1]  # the ids are all, or those behind the cache
        placeholders = image_mask[:, past_length:] if has_past else image_mask
        check_num_features(placeholders, features, self.config)
        return EncodedImages(placeholders, past_length, features, images)

    @property
    def mask_name(self) -> str:
        """Which argument is the mask of the decoder's columns."""
        return "decoder_attention_mask" if self.config.is_encoder_decoder else "attention_mask"

    def settle_stopping(self, kwargs: dict) -> None:
        """Set in the arguments of `generate` the threshold above which rows stop, and the mask of those that did.

        stop_threshold: 0.5 by default where there is a stop head; 1.0 thinks all thoughts.

        Raises:
            ValueError: ways of generation that run the prompt in other pieces than the loop does.
        """
        mask = with_mask_of_left_out(kwargs.get(self.mask_name), kwargs.get(CACHE))
        if mask is not None:
            kwargs[self.mask_name] = mask
        if self.config.stop_head:
            kwargs.setdefault("stop_threshold", 0.5)
        if kwargs.get("stop_threshold") is None:
            return
        given = kwargs.get("generation_config") or self.generation_config
        for name in ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"):
            if kwargs.get(name, getattr(given, name, None)) is not None:
                raise ValueError(
                    f"{name} runs the prompt in pieces of its own, and rows of this model stop thinking by "
                    "themselves: leave it out, or pass stop_threshold=None to think at all latents."
                )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """Leave a prefill's mask 2-D: each of its passes makes its own, and a ready 4-D one would fit only one."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(
            config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """Prepare a step: without latents that rows left out, and with the features of the placeholders it reads."""
        self.leave_out_of_step(kwargs)
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        encoded, past_key_values = IMAGES_OF_CALL.get(), kwargs.get(CACHE)
        if encoded is None:
            return model_inputs
        start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        read = model_inputs.get("inputs_embeds")
        rows, columns = (model_inputs["input_ids"] if read is None else read).shape[:2]
        features = encoded.of_columns(start, columns, rows)
        if features is not None:
            model_inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
        return model_inputs

    def leave_out_of_step(self, kwargs: dict) -> None:
        """Set in the arguments of a step the mask and positions behind a prefill in which latents were left out."""
        past_key_values, mask = kwargs.get(CACHE), kwargs.get(self.mask_name)
        known = ThoughtState.of(past_key_values).known_mask(past_key_values)  # (B, filled)
        if known is None:
            return
        if mask is None:  # as long as what is in the cache and the columns of this step
            length = int(past_key_values.get_seq_length()) + (kwargs.get("next_sequence_length") or 1)
            mask = known.new_ones(len(known), length)
        kwargs[self.mask_name] = mask = with_mask_of_left_out(mask, past_key_values)
        positions = self.mask_name.replace("attention_mask", "position_ids")
        if kwargs.get(positions) is not None:
            kwargs[positions] = positions_from_mask(mask, mask.shape[1])

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        num_tokens: int | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        num_tiles: torch.LongTensor | None = None,
    ) -> PromptPrefix:
        """Run what prompts begin with through the model once, for `generate(…, prefix=…)` to go on from.

        Args:
            input_ids, attention_mask (B, T): one prompt, all of which is the prefix, or several, of which it is what
                all of them begin with.
            num_tokens: make the prefix of so many tokens.
            pixel_values or image_features, num_tiles: the images of the prompts; only those in the prefix are read.

        Raises:
            ValueError: prompts without a common beginning; a prefix that ends inside an image; other images at its
                placeholders in one prompt than in another.
        """
        check_one_source(pixel_values=pixel_values, image_features=image_features)
        prompts = prompts_of(input_ids, attention_mask)
        # Rows that stop by themselves do so each for itself, behind what they share.
        ends_before = self.config.latent_token_id if self.config.stop_head else None
        prompt = prompts[0][None, : shared_length(prompts, num_tokens, ends_before=ends_before)]  # (1, P)
        tiles = self.count_tiles([prompt[0]])[0]
        tiles_of_images = None if num_tiles is None else num_tiles[num_tiles.cumsum(0) <= tiles]
        check_whole_images(prompt == self.config.image_token_id, tiles_of_images, self.config)
        images = {"pixel_values": pixel_values, "image_features": image_features}
        first = {name: tensor[:tiles] for name, tensor in images.items() if tensor is not None and tiles}
        prefix = PromptPrefix(prompt[0], Maker.of(self), first, tiles_of_images if first else None)
        prefix.without_images(self.count_tiles(prompts), num_tiles, **images)
        inputs = {**first, "num_tiles": prefix.num_tiles, "past_key_values": DynamicCache(), "use_cache": True}
        return prefix.keep(self.model(input_ids=prompt, **inputs).past_key_values)

    def count_tiles(self, prompts: list[torch.Tensor]) -> list[int]:
        """How many images, or tiles, each prompt has placeholders for."""
        return [int((ids == self.config.image_token_id).sum()) // self.config.image_seq_length for ids in prompts]

    def generate_behind(self, prefix: PromptPrefix, inputs: torch.Tensor | None, *args, **kwargs):
        """`generate` for whole prompts that begin with a prefix, of which only the rest goes through the model."""
        prefix.maker.check_reads(Maker.of(self))
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs  # (B, T)
        other = [name for name in (CACHE, "position_ids", "inputs_embeds") if kwargs.get(name) is not None]
        if input_ids is None or other:
            raise ValueError(
                f"A prefix needs input_ids of the whole prompts and no {' or '.join(other or ['others'])}."
            )
        prompts = prompts_of(input_ids, kwargs.pop("attention_mask", None))
        prefix.check_begins(prompts, self.config.latent_token_id)
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_features", "num_tiles")}
        check_one_source(**{name: images[name] for name in ("pixel_values", "image_features")})
        images = prefix.without_images(self.count_tiles(prompts), images.pop("num_tiles"), **images)
        pad_token_id = self.generation_config.pad_token_id or 0
        ids, mask = prefix.in_front(prompts, input_ids.shape[1], pad_token_id=pad_token_id)  # (B, T) each
        # Stock `generate()` counts placeholders to share images out to beams; those of the prefix are read already.
        known = ids[:, : len(prefix)]
        known[known == self.config.image_token_id] = self.config.start_latent_token_id
        outputs = self.generate(ids, *args, attention_mask=mask, **{CACHE: prefix}, **images, **kwargs)
        return with_prompts(outputs, input_ids, moved=not bool(mask.all()))

    def _check_room(self, generation_config, model_kwargs: dict, num_read: int) -> None:
        """Raise ValueError if num_read columns, prompts included, need more positions than the decoder has."""
        mask = model_kwargs.get(self.mask_name)
        given = isinstance(mask, torch.Tensor) and mask.ndim == 2
        num_columns = mask.shape[1] if given else num_read + 1 - (generation_config.max_new_tokens or 1)
        check_new_positions(
            position_limit(self.get_decoder()),
            mask if given and not self.get_decoder().counts_columns else None,
            num_columns=num_columns,
            num_new=num_read + 1 - num_columns,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, num_read):
        """Check that positions suffice, let transformers make the cache, and copy a prefix into its rows.

        A growing cache that transformers makes gives way to the kind that is chosen for the decoder.
        """
        self._check_room(generation_config, model_kwargs, num_read)
        prefix = model_kwargs.get(CACHE)
        begun = isinstance(prefix, PromptPrefix) or (prefix is not None and int(prefix.get_seq_length()) > 0)
        if begun and generation_config.prefill_chunk_size is not None and RELEASE < (5, 21):
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} behind a cache or prefix reads the wrong "
                "columns in this release of transformers: install 5.21 or newer, or leave it out."
            )
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if isinstance(prefix, PromptPrefix):
            check_prefix_is_readable(prefix, generation_config, is_assisted=is_assisted)
            del model_kwargs[CACHE]
        is_given = model_kwargs.get(CACHE) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, num_read)
        may_choose = not (is_given or is_assisted) and self.config.thought_schedule == "sequential"
        kind = chosen_cache(self.get_decoder()) if may_choose else None
        if kind is not None and CACHE in model_kwargs:
            model_kwargs[CACHE] = with_chosen(model_kwargs[CACHE], kind)
        if isinstance(prefix, PromptPrefix):
            self._check_window(generation_config, model_kwargs)
            num_rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs[CACHE] = prefix.copied_into(model_kwargs[CACHE], num_rows)

    def _check_window(self, generation_config, model_kwargs: dict) -> None:
        """Raise where padding between a prefix and the rest of a prompt would push columns out of a window."""
        padded = model_kwargs.get("attention_mask") is not None
        window = getattr(self.config.get_text_config(decoder=True), "sliding_window", None)
        if padded and not self.get_decoder().sees_all_columns and window < generation_config.max_length:
            raise ValueError(
                f"Padding between a prefix and the prompts' rest would stand in a window of {window} columns, and the "
                f"sequence has up to {generation_config.max_length}: pass prompts of one length, or one at a time."
            )


def with_chosen(past_key_values: Cache, kind: type[Cache]) -> Cache:
    """Return a cache that `generate` made with another kind in place of its growing cache of the text, if any."""
    own = text_cache(past_key_values)
    if type(own) is not DynamicCache or own.offloading:
        return past_key_values
    if own is past_key_values:
        return kind()
    past_key_values.self_attention_cache = kind()
    return past_key_values


def check_prefix_is_readable(prefix: PromptPrefix, generation_config, *, is_assisted: bool) -> None:
    """Raise for ways of generation that cannot begin behind a prefix."""
    if is_assisted:
        raise ValueError(
            "Assisted decoding reads the whole prompt again in its first step, also what a cache holds already: "
            "leave out the prefix, or assistant_model and prompt_lookup_num_tokens."
        )
    if not generation_config.use_cache:
        raise ValueError("A prefix is kept in a cache, and use_cache is False: leave one of them out.")
