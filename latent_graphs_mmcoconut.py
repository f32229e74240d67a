"""Latent steps of a prefill through one compiled call of the decoder: over a static cache they all have one shape.

A thought in the prefill is a decoder pass of one column, (B, 1, D), as a decoding step is. The library compiles
decoding steps by itself (torch.compile, on CUDA with CUDA graphs) but never the prefill, whose length changes.
`latent_step_caller` sends the passes of one column through the same kind of call and leaves the others as they are.
That the tokens stay the same and nothing is compiled again from step to step is tested on the CPU. On CUDA, where
fewer launches of small kernels should be worth it, it has been neither run nor measured.

Shapes: B batch, t columns of one pass, D hidden, S length of the static cache.
"""

from functools import cache, partial

import torch
from transformers import CompileConfig
from transformers.cache_utils import Cache, StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from .caches_mmcoconut import text_cache
from .compat_mmcoconut import call_with_cache


logger = logging.get_logger(__name__)

LATENT_GRAPHS = ("auto", "on", "off")


def check_latent_graphs(latent_graphs: str) -> str:
    if latent_graphs not in LATENT_GRAPHS:
        raise ValueError(f"latent_graphs={latent_graphs!r} is none of {', '.join(LATENT_GRAPHS)}: take one of them.")
    return latent_graphs


def obstacle_to_graphs(decoder: PreTrainedModel, past_key_values: Cache, **kwargs) -> str | None:
    """Why the decoder's steps over this cache cannot be one compiled call, with the remedy; None where they can."""
    keys = text_cache(past_key_values)
    quantizer = getattr(decoder, "hf_quantizer", None)
    obstacles = {
        f"the cache is a {type(keys).__name__}, whose shape changes: pass cache_implementation='static'": (
            not isinstance(keys, StaticCache)
        ),
        "the cache is offloaded: pass cache_implementation='static'": keys.offloading,
        "gradients are recorded: call the model under torch.no_grad()": torch.is_grad_enabled(),
        "output_attentions or output_hidden_states is set, and a compiled step gives neither: leave them out": bool(
            kwargs.get("output_attentions") or kwargs.get("output_hidden_states")
        ),
        "flash attention reads masks that grow: call set_attn_implementation('sdpa')": (
            is_flash_attention_requested(decoder.config)
        ),
        "the language model is spread over devices: load it on one": len({p.device for p in decoder.parameters()}) > 1,
        "the weights' quantization cannot be compiled: load them without": (
            quantizer is not None and not quantizer.is_compileable
        ),
    }
    return next((obstacle for obstacle, stands in obstacles.items() if stands), None)


def run(decoder, **inputs) -> torch.Tensor:
    return call_with_cache(decoder, **inputs).last_hidden_state  # (B, 1, D)


@cache
def compiled_run(device_type: str):
    """`run` compiled as the library compiles decoding steps: on accelerators with CUDA graphs, on a CPU without."""
    config = CompileConfig(mode=None, fullgraph=True) if device_type == "cpu" else CompileConfig()
    return torch.compile(run, **config.to_dict())


def call_or_step(decoder, *, inputs_embeds, attention_mask=None, position_ids=None, past_key_values, **kwargs):
    """The decoder on (B, t, D); compiled where t is 1 and the static cache has been written to before.

    The mask becomes (B, 1, 1, S) beforehand, of the same shape in every step; a 2-D one of all columns so far grows.
    """
    inputs = {"inputs_embeds": inputs_embeds, "past_key_values": past_key_values, **kwargs}
    inputs |= {"position_ids": position_ids} if position_ids is not None else {}
    if inputs_embeds.shape[1] > 1 or not text_cache(past_key_values).layers[0].is_initialized:
        return call_with_cache(decoder, attention_mask=attention_mask, **inputs)
    masks = call_with_cache(
        create_masks_for_generate,
        past_key_values,
        config=decoder.config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
    )
    inputs |= {"position_ids": position_ids.contiguous()} if position_ids is not None else {}
    torch.compiler.cudagraph_mark_step_begin()
    state = compiled_run(decoder.device.type)(decoder, attention_mask=masks, **inputs)  # (B, 1, D)
    # A replayed graph writes its next state into the memory of this one.
    return BaseModelOutputWithPast(state.clone())


def latent_step_caller(decoder: PreTrainedModel, past_key_values: Cache, *, latent_graphs: str, **kwargs):
    """Return what to call in the decoder's place: the decoder by `call_with_cache`, or `call_or_step` with it.

    latent_graphs: `auto` compiles on CUDA where nothing stands against it; `on` also on other devices, and warns once
        where it cannot; `off` never does.
    kwargs: what the decoder will be called with beside.
    """
    wanted = latent_graphs == "on" or (latent_graphs == "auto" and decoder.device.type == "cuda")
    if not wanted or torch.compiler.is_compiling():
        return partial(call_with_cache, decoder)
    obstacle = obstacle_to_graphs(decoder, past_key_values, **kwargs)
    if obstacle is None:
        return partial(call_or_step, decoder)
    if latent_graphs == "on":
        logger.warning_once(f"latent_graphs='on' has no effect here, and latent steps run as they are: {obstacle}.")
    return partial(call_with_cache, decoder)
