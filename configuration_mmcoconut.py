"""Configuration: which vision tower and language model, how they are fused, and how thoughts are fed back."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

VERSION = "0.2.0"
IMAGE_TOKEN = "<image>"
LATENT_TOKEN = "<|latent|>"
START_LATENT_TOKEN = "<|start-latent|>"
END_LATENT_TOKEN = "<|end-latent|>"
PAD_TOKEN = "<|pad|>"
THOUGHT_TOKENS = (LATENT_TOKEN, START_LATENT_TOKEN, END_LATENT_TOKEN)
SPECIAL_TOKENS = (IMAGE_TOKEN, *THOUGHT_TOKENS)

CHOICES = {
    "image_fusion": ("replace", "add", "cross_attention", "encoder"),
    "projector_type": ("linear", "mlp", "transformer", "pixel_shuffle", "pooled_prefix", "attention_prefix"),
    "image_pooling": ("mean", "cls"),
    "vision_feature_select_strategy": ("default", "full"),
    "thought_mode": ("feedback", "pause"),
    "thought_norm": ("none", "embedding", "projection"),
    "thought_schedule": ("sequential", "jacobi"),
    "answer_sees": ("all", "no_image", "thoughts"),
}
TOKEN_ID_FIELDS = ("image_token_id", "latent_token_id", "start_latent_token_id", "end_latent_token_id")
# Fields added to a vision-language model's own configuration, and their defaults.
THOUGHT_FIELDS = {**dict.fromkeys(TOKEN_ID_FIELDS[1:]), "thought_mode": "feedback", "thought_norm": "none"}
THOUGHT_FIELDS |= {"thought_schedule": "sequential", "jacobi_iterations": None, "stop_head": False}
LATER_FIELDS = {"answer_sees": "all"}  # missing in checkpoints of earlier versions, and their meaning there
THOUGHT_FIELDS |= LATER_FIELDS
# Image features are read by cross-attention: one placeholder says which row an image belongs to.
READ_BY_CROSS_ATTENTION = ("cross_attention", "encoder")
# They make a fixed number of visual tokens, and one vector per image that can be aligned with text.
PREFIX_PROJECTORS = ("pooled_prefix", "attention_prefix")
DECODER_CLASSES = ("AutoModelForCausalLM", "modeling_mmcoconut.MMCoconutForConditionalGeneration")
SEQ2SEQ_CLASSES = ("AutoModelForSeq2SeqLM", "seq2seq_mmcoconut.MMCoconutForSeq2SeqLM")


@strict
class MMCoconutConfig(PreTrainedConfig):
    """Everything that decides the shape and the meaning of an MMCoconut checkpoint's weights.

    Args:
        vision_config (`dict | PreTrainedConfig`): a vision tower of `AutoModel` with hidden states (I, patches, W).
        text_config (`dict | PreTrainedConfig`): a language model of `AutoModel` that takes `inputs_embeds`.
        image_fusion (`str`): features `replace` the embeddings of `<image>`, `add` to them, are read by
            `cross_attention`, or join the states of an `encoder` for cross-attention (MMCoconutForSeq2SeqLM).
        projector_type (`str`): from tower to decoder: `linear`; `mlp`; `transformer`, a linear and an encoder layer;
            `pixel_shuffle`, an `mlp` of joined neighbours; `pooled_prefix`, tokens out of the image's one pooled
            vector; `attention_prefix`, learnt queries that attend to all patches.
        projector_hidden_act (`str`), projector_bias (`bool`): of the `mlp` and `pixel_shuffle` projectors.
        projector_num_heads (`int`): attention heads of the `transformer` and `attention_prefix` projectors.
        num_visual_tokens (`int`): visual tokens per image from a `_prefix` projector.
        image_pooling (`str`): the pooled vector of a `_prefix` projector: `mean` of the patches or the `cls` token.
        alignment_adapter (`bool`): whether a linear layer maps that vector before it is compared with text.
        downsample_ratio (`float`): side of the grid after `pixel_shuffle` over the side before it: 0.5 joins 2 × 2.
        vision_feature_layer (`int | list[int]`): hidden states of the tower to read; several are joined in width.
        vision_last_norm (`bool`): whether layer -1 is read after the tower's last norm or, as in LLaVA, before it.
        vision_feature_select_strategy (`str`): `default` leaves out the first (class) token, `full` keeps all.
        image_size (`int`): side of pictures or tiles; differs from the tower's own only if it interpolates positions.
        image_seq_length (`int`): placeholders per picture or tile: one per feature, or 1 for cross-attention.
        image_token_id, latent_token_id, start_latent_token_id, end_latent_token_id (`int`): of the tokenizer.
        thought_mode (`str`): `feedback` feeds the last state back as the next latent's embedding; `pause` does not.
        thought_norm (`str`): on a state that is fed back: `none` (the paper); `embedding`, scaled to the mean norm of
            the token embeddings; `projection`, a trained MLP and LayerNorm.
        thought_schedule (`str`): `sequential`, or `jacobi`, which updates all thoughts together several times.
        jacobi_iterations (`int`): number of updates, only with `jacobi`; as many as thoughts equals `sequential`.
        answer_sees (`str`): what columns after a row's last latent attend to: `all` earlier columns; `no_image`, all
            but image features; `thoughts`, only latents of the columns up to that latent. Read at each call.
        stop_head (`bool`): whether a head predicts, from the state before a latent, if a row should stop thinking.
        initializer_range (`float`): standard deviation of new linear layers of the projector and the thoughts.
        mmcoconut_version (`str`): version that wrote the checkpoint; warns if it is newer than this code.

    Raises ValueError for a value outside its choices, or a combination that cannot work.
    """

    model_type = "mmcoconut"
    # Not `sub_configs_defaults`, which transformers has from 5.20 on only.
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_fusion: str = "replace"
    projector_type: str = "linear"
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True
    projector_num_heads: int = 8
    num_visual_tokens: int = 8
    image_pooling: str = "mean"
    alignment_adapter: bool = True
    downsample_ratio: float = 0.5
    vision_feature_layer: int | list[int] = -1
    vision_last_norm: bool = False
    vision_feature_select_strategy: str = "default"
    image_size: int | None = None
    image_seq_length: int | None = None
    image_token_id: int | None = None
    latent_token_id: int | None = None
    start_latent_token_id: int | None = None
    end_latent_token_id: int | None = None
    thought_mode: str = "feedback"
    thought_norm: str = "none"
    thought_schedule: str = "sequential"
    jacobi_iterations: int | None = None
    answer_sees: str = "all"
    stop_head: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mmcoconut_version: str = VERSION

    def __post_init__(self, **kwargs):
        self.vision_config = _as_config(self.vision_config, "clip_vision_model")
        self.text_config = _as_config(self.text_config, "gpt2")
        super().__post_init__(**kwargs)
        _warn_of_newer(self.mmcoconut_version)
        self.is_encoder_decoder = self.image_fusion == "encoder"
        own_class, model_class = SEQ2SEQ_CLASSES if self.is_encoder_decoder else DECODER_CLASSES
        self.auto_map = {"AutoConfig": "configuration_mmcoconut.MMCoconutConfig"}
        self.auto_map |= dict.fromkeys(("AutoModel", "AutoModelForImageTextToText", own_class), model_class)
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        settle_decoder(self.text_config, self.image_fusion)
        _check_choices(self)
        check_schedule(self)
        _check_token_ids(self)
        _check_projector(self)
        num_patches = num_patches_of(self.vision_config, self.vision_feature_select_strategy)
        if self.image_seq_length is None and num_patches is not None:
            self.image_seq_length = num_placeholders(self, num_patches)

    def save_pretrained(self, save_directory, **kwargs):
        """Save with the version of this code."""
        self.mmcoconut_version = VERSION
        super().save_pretrained(save_directory, **kwargs)

    def get_text_config(self, decoder=None, encoder=None):
        """Return the language model's configuration; for an encoder-decoder, the requested side."""
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)


def _warn_of_newer(version: str) -> None:
    """Warn about a checkpoint written by newer code, in which a field may have another meaning."""
    written, known = (tuple(map(int, each.split("."))) for each in (version, VERSION))
    if written > known:
        remedy = "update this code, or load with trust_remote_code=True where mmcoconut is not imported"
        logger.warning_once(f"Written by mmcoconut {version}, and this is {VERSION}: {remedy}.")


def _as_config(values: dict | PreTrainedConfig | None, model_type: str) -> PreTrainedConfig:
    """Return the configuration of one part: itself, made from its values, or the default of a model type."""
    is_made = isinstance(values, PreTrainedConfig)
    return values if is_made else AutoConfig.for_model(**{"model_type": model_type, **(values or {})})


def settle_decoder(text_config, image_fusion: str) -> None:
    """Adapt a language model's configuration to a fusion: all but `encoder` use only its decoder."""
    if image_fusion == "cross_attention":
        text_config.add_cross_attention = True
    if image_fusion != "encoder" and getattr(text_config, "decoder_layers", None) is not None:
        text_config.num_hidden_layers = text_config.decoder_layers  # under the encoder's name, which caches read
        text_config.num_attention_heads = text_config.decoder_attention_heads


def num_patches_of(vision_config, select_strategy: str) -> int | None:
    """Return the number of patches of a square image, plus a kept class token; None if unknown."""
    image_size, patch_size = getattr(vision_config, "image_size", None), getattr(vision_config, "patch_size", None)
    if not (isinstance(image_size, int) and isinstance(patch_size, int)):
        return None
    return (image_size // patch_size) ** 2 + (select_strategy == "full")


def shuffle_factor(downsample_ratio: float) -> int:
    """Return the side of the squares of tokens that `pixel_shuffle` joins into one: 2 for 0.5."""
    factor = round(1 / downsample_ratio) if downsample_ratio > 0 else 0
    if factor < 1 or abs(factor * downsample_ratio - 1) > 1e-6:
        raise ValueError(f"downsample_ratio={downsample_ratio} is not 1 over a whole number: set it to 0.5 or 1.0.")
    return factor


def num_placeholders(config, num_patches: int) -> int:
    """Return the number of placeholders per picture: one per feature, or 1 if cross-attention reads them."""
    if config.projector_type in PREFIX_PROJECTORS:
        num_patches = config.num_visual_tokens
    if config.projector_type == "pixel_shuffle":
        side, factor = round(num_patches**0.5), shuffle_factor(config.downsample_ratio)
        if side**2 != num_patches or side % factor:
            problem = f"joins {factor} × {factor} of the {num_patches} tokens of a picture, which are no square grid"
            remedy = "set another image_size, downsample_ratio or vision_feature_select_strategy"
            raise ValueError(f"pixel_shuffle {problem} of such blocks: {remedy}.")
        num_patches = (side // factor) ** 2
    return 1 if config.image_fusion in READ_BY_CROSS_ATTENTION else num_patches


def check_thought_fields(config) -> None:
    """Raise ValueError for a vision-language model's configuration without valid THOUGHT_FIELDS.

    Missing LATER_FIELDS get their defaults.
    """
    for name, default in LATER_FIELDS.items():
        if not hasattr(config, name):
            setattr(config, name, default)
    missing = [field for field in THOUGHT_FIELDS if not hasattr(config, field)]
    missing += [field for field in TOKEN_ID_FIELDS if field not in missing and getattr(config, field, None) is None]
    if missing:
        lacks = f"The configuration of this {config.model_type} lacks {', '.join(missing)}"
        raise ValueError(f"{lacks}: give the model thoughts with mmcoconut.build.from_vlm.")
    _warn_of_newer(getattr(config, "mmcoconut_version", VERSION))
    check_thought_values(config)
    _check_token_ids(config, TOKEN_ID_FIELDS[1:])  # Llama 3.2's image token has its own row after the vocabulary


def check_thought_values(config) -> None:
    """Raise ValueError for unknown or incompatible values of THOUGHT_FIELDS; token ids are not checked."""
    _check_choices(config, CHOICES.keys() & THOUGHT_FIELDS.keys())
    check_schedule(config)


def _check_choices(config, fields=CHOICES):
    for field in fields:
        value, choices = getattr(config, field), CHOICES[field]
        if value not in choices:
            raise ValueError(f"{field}={value!r} is not one of {', '.join(choices)}: set {field} to one of them.")


def check_schedule(config):
    """Raise ValueError for iterations without jacobi, or for jacobi or a stop head without fed-back thoughts."""
    schedule, iterations, mode = config.thought_schedule, config.jacobi_iterations, config.thought_mode
    if config.stop_head and (schedule == "jacobi" or mode == "pause"):
        given = f"thought_schedule={schedule!r} with thought_mode={mode!r}"
        raise ValueError(f"stop_head=True, but {given}: set 'sequential' and 'feedback', or stop_head=False.")
    if schedule != "jacobi" and iterations is not None:
        raise ValueError(f"jacobi_iterations={iterations} is unused with thought_schedule={schedule!r}: set None.")
    if schedule == "jacobi" and (iterations is None or iterations < 1):
        raise ValueError(f"jacobi_iterations={iterations} with thought_schedule='jacobi': iterate at least 1 time.")
    if schedule == "jacobi" and mode == "pause":
        raise ValueError("thought_schedule='jacobi' has no effect with thought_mode='pause': set another one of both.")


def _check_token_ids(config, inside=TOKEN_ID_FIELDS):
    """Raise ValueError for equal ids, or ids of fields `inside` that are outside the decoder's vocabulary."""
    vocab_size, fields = config.get_text_config().vocab_size, {}
    ids = {field: getattr(config, field) for field in TOKEN_ID_FIELDS if getattr(config, field) is not None}
    for field, token_id in ids.items():
        if field in inside and not 0 <= token_id < vocab_size:
            raise ValueError(f"{field}={token_id} is outside text_config.vocab_size={vocab_size}: change either.")
        if token_id in fields:
            raise ValueError(f"{field} and {fields[token_id]} are both {token_id}: give each a different id.")
        fields[token_id] = field


def _check_projector(config):
    """Raise ValueError for layers that the tower lacks, or settings that the projector cannot use."""
    width, heads = config.text_config.hidden_size, config.projector_num_heads
    if config.projector_type in ("transformer", "attention_prefix") and (heads < 1 or width % heads):
        raise ValueError(f"projector_num_heads={heads} does not divide text_config.hidden_size={width}: set a factor.")
    shuffle_factor(config.downsample_ratio)
    layers, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    layers = [layers] if isinstance(layers, int) else layers
    if not layers:
        raise ValueError("vision_feature_layer is empty: name at least one layer, such as -1.")
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            lacks = f"vision_feature_layer={layer} does not exist in a vision tower of {depth} layers"
            raise ValueError(f"{lacks}: choose a number from {-depth - 1} to {depth}.")
    if config.projector_type not in PREFIX_PROJECTORS:
        return
    if config.num_visual_tokens < 1:
        raise ValueError(f"num_visual_tokens={config.num_visual_tokens} must be at least 1: set it to 8, for example.")
    if config.image_pooling == "cls" and config.vision_feature_select_strategy == "default":
        raise ValueError("image_pooling='cls', but vision_feature_select_strategy='default' drops it: set 'full'.")
    image_width = config.vision_config.hidden_size * len(layers)
    if not config.alignment_adapter and image_width != width:
        compared = f"image vectors of width {image_width} with text vectors of width {width}"
        raise ValueError(f"alignment_adapter=False compares {compared}: set alignment_adapter=True.")


MMCoconutConfig.register_for_auto_class()

__all__ = ["MMCoconutConfig"]
