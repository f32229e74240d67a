"""What `from_backbones` does to a vision tower and a language model before they become one model.

Shapes: D hidden of the language model, V vocabulary.
"""

import copy

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .configuration_mmcoconut import MMCoconutConfig, default_image_seq_length


def load_vision_tower(name_or_path: str) -> PreTrainedModel:
    """The vision part of a pretrained checkpoint: of CLIP and SigLIP only the image tower is built and loaded."""
    config = AutoConfig.from_pretrained(name_or_path)
    vision_config = getattr(config, "vision_config", config)
    return AutoModel.from_pretrained(name_or_path, config=vision_config, dtype=torch.get_default_dtype())


def grow_embeddings(causal_lm: PreTrainedModel, tokenizer, num_known: int, *, new_token_init: str | None) -> None:
    """Resize a language model to its tokenizer, of which it knows the first tokens; many have spare rows behind them.

    The rows of the other tokens start at the mean of the known ones or at a named token's.
    """
    old_size, new_size = causal_lm.get_input_embeddings().weight.shape[0], len(tokenizer)
    num_known = min(num_known, old_size)
    if new_token_init is not None and new_token_init not in tokenizer.get_vocab():
        raise ValueError(
            f"new_token_init={new_token_init!r} is not a token of this tokenizer: name one of its tokens, or leave it "
            "out to start at the mean."
        )
    if new_size > old_size:
        causal_lm.resize_token_embeddings(new_size, mean_resizing=False)
    for layer in {causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()}:
        weight = layer.weight.data  # (V, D)
        known = weight[:num_known] if new_token_init is None else weight[[tokenizer.get_vocab()[new_token_init]]]
        weight[num_known:new_size] = known.mean(dim=0)


def new_language_model(text_config: PreTrainedConfig, tokenizer) -> PreTrainedModel:
    """A language model with random weights whose vocabulary and special ids are the tokenizer's."""
    text_config = copy.deepcopy(text_config)
    text_config.vocab_size = len(tokenizer)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, token, getattr(tokenizer, token))
    return AutoModelForCausalLM.from_config(text_config)


@torch.no_grad()
def check_plain_head(causal_lm: PreTrainedModel) -> None:
    """Logits must be states times one matrix (V, D), as ours are; found by running a token.

    Raises:
        ValueError: a language model that shifts, scales or caps its logits.
    """
    head, training = causal_lm.get_output_embeddings(), causal_lm.training
    token = torch.zeros(1, 1, dtype=torch.long, device=causal_lm.device)
    causal_lm.eval()
    logits = causal_lm.base_model(token).last_hidden_state @ head.weight.T  # (1, 1, V)
    plain = head.bias is None and torch.allclose(causal_lm(token).logits, logits, rtol=1e-3, atol=1e-3)
    causal_lm.train(training)
    if not plain:
        raise ValueError(
            f"The head of {type(causal_lm).__name__} has a bias, or scales or caps its logits, which would be lost: "
            "take a language model whose logits are its states times one matrix (GPT-2, Qwen2, Llama, …)."
        )


@torch.no_grad()
def count_image_features(vision_tower: PreTrainedModel, config: MMCoconutConfig) -> int:
    """Features that an image of the tower's own size gives, found by running a blank one through it."""
    vision_config = vision_tower.config
    size = vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(1, vision_config.num_channels, height, width, dtype=vision_tower.dtype)
    num_tokens = vision_tower(pixels.to(vision_tower.device)).last_hidden_state.shape[1]
    leaves_out_first = config.vision_feature_select_strategy == "default"
    if leaves_out_first and num_tokens == default_image_seq_length(vision_config, "default"):
        raise ValueError(
            f"vision_feature_select_strategy='default' leaves out the class token, and {vision_config.model_type} has "
            f"none among its {num_tokens} tokens: set vision_feature_select_strategy='full'."
        )
    return num_tokens - leaves_out_first
