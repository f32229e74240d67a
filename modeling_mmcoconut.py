"""MMCoconut: vision tower → projector → fusion → language model, with continuous thoughts inside the forward pass.

Shapes: B batch, T tokens, N latents, I images, P features an image, D hidden of the decoder, V vocabulary.
The recurrence itself stands in latent_mmcoconut.py.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.generation import GenerationMixin, GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .attention_mmcoconut import SplitCache, choose_attention, chooses_latent_attention, split_cache_of
from .backbones_mmcoconut import FromBackbones, call_with_row_positions
from .caches_mmcoconut import (
    CrossAttentionCache,
    FirstPassCache,
    ReplayCache,
    ReplayCrossCache,
    growing_after,
    remember_state,
)
from .compat_mmcoconut import (
    CACHE,
    CACHE_NAMES,
    CacheByEitherName,
    assert_without_waiting,
    attention_of,
    call_with_cache,
    hidden_states_to_return,
    is_checkpointing,
    keep_cache_in_checkpoints,
    rename_cache,
    slice_columns,
    takes_cache_by_either_name,
)
from .configuration_mmcoconut import (
    PREFIX_PROJECTORS,
    READ_BY_CROSS_ATTENTION,
    TOKEN_ID_FIELDS,
    MMCoconutConfig,
    check_schedule,
)
from .deferred_mmcoconut import LEAST_WIDTH
from .fusions_mmcoconut import IMAGE_FUSIONS, check_num_tiles, check_one_source
from .generation_mmcoconut import GenerationWithImages, images_of_call
from .jacobi_mmcoconut import check_not_sharded, check_one_block, think_jacobi
from .latent_graphs_mmcoconut import check_latent_graphs, latent_step_caller
from .latent_mmcoconut import (
    ThinkOutput,
    ThoughtFeed,
    agreed_columns,
    check_has_predecessor,
    check_thoughts_matter,
    column_lists,
    gather_thoughts,
    is_sharded,
    linked_thoughts,
    noise_by_column,
    positions_from_mask,
    think,
    whole_tensor,
)
from .passes_mmcoconut import Passes, check_checkpointed_passes
from .positions_mmcoconut import position_limit
from .prefixes_mmcoconut import GenerationBehindPrefix
from .projectors_mmcoconut import build_projector, check_image_features, select_features
from .regroup_mmcoconut import can_regroup, is_worth, layout_of, think_regrouped
from .stopping_mmcoconut import (
    INITIAL_BIAS,
    GenerationThatStops,
    StopHead,
    Stops,
    carry_states,
    check_can_stop,
    check_window,
    is_two_dimensional,
    mask_without,
    packed,
    remember_skipped,
    states_before,
    think_until_stopped,
    without_skipped,
)


@dataclass
class MMCoconutImageOutput(BaseModelOutputWithPooling):
    """The vision tower's output, with pooler_output a list of what the decoder reads of each image; see below.

    image_embeds (I, D): one vector an image, where the projector makes one.
    """

    image_embeds: torch.Tensor | None = None


@dataclass
class MMCoconutModelOutputWithPast(CacheByEitherName, BaseModelOutputWithPast):
    """The base model's output.

    last_hidden_state (B, T, D), past_key_values, hidden_states, attentions, cross_attentions: as in the library, for
    every column.
    image_hidden_states: projected features, one (P, D) an image, or (tiles · P, D); for cross-attention (1, P · D).
    thoughts (B, N, D), thought_mask (B, N): what was read at the latents, packed to the left; with
    `output_thoughts=True`.
    stop_logits (B, N): the stop head's, before each latent; with `output_stop_logits=True`.
    attention_mask (B, past + T): where rows left latents out, the mask in which these are 0, which every later call
    over the same cache needs.
    image_outputs: what `get_image_features` gave, the tower's hidden states where `output_hidden_states=True`.
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: tuple[torch.Tensor, ...] | None = None
    thoughts: torch.Tensor | None = None
    thought_mask: torch.Tensor | None = None
    stop_logits: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    image_outputs: MMCoconutImageOutput | None = None


@dataclass
class MMCoconutCausalLMOutputWithPast(CacheByEitherName, CausalLMOutputWithPast):
    """The head's output: loss (), logits (B, T or kept, V), and the base model's fields.

    In training with labels the logits are None unless `logits_to_keep` asks for some: the loss needs the head only at
    the labelled positions.
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: tuple[torch.Tensor, ...] | None = None
    thoughts: torch.Tensor | None = None
    thought_mask: torch.Tensor | None = None
    stop_logits: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    image_outputs: MMCoconutImageOutput | None = None


def with_cross_attention(past_key_values: Cache, encoder_inputs: dict) -> EncoderDecoderCache:
    """The cache with a place for the keys of the encoder states in encoder_inputs; as it is where it has one."""
    if isinstance(past_key_values, EncoderDecoderCache):
        return past_key_values
    if isinstance(past_key_values, ReplayCache):
        return ReplayCrossCache(past_key_values)
    states, mask = encoder_inputs["encoder_hidden_states"], encoder_inputs["encoder_attention_mask"]
    return CrossAttentionCache(past_key_values, states, mask)


def takes_no_thoughts(num_columns: int) -> bool:
    """Return True in a compiled step of one token and in `torch.export`, where passes cannot follow the ids."""
    return torch.compiler.is_exporting() or (num_columns == 1 and torch.compiler.is_compiling())


def remember(outputs: ThinkOutput, past_key_values: Cache) -> Cache:
    """The cache with the state (B, D) of its last column, so that a next call may begin with a latent.

    A compiled step of one token forgets it: its state lies in memory that the next replay of a graph overwrites.
    """
    remember_skipped(past_key_values, outputs.attention_mask)
    if takes_no_thoughts(outputs.last_hidden_state.shape[1]):
        past_key_values.last_hidden_state = None
        return past_key_values
    return remember_state(past_key_values, outputs.last_hidden_state[:, -1])


def thoughts_of(outputs: ThinkOutput, latent_mask: torch.Tensor) -> dict:
    """`thoughts` and `thought_mask` of the model's output, for the latents (B, T) of a call."""
    thought_mask = latent_mask if outputs.skipped is None else latent_mask & ~outputs.skipped
    return dict(zip(("thoughts", "thought_mask"), gather_thoughts(outputs.inputs_embeds, thought_mask)))


def asked_of_tower(kwargs: dict) -> dict:
    """Return the outputs asked of the vision tower; a list of layers is meant for the decoder."""
    return {name: True for name in ("output_hidden_states", "output_attentions") if kwargs.get(name) is True}


def remembered(past_key_values: Cache | None) -> torch.Tensor | None:
    """The state (B, D) of a cache's last column; None where another model filled it or it was cut since."""
    state = getattr(past_key_values, "last_hidden_state", None)
    if state is None or int(past_key_values.last_hidden_length) != int(past_key_values.get_seq_length()):
        return None
    return state


class MMCoconutPreTrainedModel(PreTrainedModel):
    """What both model classes share: names, supported backends, saving and checkpointing rules."""

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
        """As the library's, with every sub-model's weights under their present names.

        ViT and DINOv2 would otherwise be written under older names, which a Trainer that resumes does not find.
        """
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})

    def _init_weights(self, module):
        """As the library's, and a stop head that rarely stops."""
        if isinstance(module, StopHead):
            init.zeros_(module.weight)
            init.constant_(module.bias, INITIAL_BIAS)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **kwargs):
        """Checkpoint layer by layer, and let the decoder's layers keep the cache that thoughts are read from.

        Decoders drop the cache when their own flag is set; the layers' flags alone leave it to `ReplayCache`.

        Raises:
            ValueError: `use_reentrant=True`, which loses the gradients through keys and values of earlier passes.
        """
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError(
                "Gradient checkpointing with use_reentrant=True loses the gradients through thoughts: set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for module in self.get_decoder().modules():
            if isinstance(module, GradientCheckpointingLayer):
                keep_cache_in_checkpoints(module, enable)
            elif isinstance(module, PreTrainedModel):
                module.gradient_checkpointing = False


class MMCoconutModel(MMCoconutPreTrainedModel):
    """Vision tower, projector, fusion and language model without a head; thoughts happen in `forward`.

    bptt_thoughts: how many thoughts of a row, counted from its last one, send gradients back to the state that they
        were; of the others only keys, values and what `thought_feed` does to them are learnt. None, the default, is
        all, 0 is none.
    defer_weight_gradients: whether all passes of a training step form the decoder's weight gradients once, together.
        None, the default, is where it was measured to pay: on a CPU and for wide decoders; see deferred_mmcoconut.py.
    latent_graphs, checkpointed_passes: see there.

    All four belong to a run or a machine and are not saved.
    """

    is_seq2seq = False
    defer_weight_gradients: bool | None = None
    bptt_thoughts: int | None = None

    def __init__(self, config: MMCoconutConfig):
        super().__init__(config)
        self.check_fusion(config.image_fusion)
        check_schedule(config)  # again: from_pretrained sets fields after they were checked
        missing = [field for field in TOKEN_ID_FIELDS if getattr(config, field) is None]
        if missing:
            raise ValueError(f"The configuration lacks {', '.join(missing)}: take the ids from the tokenizer.")
        layerdrop = getattr(config.text_config, "decoder_layerdrop", 0)
        if layerdrop:
            raise ValueError(
                f"text_config.decoder_layerdrop={layerdrop} leaves out other layers in each pass, and passes with "
                "thoughts share a cache: set it to 0."
            )
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = build_projector(config)
        asked = attention_of(config.text_config)  # None where neither the user nor a recipe asked for one
        self.language_model = self.build_language_model(config)
        self.thought_feed = ThoughtFeed(config.text_config.hidden_size, config.thought_norm)
        if config.stop_head:
            self.stop_head = StopHead(config.text_config.hidden_size)
        self.fuse = IMAGE_FUSIONS[config.image_fusion]
        self.cross_attends = config.image_fusion in READ_BY_CROSS_ATTENTION
        decoder_inputs = inspect.signature(self.get_decoder().forward).parameters
        self.counts_columns = "position_ids" not in decoder_inputs
        # The library's own cache tells which layers see a window of columns only, however the configuration names it.
        layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
        self.sees_all_columns = all(type(layer) is DynamicLayer for layer in layers)
        if self.sees_all_columns and config.thought_schedule == "sequential":
            choose_attention(self.get_decoder(), asked)
        self.latent_graphs = "auto"
        self.checkpointed_passes = "all"
        if self.cross_attends and "encoder_hidden_states" not in decoder_inputs:
            raise ValueError(
                f"image_fusion={config.image_fusion!r} needs a decoder with cross-attention, and "
                f"{config.text_config.model_type} has none: take one that has (GPT-2, Marian, BART), or "
                "image_fusion='replace'."
            )
        self.post_init()

    @property
    def latent_graphs(self) -> str:
        """Whether latent steps over a static cache are compiled: `auto` (on CUDA), `on`, `off`; see call_or_step."""
        return self._latent_graphs

    @latent_graphs.setter
    def latent_graphs(self, value: str):
        self._latent_graphs = check_latent_graphs(value)

    @property
    def checkpointed_passes(self) -> str:
        """Which decoder passes gradient checkpointing recomputes: `all`, or the `first`, before the thoughts."""
        return self._checkpointed_passes

    @checkpointed_passes.setter
    def checkpointed_passes(self, value: str):
        self._checkpointed_passes = check_checkpointed_passes(value)

    @classmethod
    def check_fusion(cls, image_fusion: str) -> None:
        """Whether this class is the one of a fusion."""
        if (image_fusion == "encoder") != cls.is_seq2seq:
            raise ValueError(
                f"image_fusion={image_fusion!r} does not belong to {cls.__name__}: `encoder` is "
                "MMCoconutForSeq2SeqLM's, the others are MMCoconutForConditionalGeneration's."
            )

    @staticmethod
    def build_language_model(config: MMCoconutConfig) -> PreTrainedModel:
        """The decoder with random weights; of an encoder-decoder architecture its decoder alone."""
        if getattr(config.text_config, "decoder_layers", None) is None:
            return AutoModel.from_config(config.text_config)
        return AutoModelForCausalLM.from_config(config.text_config).get_decoder()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self):
        return self.language_model

    def selected_features(self, image_outputs, layers: int | list[int], select_strategy: str) -> torch.Tensor:
        """What the projector reads of the tower's output, (I, patches, W)."""
        return select_features(image_outputs, layers, select_strategy, last_norm=self.config.vision_last_norm)

    def run_vision_tower(self, pixel_values: torch.Tensor, layers: int | list[int], **kwargs):
        """Run the tower and keep the hidden states that the projector reads, and those that kwargs ask for."""
        kwargs["output_hidden_states"] = hidden_states_to_return(layers, kwargs.get("output_hidden_states"))
        return self.vision_tower(pixel_values, return_dict=True, **kwargs)

    @merge_with_config_defaults
    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """What the projector reads of (I, channels, height, width) pixels: (I, patches, W).

        It may be kept while the tower is frozen, and be passed as `image_features` in the place of the pixels.
        """
        image_outputs = self.run_vision_tower(pixel_values, vision_feature_layer, **kwargs)
        return self.selected_features(image_outputs, vision_feature_layer, vision_feature_select_strategy)

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        num_tiles: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MMCoconutImageOutput:
        """Features of (I, channels, height, width) pixels; `pooler_output` is a list of I tensors (P, D).

        image_features (I, patches, W) of get_vision_features may stand in the place of the pixels.
        With num_tiles (images,) these are tiles, and the list holds an image's tiles joined: (num_tiles · P, D).
        Each row of them belongs to a placeholder; for cross-attention that is one of all features, (1, P · D).
        """
        check_one_source(pixel_values=pixel_values, image_features=image_features)
        check_num_tiles(num_tiles, pixel_values=pixel_values, image_features=image_features)
        image_outputs = MMCoconutImageOutput()
        if image_features is None:
            image_outputs = MMCoconutImageOutput(**self.run_vision_tower(pixel_values, vision_feature_layer, **kwargs))
            image_features = self.selected_features(
                image_outputs, vision_feature_layer, vision_feature_select_strategy
            )
        else:
            check_image_features(image_features, self.config)
            image_features = image_features.to(self.dtype)
        return self.project(image_features, image_outputs, num_tiles)

    def project(self, image_features: torch.Tensor, image_outputs: MMCoconutImageOutput, num_tiles=None):
        """image_outputs with what the projector makes of features (I, patches, W)."""
        projected = self.multi_modal_projector(image_features)  # (I, P, D)
        if self.config.projector_type in PREFIX_PROJECTORS:
            image_outputs.image_embeds = self.multi_modal_projector.embedding(image_features)  # (I, D)
        if self.cross_attends:
            projected = projected.flatten(1)[:, None]  # (I, 1, P · D)
        if torch.compiler.is_exporting():  # a list of images would fix their number
            image_outputs.pooler_output = [projected.flatten(0, 1)]
        elif num_tiles is None:
            image_outputs.pooler_output = list(projected)
        else:
            of_images = projected.split(num_tiles.tolist())  # (tiles, P, D) each
            image_outputs.pooler_output = [tiles.flatten(0, 1) for tiles in of_images]
        return image_outputs

    def get_token_mask(self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor):
        """(B, T), True where the token stands; read off the embeddings where no ids are given."""
        if input_ids is not None:
            return input_ids == token_id
        embeddings = self.get_input_embeddings().weight  # (V, D)
        token_mask = (inputs_embeds == embeddings[token_id]).all(-1)  # (B, T)
        special = embeddings[[getattr(self.config, field) for field in TOKEN_ID_FIELDS]]
        if token_mask.any() and (special == embeddings[token_id]).all(-1).sum() > 1:
            raise ValueError(
                "Special tokens have the same embedding, as new ones have before training, so inputs_embeds do not "
                "tell where the images and the latents are: pass input_ids."
            )
        return token_mask

    def get_placeholder_mask(self, input_ids, inputs_embeds: torch.Tensor, image_features: torch.Tensor):
        """(B, T), True at the `<image>` placeholders.

        Raises:
            ValueError: their number differs from the number of image features.
        """
        image_mask = self.get_token_mask(self.config.image_token_id, input_ids, inputs_embeds)
        self.check_num_features(image_mask, image_features)
        return image_mask

    def check_num_features(self, image_mask: torch.Tensor, image_features: torch.Tensor) -> None:
        """Raise where placeholders (B, T) and image features (P, D) differ in number."""
        if torch.compiler.is_exporting():  # a program checks it when it runs, and cannot say the numbers
            torch_compilable_check(image_mask.sum() == image_features.shape[0], "placeholders and features differ")
            return
        num_placeholders, num_features = int(image_mask.sum()), image_features.shape[0]
        if num_placeholders != num_features:
            raise ValueError(
                f"The batch holds {num_placeholders} <image> placeholders ({image_mask.sum(-1).tolist()} a row) but "
                f"{num_features} image features ({self.config.image_seq_length} an image or tile): give each row "
                f"{self.config.image_seq_length} placeholders an image or tile, as MMCoconutProcessor does, and do "
                "not truncate them."
            )

    def check_whole_images(self, image_mask: torch.Tensor, num_tiles: torch.Tensor | None = None) -> None:
        """Every row of (B, T) must hold all placeholders of its images, or it would read parts of another row's.

        num_tiles (images,): the tiles of each image; by default every image is one.
        """
        counts = image_mask.sum(-1)  # (B,)
        broken = counts % self.config.image_seq_length != 0
        if torch.compiler.is_exporting():
            torch_compilable_check(~broken.any(), "a row has a part of an image")
            return
        if broken.any():
            row = broken.nonzero()[0].item()
            raise ValueError(
                f"Row {row} of the batch holds {counts[row].item()} <image> placeholders, which is no multiple of the "
                f"{self.config.image_seq_length} of an image: do not truncate rows with images."
            )
        if num_tiles is None:
            return
        tiles = (counts // self.config.image_seq_length).tolist()  # (B,)
        ends = {0, *accumulate(num_tiles.tolist())}
        for row, end in enumerate(accumulate(tiles)):
            if end not in ends:
                raise ValueError(
                    f"Row {row} of the batch holds placeholders of {tiles[row]} tiles and ends inside an image: the "
                    f"rows have {tiles} tiles and the images {num_tiles.tolist()}. Give each row all the tiles of its "
                    "images, as MMCoconutProcessor does."
                )

    def fuse_images(self, input_ids, inputs_embeds: torch.Tensor, image_outputs, past_key_values=None) -> dict:
        """What the decoder reads: the embeddings joined with the images' features by the configured fusion.

        Raises:
            ValueError: placeholders and features differ in number; an image after a cache that holds others' keys.
        """
        known = past_key_values.encoder_inputs if isinstance(past_key_values, CrossAttentionCache) else {}
        decodes = inputs_embeds.shape[1] == 1 and image_outputs is None
        if decodes and (known or not self.cross_attends):  # a step that looks for no images
            return {"inputs_embeds": inputs_embeds, **known}
        image_features = inputs_embeds[0, :0]  # (0, D)
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output), dim=0).to(inputs_embeds)  # (I·P, D)
        image_mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)  # (B, T)
        if not known:
            return self.fuse(inputs_embeds, image_features, image_mask)
        if image_outputs is not None:
            raise ValueError(
                "past_key_values already hold what the decoder reads by cross-attention, so new images would not be "
                "seen: pass all images in the first call, and no prefill_chunk_size that would cut between them."
            )
        return {"inputs_embeds": inputs_embeds, **known}

    def mean_embedding_norm(self) -> torch.Tensor | None:
        """Mean norm of the token embeddings, without gradient; None where thoughts are not scaled by it."""
        if self.config.thought_norm != "embedding":
            return None
        norms = self.get_input_embeddings().weight.detach().norm(dim=-1)  # (V,)
        return whole_tensor(norms).mean()

    def check_length(self, num_columns: int, position_ids: torch.Tensor | None, past_key_values: Cache | None) -> None:
        """Raise before a table of positions is read past its end; single decoding steps are not looked at."""
        limit = None if num_columns == 1 else position_limit(self.get_decoder())
        if limit is None:
            return
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = past_length + num_columns
        if length > limit and position_ids is not None and not self.counts_columns:
            length = int(position_ids.max()) + 1
        if length > limit:
            raise ValueError(
                f"The sequence has {length} tokens, images and latents included, but the language model has {limit} "
                "positions: shorten the question or the steps, use fewer latents or image tokens, or take a language "
                "model with more positions."
            )

    def reads_split_keys(self, prefix_length: int = 0) -> bool:
        """Return True if a call with so many columns before its first latent is to use a SplitCache.

        Never where an update of parallel thoughts would read it again, or where layers see a window of columns.
        """
        can_read = self.sees_all_columns and self.config.thought_schedule == "sequential"
        return can_read and chooses_latent_attention(self.get_decoder(), prefix_length)

    def start_cache(self, replayed: bool, kept: bool, prefix_length: int = 0) -> Cache:
        """A fresh cache: a growing one, one that gradient checkpointing can replay, or, where latent attention is to
        read it, one that leaves the first pass's keys in place; through that one a later call has no gradients."""
        text_config = self.config.get_text_config(decoder=True)
        if not replayed and not (kept and torch.is_grad_enabled()) and self.reads_split_keys(prefix_length):
            return SplitCache()
        if not replayed:
            return DynamicCache(config=text_config)
        if not self.sees_all_columns:
            raise ValueError(
                "Gradient checkpointing with latents works for full attention only, and text_config has "
                f"sliding_window={getattr(text_config, 'sliding_window', None)} in some layers: switch "
                "gradient_checkpointing off."
            )
        if self.checkpointed_passes == "first" and not kept:
            return FirstPassCache(SplitCache.after if self.reads_split_keys(prefix_length) else growing_after)
        return ReplayCache()

    def split_latents(self, latent_mask: torch.Tensor, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, T) at which something is thought, and those that a 2-D mask (B, past + T) leaves out."""
        if not is_two_dimensional(attention_mask):
            return latent_mask, torch.zeros_like(latent_mask)
        real = attention_mask.bool()[:, -latent_mask.shape[1] :]  # (B, T)
        return latent_mask & real, latent_mask & ~real

    def thought_columns(
        self, latent_mask: torch.Tensor, skipped: torch.Tensor, *, attention_mask, past_key_values
    ) -> tuple[list[int], bool]:
        """Where hidden states are fed back in this call, and whether any row leaves a latent out, skipped (B, T).

        Nowhere with `pause`, nor in a compiled decoding step or an exported program. Under FSDP the sequence is cut at
        further columns, so that all processes make the same number of passes.
        """
        if takes_no_thoughts(latent_mask.shape[1]):
            message = "A compiled step of one token, or an exported program, cannot read a thought."
            assert_without_waiting(~latent_mask.any(), message)
            return [], False
        columns, left_out = column_lists(latent_mask, skipped)
        if self.config.thought_mode == "pause":
            return [], bool(left_out)
        if is_sharded(self.language_model):
            columns = agreed_columns(columns, latent_mask.shape[1], latent_mask.device)
        has_2d_mask = is_two_dimensional(attention_mask)
        if columns and columns[-1] > 0 and not (attention_mask is None or has_2d_mask):
            raise ValueError(
                "Thoughts need a 2-D attention_mask (B, T), not one made for a single pass: pass that one."
            )
        if columns:
            has_past = remembered(past_key_values) is not None
            check_has_predecessor(latent_mask, attention_mask if has_2d_mask else None, has_past)
        return columns, bool(left_out)

    def defers_weight_gradients(self) -> bool:
        """Whether the passes of a forward pass leave the weights' gradients to be formed once."""
        chosen = self.defer_weight_gradients
        if chosen is None:
            chosen = self.device.type == "cpu" and self.config.text_config.hidden_size >= LEAST_WIDTH
        return chosen and self.training and not is_sharded(self.language_model)

    def thinking_loop(self, latent_mask, *, past_key_values=None, attention_mask=None, stop_threshold=None):
        """The function that runs the decoder where thoughts are fed back: one after the other, until a row stops, or
        all together."""
        if stop_threshold is not None:
            sharded = is_sharded(self.language_model)
            check_can_stop(self.config, attention_mask, training=self.training, fixed_passes=sharded)
            return partial(think_until_stopped, stops=Stops(self.stop_head, stop_threshold, latent_mask))
        if self.config.thought_schedule != "jacobi":
            return think
        check_schedule(self.config)
        check_not_sharded(is_sharded(self.language_model))
        check_one_block(past_key_values)
        return partial(think_jacobi, num_iterations=self.config.jacobi_iterations)

    def common_layout(self, latent_mask, columns: list[int], past_key_values, attention_mask, kwargs: dict):
        """The layout in which the rows' latents share columns, where that is possible and saves passes; else None."""
        configs = (self.config, self.get_decoder().config)
        wants_maps = kwargs.get("output_attentions") or any(config.output_attentions for config in configs)
        is_2d = isinstance(attention_mask, torch.Tensor) and attention_mask.shape == latent_mask.shape
        is_whole = attention_mask is None or is_2d
        if len(columns) < 2 or wants_maps or not is_whole or is_sharded(self.language_model):
            return None
        if not self.sees_all_columns or not can_regroup(past_key_values):
            return None
        if len(columns) <= int(latent_mask.sum(dim=1).max()):
            return None
        layout = layout_of(latent_mask, attention_mask)
        most_columns = self.config.text_config.max_position_embeddings if self.counts_columns else None
        return layout if is_worth(layout, latent_mask.shape[1], len(columns) + 1, most_columns) else None

    def decoder_call(self, columns: list[int], past_key_values: Cache | None, kwargs: dict):
        """The decoder as the passes of one forward pass call it: its latent steps compiled, where that is chosen."""
        decoder = self.get_decoder()
        call = partial(call_with_cache, decoder)
        if columns:
            call = latent_step_caller(decoder, past_key_values, latent_graphs=self.latent_graphs, **kwargs)
        if self.counts_columns:
            call = partial(call_with_row_positions, decoder, call=call)
        return Passes(decoder, call, defers=self.defers_weight_gradients()) if columns and self.training else call

    def run_decoder(
        self,
        latent_mask,
        inputs_embeds,
        *,
        attention_mask,
        position_ids,
        past_key_values,
        use_cache,
        stop_threshold=None,
        thought_noise=None,
        output_stop_logits=False,
        **kwargs,
    ) -> ThinkOutput:
        """Call the decoder once, and once more for every column at which a thought is fed back, or every update."""
        num_columns = inputs_embeds.shape[1]
        if not isinstance(past_key_values, Cache | None):
            raise NotImplementedError(
                f"The cache is a {type(past_key_values).__name__}, as continuous batching makes to pack requests into "
                "one pass, and thoughts need a pass each: use generate()."
            )
        replayed = self.training and is_checkpointing(self)
        if replayed and past_key_values is not None:
            raise ValueError(
                "Gradient checkpointing in training cannot continue past_key_values: call model.eval(), switch "
                "gradient_checkpointing off, or pass the whole sequence."
            )
        if use_cache is None:  # a cache that nobody reads would copy all keys and values of a training step
            use_cache = self.config.text_config.use_cache and not self.training
        keeps_cache = past_key_values is not None or (use_cache and not replayed)
        attention_mask = without_skipped(attention_mask, past_key_values)
        if position_ids is None and is_two_dimensional(attention_mask):
            position_ids = positions_from_mask(attention_mask, num_columns)  # (B, T)
        self.check_length(num_columns, position_ids, past_key_values)
        given_mask, (latent_mask, skipped) = latent_mask, self.split_latents(latent_mask, attention_mask)
        columns, leaves_out = self.thought_columns(
            latent_mask, skipped, attention_mask=attention_mask, past_key_values=past_key_values
        )
        looks_back = columns or leaves_out or output_stop_logits  # what a cache remembers may be on the device
        loop, before = think, remembered(past_key_values) if looks_back else None
        if columns:
            state = {"past_key_values": past_key_values, "attention_mask": attention_mask}
            loop = self.thinking_loop(latent_mask, stop_threshold=stop_threshold, **state)
        if past_key_values is None and (keeps_cache or columns):
            kept, prefix_length = keeps_cache or loop is not think, columns[0] if columns else 0
            past_key_values = self.start_cache(replayed, kept, prefix_length)
        if "encoder_hidden_states" in kwargs and past_key_values is not None:
            past_key_values = with_cross_attention(past_key_values, kwargs)
        if loop is think and columns:
            layout = self.common_layout(latent_mask, columns, past_key_values, attention_mask, kwargs)
            if layout is not None:
                loop = partial(think_regrouped, layout=layout, keeps_cache=keeps_cache)
        outputs = loop(
            self.decoder_call(columns, past_key_values, kwargs),
            inputs_embeds,
            latent_mask,
            columns=columns,
            feed=partial(self.thought_feed, embedding_norm=self.mean_embedding_norm() if columns else None),
            previous=before,
            linked=linked_thoughts(latent_mask, self.bptt_thoughts) if columns else None,
            noise=noise_by_column(thought_noise, given_mask) if columns and thought_noise is not None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            # Under checkpointing the layers would warn that they ignore use_cache; they get the cache itself.
            use_cache=past_key_values is not None and not replayed,
            **kwargs,
        )
        if leaves_out or outputs.skipped is not None:
            self.leave_out(outputs, skipped, before=before, attention_mask=attention_mask, cache=past_key_values)
        if output_stop_logits:
            outputs.stop_logits = packed(self.stop_head(states_before(outputs.last_hidden_state, before)), given_mask)
        outputs.past_key_values = remember(outputs, past_key_values) if keeps_cache else None
        return outputs

    def leave_out(self, outputs: ThinkOutput, skipped: torch.Tensor, *, before, attention_mask, cache) -> None:
        """Make the latents skipped (B, T), and those at which rows stopped, what the column before them is."""
        outputs.skipped = skipped if outputs.skipped is None else skipped | outputs.skipped
        outputs.last_hidden_state = carry_states(outputs.last_hidden_state, outputs.skipped, before)
        outputs.attention_mask = mask_without(outputs.skipped, attention_mask, cache)
        window = getattr(self.config.get_text_config(decoder=True), "sliding_window", None)
        check_window(self.sees_all_columns, window, outputs.attention_mask.shape[1])

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
        output_thoughts: bool = False,
        output_stop_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MMCoconutModelOutputWithPast:
        """Run images and text through the model; each latent placeholder reads the state of the column before it.

        Args:
            input_ids (B, T) or inputs_embeds (B, T, D): exactly one.
            pixel_values (I, channels, height, width): the images of all rows, in reading order, or their tiles.
            num_tiles (images,): how many of the pixel_values each image is; by default one.
            image_features (I, patches, W): what get_vision_features gives of pixel_values, in their place.
            attention_mask (B, past + T); position_ids (B, T), counted from the mask by default.
            past_key_values: any cache of the library; a latent may stand first if it was filled by this model.
            mm_encoder_outputs: {"image": output of get_image_features}, in the place of pixel_values.
            stop_threshold: rows stop thinking where the stop head's probability is above it, a number or (B, N) one
                for each latent of each row; None: they think at all latents whose mask is 1.
            thought_noise (B, N, D): added to the thoughts of each row, in units of their own root mean square.
            output_thoughts: also return what was read at the latents.
            output_stop_logits: also return what the stop head says before each latent, left out or not.

        Raises:
            ValueError: placeholders and features differ in number; a latent without a token before it; more tokens
                than positions; both or neither of ids and embeddings; images given twice.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        check_one_source(
            pixel_values=pixel_values, image_features=image_features, mm_encoder_outputs=mm_encoder_outputs
        )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        image_outputs = (mm_encoder_outputs or {}).get("image")
        encodes = pixel_values is not None or image_features is not None
        if encodes:
            images = {"num_tiles": num_tiles, "image_features": image_features}
            image_outputs = self.get_image_features(pixel_values, **images, **asked_of_tower(kwargs), return_dict=True)

        latent_mask = self.get_token_mask(self.config.latent_token_id, input_ids, inputs_embeds)  # (B, T)
        decoder_inputs = self.fuse_images(input_ids, inputs_embeds, image_outputs, past_key_values)
        if encodes:
            image_mask = self.get_token_mask(self.config.image_token_id, input_ids, inputs_embeds)  # (B, T)
            self.check_whole_images(image_mask, num_tiles)
        outputs = self.run_decoder(
            latent_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            stop_threshold=stop_threshold,
            thought_noise=thought_noise,
            output_stop_logits=output_stop_logits,
            **decoder_inputs,
            **kwargs,
        )
        return MMCoconutModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.past_key_values},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            image_hidden_states=tuple(image_outputs.pooler_output) if image_outputs is not None else None,
            **(thoughts_of(outputs, latent_mask) if output_thoughts else {}),
            stop_logits=outputs.stop_logits,
            attention_mask=outputs.attention_mask,
            image_outputs=self.returned_of_tower(image_outputs, kwargs),
        )

    def returned_of_tower(self, image_outputs, kwargs: dict):
        """Return `image_outputs` without the states that only the projector asked for."""
        wanted = kwargs.get("output_hidden_states") or self.vision_tower.config.output_hidden_states
        if wanted or image_outputs is None:
            return image_outputs
        return type(image_outputs)(**{name: value for name, value in image_outputs.items() if name != "hidden_states"})


def setting_of_base(name: str) -> property:
    """A setting of MMCoconutModel, read and written through the model with a head."""
    return property(lambda self: getattr(self.model, name), lambda self, value: setattr(self.model, name, value))


class GenerationOverSplitKeys:
    """The part of a model with a head that gives `generate` a SplitCache where that can be read."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args):
        """Put a SplitCache in the place of a growing cache that transformers makes."""
        is_given = model_kwargs.get(CACHE) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if CACHE in model_kwargs and not (is_given or is_assisted) and self.model.reads_split_keys():
            model_kwargs[CACHE] = split_cache_of(model_kwargs[CACHE])


class MMCoconutForConditionalGeneration(
    MMCoconutPreTrainedModel,
    FromBackbones,
    GenerationWithImages,
    GenerationBehindPrefix,
    GenerationThatStops,
    GenerationOverSplitKeys,
    GenerationMixin,
):
    """MMCoconutModel with a language-model head: `forward` gives loss and logits, `generate` answers.

    The prompt's latents are thought in the prefill, so every way of stock `generate()` works; a decoding step is
    that of an ordinary language model.
    """

    base_class = MMCoconutModel
    text_auto_class = AutoModelForCausalLM
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MMCoconutConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = self.base_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{self.embedding_name()}.weight"}
        self.post_init()
        if not self.get_decoder().tp_plan:  # a head cut alone would be cut from the embeddings that it is tied to
            self.tp_plan = None
        self.suppress_placeholders()

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

    def embedding_name(self) -> str:
        """Where the decoder keeps its token embeddings: wte, embed_tokens, …"""
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

    bptt_thoughts = setting_of_base("bptt_thoughts")
    checkpointed_passes = setting_of_base("checkpointed_passes")
    defer_weight_gradients = setting_of_base("defer_weight_gradients")
    latent_graphs = setting_of_base("latent_graphs")

    def get_vision_features(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.model.get_vision_features(pixel_values, **kwargs)

    def get_image_features(self, *args, **kwargs) -> tuple | BaseModelOutputWithPooling:
        return self.model.get_image_features(*args, **kwargs)

    def generate(self, inputs: torch.Tensor | None = None, *args, image_features=None, prefix=None, **kwargs):
        """Stock `generate()`, which encodes images before any forward pass could see whose they are.

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

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """Leave a prefill's mask 2-D: each of its passes makes its own, and a ready 4-D one would fit only one."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return create_masks_for_generate(
            config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    def loss_and_logits(self, hidden_states, targets, logits_to_keep, **kwargs) -> tuple:
        """The loss of states (B, T, D) and what each is to predict, targets (B, T) or None; logits (B, kept, V).

        The loss runs the head on the labelled positions only; in training with targets the logits are None unless
        logits_to_keep asks for some.
        """
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
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        image_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        stop_threshold: float | torch.Tensor | None = None,
        thought_noise: torch.Tensor | None = None,
        output_thoughts: bool = False,
        output_stop_logits: bool = False,
        shift_labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MMCoconutCausalLMOutputWithPast:
        """The base model, its head and the causal loss.

        Args:
            labels (B, T): token ids, -100 where there is no loss; shifted inside.
            shift_labels (B, T): what each column is to predict, in the place of labels, as context parallelism, which
                cuts the sequence, prepares them.
            logits_to_keep: as in the library. None means all, except in training with labels, where it means none:
                the loss runs the head on the labelled positions only.
            The rest as in MMCoconutModel.forward; `num_items_in_batch` reaches the loss.

        Raises:
            ValueError: a latent after the last labelled token of its row.
        """
        targets = shift_labels  # (B, T)
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # (B, T)
        if targets is not None and input_ids is not None:
            latent_mask, _ = self.model.split_latents(input_ids == self.config.latent_token_id, attention_mask)
            first = targets.new_full((len(targets), 1), -100) if labels is None else labels[:, :1]  # (B, 1)
            labelled = torch.cat([first, targets], dim=1) != -100  # (B, T + 1), of the column behind the last too
            check_thoughts_matter(nn.functional.pad(latent_mask, (0, 1)), labelled)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_tiles=num_tiles,
            image_features=image_features,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            stop_threshold=stop_threshold,
            thought_noise=thought_noise,
            output_thoughts=output_thoughts,
            output_stop_logits=output_stop_logits,
            **kwargs,
        )
        loss, logits = self.loss_and_logits(outputs.last_hidden_state, targets, logits_to_keep, **kwargs)
        return MMCoconutCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.past_key_values},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            image_hidden_states=outputs.image_hidden_states,
            thoughts=outputs.thoughts,
            thought_mask=outputs.thought_mask,
            stop_logits=outputs.stop_logits,
            attention_mask=outputs.attention_mask,
            image_outputs=outputs.image_outputs,
        )


MMCoconutForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MMCoconutForConditionalGeneration", "MMCoconutModel", "MMCoconutPreTrainedModel"]
