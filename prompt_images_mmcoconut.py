"""`generate` for composed models: images, and prefixes, which are the shared beginnings of prompts.

Releases of transformers distribute images to beams and chunks in different ways, some wrongly for rows with several
images. Here images are encoded once, before the prompt is repeated or split, and every step gets the features of the
columns it reads. A prefix (an image or a long text) runs through the model once, and is copied into caches.

Shapes: B rows of the prompt, E that they are repeated to, T columns, P of a prefix, F features, D hidden, I tiles.
"""

import json
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .caches_mmcoconut import ThoughtState, text_cache, with_cross_attention
from .compat_mmcoconut import CACHE, RELEASE, rename_cache
from .generation_mmcoconut import ThinkingGenerationMixin
from .passes_mmcoconut import positions_from_mask
from .vision_mmcoconut import check_num_features, check_num_tiles, check_one_source, check_whole_images


IMAGE_SOURCES = ("pixel_values", "image_features")
# Features of the same picture, computed in another batch, differ by rounding; those of another picture by far more.
SAME_FEATURES = 1e-2
SAMPLED = 16  # first values of each parameter, to recognize the weights
# Configuration fields about saving or outputs, which do not affect keys and values.
NOT_COMPARED = ("architectures", "auto_map", "dtype", "transformers_version", "mmcoconut_version", "use_cache")
NOT_COMPARED += ("output_attentions", "output_hidden_states", "return_dict")


@dataclass(frozen=True)
class _EncodedImages:
    """The image features of the prompts' placeholders.

    placeholders (B, T): True at the `<image>` columns that are not in a cache yet; first: the column of the first.
    features (F, D): one per placeholder, row by row.
    inputs: the images that they were made from, which an assistant model encodes again.
    """

    placeholders: torch.Tensor
    first: int
    features: torch.Tensor
    inputs: dict

    def of_columns(self, start: int, num_columns: int, num_rows: int) -> torch.Tensor | None:
        """Return the features (F, D) of columns start, start + 1, … in E rows; None if these have no placeholder."""
        start, repeats = max(start - self.first, 0), num_rows // len(self.placeholders)
        columns = slice(start, start + num_columns)
        numbers = self.placeholders.flatten().cumsum(0).view_as(self.placeholders) - 1  # (B, T)
        read = self.placeholders[:, columns].repeat_interleave(repeats, dim=0)  # (E, num_columns)
        numbers = numbers[:, columns].repeat_interleave(repeats, dim=0)[read]  # (F,)
        return self.features[numbers] if len(numbers) else None


IMAGES_OF_CALL: ContextVar[_EncodedImages | None] = ContextVar("IMAGES_OF_CALL", default=None)


def _take_images(kwargs: dict) -> dict:
    """Pop the images from keyword arguments; return them by name, num_tiles last."""
    images = {name: kwargs.pop(name, None) for name in (*IMAGE_SOURCES, "num_tiles")}
    check_one_source(**{name: images[name] for name in IMAGE_SOURCES})
    return {name: value for name, value in images.items() if value is not None}


def rows_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the rows of (B, T) without their padding."""
    if attention_mask is None:
        return list(input_ids)
    return [row[mask.bool()] for row, mask in zip(input_ids, attention_mask)]


def _common_length(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return the number of equal tokens at the beginning of two prompts."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).long().cumprod(0).sum())


def _shared_length(prompts: list[torch.Tensor], num_tokens: int | None, ends_before: int | None) -> int:
    """Return the length of the prompts' prefix: the tokens that all begin with, or num_tokens of them.

    Each of several prompts keeps a token after it, for the next pass; the token ends_before is never in a prefix.
    """
    lengths = [_common_length(prompts[0], prompt) for prompt in prompts]
    if len(prompts) > 1:
        lengths += [len(prompt) - 1 for prompt in prompts]
    if ends_before is not None:
        lengths += (prompts[0] == ends_before).nonzero().flatten().tolist()
    shared = min(lengths)
    if shared < 1 or (num_tokens is not None and not 1 <= num_tokens <= shared):
        wanted = "at least one" if num_tokens is None else num_tokens
        remedy = f"give prompts with one beginning and their attention_mask, or 1 <= num_tokens <= {shared}"
        raise ValueError(f"The prompts begin with {shared} common tokens, but the prefix needs {wanted}: {remedy}.")
    return shared if num_tokens is None else num_tokens


def compared(fields: dict) -> dict:
    """Return the fields of a configuration, or a nested one, that keys and values depend on."""
    return {name: value for name, value in fields.items() if name not in NOT_COMPARED and not name.startswith("_")}


def fingerprint(model) -> dict:
    """Return what identifies a model: its name, its configuration, and first values of its parameters."""
    fields = json.loads(model.config.to_json_string(use_diff=False), object_hook=compared)
    loaded = [weight.detach() for weight in model.parameters() if not weight.is_meta]
    weights = torch.cat([weight.flatten()[:SAMPLED].float().cpu() for weight in loaded])
    name = model.name_or_path or f"a {type(model).__name__} that was not loaded"
    return {**fields, "weights": weights.tolist(), "name": name}


@dataclass
class PromptPrefix:
    """A prompt's first P tokens as computed by `model.prefill`; it is only copied from, never changed.

    maker: `fingerprint` of the model that computed it, the only one that may read it; input_ids (P,).
    images: its pixel_values or image_features (I, …), and their num_tiles, by these names.
    cache: keys and values of each layer, and the state that thoughts after it read; one row.
    """

    input_ids: torch.Tensor
    maker: dict
    images: dict[str, torch.Tensor]
    cache: Cache = field(default_factory=DynamicCache)

    def __len__(self) -> int:
        return len(self.input_ids)

    get_seq_length = __len__  # same name as in the cache that this is copied into

    def copied_into(self, past_key_values: Cache, num_rows: int) -> Cache:
        """Copy these keys and values into each row of an empty cache of any kind, and return it."""

        def of_rows(states: torch.Tensor) -> torch.Tensor:
            return states.expand(num_rows, *states.shape[1:])

        cache = text_cache(past_key_values)
        for index, layer in enumerate(text_cache(self.cache).layers):
            cache.update(of_rows(layer.keys), of_rows(layer.values), index)
        if isinstance(self.cache, EncoderDecoderCache):
            past_key_values = with_cross_attention(past_key_values)
            for index, layer in enumerate(self.cache.cross_attention_cache.layers):
                past_key_values.cross_attention_cache.update(of_rows(layer.keys), of_rows(layer.values), index)
                past_key_values.is_updated[index] = True
        ThoughtState.within(past_key_values)
        cache.thought_state = ThoughtState.of(self.cache).of_rows(of_rows)
        return past_key_values

    def check_reader(self, model) -> None:
        """Raise ValueError if this model is not the one that made the prefix."""
        made, reads = self.maker, fingerprint(model)
        for name in made | reads:
            if name != "name" and made.get(name) != reads.get(name):
                values = "are others" if name == "weights" else f"is {reads.get(name)!r}, not {made.get(name)!r}"
                models = f"The prefix was made by {made['name']}, and is read by {reads['name']}"
                remedy = "make the prefix with the model that reads it, and again after training"
                raise ValueError(f"{models}, whose {name} {values}: {remedy}.")

    def check_begins(self, prompts: list[torch.Tensor], latent_token_id: int) -> None:
        """Raise ValueError unless all prompts begin with the prefix and continue, no latent right after padding."""
        for row, prompt in enumerate(prompts):
            common = _common_length(prompt, self.input_ids)
            shared = min(common, len(prompt) - 1)
            if shared < len(self):
                pair = [f"id {ids[common]}" if common < len(ids) else "its end" for ids in (prompt, self.input_ids)]
                where = f"leaves the prefix ({len(self)} tokens) at token {common}: {' where it has '.join(pair)}"
                remedy = f"attention_mask where they are padded, or make a prefix of at most num_tokens={shared}"
                raise ValueError(f"Row {row} {where}; pass whole prompts, and their {remedy}.")
            if prompt[len(self)] == latent_token_id and len(prompt) < max(map(len, prompts)):
                where = f"directly after the {len(self)} tokens of the prefix, where its padding would go"
                remedy = f"make the prefix with num_tokens={len(self) - 1}, or pass the row alone"
                raise ValueError(f"Row {row} is shorter than others, with a latent {where}: {remedy}.")

    def in_front(self, prompts: list[torch.Tensor], num_columns: int, pad_token_id: int) -> tuple:
        """Return input_ids and attention_mask (B, num_columns) of [prefix | padding | rest of the prompt].

        A cache holds the prefix in the same columns of every row, so padding is in the middle; positions skip it.
        """
        ids = self.input_ids.new_full((len(prompts), num_columns), pad_token_id)  # (B, T)
        columns = torch.arange(num_columns, device=ids.device)  # (T,)
        starts = ids.new_tensor([num_columns - len(prompt) + len(self) for prompt in prompts])  # (B,), of the rests
        mask = (columns < len(self)) | (columns >= starts[:, None])  # (B, T)
        ids[mask] = torch.cat(prompts)
        return ids, mask.long()

    def without_images(self, images: dict, tiles_of_rows: list[int]) -> dict:
        """Return the given images without those of the prefix, which come first in every row.

        tiles_of_rows: the tiles (without num_tiles: images) of each whole prompt. If only as many images are given as
        follow the prefix, they are returned. Raise ValueError for other images than the prefix's, or other numbers.
        """
        name, known_name = next(iter(images), "num_tiles"), next(iter(self.images), "num_tiles")
        if "num_tiles" in (name, known_name):
            return images
        tensor, known = images[name], self.images[known_name].to(images[name])
        num_all = sum(tiles_of_rows)
        num_behind = num_all - len(tiles_of_rows) * len(known)
        if len(tensor) == num_behind:
            return images
        if len(tensor) != num_all or name != known_name:
            found = f"{name} has {len(tensor)} images or tiles, which cannot be compared with the {len(known)}"
            remedy = f"pass {known_name} of all {num_all} in the prompts, or of the {num_behind} after the prefix"
            raise ValueError(f"{found} {known_name} of the prefix: {remedy}.")
        is_known = torch.cat([torch.arange(tiles) < len(known) for tiles in tiles_of_rows])  # (I,)
        tolerance = 0 if name == "pixel_values" else SAME_FEATURES * known.abs().max()
        for row, first in enumerate(tensor[is_known].split(len(known))):
            if first.shape != known.shape or not (first - known).abs().max() <= tolerance:
                remedy = "make a prefix for each picture, or pass only the images after it"
                raise ValueError(f"Row {row} has other {name} than the {len(known)} of the prefix: {remedy}.")
        num_tiles = images.get("num_tiles", torch.ones(num_all, dtype=torch.long)).cpu()  # (images,)
        check_num_tiles(num_tiles, **{name: tensor})
        is_behind = ~is_known[num_tiles.cumsum(0) - num_tiles]  # (images,), by the first tile of each
        return {name: tensor[~is_known], "num_tiles": num_tiles[is_behind]} if num_behind else {}


class PromptImagesGenerationMixin(ThinkingGenerationMixin):
    """GenerationMixin of composed models, which reads image features column by column."""

    def generate(self, inputs: torch.Tensor | None = None, *args, prefix=None, **kwargs):
        """Generate as transformers does; images are encoded once, before the first forward pass.

        prefix: output of `prefill` for the beginning of all prompts, which input_ids must still contain. Its images
            need not be passed again; if they are, they are compared. For prompts of different lengths no cache is
            returned, and `no_repeat_ngram_size` sees padding after the prefix.
        kwargs: also those of `forward`; with a stop head stop_threshold defaults to 0.5; 1.0 disables early exit.
        """
        rename_cache(kwargs)
        if prefix is not None:
            return self.generate_behind(prefix, inputs, *args, **kwargs)
        # Steps read the images here and not from keywords, which transformers repeats and drops.
        token = IMAGES_OF_CALL.set(self.encode_prompts(inputs, kwargs))
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            IMAGES_OF_CALL.reset(token)

    def encode_prompts(self, inputs: torch.Tensor | None, kwargs: dict) -> _EncodedImages | None:
        """Pop the images from the arguments of `generate` and encode them; an assistant takes the main model's."""
        images, encoded = _take_images(kwargs), kwargs.pop("mm_encoder_outputs", None) or None
        past_key_values, assisted = kwargs.get(CACHE), IMAGES_OF_CALL.get()
        past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if not images and encoded is None and assisted is not None and past_length == 0:
            images = assisted.inputs
        if encoded is None and not any(name in images for name in IMAGE_SOURCES):
            return None
        check_one_source(**{name: images.get(name) for name in IMAGE_SOURCES}, mm_encoder_outputs=encoded)
        ids, embeds = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("inputs_embeds")
        image_mask = self.model.get_token_mask(self.config.image_token_id, ids, embeds)  # (B, T)
        if assisted is not None and not image_mask.any():  # a nested call on other inputs
            return None
        mask = kwargs.get("attention_mask")
        if mask is None or mask.shape[1] == image_mask.shape[1]:  # the ids are all, not only those after the cache
            image_mask = image_mask[:, past_length:]
        check_whole_images(image_mask, images.get("num_tiles"), self.config)
        if encoded is None:
            with torch.no_grad():
                encoded = {"image": self.get_image_features(**images, return_dict=True)}
        features = torch.cat(list(encoded["image"].pooler_output))  # (F, D)
        check_num_features(image_mask, features, self.config)
        return _EncodedImages(image_mask, past_length, features, images)

    def positions_without(self, position_ids: torch.Tensor, mask: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
        """Return the positions (B, T) of all columns, which count the real tokens."""
        return positions_from_mask(without, without.shape[1])

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """Keep a prefill's mask 2-D: each pass makes its own, and a prepared 4-D mask would fit only one."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, **kwargs) -> dict:
        """Prepare a step, with the features of the placeholders that it reads."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
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

    @torch.no_grad()
    def prefill(
        self, input_ids, attention_mask=None, num_tokens=None, pixel_values=None, image_features=None, num_tiles=None
    ) -> PromptPrefix:
        """Run the shared beginning of prompts through the model once, for `generate(…, prefix=…)`.

        Args:
            input_ids, attention_mask (B, T): one prompt, which is the prefix, or several, which begin with it.
            num_tokens: of the prefix, in which no image may end halfway.
            pixel_values or image_features, num_tiles: the prompts' images; those in the prefix must be the same.
        """
        images = {"pixel_values": pixel_values, "image_features": image_features, "num_tiles": num_tiles}
        images, prompts = _take_images(images), rows_of(input_ids, attention_mask)
        # With early exit each row stops at its own latent, after the shared prefix.
        ends_before = self.config.latent_token_id if self.config.stop_head else None
        prompt = prompts[0][None, : _shared_length(prompts, num_tokens, ends_before)]  # (1, P)
        [tiles] = self.count_tiles(prompt)
        first = {name: value[:tiles] for name, value in images.items()}
        if num_tiles is not None:
            first["num_tiles"] = num_tiles[num_tiles.cumsum(0) <= tiles]
        check_whole_images(prompt == self.config.image_token_id, first.get("num_tiles"), self.config)
        prefix = PromptPrefix(prompt[0], fingerprint(self), first if tiles else {})
        prefix.without_images(images, self.count_tiles(prompts))
        outputs = self.model(input_ids=prompt, past_key_values=prefix.cache, use_cache=True, **prefix.images)
        prefix.cache = outputs.past_key_values
        return prefix

    def count_tiles(self, prompts) -> list[int]:
        """Return the number of images, or tiles, that each prompt has placeholders for."""
        return [int((ids == self.config.image_token_id).sum()) // self.config.image_seq_length for ids in prompts]

    def generate_behind(self, prefix: PromptPrefix, inputs: torch.Tensor | None, *args, **kwargs):
        """Generate for whole prompts that begin with a prefix; only the rest runs through the model."""
        prefix.check_reader(self)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs  # (B, T)
        other = [name for name in (CACHE, "position_ids", "inputs_embeds") if kwargs.get(name) is not None]
        if input_ids is None or other:
            raise ValueError(f"A prefix needs input_ids of whole prompts and no {' or '.join(other or ['others'])}.")
        prompts = rows_of(input_ids, kwargs.pop("attention_mask", None))
        prefix.check_begins(prompts, self.config.latent_token_id)
        images = prefix.without_images(_take_images(kwargs), self.count_tiles(prompts))
        ids, mask = prefix.in_front(prompts, input_ids.shape[1], self.generation_config.pad_token_id or 0)  # (B, T)
        outputs = self.generate(ids, *args, attention_mask=mask, **{CACHE: prefix}, **images, **kwargs)
        if mask.all():
            return outputs
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences  # (E, T + new)
        sequences[:, : ids.shape[1]] = input_ids.repeat_interleave(len(sequences) // len(ids), dim=0)
        if outputs is not sequences:
            outputs.past_key_values = None  # its padding is in other columns than in the prompts and their mask
        return outputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, num_read):
        """Copy a prefix into the cache that is made."""
        given = model_kwargs.get(CACHE)
        if generation_config.prefill_chunk_size is not None and RELEASE < (5, 21) and given and given.get_seq_length():
            problem = "after a cache or prefix reads the wrong columns in this release of transformers"
            raise ValueError(f"prefill_chunk_size {problem}: install transformers 5.21 or newer, or leave it out.")
        has_prefix = isinstance(given, PromptPrefix)
        if has_prefix:
            self.check_follows(
                generation_config, model_kwargs.get("attention_mask"), self.is_assisted(generation_mode)
            )
            del model_kwargs[CACHE]
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, num_read)
        if has_prefix:
            repeats = max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs[CACHE] = given.copied_into(model_kwargs[CACHE], batch_size * repeats)

    def check_follows(self, generation_config, attention_mask: torch.Tensor | None, is_assisted: bool) -> None:
        """Raise ValueError for generation that cannot continue a prefix, or padding that a window would count."""
        if is_assisted:
            remedy = "leave out the prefix, or assistant_model and prompt_lookup_num_tokens"
            raise ValueError(f"Assisted decoding reads whole prompts again, even those in a cache: {remedy}.")
        if not generation_config.use_cache:
            raise ValueError("A prefix needs a cache, but use_cache is False: leave one of them out.")
        window, length = getattr(self.get_decoder().config, "sliding_window", None), generation_config.max_length
        if attention_mask is not None and not self.get_decoder().sees_all_columns and (window or 0) < length:
            problem = f"in a window of {window} columns, and the sequence has up to {length}"
            remedy = "pass prompts of one length, or one at a time"
            raise ValueError(f"Padding between a prefix and the prompts' rest would be {problem}: {remedy}.")
