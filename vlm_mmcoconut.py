"""Add thoughts to any vision-language model of transformers, in a subclass of its own class with the same name.

    Qwen2_5_VLForConditionalGeneration        ThinkingVLM in front: options and outputs of thoughts, `generate`, saving
        model: Qwen2_5_VLModel                ReadsLatents in front: tells the decoder where the latents are
            language_model                    ThinkingDecoder in front, see thinking_mmcoconut.py

There is no fork: images, positions, masks and weight names are the model's own, so its plain class also opens a
checkpoint. Additional fields in config.json describe the thoughts.

    thinking_class(Qwen2_5_VLForConditionalGeneration)      the class
    vlm_mmcoconut.Qwen2_5_VLForConditionalGeneration        the same, as `auto_map` names it in a checkpoint

Shapes: B batch, T tokens, N latents, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

import torch
import transformers
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .compat_mmcoconut import CACHE, PutInFront, in_front, rename_cache, takes_arguments_of, takes_no_thoughts
from .configuration_mmcoconut import VERSION, check_thought_fields
from .generation_mmcoconut import ThinkingGenerationMixin
from .passes_mmcoconut import READ_ONCE, is_two_dimensional, with_mask_of_left_out
from .schedules_mmcoconut import RETURNED, MakesThoughts, check_none_missed
from .thinking_mmcoconut import give_thoughts, thinking


AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModel")
THOUGHT_MODULES = ("thought_feed", "stop_head")
# Arguments of a call that concern its thoughts, in the order of ThinkingVLM.think_forward.
OF_THOUGHTS = ("stop_threshold", "thought_noise", "given_thoughts", *RETURNED)
# Configuration fields with the id of an image placeholder.
IMAGE_TOKENS = ("image_token_id", "image_token_index")
# Model types that cap the logits of their head if their configuration says so, and those that scale the logits by
# a power of its logits_scaling.
CAPPED = ("gemma3n", "gemma4", "gemma4_unified", "paligemma")
SCALED = {"granite4_vision": -1, "granite_docling": -1, "hyperclovax_vision_v2": 1}


@dataclass
class Asked:
    """The thought options of a call, and, after the call, the thought fields of its output.

    options: those in OF_THOUGHTS, as in ThinkingVLM.forward; or schedule, which replaces the configured one.
    """

    options: dict
    fields: dict = field(default_factory=dict)


ASKED: ContextVar[Asked | None] = ContextVar("ASKED", default=None)


@contextmanager
def asking(**options) -> Iterator[Asked]:
    """Set the thought options of the call inside; the base model's signature has no arguments for them."""
    token = ASKED.set(asked := Asked(options))
    try:
        yield asked
    finally:
        ASKED.reset(token)


def run_with_latents(model: MakesThoughts, own_forward: Callable, inputs: dict):
    """Run the forward of a model with a thinking decoder, and tell the decoder where the latents are."""
    asked = ASKED.get() or Asked({})
    read = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    if read is None:  # the model raises its own error
        return own_forward(**inputs)
    latents = model.get_token_mask(model.config.latent_token_id, inputs.get("input_ids"), read)  # (B, T)
    if takes_no_thoughts(read.shape[1]):
        check_none_missed(latents, inputs.get(CACHE))
        return own_forward(**inputs)
    mask = inputs.get("attention_mask")
    if mask is None or is_two_dimensional(mask):
        inputs["attention_mask"] = mask = with_mask_of_left_out(mask, inputs.get(CACHE))
    options = {**asked.options}
    returned = {name: options.pop(name) for name in RETURNED if name in options}
    image_mask = model.image_columns(inputs.get("input_ids"), read)
    is_beside = READ_ONCE[0] in model.get_decoder().own_arguments  # read by layers that cannot hide anything
    if image_mask is None and model.config.answer_sees == "no_image" and not is_beside:
        raise ValueError(
            "answer_sees='no_image' needs the columns of the images: pass input_ids with a placeholder for "
            f"each image feature, which a {type(model).__name__} has if its configuration has an image_token_id; or "
            "set answer_sees to 'thoughts' or 'all'."
        )
    options["row_mask"] = mask if is_two_dimensional(mask) else None
    thoughts = model.thoughts_of_call(latents, image_mask, **options)
    with thinking(thoughts):
        outputs = own_forward(**inputs)
    if thoughts.inputs_embeds is None:
        raise ValueError(f"{type(model).__name__} did not run its decoder, so no thought was computed.")
    asked.fields = model.fields_of(thoughts, **returned)
    return outputs


class HasThinkingDecoder(MakesThoughts):
    """A model with a `thinking_decoder`, at any depth."""

    def get_decoder(self, *args, **kwargs):
        """Return the thinking decoder; before it exists, the model's own decoder."""
        own = self.__dict__.get("thinking_decoder")
        return super().get_decoder(*args, **kwargs) if own is None else own

    def image_columns(self, input_ids: torch.Tensor | None, read: torch.Tensor) -> torch.Tensor | None:
        """Return (B, T), True at image features among the text; None without placeholders or ids."""
        ids = {getattr(self.config, name, None) for name in IMAGE_TOKENS} - {None}
        if input_ids is None or not ids or not {*READ_ONCE}.isdisjoint(self.get_decoder().own_arguments):
            return None
        return torch.isin(input_ids, torch.tensor([*ids], device=input_ids.device))

    def thought_modules(self) -> list[nn.Module]:
        """Return the modules that `add_thought_modules` has added."""
        return [module for name, module in self.named_children() if name in THOUGHT_MODULES]


class ReadsLatents(PutInFront, HasThinkingDecoder):
    """Mixin for a vision-language model's base class: tells the decoder where the latents are."""

    own_arguments: tuple[str, ...]

    @can_return_tuple
    def forward(self, *args, **kwargs):
        """Run the model; each latent in input_ids (B, T) reads the previous column's state."""
        inputs = rename_cache({**dict(zip(self.own_arguments, args)), **kwargs})
        return run_with_latents(self, super().forward, inputs)


class ThinkingVLM(HasThinkingDecoder, ThinkingGenerationMixin):
    """Mixin for a vision-language model with a head: thought options and outputs, `generate`, saving."""

    accepts_loss_kwargs = True  # the loss is `run_own_forward`'s, over the tokens of all batches of an update

    def __init__(self, config, *args, **kwargs):
        check_thought_fields(config)
        super().__init__(config, *args, **kwargs)
        self.begin_to_think()

    def begin_to_think(self) -> None:
        """Add the mixins to the parts of a complete model, and the modules between states and thoughts."""
        decoder = give_thoughts(self.get_decoder().base_model)  # without the head, if the decoder has one
        reader = self.base_model
        for model in (self, reader):  # not as a sub-module: its weights would get two names
            model.__dict__["thinking_decoder"] = decoder
        if reader is not self:
            reader.own_arguments = tuple(inspect.signature(reader.forward).parameters)
            reader.__class__ = in_front(ReadsLatents, type(reader))
        reader.add_thought_modules(self.config.get_text_config().hidden_size)
        for module in reader.thought_modules():  # the model's own weights are initialized by now
            module.apply(self._init_weights)
        self.suppress_placeholders()

    def think_forward(
        self,
        stop_threshold=None,
        thought_noise=None,
        given_thoughts=None,
        output_thoughts: bool = False,
        output_view: bool = False,
        output_stop_logits: bool = False,
        **kwargs,
    ):
        """Run the model's own forward, with thoughts at the latents.

        Args:
            stop_threshold: a row stops thinking when the stop probability exceeds it; a number or (B, N).
            thought_noise (B, N, D): added to each row's thoughts, in units of a thought's root mean square.
            given_thoughts: vectors that latents read instead of states (teacher forcing), see `given` in Thoughts.
            output_thoughts, output_view, output_stop_logits: also return `thoughts` (B, N, D) with their
                `thought_mask` (B, N), a `view`, see ThoughtView, or `stop_logits` (B, N).
            shift_labels (B, T): labels that are already shifted, instead of labels.
            The rest as in the model's own forward. In training the head runs on labelled columns alone, and logits
            are None.

        Where latents were left out, the output's attention_mask (B, past + T) is 0 at them; pass it to later calls.
        """
        values = (stop_threshold, thought_noise, given_thoughts, output_thoughts, output_view, output_stop_logits)
        options = {name: value for name, value in zip(OF_THOUGHTS, values) if value is not None and value is not False}
        if (outer := ASKED.get()) is not None:
            options = {**outer.options, **options}
        return_dict = kwargs.pop("return_dict", None)
        with asking(**options) as asked:
            outputs = self.run_own_forward(self.own_class.forward.__get__(self), kwargs)
        for name, value in asked.fields.items():
            if value is not None:
                outputs[name] = value
        if output_view:
            outputs["view"].head = self.logits_of
            outputs["view"].hidden_states = outputs.get("hidden_states")
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return outputs.to_tuple() if as_tuple else outputs

    def logits_of(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (…, V) of last hidden states (…, D), scaled and capped as the own forward does."""
        logits, config = self.get_output_embeddings()(states), self.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None) if self.config.model_type in CAPPED else None
        if self.config.model_type in SCALED:
            logits = logits * config.logits_scaling ** SCALED[self.config.model_type]
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def run_own_forward(self, own_forward: Callable, inputs: dict):
        """Run the own forward; the loss covers labelled columns, and in training the head runs only on them."""
        labels, shift_labels = inputs.get("labels"), inputs.get("shift_labels")
        targets = self.targets_of(labels, shift_labels, inputs.get("input_ids"), inputs.get("attention_mask"))
        run = own_forward
        if self.base_model is self:

            def run(**given):
                return run_with_latents(self, own_forward, given)

        if targets is None:
            return run(**inputs, return_dict=True)
        given = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        kept, labelled = given.pop("logits_to_keep", None), targets != -100  # (B, T)
        keeps_all = kept is None or (isinstance(kept, int) and kept == 0)
        returned = torch.full_like(labelled[0], keeps_all and not self.training)  # (T,)
        if not keeps_all:
            returned[slice(-kept, None) if isinstance(kept, int) else kept] = True
        columns = (labelled.any(dim=0) | returned | (not self.keeps_logits)).nonzero()[:, 0]  # (c,)
        if self.keeps_logits:
            given["logits_to_keep"] = columns
        outputs, labelled = run(**given, return_dict=True), labelled[:, columns]  # (B, c)
        logits, wanted = outputs.logits[labelled], targets[:, columns][labelled]  # (n, V), (n,)
        sizes = {"vocab_size": logits.shape[-1], "num_items_in_batch": inputs.get("num_items_in_batch")}
        loss = self.loss_function(logits=logits, labels=None, shift_labels=wanted, **sizes)
        if outputs.get("aux_loss") is not None:  # of routers
            loss = loss + self.config.get_text_config().router_aux_loss_coef * outputs.aux_loss.to(loss.device)
        logits = outputs.logits[:, returned[columns]] if returned.any() else None
        return type(outputs)(**{**outputs, "loss": loss, "logits": logits})

    def generate(self, *args, prefix=None, **kwargs):
        """Generate as transformers does; see ThinkingGenerationMixin.generate."""
        return super().generate(*args, **kwargs) if prefix is None else self.prefill()

    def prefill(self, *args, **kwargs):
        """Raise NotImplementedError: a prefix's padding would fall among the model's image positions."""
        raise NotImplementedError(
            f"{type(self).__name__} has no prefixes: pass whole prompts, or past_key_values of transformers; "
            "InternVL and LLaVA support them in their composed form (`composed_from_vlm`)."
        )

    def save_pretrained(self, save_directory, **kwargs):
        """Save with current parameter names, the code of the thoughts, and the name of the class that loads it."""
        self.config.mmcoconut_version = VERSION
        self.config.auto_map = dict.fromkeys(AUTO_CLASSES, f"vlm_mmcoconut.{type(self).__name__}")
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})


@cache
def thinking_class(own_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of a vision-language model with thoughts, a subclass of its own class under the same name."""
    own_forward = own_class.forward
    body = {"__module__": __name__, "__qualname__": own_class.__name__, "__doc__": ThinkingVLM.__doc__}
    body["forward"] = takes_arguments_of(own_forward)(ThinkingVLM.think_forward)
    body["own_class"], body["keeps_logits"] = own_class, "logits_to_keep" in inspect.signature(own_forward).parameters
    # transformers looks for GenerationMixin among the bases themselves.
    made = type(own_class.__name__, (ThinkingVLM, own_class, GenerationMixin), body)
    made.register_for_auto_class(AUTO_CLASSES[0])
    return made


def give_thoughts_to_vlm(vlm: PreTrainedModel) -> ThinkingVLM:
    """Give a model thoughts in place, as its configuration says, and return it; weights are not moved."""
    check_thought_fields(vlm.config)
    vlm.__class__ = thinking_class(type(vlm))
    vlm.begin_to_think()
    for module in vlm.base_model.thought_modules():
        module.to(vlm.device, vlm.dtype)
    return vlm


def __getattr__(name: str):
    """Return the thinking class of a model of transformers by its name, as `auto_map` in a checkpoint asks for it."""
    own_class = None if name.startswith("_") else getattr(transformers, name, None)
    if isinstance(own_class, type) and issubclass(own_class, PreTrainedModel):
        return thinking_class(own_class)
    raise AttributeError(f"transformers {transformers.__version__} has no model class {name}: install a newer one.")
