"""MMCoconut: vision tower → projector → fusion → thinking decoder.

    pixel_values → vision_tower → multi_modal_projector → image features (P, D) of each image
                                                                    ↓ fuse
    input_ids    → embeddings ────────────────────────────────→ inputs_embeds → language_model → lm_head → logits
                 → latents: columns of the latent placeholders ──────────────────────↑

The language model is any decoder of transformers; thinking_mmcoconut.py makes it read its own states at the latents.

Shapes: B batch, T tokens, N latents, I images, P features per image, W width of the tower, D hidden size of the
decoder, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .compat_mmcoconut import (
    CACHE,
    CACHE_NAMES,
    CacheByEitherName,
    slice_columns,
    takes_arguments_of,
    takes_cache_by_either_name,
    takes_no_thoughts,
)
from .configuration_mmcoconut import (
    READ_BY_CROSS_ATTENTION,
    TOKEN_ID_FIELDS,
    MMCoconutConfig,
    check_schedule,
)
from .passes_mmcoconut import masks_of_call
from .prompt_images_mmcoconut import PromptImagesGenerationMixin
from .schedules_mmcoconut import RETURNED, MakesThoughts, check_none_missed
from .thinking_mmcoconut import give_thoughts, thinking
from .views_mmcoconut import ThoughtView
from .vision_mmcoconut import (
    IMAGE_FUSIONS,
    MMCoconutImageOutput,
    ReadsImages,
    asked_outputs,
    build_projector,
    check_whole_images,
)


@dataclass
class ThoughtFields(CacheByEitherName):
    """Fields that the outputs below add to those of transformers.

    image_hidden_states: projected features, per image (P, D), or (tiles · P, D); for cross-attention (1, P · D).
    thoughts (B, N, D), thought_mask (B, N): what the latents read, packed to the left; with
    `output_thoughts=True`.
    view: the thoughts as objectives see them, a ThoughtView; with `output_view=True`.
    stop_logits (B, N): logits of the stop head before each latent; with `output_stop_logits=True`.
    attention_mask (B, past + T): set if latents were left out, with 0 at them; pass it to every later call
    over this cache.
    image_outputs: output of `get_image_features`, with the tower's hidden states if `output_hidden_states=True`.
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: tuple[torch.Tensor, ...] | None = None
    thoughts: torch.Tensor | None = None
    thought_mask: torch.Tensor | None = None
    view: ThoughtView | None = None
    stop_logits: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    image_outputs: MMCoconutImageOutput | None = None


@dataclass
class MMCoconutModelOutputWithPast(ThoughtFields, BaseModelOutputWithPast):
    """The base model's output: last_hidden_state (B, T, D), cache, hidden_states, attentions; see ThoughtFields."""


@dataclass
class MMCoconutCausalLMOutputWithPast(ThoughtFields, CausalLMOutputWithPast):
    """The head's output: loss (), logits (B, T or kept, V) or None (see forward), and the base model's fields."""


class MMCoconutPreTrainedModel(MakesThoughts, PreTrainedModel):
    """Base class of all models: names, supported backends, saving and checkpointing."""

    config_class = MMCoconutConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [*CACHE_NAMES]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def save_pretrained(self, save_directory, **kwargs):
        """Save with current, not legacy, parameter names: a resuming Trainer does not find ViT's legacy names."""
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})


class MMCoconutModel(ReadsImages, MMCoconutPreTrainedModel):
    """Vision tower, projector, fusion and thinking decoder, without a head."""

    is_seq2seq = False

    def __init__(self, config: MMCoconutConfig):
        super().__init__(config)
        _check_buildable(config, type(self))
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = self.build_language_model(config)
        give_thoughts(self.get_decoder())
        self.add_thought_modules(config.text_config.hidden_size)
        self.fuse = IMAGE_FUSIONS[config.image_fusion]
        self.cross_attends = config.image_fusion in READ_BY_CROSS_ATTENTION
        if self.cross_attends and "encoder_hidden_states" not in self.get_decoder().own_arguments:
            raise ValueError(
                f"image_fusion={config.image_fusion!r} needs a decoder with cross-attention, but "
                f"{config.text_config.model_type} has none: use GPT-2, Marian or BART, or set "
                "image_fusion='replace'."
            )
        self.post_init()

    @staticmethod
    def build_language_model(config: MMCoconutConfig) -> PreTrainedModel:
        """Return the decoder with random weights; for an encoder-decoder architecture, only its decoder."""
        if getattr(config.text_config, "decoder_layers", None) is None:
            return AutoModel.from_config(config.text_config)
        return AutoModelForCausalLM.from_config(config.text_config).get_decoder()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self):
        return self.language_model

    def run_decoder(
        self,
        latents: torch.Tensor,
        inputs: dict,
        *,
        image_mask: torch.Tensor | None = None,
        returned: dict,
        **options,
    ) -> tuple[BaseModelOutputWithPast, dict]:
        """Run the decoder with thoughts at the latents (B, T); return its output, and the fields of its thoughts.

        inputs: of the decoder; use_cache defaults to True outside training. image_mask (B, T): True at image
        features. options: for `thoughts_of_call`; returned: for `fields_of`.
        """
        decoder = self.get_decoder()
        if inputs["use_cache"] is None:  # in training, an unused cache would copy all keys and values
            inputs["use_cache"] = self.config.text_config.use_cache and not self.training
        if takes_no_thoughts(latents.shape[1]):
            check_none_missed(latents, inputs[CACHE])
            return decoder(**inputs, return_dict=True), {}
        thoughts = self.thoughts_of_call(latents, image_mask, **options)
        with thinking(thoughts):
            outputs = decoder(**inputs, return_dict=True)
        fields = self.fields_of(thoughts, **returned)
        if "view" in fields:
            fields["view"].hidden_states = outputs.get("hidden_states")
        return outputs, fields

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        stop_threshold: float | torch.Tensor | None = None,
        thought_noise: torch.Tensor | None = None,
        given_thoughts: Callable | None = None,
        output_thoughts: bool = False,
        output_view: bool = False,
        output_stop_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MMCoconutModelOutputWithPast:
        """Run images and text through the model; each latent placeholder reads the previous column's state.

        input_ids (B, T) or inputs_embeds (B, T, D): exactly one; attention_mask (B, past + T); position_ids (B, T).
        pixel_values (I, channels, height, width): images of all rows, in reading order, or their tiles, with
            num_tiles (images,) per image. Alternatives: image_features (I, patches, W), the tower's, as
            get_vision_features returns them; or mm_encoder_outputs {"image": output of get_image_features}.
        past_key_values: any cache of transformers; if this model filled it, the first column may be a latent.
        stop_threshold: a row stops thinking when the stop probability exceeds it; a number or (B, N).
        thought_noise (B, N, D): added to each row's thoughts, in units of a thought's root mean square.
        given_thoughts: vectors that latents read instead of states (teacher forcing), see `given` in Thoughts.
        output_thoughts, output_view, output_stop_logits: also return the thoughts read at the latents, a ThoughtView
            of them, or the stop head's logits.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        images = {"pixel_values": pixel_values, "image_features": image_features}
        image_outputs = self.image_outputs_of(images, num_tiles, mm_encoder_outputs, **asked_outputs(kwargs))
        fused = self.fuse_images(input_ids, inputs_embeds, image_outputs, past_key_values)
        image_mask = None
        hides_images = self.config.answer_sees == "no_image"
        if image_outputs is not None or output_view or hides_images or given_thoughts is not None:
            image_mask = self.get_token_mask(self.config.image_token_id, input_ids, inputs_embeds)  # (B, T)
        if image_outputs is not None and not mm_encoder_outputs:  # they may belong to only some of the prompts
            check_whole_images(image_mask, num_tiles, self.config)
        latents = self.get_token_mask(self.config.latent_token_id, input_ids, inputs_embeds)  # (B, T)
        masks = masks_of_call(self.get_decoder(), latents.shape[1], attention_mask, position_ids, past_key_values)
        inputs = {**kwargs, **masks, CACHE: past_key_values, "use_cache": use_cache, **fused}
        outputs, fields = self.run_decoder(
            latents,
            inputs,
            image_mask=None if self.cross_attends else image_mask,
            stop_threshold=stop_threshold,
            thought_noise=thought_noise,
            given_thoughts=given_thoughts,
            returned=dict(zip(RETURNED, (output_thoughts, output_view, output_stop_logits))),
        )
        names = ("last_hidden_state", CACHE, "hidden_states", "attentions", "cross_attentions")
        fields |= {name: outputs.get(name) for name in names}
        image_states = None if image_outputs is None else tuple(image_outputs.pooler_output)
        return MMCoconutModelOutputWithPast(**fields, image_hidden_states=image_states, image_outputs=image_outputs)


def _check_buildable(config: MMCoconutConfig, model_class: type[MMCoconutModel]) -> None:
    """Raise ValueError for a fusion of the other class, missing token ids, or a decoder with LayerDrop."""
    if (config.image_fusion == "encoder") != model_class.is_seq2seq:
        raise ValueError(
            f"image_fusion={config.image_fusion!r} does not work with {model_class.__name__}: use "
            "MMCoconutForSeq2SeqLM for `encoder`, and MMCoconutForConditionalGeneration for the others."
        )
    check_schedule(config)  # again: from_pretrained sets fields after they were checked
    missing = [field for field in TOKEN_ID_FIELDS if getattr(config, field) is None]
    if missing:
        raise ValueError(f"The configuration lacks {', '.join(missing)}: set them to the tokenizer's ids.")
    layerdrop = getattr(config.text_config, "decoder_layerdrop", 0)
    if layerdrop:
        raise ValueError(
            f"text_config.decoder_layerdrop={layerdrop} drops different layers in each pass, but passes with "
            "thoughts share a cache: set it to 0."
        )


class MMCoconutForConditionalGeneration(PromptImagesGenerationMixin, MMCoconutPreTrainedModel):
    """MMCoconutModel with a language-model head: `forward` returns loss and logits, `generate` answers.

    The thoughts are computed in the prefill, so every decoding method of stock `generate()` works; a decoding step
    is that of an ordinary language model.
    """

    base_class = MMCoconutModel
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MMCoconutConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = self.base_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{self.embedding_name()}.weight"}
        self.post_init()
        if not self.get_decoder().tp_plan:  # a head sharded alone would no longer be tied to the embeddings
            self.tp_plan = None
        self.suppress_placeholders()

    def embedding_name(self) -> str:
        """Return the attribute name of the decoder's token embeddings: wte, embed_tokens, …"""
        embeddings = self.model.get_input_embeddings()
        return next(name for name, module in self.model.language_model.named_modules() if module is embeddings)

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_decoder(self):
        return self.model.get_decoder()

    @property
    def vision_tower(self) -> PreTrainedModel:
        return self.model.vision_tower

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model.language_model

    def get_vision_features(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.model.get_vision_features(pixel_values, **kwargs)

    def get_image_features(self, *args, **kwargs) -> tuple | BaseModelOutputWithPooling:
        return self.model.get_image_features(*args, **kwargs)

    def loss_and_logits(self, hidden_states, targets, logits_to_keep, **kwargs) -> tuple:
        """Return the loss of states (B, T, D) and targets (B, T) or None, and logits (B, kept, V) as in forward."""
        loss = logits = None
        if targets is not None:
            labelled = targets != -100  # (B, T)
            loss = self.loss_function(
                logits=self.lm_head(hidden_states[labelled]),  # (labelled, V)
                labels=None,
                shift_labels=targets[labelled],  # (labelled,)
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        if targets is None or logits_to_keep is not None or not self.training:
            kept = 0 if logits_to_keep is None else logits_to_keep
            logits = self.lm_head(slice_columns(hidden_states, kept))  # (B, kept, V)
        return loss, logits

    @takes_arguments_of(MMCoconutModel.forward)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        **kwargs,
    ) -> tuple | MMCoconutCausalLMOutputWithPast:
        """Run the base model, its head and the causal loss.

        Args:
            labels (B, T): token ids, -100 where there is no loss; shifted inside.
            shift_labels (B, T): labels that are already shifted, instead of labels; context parallelism, which
                splits the sequence, prepares them.
            logits_to_keep: as in transformers. None: all logits, but in training with labels no logits: the loss
                runs the head on labelled positions only.
            The rest as in MMCoconutModel.forward; `num_items_in_batch` reaches the loss.

        Raises:
            ValueError: a row has a latent after its last labelled token.
        """
        targets = self.targets_of(labels, shift_labels, input_ids, attention_mask)  # (B, T)
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
        outputs = self.model(**inputs, **kwargs)
        loss, logits = self.loss_and_logits(outputs.last_hidden_state, targets, logits_to_keep, **kwargs)
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        if "view" in fields:
            fields["view"].head = self.lm_head
        return MMCoconutCausalLMOutputWithPast(loss=loss, logits=logits, **fields)


MMCoconutForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MMCoconutForConditionalGeneration", "MMCoconutModel", "MMCoconutPreTrainedModel"]
