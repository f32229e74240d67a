"""Check that a vision-language model with thoughts gives the same result in pieces as by the definition.

Decoders differ in how they pass masks, positions and other arguments with one entry per token to their layers. Running
a short prompt both ways checks that all of them are sliced correctly between two thoughts, see thinking_mmcoconut.

Shapes: B batch, T tokens, D hidden.
"""

import logging

import torch
from PIL import Image
from transformers.modeling_utils import PreTrainedModel

from mmcoconut.build.processors import processor_from_vlm
from mmcoconut.passes_mmcoconut import COLUMN_AXES, READ_ONCE, ROWS_OF_MASKS, Passes, column_lists
from mmcoconut.thinking_mmcoconut import Thoughts, think, think_uncached
from mmcoconut.vlm_mmcoconut import asking


logger = logging.getLogger("mmcoconut")

SIDE = 56  # of the blank image, in pixels; processors enlarge it where they must
NUM_LATENTS = 2
QUESTION, ANSWER = "What is shown?", "Nothing is."
KNOWN = {*COLUMN_AXES, *ROWS_OF_MASKS, *READ_ONCE, "attention_mask", "encoder_hidden_states", "use_cache"}
# Allowed ratio of the rounding error of all layers to that of one rounding of the input.
OF_ALL_LAYERS = 4.0
# If rounding alone changes a state by this share of itself, the check cannot decide.
TOO_MUCH = 0.5


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative difference of a state that rounding may cause: half of the dtype's digits.

    Another order of sums changes a state by some epsilons per layer; an error changes it by about its own size.
    """
    return max(torch.finfo(each).eps for each in (dtype, torch.float32)) ** 0.5  # float32 inside of norms, at best


def differences(states: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return (T,), the maximum over rows of the relative difference of each column's state in (B, T, D)."""
    states, expected = states.float(), expected.float()
    relative = (states - expected).norm(dim=-1) / expected.norm(dim=-1)  # (B, T)
    return relative.nan_to_num(nan=torch.inf).amax(dim=0)


class ThinkByDefinition:
    """`think_uncached` as a schedule; afterwards `unknown` names decoder arguments that are not sliced by column.

    is_moved: perturb the embeddings by one rounding, to measure its effect.
    """

    def __init__(self, is_moved: bool = False):
        self.is_moved, self.unknown = is_moved, []

    def __call__(self, passes: Passes, thoughts: Thoughts) -> None:
        inputs = dict(passes.inputs)
        embeds = inputs.pop("inputs_embeds")  # (B, T, D)
        if self.is_moved:
            signs = torch.randint(2, embeds.shape, generator=torch.Generator().manual_seed(0)).to(embeds) * 2 - 1
            embeds = embeds * (1 + torch.finfo(embeds.dtype).eps * signs)
        self.unknown = sorted(
            name
            for name, value in inputs.items()
            if name not in KNOWN and isinstance(value, torch.Tensor) and embeds.shape[1] in value.shape
        )
        outputs = []

        def decoder(inputs_embeds, use_cache):
            given = {**inputs, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
            outputs.append(passes.call_decoder(None, **given))
            return outputs[-1]

        _, read = think_uncached(decoder, embeds, thoughts)
        passes.outputs.append(outputs[-1])
        passes.embeds_run.append(read)


def inputs_of_check(model: PreTrainedModel, source, tokenizer) -> dict:
    """Return a prompt with two latents followed by text, with a blank image or text only.

    source: the vision-language model's processor, or its folder or Hub id; None: there is none.
    """
    if source is None:
        logger.warning("Thoughts after an image are not checked, because there is only a tokenizer: give processor=….")
        return {"input_ids": torch.tensor([_text_prompt(model, tokenizer)])}
    try:
        processor = processor_from_vlm(source, config=model.config, tokenizer=tokenizer)
    except OSError as error:
        logger.warning("Thoughts after an image are not checked, because there is no processor: %s", error)
        return {"input_ids": torch.tensor([_text_prompt(model, tokenizer)])}
    image = Image.new("RGB", (SIDE, SIDE))
    return processor(images=[[image]], text=[QUESTION], num_latents=NUM_LATENTS, return_tensors="pt")


def _text_prompt(model: PreTrainedModel, tokenizer) -> list[int]:
    config = model.config
    question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (QUESTION, ANSWER))
    latents = [config.start_latent_token_id, *[config.latent_token_id] * NUM_LATENTS, config.end_latent_token_id]
    return [*question, *latents, *answer]


@torch.no_grad()
def check_thoughts(model: PreTrainedModel, inputs) -> None:
    """Raise ValueError unless thinking in pieces equals the definition, within the error of the model's dtype.

    The decoder runs 4 times over the columns of inputs, the towers twice; 3 times more if states differ by more than
    half of the dtype's digits, to measure the effect of rounding in this model.

    Args:
        model: of `from_vlm`, or loaded; its mode and configuration do not change.
        inputs: of its processor, with latents; a short prompt suffices.

    Raises:
        ValueError: states differ, or pieces do not run; names the difference and a possible reason.
    """
    config, given = model.config, _as_read_by(model, inputs)
    definition, columns = ThinkByDefinition(), column_lists(given["input_ids"] == config.latent_token_id)[0]
    errors = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
    try:
        expected = _thought(model, given, definition)
    except errors as error:
        raise ValueError(
            f"This {type(model).__name__} cannot read the prompt that its thoughts are checked with, "
            f"{', '.join(given)}: {_told(error)}. Give the processor that it was trained with, or check=False."
        ) from error
    try:
        states = _thought(model, given, think)
    except errors as error:
        raise _rejected(model, f"it fails with {_told(error)}", definition.unknown) from error
    found, tolerance = differences(states, expected), tolerance_of(model.dtype)  # (T,)
    if found.max() <= tolerance:
        return
    moved = differences(_thought(model, given, ThinkByDefinition(is_moved=True)), expected).max().item()
    if moved > TOO_MUCH:
        logger.warning(
            "Whether this %s thinks rightly cannot be told in %s, as rounding alone changes its states by %.0f%%: "
            "check it in torch.float32.",
            *(config.model_type, _name(model.dtype), 100 * moved),
        )
        return
    tolerance = max(tolerance, OF_ALL_LAYERS * moved)
    if found.max() > tolerance:
        failed = (
            f"the state of column {found.argmax()} of {len(found)} differs by {found.max():.1e} of its size where "
            f"{tolerance:.1e} may be rounding in {_name(model.dtype)}, and latents are in columns "
            f"{', '.join(map(str, columns))}"
        )
        raise _rejected(model, failed, definition.unknown)


def _as_read_by(model: PreTrainedModel, inputs) -> dict[str, torch.Tensor]:
    """Return the tensors of inputs on a model's device; floating-point ones in its dtype."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in tensors.items()
    }


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _thought(model: PreTrainedModel, inputs: dict, schedule) -> torch.Tensor:
    """Return the last hidden states (B, T, D) of a call with a schedule, in evaluation mode."""
    config, training, mode = model.config, model.training, model.config.thought_mode
    model.eval()
    config.thought_mode = "feedback"
    try:
        with asking(schedule=schedule):
            return model.base_model(**inputs, use_cache=False).last_hidden_state
    finally:
        model.train(training)
        config.thought_mode = mode


def _rejected(model: PreTrainedModel, failed: str, unknown: list[str]) -> ValueError:
    found = (
        f" Its decoder takes {', '.join(unknown)}, with one entry per token, which is not sliced." if unknown else ""
    )
    return ValueError(
        f"This {type(model).__name__} does not think in pieces what it thinks by the definition: {failed}.{found} "
        "Take another vision-language model or another release of transformers; check=False (`check_vlm: false` in a "
        "recipe) takes it as it is. A model that was given as an object has its new tokens already: load it again."
    )
