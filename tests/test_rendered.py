"""Rendered chats given as text: their ids are those of the tokenized chat, and what could be either is refused."""

import copy
import json
import pickle

import pytest
import torch
from test_from_vlm import thinking_pair
from tiny import tiny_image, tiny_model, tiny_processor, tiny_seq2seq

from mmcoconut.processing_mmcoconut import MMCoconutProcessor


QUESTION = "What colour is the left square?"


def part(value) -> dict:
    return {"type": "text", "text": value} if isinstance(value, str) else {"type": "image", "image": value}


def chat_of(*turns) -> list[dict]:
    """Messages of user and assistant by turns; a turn is a text, or a list of texts and images."""
    parts = [[part(value) for value in (turn if isinstance(turn, list) else [turn])] for turn in turns]
    return [{"role": ("user", "assistant")[number % 2], "content": each} for number, each in enumerate(parts)]


def encoded(processor, messages, **kwargs):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "num_latents": 2}
    return processor.apply_chat_template(messages, **{**options, **kwargs})


IMAGES = [tiny_image(seed) for seed in range(3)]
CHATS = {
    "question": chat_of([IMAGES[0], QUESTION]),
    "no image": chat_of(QUESTION),
    "no text": chat_of([IMAGES[0], IMAGES[1]]),
    "lines": chat_of([IMAGES[0], "Which?\n\nASSISTANT or user\n", IMAGES[1], "\nWhy?"]),
    "three turns": chat_of([IMAGES[0], QUESTION], "B2\n### red", ["And", IMAGES[1], "?"], "### no", "Why?"),
    "answered": chat_of([IMAGES[0], QUESTION], "### red"),
    "two answers": chat_of(QUESTION, "B2\n### red", [IMAGES[0], "?"], ""),
    "instructed": [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, *chat_of([IMAGES[0], "Hi"])],
}
COPIES = {
    "itself": lambda prompt: prompt,
    "deep copy": copy.deepcopy,
    "pickled": lambda prompt: pickle.loads(pickle.dumps(prompt)),
    "plain": lambda prompt: json.loads(json.dumps(prompt)),
}


def with_bos():
    tokenizer = (processor := tiny_processor(tiny_model())).tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    template = processor.chat_template.replace("{{- '' -}}", "{{- bos_token -}}")
    assert "bos_token" in template
    return MMCoconutProcessor(
        processor.image_processor, tokenizer, processor.image_seq_length, chat_template=template, markers="start"
    )


MAKERS = {
    "own": lambda: tiny_processor(tiny_model(), num_latents=3),
    "with bos": with_bos,
    "latents alone": lambda: tiny_processor(tiny_model(), markers="none"),
    "internvl": lambda: thinking_pair("internvl")[1],
    "llava": lambda: thinking_pair("llava", markers="start")[1],
}


@pytest.fixture(scope="module")
def processors():
    return {name: make() for name, make in MAKERS.items()}


def images_in(messages) -> list:
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def writes(messages) -> bool:
    """Whether the assistant is to write, behind a question."""
    return messages[-1]["role"] == "user"


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_rendered_chat_gives_the_ids_of_the_tokenized_chat(processors, kind, name, copied):
    processor, messages = processors[kind], CHATS[name]
    for begins in {False, writes(messages)}:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=begins, num_latents=2)
        expected = encoded(processor, messages, add_generation_prompt=begins)
        given, rendered = COPIES[copied](prompt), None
        if copied == "plain" and (not begins or (kind, name) == ("llava", "no text")):
            # Only a prompt to answer is recognized, and LLaVA's template begins it otherwise behind an image.
            rendered = True
        found = processor(text=given, images=images_in(messages) or None, rendered=rendered, return_tensors="pt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["answered", "two answers"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_copy_of_a_chat_without_a_prompt_to_answer_must_be_said_to_be_rendered(processors, kind, name):
    prompt = str(processors[kind].apply_chat_template(CHATS[name], num_latents=2))
    with pytest.raises(ValueError, match="pass rendered=True if apply_chat_template wrote it"):
        processors[kind](text=prompt, images=images_in(CHATS[name]))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("answer", ["### red", "B2\nC3\n### é", "### red<|endoftext|>"])
def test_an_answer_may_follow_a_rendered_chat(processors, kind, answer, copied):
    processor = processors[kind]
    answer = answer.replace("<|endoftext|>", processor.tokenizer.eos_token) if kind != "llava" else "### red"
    prompt = processor.apply_chat_template(CHATS["question"], add_generation_prompt=True, num_latents=2)
    rendered = True if copied == "plain" else None
    ids = processor(text=COPIES[copied](prompt + answer), images=IMAGES[0], rendered=rendered)["input_ids"][0]
    alone = encoded(processor, CHATS["question"], add_generation_prompt=True)["input_ids"][0].tolist()
    assert ids[: len(alone)] == alone
    assert processor.tokenizer.decode(ids[len(alone) :]) == answer


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "text",
    [
        "Is {image} or <|latent|> red?",
        "{image}\nWhat is it?",
        "{image} What is it?",
        "<|start-latent|>{eos}",
        "{eos}Which? {eos}\n{eos}",
        "Which?\n<|end-latent|><|latent|><|start-latent|>",
        "Which?\n<|latent|><|start-latent|> and\n",
        "a<|latent|>\n<|latent|>b\n",
        "{image}a\n<|latent|><|latent|>b{image}\n",
        "<|latent|>",
    ],
)
def test_a_question_with_control_tokens_stays_a_question(processors, kind, text):
    processor = processors[kind]
    text = text.format(image=processor.image_token, eos=processor.tokenizer.eos_token)
    expected = encoded(processor, chat_of([IMAGES[0], text]), add_generation_prompt=True)["input_ids"][0].tolist()
    assert processor(text=text, images=IMAGES[0], rendered=False, num_latents=2)["input_ids"][0] == expected
    assert processor(text=text, images=IMAGES[0], num_latents=2)["input_ids"][0] == expected


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", ["own", "internvl"])
def test_a_rendered_chat_is_a_question_if_it_is_said_to_be_one(processors, kind, copied):
    processor = processors[kind]
    prompt = COPIES[copied](processor.apply_chat_template(CHATS["question"], add_generation_prompt=True))
    ids = processor(text=prompt, images=IMAGES[0], rendered=False, num_latents=0)["input_ids"][0]
    assert ids.count(processor.latent_token_id) == 0
    assert prompt in processor.tokenizer.decode(ids)


BATCH = [chat_of([IMAGES[0], "a b", IMAGES[1]]), chat_of("Why?"), chat_of([IMAGES[2], QUESTION])]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("images", [IMAGES, [IMAGES[:2], [], IMAGES[2:]]])
def test_a_batch_takes_images_for_each_chat_or_in_one_list(processors, copied, images):
    processor = processors["own"]
    prompts = processor.apply_chat_template(BATCH, add_generation_prompt=True, num_latents=2)
    found = processor(text=list(map(COPIES[copied], prompts)), images=images, return_tensors="pt")
    expected = encoded(processor, BATCH, add_generation_prompt=True)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["own", "internvl"])
def test_image_tokens_alone_are_rendered(processors, kind):
    processor = processors[kind]
    batch = processor(text=processor.image_token * 2, images=IMAGES[:2])
    tiles = batch.get("num_tiles", [1, 1])
    assert batch["input_ids"][0] == [token for number in tiles for token in processor.image_ids(int(number))]


def test_an_encoder_decoder_reads_rendered_chats_too():
    processor = tiny_processor(tiny_seq2seq())
    prompt = processor.apply_chat_template(CHATS["question"], add_generation_prompt=True, num_latents=2)
    expected = processor(text=QUESTION, images=IMAGES[0], num_latents=2)
    for each in (prompt, str(prompt)):
        found = processor(text=each, images=IMAGES[0])
        assert all(found[key] == expected[key] for key in ("input_ids", "decoder_input_ids"))


@pytest.mark.parametrize("change", ["''", "part['text'] ~ part['text']"])
def test_a_template_may_leave_texts_out_or_write_them_twice(processors, change):
    processor = processors["own"]
    template = processor.chat_template.replace("else part['text']", f"else {change}")
    parts = (processor.image_processor, processor.tokenizer, processor.image_seq_length)
    other = MMCoconutProcessor(*parts, chat_template=template)
    prompt = other.apply_chat_template(CHATS["question"], add_generation_prompt=True, num_latents=1)
    first, *others = (
        other(text=text, images=IMAGES[0], rendered=flag)["input_ids"][0]
        for text, flag in ((prompt, None), (str(prompt), None), (prompt, True))
    )
    assert others == [first] * 2 and first.count(other.latent_token_id) == 1


@pytest.mark.parametrize("text", [[], [1], ["a", None]])
def test_text_must_be_strings(processors, text):
    with pytest.raises(ValueError, match="give at least one question"):
        processors["own"](text=text)
