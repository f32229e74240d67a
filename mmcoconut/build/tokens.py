"""The placeholders and markers in a tokenizer that a new model is built with, and what ends its turns."""

import tempfile
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer

from mmcoconut.chat_template_mmcoconut import control_tokens_of
from mmcoconut.configuration_mmcoconut import IMAGE_TOKEN, PAD_TOKEN, THOUGHT_TOKENS
from mmcoconut.errors import UsageError


# By model type, spare tokens of a vision-language model's tokenizer that become THOUGHT_TOKENS, where no new ones fit.
SPARE_TOKENS = {
    # The image token has a row behind the vocabulary's, and transformers cannot read a longer vocabulary back.
    "mllama": tuple(f"<|reserved_special_token_{number}|>" for number in (10, 11, 12)),
}
SAMPLE_TURNS = (("Which colour?", "### 7291"), ("And then?", None))  # a question, its answer, a further question


def turn_end_of(tokenizer) -> str | None:
    """Return the token that a tokenizer's chat template writes directly behind an answer, or else its eos token.

    Raises:
        ValueError: a template that refuses an ordinary chat of three messages.
    """
    if tokenizer.chat_template is None:
        return tokenizer.eos_token
    (question, answer), (further, _) = SAMPLE_TURNS
    contents = (("user", question), ("assistant", answer), ("user", further))
    chat = [{"role": role, "content": content} for role, content in contents]
    try:
        following = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(answer)[2]
    except TemplateError as error:
        remedy = "set tokenizer.chat_template = None, or chat_template: plain in a recipe, to leave it out"
        raise UsageError(f"The tokenizer's chat template refuses an ordinary chat ({error}): {remedy}.") from error
    end = control_tokens_of(tokenizer, tokenizer.get_chat_template()).match(following)
    return end[0] if end and end[0] else tokenizer.eos_token


def image_token_of(tokenizer, image_token_id: int) -> str:
    """Return the string of a vision-language model's image token.

    Raises:
        ValueError: an id that the tokenizer does not have.
    """
    image_token = tokenizer.convert_ids_to_tokens(image_token_id)
    if image_token is None:
        has_none = f"of {len(tokenizer)} tokens has none at the model's image_token_id={image_token_id}"
        raise UsageError(f"The tokenizer {has_none}: use the tokenizer that the model was built with.")
    return image_token


def add_special_tokens(tokenizer, image_token: str = IMAGE_TOKEN, *, model_type: str | None = None) -> None:
    """Give a tokenizer the placeholders and markers it lacks, as special tokens, and a pad token if it has none.

    model_type: of the vision-language model that it belongs to, if there is one; some have SPARE_TOKENS, which are
        renamed and keep their ids.
    """
    spare = SPARE_TOKENS.get(model_type, ())
    known = tokenizer.get_vocab()
    if spare and THOUGHT_TOKENS[0] not in known:
        rename_tokens(tokenizer, dict(zip(spare, THOUGHT_TOKENS, strict=True)))
        known = tokenizer.get_vocab()
    missing = [token for token in (image_token, *THOUGHT_TOKENS) if token not in known]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})


def rename_tokens(tokenizer, names: dict[str, str]) -> None:
    """Rename special tokens of a tokenizer, {old: new}, in place; their ids stay.

    Raises:
        ValueError: a token that the tokenizer lacks.
    """
    lacking = [name for name in names if name not in tokenizer.get_vocab()]
    if lacking:
        raise UsageError(f"The tokenizer has no {lacking[0]} to be renamed: use the one that the model came with.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            text = path.read_text()
            for old, new in names.items():
                text = text.replace(f'"{old}"', f'"{new}"')
            path.write_text(text)
        renamed = AutoTokenizer.from_pretrained(folder)
    vars(tokenizer).update(vars(renamed))
