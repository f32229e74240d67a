"""The check of a vision-language model that is given thoughts: pieces over a cache equal the definition.

Decoders pass arguments with one entry a token, masks and positions on to their layers, each in its own way. Whether
all of them are cut rightly between two thoughts is found by running a short prompt both ways, see thinking_mmcoconut.

Shapes: B batch, T tokens, D hidden.
"""

import logging

import torch
from PIL import Image
from transformers.modeling_utils import PreTrainedModel

from mmcoconut.build.processors import processor_from_vlm
from mmcoconut.passes_mmcoconut import column_lists
from mmcoconut.thinking_mmcoconut import COLUMN_AXES, READ_ONCE, ROWS_OF_MASKS, Passes, Thoughts, think, think_uncached
from mmcoconut.vlm_mmcoconut import asking


logger = logging.getLogger("mmcoconut")

SIDE = 56  # of the blank image, in pixels; processors enlarge it where they must
NUM_LATENTS = 2
QUESTION, ANSWER = "What is shown?", "Nothing is."
KNOWN = {*COLUMN_AXES, *ROWS_OF_MASKS, *READ_ONCE, "attention_mask", "encoder_hidden_states", "use_cache"}


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative difference of a state that rounding may make: half of the digits that the dtype has.

    Another order of sums changes a state by some epsilons a layer; a mistake changes it by about itself.
    """
    return torch.finfo(dtype).eps ** 0.5


class ThinkByDefinition:
    """`think_uncached` as a schedule; afterwards `unknown` names arguments of a decoder that are not cut by column."""

    def __init__(self):
        self.unknown: list[str] = []

    def __call__(self, passes: Passes, thoughts: Thoughts) -> None:
        inputs = dict(passes.inputs)
        embeds = inputs.pop("inputs_embeds")  # (B, T, D)
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
    """Return a prompt with two latents and a text behind them: of a blank image, or of text alone.

    source: the vision-language model's processor, or the folder or Hub id that has one; None: there is none.
    """
    if source is None:
        logger.warning("Thoughts behind an image are not checked, for there is a tokenizer alone: give processor=….")
        return {"input_ids": torch.tensor([_text_prompt(model, tokenizer)])}
    processor = processor_from_vlm(source, config=model.config, tokenizer=tokenizer)
    image = Image.new("RGB", (SIDE, SIDE))
    return processor(images=[[image]], text=[QUESTION], num_latents=NUM_LATENTS, return_tensors="pt")


def _text_prompt(model: PreTrainedModel, tokenizer) -> list[int]:
    config = model.config
    question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (QUESTION, ANSWER))
    latents = [config.start_latent_token_id, *[config.latent_token_id] * NUM_LATENTS, config.end_latent_token_id]
    return [*question, *latents, *answer]


@torch.no_grad()
def check_thoughts(model: PreTrainedModel, inputs) -> None:
    """Raise unless a model thinks in pieces what the definition says, within the error of its dtype.

    The decoder runs 6 times over the columns of inputs, the towers twice.

    Args:
        model: of `from_vlm`, or loaded; its mode and configuration stay as they are.
        inputs: of its processor, with latents; a short prompt suffices.

    Raises:
        ValueError: states that differ, or pieces that do not run; with what differed, and what may be the reason.
    """
    config, training, mode = model.config, model.training, model.config.thought_mode
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in tensors.items()
    }
    definition, columns = ThinkByDefinition(), column_lists(given["input_ids"] == config.latent_token_id)[0]
    model.eval()
    config.thought_mode = "feedback"
    try:
        expected = _states(model, given, definition)
        states = _states(model, given, think)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        failed = f"it fails with {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise _rejected(model, failed, definition.unknown) from error
    finally:
        model.train(training)
        config.thought_mode = mode
    differences = (states - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)  # (B, T)
    differences = differences.nan_to_num(nan=torch.inf).amax(dim=0)  # (T,)
    largest, tolerance = differences.max().item(), tolerance_of(model.dtype)
    if largest > tolerance:
        column = differences.argmax().item()
        failed = (
            f"the state of column {column} of {len(differences)} differs by {largest:.1e} of its size where "
            f"{tolerance:.1e} may be rounding in {str(model.dtype).removeprefix('torch.')}, and latents are in columns "
            f"{', '.join(map(str, columns))}"
        )
        raise _rejected(model, failed, definition.unknown)


def _states(model: PreTrainedModel, inputs: dict, schedule) -> torch.Tensor:
    """Return the last hidden states (B, T, D) of a call that thinks by a schedule."""
    with asking(schedule=schedule):
        return model.base_model(**inputs, use_cache=False).last_hidden_state


def _rejected(model: PreTrainedModel, failed: str, unknown: list[str]) -> ValueError:
    found = f" Its decoder takes {', '.join(unknown)}, with one entry a token, which is not cut." if unknown else ""
    return ValueError(
        f"A {model.config.model_type} ({type(model).__name__}) does not think in pieces what it thinks by the "
        f"definition: {failed}.{found} Take another vision-language model or another release of transformers; "
        "check=False (`check_vlm: false` in a recipe) takes it as it is."
    )
