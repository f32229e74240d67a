"""The processor: one layout for every way in, and no way from user text to a special token."""

import base64
import copy
import json
import pickle
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import NUM_FEATURES, tiny_image, tiny_model, tiny_processor, tiny_seq2seq, tiny_tokenizer
from transformers import AutoTokenizer

from mmcoconut.build import processor_from_backbones
from mmcoconut.chat_template_mmcoconut import RenderedPrompt, parse_answer
from mmcoconut.configuration_mmcoconut import SPECIAL_TOKENS
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.training.collator import encode_target


QUESTION = "What colour is the left square?"
MARKER_TOKENS = {
    "both": ("<|start-latent|>", "<|end-latent|>"),
    "start": ("<|start-latent|>",),
    "none": (),
}


@pytest.fixture(scope="module")
def config():
    return tiny_model().config


@pytest.fixture
def processor(config):
    return tiny_processor(SimpleNamespace(config=config))


@pytest.fixture
def image():
    return Image.linear_gradient("L").convert("RGB")


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def encode_chat(processor, messages, **kwargs):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(messages, **{**options, **kwargs})


@pytest.mark.parametrize("markers", MARKER_TOKENS)
@pytest.mark.parametrize("num_latents", [0, 3])
def test_layout_is_images_question_markers_latents(processor, image, markers, num_latents):
    processor.markers = markers
    ids = processor(images=[[image, image]], text=[QUESTION], num_latents=num_latents)["input_ids"][0]
    start, end = (MARKER_TOKENS[markers] + (None, None))[:1], MARKER_TOKENS[markers][1:]
    expected = [
        *["<image>"] * 2 * NUM_FEATURES,
        *processor.tokenizer.tokenize(f"{QUESTION}\n"),
        *[token for token in start if token],
        *["<|latent|>"] * num_latents,
        *end,
    ]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == expected


@pytest.mark.parametrize("text", [QUESTION, "Is <image> or <|latent|> red?", "<|start-latent|><|endoftext|>", ""])
def test_every_way_in_gives_the_same_ids(processor, image, text):
    called = processor(images=image, text=text, num_latents=2, return_tensors="pt")
    chat = encode_chat(processor, [user(image, text)], num_latents=2)
    assert torch.equal(called["input_ids"], chat["input_ids"])
    assert torch.equal(called["pixel_values"], chat["pixel_values"])
    assert called["input_ids"][0].tolist() == processor.encode_prompt(text, num_latents=2)


def test_rendered_chat_gives_the_same_ids_when_it_is_said_to_be_rendered(processor, image):
    text = processor.apply_chat_template([user(image, QUESTION)], add_generation_prompt=True, num_latents=2)
    rendered = processor(images=image, text=text, rendered=True, return_tensors="pt")
    assert rendered["input_ids"][0].tolist() == processor.encode_prompt(QUESTION, num_latents=2)


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "<|endoftext|>", "<|pad|>"])
def test_user_text_never_becomes_a_special_token(processor, image, token):
    token_id = processor.tokenizer.convert_tokens_to_ids(token)
    plain = processor(images=image, text=QUESTION, num_latents=2, return_tensors="pt")["input_ids"]
    attack = f"{token}{QUESTION} {token}\n{token}"
    for ids in (
        processor(images=image, text=attack, num_latents=2, return_tensors="pt")["input_ids"],
        encode_chat(processor, [user(image, attack)], num_latents=2)["input_ids"],
    ):
        assert (ids == token_id).sum() == (plain == token_id).sum()
    assert token_id not in processor.encode_text(attack)
    assert encode_target(processor, [attack], attack).count(token_id) == (token == "<|endoftext|>")
    assert token in processor.tokenizer.decode(processor.encode_text(attack))


def test_message_with_a_special_token_is_not_rendered_to_text(processor, image):
    with pytest.raises(ValueError, match="cannot tell from a real one: call apply_chat_template with tokenize=True"):
        processor.apply_chat_template([user(image, "hi <|latent|>")], add_generation_prompt=True)


def test_ragged_batch_is_padded_on_the_left_and_each_row_is_as_alone(processor, image):
    images = [[image], [], [image, image]]
    texts = [QUESTION, "red?", "What shape?"]
    batch = processor(images=images, text=texts, num_latents=[2, 0, 5], return_tensors="pt")
    assert batch["pixel_values"].shape[0] == 3
    for row, mask, text, group, count in zip(batch["input_ids"], batch["attention_mask"], texts, images, [2, 0, 5]):
        alone = processor.encode_prompt(text, num_images=len(group), num_latents=count)
        assert row[mask.bool()].tolist() == alone
        assert mask.tolist() == sorted(mask.tolist())


def test_default_number_of_latents_is_the_saved_one(processor, image, tmp_path):
    processor.num_latents, processor.markers = 4, "start"
    processor.save_pretrained(tmp_path)
    loaded = MMCoconutProcessor.from_pretrained(tmp_path)
    assert loaded(images=image, text=QUESTION)["input_ids"] == processor(images=image, text=QUESTION)["input_ids"]
    assert loaded(images=image, text=QUESTION)["input_ids"][0].count(loaded.latent_token_id) == 4


def test_thoughts_stand_before_every_assistant_turn_of_a_chat(processor, image):
    answer = {"role": "assistant", "content": [{"type": "text", "text": "### red"}]}
    first = encode_chat(processor, [user(image, QUESTION)], num_latents=2)["input_ids"][0].tolist()
    both = encode_chat(processor, [user(image, QUESTION), answer, user("What shape?")], num_latents=2)
    ids = both["input_ids"][0].tolist()
    turn = [*processor.encode_text("### red"), processor.tokenizer.eos_token_id]
    assert ids == first + turn + processor.encode_prompt("What shape?", num_images=0, num_latents=2)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("B2\n### red", "red"),
        ("### 1\n### 2 ", "1\n### 2"),
        ("2 ### 3\n### 48+24=72 #### 72", "48+24=72 #### 72"),
        ("### Sure:\n\n### Eggs\n- two", "Sure:\n\n### Eggs\n- two"),
        ("48+24=72\n#### 72", "72"),
        ("### #1", "#1"),
        ("### ### red", "red"),
        ("B2\n###\n###### red", "red"),
        ("a ### b ### c d\n", "c d"),
        ("red", ""),
        ("###", ""),
        ("a ### b c\n", "b c"),
    ],
)
def test_answer_follows_the_first_line_that_begins_with_the_marker_or_else_the_last_marker(text, answer):
    assert parse_answer(text) == answer


def test_answers_are_decoded_from_targets(processor):
    targets = [encode_target(processor, ["red", "blue"], "a cube"), encode_target(processor, [], "red")]
    length = max(map(len, targets))
    padded = [ids + [processor.tokenizer.pad_token_id] * (length - len(ids)) for ids in targets]
    assert processor.decode_answers(torch.tensor(padded)) == ["a cube", "red"]


@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_answers_of_generate_are_decoded_without_their_prompts(make, options, image):
    model = make()
    processor = tiny_processor(model, num_latents=1)
    inputs = processor(images=[image] * 2, text=["Which?", QUESTION], return_tensors="pt")
    options = {**options, "max_new_tokens": 4, "return_dict_in_generate": True, "do_sample": False}
    generated = model.generate(**inputs, **options)
    written = torch.tensor(encode_target(processor, [], "red")).expand(len(generated.sequences), -1)
    prompts = inputs[processor.prompt_names[0]].repeat_interleave(options.get("num_return_sequences", 1), dim=0)
    assert torch.equal(generated.sequences[:, : prompts.shape[1]], prompts)
    generated.sequences = torch.cat([prompts, written], dim=1)
    for given in (generated, generated.sequences):
        assert processor.decode_answers(given, inputs) == ["red"] * len(prompts)


def test_rows_that_do_not_begin_with_the_prompts_are_refused_with_both_numbers(processor):
    inputs = processor(text=["Which?", QUESTION], return_tensors="pt")
    columns = inputs["input_ids"].shape[1]
    whole = torch.cat([inputs["input_ids"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    assert processor.decode_answers(whole, inputs) == ["", ""]
    for wrong in (whole[:1], whole[:, columns:], whole.flip(0), torch.cat([whole, whole[:1]])):
        message = (
            f"{len(wrong)} generated rows do not begin with the 2 prompts of {columns} tokens.*pass generate's inputs"
        )
        with pytest.raises(ValueError, match=message):
            processor.decode_answers(wrong, inputs)


def test_reloaded_processor_pads_prompts_in_front(processor, tmp_path):
    """A saved tokenizer does not keep its side, and a prompt that is padded behind is answered wrongly."""
    processor.save_pretrained(tmp_path)
    reloaded = MMCoconutProcessor.from_pretrained(tmp_path)
    texts = ["What?", "What colour is the left square?"]
    expected, found = processor(text=texts, return_tensors="pt"), reloaded(text=texts, return_tensors="pt")
    assert expected["attention_mask"][0, 0] == 0
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])


def test_tokenizer_without_the_special_tokens_is_refused():
    with pytest.raises(ValueError, match="lacks the special tokens <image>, .*from_backbones"):
        MMCoconutProcessor(tiny_processor(tiny_model()).image_processor, tiny_tokenizer(), image_seq_length=4)


def test_tokenizer_of_another_model_is_refused():
    model, processor = tiny_model(), tiny_processor(tiny_model())
    model.config.latent_token_id += 7
    with pytest.raises(ValueError, match=r"at \d+, the model's latent_token_id is \d+: use the tokenizer"):
        processor_from_backbones(
            config=model.config, tokenizer=processor.tokenizer, image_processor=processor.image_processor
        )


@pytest.mark.parametrize(
    "call, message",
    [
        ({"images": ["a", "b"], "text": ["1", "2", "3"]}, "2 images for 3 texts: give one image per text"),
        ({"text": ["1", "2"], "num_latents": [1]}, "1 entries in num_latents for 2 texts"),
        ({}, "text is None: give a question for each image"),
        ({"images": "a"}, "text is None: give a question .* or use encode_images"),
        ({"text": []}, r"text=\[\] is no list of texts: give at least one question"),
        ({"text": "1", "truncation": True}, "could cut images or thoughts"),
        ({"text": "1", "rendered": True, "num_latents": 1}, "no effect on rendered text"),
    ],
)
def test_images_texts_and_latents_must_match_in_number(processor, call, message):
    with pytest.raises(ValueError, match=message):
        processor(**call)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"markers": "end"}, "both, start, none"),
        *(({"num_latents": number}, str(number)) for number in (-1, 2.5, True)),
    ],
)
def test_impossible_layout_is_refused(processor, values, message):
    with pytest.raises(ValueError, match=message):
        MMCoconutProcessor(processor.image_processor, processor.tokenizer, 4, chat_template="", **values)


@pytest.mark.parametrize("num_latents", [-1, 2.5, "x", True, [1, -1]])
def test_what_is_no_number_of_latents_is_refused(processor, num_latents):
    with pytest.raises(ValueError, match="must be a non-negative integer"):
        processor(text=["What is it?", "Why?"], num_latents=num_latents)


CHAT = [[QUESTION], [QUESTION, "### red", "What shape?"], ["Is it?", "### <|latent|>\\n<|endoftext|>", "Why?"]]


def chat_of(texts, image=None):
    """A chat in which user and assistant take turns, the user's first message with an image."""
    messages = []
    for number, text in enumerate(texts):
        parts = [image, text] if image is not None and number == 0 else [text]
        message = user(*parts)
        messages.append({**message, "role": "assistant"} if number % 2 else message)
    return messages


@pytest.mark.parametrize("texts", CHAT[:2])
@pytest.mark.parametrize("carry", [lambda text: text, copy.deepcopy, lambda text: pickle.loads(pickle.dumps(text))])
def test_what_a_template_rendered_gives_the_ids_of_the_tokenized_chat(processor, image, texts, carry):
    messages = chat_of(texts, image)
    text = carry(processor.apply_chat_template(messages, add_generation_prompt=True, num_latents=2))
    expected = encode_chat(processor, messages, num_latents=2)
    for given in (text, [text]):
        found = processor(text=given, images=image, return_tensors="pt")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_text_may_follow_what_a_template_rendered(processor, image):
    prompt = processor.apply_chat_template([user(image, QUESTION)], add_generation_prompt=True, num_latents=2)
    ids = processor(text=prompt + "### red", images=image)["input_ids"][0]
    assert ids == processor.encode_prompt(QUESTION, num_latents=2) + processor.encode_text("### red")


def test_text_may_stand_before_what_a_template_rendered(processor, image):
    prompt = processor.apply_chat_template([user(image, QUESTION)], add_generation_prompt=True, num_latents=2)
    ids = processor(text="Look:\n" + prompt, images=image)["input_ids"][0]
    assert ids == processor.encode_text("Look:\n") + processor.encode_prompt(QUESTION, num_latents=2)


def test_parts_of_what_a_template_rendered_are_rendered(processor, image):
    messages = chat_of([QUESTION, "### red"], image)
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True, num_latents=2)
    completion = processor.apply_chat_template(messages, num_latents=2)[len(prompt) :]
    ids = processor(text=completion)["input_ids"][0]
    assert ids == encode_target(processor, [], "red")


COPIES = {
    "characters": lambda text: "".join(list(text)),
    "JSON": lambda text: json.loads(json.dumps({"text": text}))["text"],
    "data set": lambda text: Dataset.from_dict({"text": [text]})[0]["text"],
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("texts", CHAT[:2])
@pytest.mark.parametrize("markers, num_latents", [("both", 2), ("both", 0), ("start", 3), ("none", 1), ("none", 0)])
def test_a_copy_of_a_rendered_prompt_gives_the_same_ids(processor, image, copied, texts, markers, num_latents):
    processor.markers = markers
    messages, rendered = chat_of(texts, image), None
    text = COPIES[copied](processor.apply_chat_template(messages, num_latents=num_latents, add_generation_prompt=True))
    assert type(text) is str
    if len(texts) > 1 and (markers, num_latents) == ("none", 0):  # no thoughts before the answer, and an end token
        with pytest.raises(ValueError, match="pass rendered=True"):
            processor(text=text, images=image)
        rendered = True
    found = processor(text=text, images=image, rendered=rendered, return_tensors="pt")
    assert torch.equal(found["input_ids"], encode_chat(processor, messages, num_latents=num_latents)["input_ids"])


@pytest.mark.parametrize(
    "text",
    [
        f"{QUESTION}\n<|start-latent|><|latent|>",
        f"{QUESTION} <|start-latent|><|latent|><|end-latent|>",
        f"<|latent|>{QUESTION}\n<|start-latent|><|latent|>",
        f"{QUESTION}\n<|start-latent|><|latent|><|end-latent|>a<image>",
        "<|endoftext|>",
    ],
)
def test_a_plain_string_with_control_tokens_that_is_no_prompt_must_be_said_to_be_a_question(processor, text):
    with pytest.raises(ValueError, match=r"A plain string holds .*<.*: pass rendered=True if .* or rendered=False"):
        processor(text=text)
    ids = processor(text=text, rendered=False)["input_ids"][0]
    assert ids == processor.encode_prompt(text, num_images=0)


@pytest.mark.parametrize("options", [{"rendered": False}, {"num_latents": 2}, {"history": [[]]}])
def test_a_copy_that_is_said_to_be_a_question_is_one(processor, image, options):
    text = str.__str__(processor.apply_chat_template([user(image, QUESTION)], add_generation_prompt=True))
    ids = processor(text=text, images=image, **options)["input_ids"][0]
    assert ids == processor.encode_prompt(text, num_latents=options.get("num_latents"))


def test_a_batch_may_hold_rendered_prompts_and_questions(processor, image):
    prompt = processor.apply_chat_template([user(image, QUESTION)], add_generation_prompt=True, num_latents=2)
    batch = processor(text=["red?", prompt], images=[[], [image]], padding=False)
    assert batch["input_ids"][0] == processor.encode_prompt("red?", num_images=0)
    assert batch["input_ids"][1] == processor.encode_prompt(QUESTION, num_latents=2)


@pytest.mark.parametrize("options", [{"num_latents": 2}, {"history": [[]]}])
def test_latents_and_history_of_what_is_rendered_are_refused(processor, options):
    prompt = processor.apply_chat_template([user(QUESTION)], add_generation_prompt=True)
    with pytest.raises(ValueError, match="no effect on rendered text"):
        processor(text=prompt, **options)


def test_a_flat_list_of_images_is_shared_out_to_rendered_prompts(processor):
    images = [tiny_image(seed) for seed in range(3)]
    chats = [[user(images[0], "and", images[1])], [user("no picture")], [user(images[2], "red?")]]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    expected = encode_chat(processor, chats)
    found = processor(text=texts, images=images, return_tensors="pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="2 images for 3 texts: give .* or a list of images for each text"):
        processor(text=texts, images=images[:2])


@pytest.mark.parametrize("copied", [False, True])
def test_rendered_text_needs_an_image_for_each_image_token(processor, image, copied):
    prompt = processor.apply_chat_template([user(image, QUESTION)], add_generation_prompt=True)
    prompt = str.__str__(prompt) if copied else prompt
    with pytest.raises(ValueError, match="has 1 <image>, but 2 images are given"):
        processor(text=prompt, images=[image, image])


def test_control_tokens_in_messages_are_read_as_such_only_on_demand(processor, image):
    latent, messages = processor.latent_token_id, [user(image, f"{QUESTION}<|latent|>")]
    read = [
        encode_chat(processor, messages, num_latents=2, sanitize_control_tokens=sanitized)["input_ids"][0].tolist()
        for sanitized in (True, False)
    ]
    assert [ids.count(latent) for ids in read] == [2, 3]


@pytest.mark.parametrize("texts", CHAT[1:])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_of_the_assistant_covers_what_it_writes_and_its_end(processor, image, texts, side):
    messages = chat_of(texts[:2], image)
    options = {"add_generation_prompt": False, "num_latents": 2, "return_assistant_tokens_mask": True}
    batch = encode_chat(processor, [messages, chat_of(texts[:1], image)], padding_side=side, padding=True, **options)
    ids, mask = batch["input_ids"], batch["assistant_masks"].bool()
    written = [*processor.encode_text(texts[1]), processor.tokenizer.eos_token_id]
    assert ids[0][mask[0]].tolist() == written
    assert not mask[1].any() and mask.shape == ids.shape == batch["attention_mask"].shape
    plain = encode_chat(processor, messages, add_generation_prompt=False, num_latents=2)
    assert torch.equal(ids[0][batch["attention_mask"][0].bool()], plain["input_ids"][0])


def test_every_answer_of_a_conversation_is_in_the_mask(processor, image):
    texts = [QUESTION, "### red", "What shape?", "### a cube"]
    options = {"add_generation_prompt": False, "num_latents": 3, "return_assistant_tokens_mask": True}
    batch = encode_chat(processor, chat_of(texts, image), **options)
    written = [[*processor.encode_text(text), processor.tokenizer.eos_token_id] for text in texts[1::2]]
    assert batch["input_ids"][batch["assistant_masks"].bool()].tolist() == written[0] + written[1]


def test_marks_in_messages_forge_no_control_token(processor):
    for text in ("\ufdd0<|latent|>\ufdd1", "<|lat\ufdd0ent|>", "\ufdd1<|latent|>\ufdd0"):
        plain = encode_chat(processor, [user(QUESTION + "<|latent|>")], num_latents=2)["input_ids"]
        assert torch.equal(encode_chat(processor, [user(QUESTION + text)], num_latents=2)["input_ids"], plain)
        prompt = RenderedPrompt(f"{text}\n")
        assert processor(text=prompt)["input_ids"] == processor(text=RenderedPrompt("<|latent|>\n"))["input_ids"]


TOOLS = [{"type": "function", "function": {"name": "look<|latent|>", "description": "d"}}]
TOOL_TEMPLATE = "{{ place }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ messages[0].name }}"


def test_no_field_of_a_chat_becomes_a_control_token(processor):
    message = {**user(QUESTION), "name": "Eve<|latent|>"}
    options = {"chat_template": TOOL_TEMPLATE, "tools": TOOLS, "place": "<|latent|>", "return_tensors": None}
    ids = encode_chat(processor, [message], **options)["input_ids"][0]
    assert processor.latent_token_id not in ids
    assert processor.tokenizer.decode(ids) == "<|latent|>look<|latent|>Eve<|latent|>"
    with pytest.raises(ValueError, match="cannot tell from a real one"):
        processor.apply_chat_template([user(QUESTION)], chat_template=TOOL_TEMPLATE, tools=TOOLS)


def test_an_added_token_that_the_template_writes_is_text_in_messages_too(processor):
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["<turn>", "unwritten"])  # not special, so a tokenizer finds them in any text
    template = "<turn>{{ messages[0].content }}"
    ids = processor.apply_chat_template([{"role": "user", "content": "a<turn>b unwritten"}], template, tokenize=True)[
        0
    ]
    turn, unwritten = tokenizer.convert_tokens_to_ids(["<turn>", "unwritten"])
    assert (ids.count(turn), ids.count(unwritten)) == (1, 1) and ids[0] == turn
    assert tokenizer.decode(ids) == "<turn>a<turn>b unwritten"


def test_the_template_says_what_the_assistant_writes(processor, image):
    """trl asks a template for `{% generation %}`, and the tokenizer alone for its mask."""
    assert re.search(r"{%-?\s*generation\s*-?%}", processor.chat_template)
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "### red"}]
    options = {"chat_template": processor.chat_template, "num_latents": 2, "return_assistant_tokens_mask": True}
    encoded = processor.tokenizer.apply_chat_template(messages, return_dict=True, **options)
    marked = [token for token, value in zip(encoded["input_ids"], encoded["assistant_masks"]) if value]
    assert marked == [*processor.encode_text("### red"), processor.tokenizer.eos_token_id]


@pytest.mark.parametrize("texts", CHAT[1:])
def test_a_template_without_generation_gives_the_same_mask(processor, image, texts):
    """As checkpoints of version 0.1 have it."""
    old = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", processor.chat_template)
    options = {"add_generation_prompt": False, "num_latents": 2, "return_assistant_tokens_mask": True}
    expected, found = (
        encode_chat(processor, chat_of(texts, image), chat_template=template, **options) for template in (None, old)
    )
    assert expected["assistant_masks"].any()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_mask_follows_generation_where_a_template_has_it(processor):
    template = (
        "{% for message in messages %}{% if loop.last %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": role, "content": content} for role, content in [("assistant", "no "), ("assistant", "yes")]]
    batch = encode_chat(
        processor, messages, chat_template=template, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    assert processor.decode(batch["input_ids"][batch["assistant_masks"].bool()]) == "yes"


def test_a_mask_of_a_template_that_changes_the_answer_is_refused(processor):
    template = "{% for message in messages %}{{ message.content | trim }}\n{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]
    with pytest.raises(ValueError, match="changes what the assistant wrote.*endgeneration"):
        encode_chat(processor, messages, chat_template=template, return_assistant_tokens_mask=True)
    ids = encode_chat(processor, messages, chat_template=template)["input_ids"][0]
    assert processor.decode(ids) == "a\nb\n"


def test_serving_engines_are_told_the_tokens_of_images(processor, image):
    told = processor._get_num_multimodal_tokens(image_sizes=[(16, 16), (40, 20)])
    batch = processor(text=QUESTION, images=[image, image], return_mm_token_type_ids=True, return_tensors="pt")
    assert told.num_image_tokens == [NUM_FEATURES] * 2 and told.num_image_patches == [1, 1]
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == processor.image_token_id).long())
    assert batch["mm_token_type_ids"].sum() == sum(told.num_image_tokens)


@pytest.mark.parametrize("nested", [False, True])
def test_options_reach_text_and_images_flat_and_in_groups(processor, image, nested):
    text = {"padding": "max_length", "max_length": 40, "padding_side": "right"}
    of_images = {"do_normalize": False}
    options = {"text_kwargs": text, "images_kwargs": of_images} if nested else {**text, **of_images}
    common = {"common_kwargs": {"return_tensors": "pt"}} if nested else {"return_tensors": "pt"}
    batch = processor(text=QUESTION, images=image, **options, **common)
    assert batch["input_ids"].shape == (1, 40) and batch["attention_mask"][0, -1] == 0
    normal = processor(text=QUESTION, images=image, return_tensors="pt")
    assert not torch.equal(batch["pixel_values"], normal["pixel_values"])
    chat = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    chat = processor.apply_chat_template([user(image, QUESTION)], processor_kwargs={**options, **common}, **chat)
    assert all(torch.equal(chat[name], batch[name]) for name in batch)


def test_rows_are_padded_to_a_multiple(processor):
    assert processor(text=["a", "b c d"], pad_to_multiple_of=16, return_tensors="pt")["input_ids"].shape == (2, 16)


@pytest.mark.parametrize("images", [None, "one"])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_latent": 0}, "num_latent is no option of the processor: did you mean num_latents?"),
        ({"text_kwargs": {"pading": True}}, "did you mean padding?"),
        ({"images_kwargs": {"do_resise": False}}, "did you mean do_resize?"),
        ({"images_kwargs": {"padding": True}}, "padding is no option of the processor"),
        ({"common_kwargs": {"return_tensor": "pt"}}, "did you mean return_tensors?"),
        ({"do_rescale": True, "images_kwargs": {"do_rescale": True}}, "do_rescale is given twice"),
        ({"padding": True, "text_kwargs": {"padding": True}}, "padding is given twice"),
        ({"add_special_tokens": True}, "add_special_tokens is no option of the processor"),
        ({"videos": ["a.mp4"]}, "videos is no option of the processor"),
        ({"padding": "max_length"}, "padding='max_length' needs max_length"),
        ({"padding": "max_length", "max_length": 5}, r"of a prompt of \d+ tokens, and max_length is 5"),
        ({"max_length": 5}, "max_length=5 has no effect alone"),
        ({"max_length": 5, "truncation": True}, r"of a prompt of \d+ tokens, and max_length is 5"),
    ],
)
def test_unknown_options_and_those_without_effect_are_refused(processor, image, images, options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        processor(text=QUESTION, images=image if images else None, **options)


def test_a_prompt_that_fits_may_ask_for_truncation(processor):
    whole = processor(text=QUESTION)["input_ids"]
    assert processor(text=QUESTION, truncation=True, max_length=99)["input_ids"] == whole


@pytest.mark.parametrize("options", [{"padding": False}, {"truncation": False}, {"truncation": "do_not_truncate"}])
@pytest.mark.parametrize("neutral", [{}, {"videos": None, "audio": None}, {"add_special_tokens": False}])
def test_options_that_ask_for_nothing_change_nothing(processor, options, neutral):
    assert processor(text=QUESTION, **options, **neutral)["input_ids"] == processor(text=QUESTION)["input_ids"]


@pytest.mark.parametrize("nested, tokenize", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "name, value, hint",
    [("num_latent", 0, "num_latents"), ("do_resise", False, "do_resize"), ("pading", True, "padding")],
)
def test_unknown_options_of_a_chat_are_refused(processor, image, nested, name, value, hint, tokenize):
    options = {"processor_kwargs": {name: value}} if nested else {name: value}
    with pytest.raises(ValueError, match=f"{name} is no option .*did you mean {hint}"):
        processor.apply_chat_template([user(image, QUESTION)], tokenize=tokenize, return_dict=True, **options)


def test_options_of_a_chat_may_be_flat(processor, image):
    flat = encode_chat(processor, [user(image, QUESTION)], do_normalize=False, padding="max_length", max_length=40)
    options = {"do_normalize": False, "padding": "max_length", "max_length": 40, "num_latents": 2}
    nested = encode_chat(processor, [user(image, QUESTION)], processor_kwargs=options)
    assert flat["input_ids"].shape == nested["input_ids"].shape == (1, 40)
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert [(batch["input_ids"] == processor.latent_token_id).sum() for batch in (flat, nested)] == [0, 2]


def test_tools_that_the_template_does_not_write_are_refused(processor):
    with pytest.raises(ValueError, match="tools is no option of apply_chat_template"):
        processor.apply_chat_template([user(QUESTION)], tools=TOOLS)
    assert processor.apply_chat_template([user(QUESTION)], tools=None, load_audio_from_video=False) == f"{QUESTION}\n"


@pytest.mark.parametrize("options, length", [({}, 50), ({"padding": "longest"}, None), ({"max_length": 60}, 60)])
def test_a_call_goes_before_what_the_tokenizer_was_made_with(processor, image, tmp_path, options, length):
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding="max_length", max_length=50)
    made = MMCoconutProcessor(
        processor.image_processor, tokenizer, NUM_FEATURES, chat_template=processor.chat_template
    )
    found = made(text=QUESTION, images=image, return_tensors="pt", **options)["input_ids"]
    assert (
        found.shape[1] == length or processor(text=QUESTION, images=image, return_tensors="pt")["input_ids"].shape[1]
    )


def test_padding_stands_on_the_side_that_is_asked_for(processor):
    texts = ["a", QUESTION]
    sides = [processor(text=texts, padding_side=side)["attention_mask"][0] for side in ("left", "right")]
    assert sides[0][0] == sides[1][-1] == 0 and sides[0] == sides[1][::-1]
    processor.tokenizer.padding_side = "right"
    assert processor(text=texts)["attention_mask"][0] == sides[1]


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_a_call_gives_what_the_names_of_inputs_say(processor, image, kind):
    batch = processor(images=image, text=QUESTION, return_tensors=kind)
    assert list(batch) == processor.model_input_names
    types = {"pt": torch.Tensor, "np": np.ndarray, None: list}
    assert {type(value) for value in batch.values()} == {types[kind]}


def test_a_saved_processor_is_equal_and_gives_equal_batches(processor, image, tmp_path):
    processor.num_latents, processor.markers = 2, "start"
    processor.save_pretrained(tmp_path)
    loaded = MMCoconutProcessor.from_pretrained(tmp_path, backend="pil")
    saved = processor.to_dict()
    saved.pop("auto_map")  # saving writes it into the processor
    assert loaded.to_dict() == saved and loaded.chat_template == processor.chat_template
    options = {"return_tensors": "pt", "return_mm_token_type_ids": True}
    expected, found = (each(images=image, text=QUESTION, **options) for each in (processor, loaded))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("content", ["image", "url", "path", "base64", "image_url"])
@pytest.mark.parametrize("num_chats", [None, 1, 2])
def test_a_chat_takes_its_images_under_every_key(processor, image, content, num_chats, tmp_path):
    image.save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    path = str(tmp_path / "a.png")
    part = {
        "image": {"type": "image", "image": image},
        "url": {"type": "image", "url": f"data:image/png;base64,{data}"},
        "path": {"type": "image", "path": path},
        "base64": {"type": "image", "base64": data},
        "image_url": {"type": "image_url", "image_url": {"url": path}},
    }[content]
    messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
    conversation = messages if num_chats is None else [messages] * num_chats
    before = copy.deepcopy(messages)
    found = encode_chat(processor, conversation)
    expected = processor(images=[image] * (num_chats or 1), text=[QUESTION] * (num_chats or 1), return_tensors="pt")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert messages == before
    ids = processor.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)
    assert ids == expected["input_ids"].tolist()
    places = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    found = encode_chat(processor, places, processor_kwargs={"images": [image]})
    assert torch.equal(found["pixel_values"], expected["pixel_values"][:1])


@pytest.mark.parametrize("conversation", [[], [[]], ["a"], [["a"]], [7]])
def test_what_is_no_chat_is_refused(processor, conversation):
    with pytest.raises(ValueError, match="A chat has messages of type"):
        processor.apply_chat_template(conversation)


def test_an_answer_that_is_begun_is_gone_on_with(processor):
    messages = [user(QUESTION), {"role": "assistant", "content": "### a r"}]
    ids = processor.apply_chat_template(messages, tokenize=True, continue_final_message=True, num_latents=2)[0]
    assert ids == processor.encode_prompt(QUESTION, num_images=0, num_latents=2) + processor.encode_text("### a r")


def test_generated_ids_are_decoded_as_by_every_processor(processor):
    ids = [encode_target(processor, ["red"], "a cube"), processor.encode_prompt("red?", num_images=0, num_latents=2)]
    texts = ["red\n### a cube", "red?\n"]
    assert processor.post_process_image_text_to_text(ids) == texts
    assert processor.batch_decode(ids, skip_special_tokens=True) == texts
    assert processor.decode(ids[0], skip_special_tokens=True) == texts[0]


def test_an_unknown_argument_of_a_new_processor_is_refused(processor):
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    for make in (MMCoconutProcessor, partial(processor_from_backbones, config=tiny_model().config)):
        with pytest.raises(ValueError, match="num_latent is no argument.*did you mean num_latents"):
            make(num_latent=3, **parts)


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), torch.tensor(3), 3])
def test_any_whole_number_counts_latents(processor, number, tmp_path):
    parts = (processor.image_processor, processor.tokenizer)
    made = MMCoconutProcessor(*parts, num_latents=number, chat_template=processor.chat_template)
    made.save_pretrained(tmp_path)
    assert MMCoconutProcessor.from_pretrained(tmp_path, backend="pil").num_latents == 3
    for ids in (made(text=QUESTION)["input_ids"][0], processor(text=QUESTION, num_latents=number)["input_ids"][0]):
        assert ids.count(processor.latent_token_id) == 3
