"""Build models from a vision tower and a language model (`from_backbones`), or from the parts of a VLM.

`from_vlm` in vlms.py adds thoughts to a VLM in its own class.

Shapes: D hidden of the language model, V vocabulary.
"""

import copy
import difflib

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from mmcoconut.build.gguf import find_gguf, load_gguf, load_tokenizer
from mmcoconut.build.timm import MODEL_TYPE as TIMM_MODEL_TYPE
from mmcoconut.build.timm import check_timm, settle_timm
from mmcoconut.build.tokens import add_special_tokens, image_token_of, turn_end_of
from mmcoconut.configuration_mmcoconut import (
    SPECIAL_TOKENS,
    THOUGHT_TOKENS,
    TOKEN_ID_FIELDS,
    MMCoconutConfig,
    num_patches_of,
    num_placeholders,
    settle_decoder,
)
from mmcoconut.errors import UsageError
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.schedules_mmcoconut import StopHead
from mmcoconut.seq2seq_mmcoconut import MMCoconutForSeq2SeqLM
from mmcoconut.thinking_mmcoconut import ThoughtFeed, give_thoughts
from mmcoconut.vision_mmcoconut import build_projector


def internvl_fields(vlm: PreTrainedModel) -> dict:
    """Return the fields of InternVL's projector; it reads the last layer's output, which some towers normalise."""
    if vlm.config.vision_feature_layer == -1:
        vlm.model.vision_tower.config.tie_last_hidden_states = True
    return {"projector_type": "pixel_shuffle", "downsample_ratio": vlm.config.downsample_ratio}


def llava_fields(vlm: PreTrainedModel) -> dict:
    """Return the fields of LLaVA's projector."""
    return {"projector_type": "mlp", "projector_bias": vlm.config.multimodal_projector_bias}


# Vision-language models that `composed_from_vlm` supports: one function per model type.
VLM_FIELDS = {"internvl": internvl_fields, "llava": llava_fields}
SHARED_FIELDS = ("image_token_id", "projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy")

OF_VLM_PROJECTOR = ("projector_type", "projector_bias", "downsample_ratio", "tie_word_embeddings")
DECIDED_BY_VLM = (*TOKEN_ID_FIELDS, *SHARED_FIELDS, *OF_VLM_PROJECTOR, "vision_config", "text_config")


def check_convertible(config: PreTrainedConfig) -> None:
    if config.model_type not in VLM_FIELDS:
        raise UsageError(
            f"composed_from_vlm cannot take apart a {config.model_type}, only {', '.join(VLM_FIELDS)}: take one of "
            "these, or give it thoughts in its own class with from_vlm."
        )


def check_fields(names, *, method: str, decided: tuple[str, ...] = TOKEN_ID_FIELDS) -> None:
    """Raise ValueError for a name that is no configuration field, or that the joined parts determine."""
    fields = [name for name in MMCoconutConfig.__dataclass_fields__ if not name.startswith("_")]
    for name in names:
        if name in decided:
            raise UsageError(f"{method} takes no {name!r}, which follows from the parts that it joins: leave it out.")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "what it takes are the fields of MMCoconutConfig."
            raise UsageError(f"{method} takes no {name!r}: {hint}")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a torch dtype, given one or its name such as `bfloat16`."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise UsageError(
            f"dtype={dtype!r} is not a type of weights: pass torch.bfloat16, torch.float16 or torch.float32."
        )
    return named


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights of a model; computed buffers, such as rotary frequencies, keep their precision."""
    saved = model.state_dict().keys()
    weights = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in saved)]
    for weight in weights:
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    parts = [getattr(model.config, name, None) for name in model.config.sub_configs]
    for config in [model.config, *(part for part in parts if part is not None)]:
        config.dtype = dtype
    return model


def load_config(name_or_path: str, part: str, **options) -> PreTrainedConfig:
    """Return the configuration of a pretrained part.

    Raises:
        ValueError: the name is neither a folder with a configuration nor on the Hub; or timm is missing for a timm
            backbone.
    """
    try:
        if PreTrainedConfig.get_config_dict(name_or_path, **options)[0].get("model_type") == TIMM_MODEL_TYPE:
            check_timm(f"The {part} {name_or_path!r}")
        return AutoConfig.from_pretrained(name_or_path, **options)
    except OSError as error:
        raise UsageError(
            f"The {part} {name_or_path!r} is neither a folder that holds a config.json nor found on the Hub: give an "
            "existing folder, or a Hub id while there is a connection or a downloaded copy."
        ) from error


def load_vlm(vlm: str | PreTrainedModel) -> PreTrainedModel:
    """Return a pretrained vision-language model, loaded if given by name; its type is checked before loading."""
    if isinstance(vlm, PreTrainedModel):
        check_convertible(vlm.config)
        return vlm
    check_convertible(load_config(vlm, "vision-language model"))
    return AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.get_default_dtype())


def settle_tying(vlm: PreTrainedModel) -> bool:
    """Return True if head and embeddings are one matrix, and correct configurations that say otherwise.

    A checkpoint with two matrices is loaded untied whatever its configuration says, but the next resizing would tie
    them and lose the head.
    """
    tied = vlm.get_output_embeddings().weight is vlm.get_input_embeddings().weight
    for config in (vlm.config, vlm.config.get_text_config(), vlm.get_decoder().config):
        config.tie_word_embeddings = tied
    return tied


def fields_of_vlm(vlm: PreTrainedModel) -> dict:
    """Return the fields of MMCoconutConfig that a vision-language model determines."""
    shared = {field: getattr(vlm.config, field) for field in SHARED_FIELDS}
    return {**shared, **VLM_FIELDS[vlm.config.model_type](vlm), "tie_word_embeddings": settle_tying(vlm)}


def ends_of(generation_config, tokenizer) -> int | list[int]:
    """Return the tokens that end an answer: those of a generation configuration, and that of training texts."""
    ends = generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = list(dict.fromkeys([*ends, tokenizer.eos_token_id]))
    return ends if len(ends) > 1 else ends[0]


def ends_of_turns(generation_config, tokenizer) -> int | list[int]:
    """Return the tokens that end an instruct model's answer: `ends_of`, and its template's end of turn."""
    ends = ends_of(generation_config, tokenizer)
    turn_end = tokenizer.convert_tokens_to_ids(turn_end_of(tokenizer))
    ends = list(dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), turn_end]))
    return ends if len(ends) > 1 else ends[0]


def load_vision_tower(name_or_path: str) -> PreTrainedModel:
    """Load the vision tower of a checkpoint; for CLIP and SigLIP only the image tower is built and loaded."""
    config = load_config(name_or_path, "vision tower")
    vision_config = getattr(config, "vision_config", config)
    options = {"config": vision_config, "dtype": torch.get_default_dtype()}
    tower, info = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if len(missing) > len(tower.state_dict()) // 2:  # some checkpoints lack a pooler, which is not read
        raise UsageError(
            f"{name_or_path} lacks {len(missing)} of {len(tower.state_dict())} weights of {type(tower).__name__}, "
            f"{missing[0]} the first: name a checkpoint of a vision tower; a whole vision-language model is taken by "
            "from_vlm (`vlm` in a recipe)."
        )
    return tower


def new_vision_tower(vision_config: PreTrainedConfig) -> PreTrainedModel:
    """Return a vision tower with random weights."""
    if vision_config.model_type == TIMM_MODEL_TYPE:
        check_timm(f"The vision tower {vision_config.architecture!r}")
    return AutoModel.from_config(vision_config)


def vision_tower_for(
    vision: str | None, vision_config: PreTrainedConfig | None, config_kwargs: dict
) -> PreTrainedModel:
    """Return a vision tower, pretrained by name or with random weights; its features must be a sequence of tokens."""
    vision_tower = load_vision_tower(vision) if vision else new_vision_tower(vision_config)
    if vision_tower.config.model_type == TIMM_MODEL_TYPE:
        settle_timm(vision_tower, config_kwargs)
    check_has_tokens(vision_tower.config)
    return vision_tower


def check_has_tokens(vision_config: PreTrainedConfig) -> None:
    """Raise ValueError for a tower without a single width and depth, such as a convolutional network."""
    for name in ("hidden_size", "num_hidden_layers"):
        if getattr(vision_config, name, None) is None:
            raise UsageError(
                f"The vision tower {vision_config.model_type} has no {name}, so its features are no sequence of "
                "tokens of one width: take a vision transformer (CLIP, SigLIP, ViT, DINOv2, …)."
            )


def settle_vocabulary(text_config: PreTrainedConfig, vocab_size: int) -> None:
    """Set the vocabulary size under each name that a language model uses."""
    if getattr(text_config, "vocab_size", None) is not None:
        text_config.vocab_size = vocab_size
    if getattr(text_config, "decoder_vocab_size", None) is not None:  # Marian's decoder and head
        text_config.decoder_vocab_size = vocab_size


def grow_embeddings(causal_lm: PreTrainedModel, tokenizer, num_known: int, *, new_token_init: str | None) -> None:
    """Resize a language model to its tokenizer, whose first num_known tokens it knows; many have spare rows.

    Rows of new tokens start at the mean of the known ones, or at a named token's.
    """
    start_rows(causal_lm, range(num_known, len(tokenizer)), tokenizer, new_token_init=new_token_init)


def start_rows(causal_lm: PreTrainedModel, new_ids, tokenizer, *, new_token_init: str | None) -> None:
    """Initialize the rows of embeddings and head at new_ids to the mean of earlier rows, or to a named token's.

    If the tokenizer has more tokens than the embeddings have rows, they grow to its length.

    Raises:
        ValueError: a `new_token_init` that the tokenizer lacks.
    """
    if new_token_init is not None and new_token_init not in tokenizer.get_vocab():
        raise UsageError(
            f"new_token_init={new_token_init!r} is not a token of this tokenizer: name one of its tokens, or leave it "
            "out to start at the mean."
        )
    old_size, new_size = causal_lm.get_input_embeddings().weight.shape[0], len(tokenizer)
    if new_size > old_size:
        causal_lm.resize_token_embeddings(new_size, mean_resizing=False)
        for config in (causal_lm.config, causal_lm.config.get_text_config(), causal_lm.get_decoder().config):
            settle_vocabulary(config, new_size)
    new_ids = [*new_ids, *range(old_size, new_size)]
    if not new_ids:
        return
    for layer in {causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()}:
        weight = layer.weight.data  # (V, D)
        known = weight[: min(new_ids)] if new_token_init is None else weight[[tokenizer.get_vocab()[new_token_init]]]
        weight[new_ids] = known.mean(dim=0)


def check_has_encoder(text_config: PreTrainedConfig, image_fusion: str) -> None:
    """Raise ValueError if the fusion needs a text encoder and there is none (transformers would list all models)."""
    if image_fusion == "encoder" and not text_config.is_encoder_decoder:
        raise UsageError(
            f"image_fusion='encoder' needs a language model with an encoder, but {text_config.model_type} is a "
            "decoder alone: use BART, or another image_fusion."
        )


def load_language_model(
    name_or_path: str, auto_class, *, image_fusion: str, gguf_file: str | None = None
) -> PreTrainedModel:
    """Load a complete pretrained language model; cross-attention that it lacks gets random weights.

    Raises:
        ValueError: the checkpoint lacks other weights, or the encoder that the fusion needs.
    """
    of_file = {} if gguf_file is None else {"gguf_file": gguf_file}
    config = load_config(name_or_path, "language model", **of_file)
    if config.get_text_config() is not config and not config.is_encoder_decoder:
        raise UsageError(
            f"{name_or_path} is a {config.model_type}, of which the language model is a part: name a checkpoint of a "
            "language model; a whole vision-language model is taken by from_vlm (`vlm` in a recipe)."
        )
    check_has_encoder(config, image_fusion)
    settle_decoder(config, image_fusion)
    options = {"config": config, "dtype": torch.get_default_dtype()}
    if gguf_file is None:
        causal_lm, info = auto_class.from_pretrained(name_or_path, output_loading_info=True, **options)
    else:
        causal_lm, info = load_gguf(name_or_path, gguf_file, auto_class, **options)
    missing = sorted(name for name in info["missing_keys"] if "cross" not in name and "encoder_attn" not in name)
    if missing:
        raise UsageError(
            f"{name_or_path} lacks {len(missing)} weights of {type(causal_lm).__name__}, {missing[0]} the first: name "
            "a checkpoint of a language model."
        )
    return causal_lm


def new_language_model(text_config: PreTrainedConfig, tokenizer, auto_class, *, image_fusion: str) -> PreTrainedModel:
    """Return a language model with random weights and the tokenizer's vocabulary and special ids."""
    check_has_encoder(text_config, image_fusion)
    text_config = copy.deepcopy(text_config)
    settle_vocabulary(text_config, len(tokenizer))
    settle_decoder(text_config, image_fusion)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, token, getattr(tokenizer, token))
    if text_config.is_encoder_decoder:  # as BART: the end of a text is what the decoder starts from
        text_config.decoder_start_token_id = tokenizer.eos_token_id
    return auto_class.from_config(text_config)


@torch.no_grad()
def check_row_positions(decoder: PreTrainedModel) -> None:
    """Check that left padding does not change a thinking decoder's states, by running two tokens both ways.

    Raises:
        ValueError: the decoder's positions cannot be set per row.
    """
    embeds = decoder.get_input_embeddings()(torch.zeros(1, 3, dtype=torch.long, device=decoder.device))  # (1, 3, D)
    mask = torch.tensor([[0, 1, 1]], device=decoder.device)
    positions = torch.tensor([[0, 0, 1]], device=decoder.device)
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    training = decoder.training
    decoder.eval()
    padded = decoder(**inputs).last_hidden_state[:, 1:]  # (1, 2, D)
    alone = decoder(inputs_embeds=embeds[:, 1:]).last_hidden_state  # (1, 2, D)
    decoder.train(training)
    if not torch.allclose(padded, alone, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"{type(decoder).__name__} scales embeddings before it adds positions, so rows after padding would be "
            "read wrongly: set scale_embedding=False in its configuration."
        )


@torch.no_grad()
def check_plain_head(causal_lm: PreTrainedModel) -> None:
    """Check, by running a token, that logits are states times one matrix (V, D).

    Raises:
        ValueError: the language model shifts, scales or caps its logits, or has no base model without its head.
    """
    if causal_lm.base_model is causal_lm:
        raise UsageError(
            f"{type(causal_lm).__name__} has no part without its head, which thoughts are states of: take an "
            "encoder-decoder that has one (BART, mBART, Marian)."
        )
    head, training = causal_lm.get_output_embeddings(), causal_lm.training
    token = torch.zeros(1, 1, dtype=torch.long, device=causal_lm.device)
    inputs = {"input_ids": token, **({"decoder_input_ids": token} if causal_lm.config.is_encoder_decoder else {})}
    causal_lm.eval()
    logits = causal_lm.base_model(**inputs).last_hidden_state @ head.weight.T  # (1, 1, V)
    plain = head.bias is None and torch.allclose(causal_lm(**inputs).logits, logits, rtol=1e-3, atol=1e-3)
    causal_lm.train(training)
    if not plain:
        raise UsageError(
            f"The head of {type(causal_lm).__name__} has a bias, or scales or caps its logits, which would be lost: "
            "take a language model whose logits are its states times one matrix (GPT-2, Qwen2, Llama, …)."
        )


@torch.no_grad()
def count_placeholders(vision_tower: PreTrainedModel, config: MMCoconutConfig) -> int:
    """Return the number of placeholders of an image of config.image_size (default: the tower's), by running two.

    Raises:
        ValueError: the tower joins images, or has no class token to leave out.
    """
    vision_config = vision_tower.config
    size = config.image_size or vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(2, vision_config.num_channels, height, width, dtype=vision_tower.dtype)
    num_images, num_tokens = vision_tower(pixels.to(vision_tower.device)).last_hidden_state.shape[:2]
    if num_images != 2:
        raise UsageError(
            f"The vision tower {vision_config.model_type} gives {num_images} row of features for 2 images: take one "
            "with a row per image (CLIP, SigLIP, InternVL, …)."
        )
    leaves_out_first = config.vision_feature_select_strategy == "default"
    if leaves_out_first and num_tokens == num_patches_of(vision_config, "default"):
        raise UsageError(
            f"vision_feature_select_strategy='default' leaves out the class token, and {vision_config.model_type} has "
            f"none among its {num_tokens} tokens: set vision_feature_select_strategy='full'."
        )
    return num_placeholders(config, num_tokens - leaves_out_first)


def without_backbones(config: MMCoconutConfig) -> MMCoconutForConditionalGeneration:
    """Return a model without backbones, which are joined later: only projector and thought modules have weights."""
    with torch.device("meta"):
        model = MMCoconutForConditionalGeneration(config)
    model.model.multi_modal_projector = build_projector(config).apply(model._init_weights)
    thought_feed = ThoughtFeed(config.text_config.hidden_size, config.thought_norm)
    model.model.thought_feed = thought_feed.apply(model._init_weights)
    if config.stop_head:
        model.model.stop_head = StopHead(config.text_config.hidden_size).apply(model._init_weights)
    return model


def join(model, vision_tower: PreTrainedModel, language_model: PreTrainedModel, *, head: nn.Linear):
    """Return the model with these parts, in evaluation mode, as from_pretrained leaves a model."""
    model.model.vision_tower, model.model.language_model, model.lm_head = vision_tower, language_model, head
    give_thoughts(model.get_decoder())
    model.config.image_seq_length = count_placeholders(vision_tower, model.config)
    model.tie_weights()
    return model.eval()


def language_model_for(
    image_fusion: str, text: str | None, text_config, tokenizer, gguf_file: str | None = None
) -> PreTrainedModel:
    """Return the language model with a head that a fusion needs, pretrained by name or with random weights."""
    auto_class = AutoModelForSeq2SeqLM if image_fusion == "encoder" else AutoModelForCausalLM
    if text is not None:
        return load_language_model(text, auto_class, image_fusion=image_fusion, gguf_file=gguf_file)
    return new_language_model(text_config, tokenizer, auto_class, image_fusion=image_fusion)


def assemble(config: MMCoconutConfig, vision_tower: PreTrainedModel, causal_lm: PreTrainedModel, tokenizer):
    """Return the model of a tower and a language model with a head, with the tokenizer's generation settings."""
    if config.is_encoder_decoder:
        model, language_model = MMCoconutForSeq2SeqLM(config), causal_lm.base_model
        model.generation_config.decoder_start_token_id = config.text_config.decoder_start_token_id
    else:
        model, language_model = MMCoconutForConditionalGeneration(config), causal_lm.get_decoder()
    join(model, vision_tower, language_model, head=causal_lm.get_output_embeddings())
    if model.get_decoder().counts_columns:
        check_row_positions(model.get_decoder())
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokenizer.chat_template is not None:
        tokens["eos_token_id"] = ends_of_turns(causal_lm.generation_config, tokenizer)
        model.config.get_text_config().eos_token_id = tokens["eos_token_id"]
    # BART forces start and end tokens for summaries; answers need none.
    model.generation_config.update(**tokens, forced_bos_token_id=None, forced_eos_token_id=None)
    return model


def from_backbones(
    vision: str | None = None,
    text: str | None = None,
    *,
    gguf_file: str | None = None,
    tokenizer=None,
    vision_config: PreTrainedConfig | None = None,
    text_config: PreTrainedConfig | None = None,
    new_token_init: str | None = None,
    dtype: torch.dtype | str | None = None,
    **config_kwargs,
):
    """Return a new model from a vision tower and a language model, pretrained or from their configurations.

    Args:
        vision, text: Hub ids or folders of pretrained weights, e.g. "openai/clip-vit-base-patch32" and
            "openai-community/gpt2"; or vision_config, text_config: configurations, for random weights.
        gguf_file: the file of `text` that holds its weights and tokenizer as GGUF, which are unpacked.
        tokenizer: the language model's, loaded from `text` by default; it gets the four special tokens where it lacks
            them, and the embeddings grow to its length.
        new_token_init: a token whose embedding the new ones start from (the paper: "<<"); None: the old ones' mean.
        dtype: of all weights, e.g. torch.bfloat16; None: torch's default.
        config_kwargs: fields of MMCoconutConfig, e.g. image_fusion="add"; `encoder` makes a MMCoconutForSeq2SeqLM out
            of an encoder-decoder such as BART, the others a MMCoconutForConditionalGeneration.

    Raises:
        ValueError: both or neither of a name and a configuration; an unknown field, dtype or `new_token_init`; no
            such `gguf_file`; a language model whose head is more than a matrix.
    """
    if (vision is None) == (vision_config is None) or (text is None) == (text_config is None):
        raise UsageError("Give exactly one of vision and vision_config, and exactly one of text and text_config.")
    check_fields(config_kwargs, method="from_backbones")
    dtype = as_dtype(dtype)
    if gguf_file is not None:
        find_gguf(text, gguf_file)
    tokenizer = tokenizer or load_tokenizer(text, gguf_file)
    num_known = len(tokenizer)
    add_special_tokens(tokenizer)
    vision_tower = vision_tower_for(vision, vision_config, config_kwargs)
    image_fusion = config_kwargs.get("image_fusion", MMCoconutConfig.image_fusion)
    causal_lm = language_model_for(image_fusion, text, text_config, tokenizer, gguf_file)
    if text:
        grow_embeddings(causal_lm, tokenizer, num_known, new_token_init=new_token_init)
    check_plain_head(causal_lm)
    token_ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    config = MMCoconutConfig(
        vision_config=vision_tower.config,
        text_config=causal_lm.config,
        **dict(zip(TOKEN_ID_FIELDS, token_ids)),
        **config_kwargs,
    )
    model = assemble(config, vision_tower, causal_lm, tokenizer)
    return model if dtype is None else cast_weights(model, dtype)


def generation_config_of(vlm: PreTrainedModel, tokenizer, suppress_tokens: list[int]):
    """Return a VLM's generation configuration, with training's end tokens, and with placeholders suppressed."""
    generation_config = copy.deepcopy(vlm.generation_config)
    ends = ends_of(vlm.generation_config, tokenizer)
    tokens = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id, "suppress_tokens": suppress_tokens}
    generation_config.update(**tokens)
    return generation_config


def composed_from_vlm(
    vlm: str | PreTrainedModel,
    *,
    tokenizer=None,
    processor=None,
    new_token_init: str | None = None,
    dtype: torch.dtype | str | None = None,
    **config_kwargs,
):
    """Return a pretrained InternVL or LLaVA with thoughts, as a composed model of its unchanged parts.

    Its images can be cached (`precompute_image_features`) and be part of a prefix; `from_vlm` keeps its own class.

    Args:
        vlm: Hub id or folder, e.g. "OpenGVLab/InternVL3-1B-hf", or the model itself, whose parts are taken over:
            do not use it afterwards.
        tokenizer, or processor with one: loaded from `vlm` by default; the tokenizer gets the latent and the two
            markers where it lacks them, and the embeddings grow to its length. The image token is the VLM's own.
        new_token_init: a token whose embedding the new tokens start from; None takes the mean of the old ones.
        dtype: of all weights, e.g. torch.bfloat16; None: the model's own, or torch's default for one by name.
        config_kwargs: fields of MMCoconutConfig that the VLM does not decide, e.g. thought_norm or image_size.

    Raises:
        ValueError: a model of another kind; a model without its tokenizer; an unknown `new_token_init`, dtype or
            field, or one that the VLM decides.
    """
    if tokenizer is None and processor is None and isinstance(vlm, PreTrainedModel):
        raise UsageError("A model object has no tokenizer: also give tokenizer or processor.")
    check_fields(config_kwargs, method="composed_from_vlm", decided=DECIDED_BY_VLM)
    dtype = as_dtype(dtype)
    tokenizer = tokenizer or (AutoTokenizer.from_pretrained(vlm) if processor is None else processor.tokenizer)
    vlm = load_vlm(vlm)
    settle_tying(vlm)
    num_known = len(tokenizer)
    add_special_tokens(tokenizer, image_token_of(tokenizer, vlm.config.image_token_id))
    grow_embeddings(vlm, tokenizer, num_known, new_token_init=new_token_init)
    thought_ids = dict(zip(TOKEN_ID_FIELDS[1:], tokenizer.convert_tokens_to_ids(list(THOUGHT_TOKENS))))
    model = compose(vlm, {**thought_ids, **config_kwargs})
    model.generation_config = generation_config_of(vlm, tokenizer, model.generation_config.suppress_tokens)
    return cast_weights(model.to(vlm.device), vlm.dtype if dtype is None else dtype)


def compose(vlm: PreTrainedModel, fields: dict) -> MMCoconutForConditionalGeneration:
    """Return a model of the parts of an InternVL or LLaVA, which is consumed; its thought modules are new.

    fields: of MMCoconutConfig, beside those that the VLM decides.
    """
    config = MMCoconutConfig(
        vision_config=vlm.model.vision_tower.config,
        text_config=vlm.model.language_model.config,
        **{**fields_of_vlm(vlm), **fields},
    )
    model = without_backbones(config)
    join(model, vlm.model.vision_tower, vlm.model.language_model, head=vlm.get_output_embeddings())
    model.model.multi_modal_projector.load_state_dict(vlm.model.multi_modal_projector.state_dict())
    return model
