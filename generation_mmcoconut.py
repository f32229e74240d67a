"""Images in `generate`: encoded once, before the prompt is repeated for beams or cut into chunks.

Releases of transformers share images out to beams and chunks in different ways, some wrongly for rows with several
images. Here the features of each row are kept beside its placeholders, and every step gets those that belong to the
columns it reads.

Shapes: B rows of the prompt, E rows that a prompt was repeated to, T columns of the prompt, P features, D hidden.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat_mmcoconut import CACHE
from .fusions_mmcoconut import check_one_source


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


class GenerationWithImages:
    """The part of a model with a head that encodes the images of `generate`; before GenerationMixin."""

    def encode_prompts(self, inputs: torch.Tensor | None, kwargs: dict) -> EncodedImages | None:
        """Take the images out of the arguments of `generate` and encode them; None where there are none to read.

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
        self.model.check_whole_images(image_mask, images.get("num_tiles"))
        if encoded is None:
            with torch.no_grad():
                encoded = {"image": self.get_image_features(**images, return_dict=True)}
        features = torch.cat(list(encoded["image"].pooler_output))  # (P, D)
        mask = kwargs.get("attention_mask")
        has_past = mask is None or mask.shape[1] == image_mask.shape[1]  # the ids are all, or those behind the cache
        placeholders = image_mask[:, past_length:] if has_past else image_mask
        self.model.check_num_features(placeholders, features)
        return EncodedImages(placeholders, past_length, features, images)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        """Prepare a step, with the features of the placeholders that it reads."""
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        encoded = IMAGES_OF_CALL.get()
        if encoded is None:
            return model_inputs
        past_key_values = kwargs.get(CACHE)
        start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        read = model_inputs.get("inputs_embeds")
        rows, columns = (model_inputs["input_ids"] if read is None else read).shape[:2]
        features = encoded.of_columns(start, columns, rows)
        if features is not None:
            model_inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
        return model_inputs
