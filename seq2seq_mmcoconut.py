"""MMCoconutForSeq2SeqLM: visual tokens join a text encoder's states, and the decoder thinks before it answers.

    picture  → vision tower → visual tokens ┐
    question → text encoder → states        ┴→ cross-attention of the decoder: <start> thoughts → answer

The encoder is also the teacher of an alignment: each picture's vector is trained towards a text's mean state (JEPA).

Shapes: B batch, S tokens of the encoder, T of the decoder, I images, E visual tokens and states of a row, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.bart.modeling_bart import shift_tokens_right
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .compat_mmcoconut import CACHE, rename_cache, takes_arguments_of, takes_cache_by_either_name
from .configuration_mmcoconut import MMCoconutConfig
from .modeling_mmcoconut import MMCoconutForConditionalGeneration, MMCoconutModel, ThoughtFields
from .passes_mmcoconut import check_thoughts_matter, masks_of_call, position_limit, positions_from_mask
from .schedules_mmcoconut import RETURNED
from .vision_mmcoconut import asked_outputs, check_whole_images


@dataclass
class MMCoconutEncoderOutput(ModelOutput):
    """The decoder's input: states and mask (B, E), visual tokens first; hidden_states (B, S, D) of the text.

    image_mask (B, E): True at the visual tokens.
    """

    last_hidden_state: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    image_hidden_states: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class MMCoconutSeq2SeqModelOutput(ThoughtFields, Seq2SeqModelOutput):
    """The base model's output: the decoder's states, MMCoconutEncoderOutput's under `encoder_`, and ThoughtFields."""

    image_embeds: torch.Tensor | None = None


@dataclass
class MMCoconutSeq2SeqLMOutput(ThoughtFields, Seq2SeqLMOutput):
    """The head's output: loss () of the labels alone, alignment_loss () in [0, 2], and the base model's fields."""

    alignment_loss: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None


def alignment_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Return the mean of 1 - cosine between images' and texts' vectors (I, D); unequal numbers raise ValueError."""
    if len(image_embeds) != len(text_embeds):
        raise ValueError(f"{len(image_embeds)} images to align with {len(text_embeds)} texts: give one per image.")
    return (1 - nn.functional.cosine_similarity(image_embeds, text_embeds, dim=-1)).mean()


def visual_tokens_of(attention_mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return (B, E), True at the visual tokens before the num_tokens text tokens of this mask (B, E)."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns < len(columns) - num_tokens).expand_as(attention_mask)


class MMCoconutSeq2SeqModel(MMCoconutModel):
    """Vision tower, projector and an encoder-decoder without a head; thoughts happen in the decoder."""

    is_seq2seq = True

    @staticmethod
    def build_language_model(config: MMCoconutConfig) -> PreTrainedModel:
        """Return encoder and decoder with random weights; separate embeddings raise ValueError."""
        if not getattr(config.text_config, "share_encoder_decoder_embeddings", True):
            remedy = "take a language model that shares them"
            raise ValueError(f"text_config.share_encoder_decoder_embeddings=False is not supported: {remedy}.")
        return AutoModel.from_config(config.text_config)

    def get_decoder(self):
        return self.language_model.get_decoder()

    def get_encoder(self, modality: str | None = None):
        return super().get_encoder(modality) if modality is not None else self.language_model.get_encoder()

    @can_return_tuple
    @torch.no_grad()
    def get_text_features(self, input_ids, attention_mask=None, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """Return the encoder's states of texts (n, S), with their L2-normalised means as `pooler_output` (n, D)."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (n, S)
        encoder = self.get_encoder()
        training = encoder.training
        encoder.eval()  # a teacher must be deterministic
        outputs = encoder(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        encoder.train(training)
        states, mask = outputs.last_hidden_state, attention_mask[..., None]  # (n, S, D), (n, S, 1)
        mean = (states * mask.to(states.dtype)).sum(dim=1) / mask.sum(dim=1)  # (n, D)
        return BaseModelOutputWithPooling(pooler_output=nn.functional.normalize(mean, dim=-1), **outputs)

    def encode(self, input_ids, attention_mask=None, pixel_values=None, num_tiles=None, image_features=None, **kwargs):
        """Encode questions (B, S) and their images to an MMCoconutEncoderOutput, which the decoder reads.

        kwargs: output_hidden_states and output_attentions, of the text encoder; others are ignored.
        Raise ValueError without a question, or if it exceeds the encoder's positions or misplaces images.
        """
        if input_ids is None:
            raise ValueError("There is no question to encode: pass input_ids, or encoder_outputs that encode() gave.")
        encoder, length = self.get_encoder(), input_ids.shape[1]
        limit = position_limit(encoder) or length
        if length > limit:
            raise ValueError(f"The question has {length} tokens, but the text encoder has {limit} positions: cut it.")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, S)
        text_mask = attention_mask * (input_ids != self.config.image_token_id)  # (B, S)
        outputs = encoder(input_ids, attention_mask=text_mask, return_dict=True, **asked_outputs(kwargs))
        states = outputs.last_hidden_state  # (B, S, D)
        projected, images = states[0, :0], {}  # (0, D)
        if pixel_values is not None or image_features is not None:
            images = self.get_image_features(pixel_values, num_tiles, image_features, return_dict=True)
            projected = torch.cat(images.pooler_output).to(states)  # (I, P · D)
        image_mask = self.get_placeholder_mask(input_ids, states, projected)  # (B, S)
        check_whole_images(image_mask, num_tiles, self.config)
        read = self.fuse(states, projected, image_mask, attention_mask)
        return MMCoconutEncoderOutput(
            last_hidden_state=read["encoder_hidden_states"],
            attention_mask=read["encoder_attention_mask"],
            image_mask=visual_tokens_of(read["encoder_attention_mask"], input_ids.shape[1]),
            image_embeds=images.get("image_embeds"),
            image_hidden_states=tuple(images["pooler_output"]) if images else None,
            **{name: outputs.get(name) for name in ("hidden_states", "attentions")},
        )

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: MMCoconutEncoderOutput | None = None,
        past_key_values: Cache | None = None,
        num_tiles: torch.LongTensor | None = None,
        image_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        stop_threshold: float | torch.Tensor | None = None,
        thought_noise: torch.Tensor | None = None,
        given_thoughts: Callable | None = None,
        output_thoughts: bool = False,
        output_view: bool = False,
        output_stop_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MMCoconutSeq2SeqModelOutput:
        """Encode question and images, then run the decoder; each latent reads the previous column's state.

        Args:
            input_ids, attention_mask (B, S), pixel_values, num_tiles, image_features: as in `encode`; or
            encoder_outputs: the output of `encode`.
            decoder_input_ids (B, T), latents included: None only encodes; with decoder_attention_mask (B, past + T)
            and decoder_position_ids (B, T), by default counted from it. The rest as in MMCoconutModel.forward.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask, pixel_values, num_tiles, image_features, **kwargs)
        names = ("last_hidden_state", "hidden_states", "attentions")
        encoded = {f"encoder_{name}": encoder_outputs.get(name) for name in names}
        encoded |= {name: encoder_outputs.get(name) for name in ("image_hidden_states", "image_embeds")}
        if decoder_input_ids is None:
            return MMCoconutSeq2SeqModelOutput(**encoded)
        inputs_embeds = self.get_input_embeddings()(decoder_input_ids)  # (B, T, D)
        masks = (decoder_attention_mask, decoder_position_ids)
        inputs = masks_of_call(self.get_decoder(), inputs_embeds.shape[1], *masks, past_key_values)
        inputs |= {"inputs_embeds": inputs_embeds, CACHE: past_key_values, "use_cache": use_cache}
        inputs["encoder_hidden_states"] = encoder_outputs.last_hidden_state
        inputs["encoder_attention_mask"] = encoder_outputs.attention_mask
        outputs, thought_fields = self.run_decoder(
            decoder_input_ids == self.config.latent_token_id,  # (B, T)
            {**kwargs, **inputs},
            beside=encoder_outputs.image_mask,
            stop_threshold=stop_threshold,
            thought_noise=thought_noise,
            given_thoughts=given_thoughts,
            returned=dict(zip(RETURNED, (output_thoughts, output_view, output_stop_logits))),
        )
        return MMCoconutSeq2SeqModelOutput(
            **{name: outputs.get(name) for name in ("last_hidden_state", CACHE, "cross_attentions")},
            **{f"decoder_{name}": outputs.get(name) for name in names[1:]},
            **thought_fields,
            **encoded,
        )


# Arguments that `generate` does not support, and what to do instead.
REFUSED = {
    "prefix": ", which reads a question whole: give its image_features, which get_vision_features() makes once",
    "prefill_chunk_size": ": leave it out",
    "assistant_model": ", which hands on no images: leave it out, or pass prompt_lookup_num_tokens",
}


class MMCoconutForSeq2SeqLM(MMCoconutForConditionalGeneration):
    """MMCoconutSeq2SeqModel with a head; `image_fusion: encoder`. The latents are in `decoder_input_ids`."""

    base_class = MMCoconutSeq2SeqModel
    mask_name = "decoder_attention_mask"

    def get_text_features(self, *args, **kwargs) -> tuple | BaseModelOutputWithPooling:
        return self.model.get_text_features(*args, **kwargs)

    def prefill(self, *args, **kwargs):
        """Raise ValueError: questions cannot share a prefix, because the encoder reads each one whole."""
        raise ValueError(f"prefill() does not work with an encoder-decoder{REFUSED['prefix']}.")

    def generate(self, inputs: torch.Tensor | None = None, *args, encoder_outputs=None, **kwargs):
        """Generate from the output of `encode`, computed once; arguments in REFUSED raise ValueError."""
        for name, remedy in REFUSED.items():
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} does not work with an encoder-decoder{remedy}.")
        rename_cache(kwargs)
        self.settle_stopping(kwargs)
        if encoder_outputs is None:
            input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
            names = ("attention_mask", "pixel_values", "num_tiles", "image_features")
            sources = {name: kwargs.pop(name, None) for name in names}
            chosen = kwargs.get("generation_config") or self.generation_config
            with torch.no_grad():
                encoder_outputs = self.model.encode(input_ids, **sources, **asked_outputs(chosen.to_dict() | kwargs))
        kwargs["attention_mask"] = encoder_outputs.attention_mask
        # Not this class's parent, whose generate() checks images that are read in the text.
        return GenerationMixin.generate(self, None, *args, encoder_outputs=encoder_outputs, **kwargs)

    def prepare_inputs_for_generation(self, *args, decoder_attention_mask: torch.Tensor | None = None, **kwargs):
        """Add the rows' positions to transformers' inputs: a static cache's 4-D mask does not give them."""
        if decoder_attention_mask is not None:
            columns = decoder_attention_mask.shape[1]
            kwargs["decoder_position_ids"] = positions_from_mask(decoder_attention_mask, columns)  # (B, past + T)
        return super().prepare_inputs_for_generation(*args, decoder_attention_mask=decoder_attention_mask, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return labels (B, T) shifted right after the decoder's start token, with pad tokens for -100."""
        text_config = self.config.text_config
        return shift_tokens_right(labels, text_config.pad_token_id, text_config.decoder_start_token_id)

    @takes_arguments_of(MMCoconutSeq2SeqModel.forward)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        *,
        labels: torch.LongTensor | None = None,
        alignment_input_ids: torch.LongTensor | None = None,
        alignment_attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        **kwargs,
    ) -> tuple | MMCoconutSeq2SeqLMOutput:
        """Run the base model, its head, the loss of the labels, and the alignment loss.

        Args:
            labels (B, T): target of each column of decoder_input_ids, -100 where there is no loss; not shifted inside.
                Without decoder_input_ids these are made from the labels.
            alignment_input_ids, alignment_attention_mask (I, S): one text per image, to align the image's vector with.
                With them and neither labels nor decoder_input_ids the decoder does not run.
            The rest as in MMCoconutSeq2SeqModel.forward, logits_to_keep as in MMCoconutForConditionalGeneration.

        Raise ValueError for a latent after a row's last labelled token, no image vectors to align, or no inputs.
        """
        if decoder_input_ids is None and labels is None and alignment_input_ids is None:
            raise ValueError("There is nothing for the decoder to read: pass decoder_input_ids, labels or texts.")
        if kwargs.get("shift_labels") is not None:
            raise ValueError("Labels of an encoder-decoder are not shifted, so it takes no shift_labels: pass labels.")
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)  # (B, T)
        if labels is not None:
            latents = decoder_input_ids == self.config.latent_token_id  # (B, T)
            check_thoughts_matter(latents, kwargs.get("decoder_attention_mask"), labels != -100)
        outputs = self.model(input_ids, pixel_values, attention_mask, decoder_input_ids, **kwargs)
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        if "view" in fields:
            fields["view"].head = self.lm_head
        if alignment_input_ids is not None:
            texts = (alignment_input_ids, alignment_attention_mask)
            fields["alignment_loss"] = self.align(outputs.image_embeds, *texts)
        if decoder_input_ids is not None:
            states = outputs.last_hidden_state  # (B, T, D)
            fields["loss"], fields["logits"] = self.loss_and_logits(states, labels, logits_to_keep, **kwargs)
        return MMCoconutSeq2SeqLMOutput(**fields)

    def align(self, image_embeds, alignment_input_ids, alignment_attention_mask) -> torch.Tensor:
        """Return the alignment loss of a batch's images and their texts."""
        if image_embeds is None:
            remedy = "pass the images, and take a projector that makes them, pooled_prefix or attention_prefix"
            raise ValueError(f"There are texts, but no image vectors: {remedy}, not {self.config.projector_type}.")
        texts = self.get_text_features(alignment_input_ids, alignment_attention_mask, return_dict=True)
        return alignment_loss(image_embeds, texts.pooler_output)


MMCoconutForSeq2SeqLM.register_for_auto_class("AutoModelForSeq2SeqLM")

__all__ = ["MMCoconutForSeq2SeqLM", "MMCoconutSeq2SeqModel"]
