"""The processor: one layout for every way in, and no way from user text to a special token."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NUM_FEATURES, tiny_model, tiny_processor, tiny_tokenizer

from mmcoconut.configuration_mmcoconut import SPECIAL_TOKENS
from mmcoconut.processing_mmcoconut import MMCoconutProcessor, parse_answer


QUESTION = "What colour is the left square?"
MARKER_TOKENS = {
    "both": ("<|start-latent|>", "<|end-latent|>"),
    "start": ("<|start-latent|>",),
    "none": (),
}


@pytest.fixture
def processor():
    return tiny_processor(tiny_model())


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
    assert processor.encode_target([attack], attack).count(token_id) == (token == "<|endoftext|>")
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
    targets = [processor.encode_target(["red", "blue"], "a cube"), processor.encode_target([], "red")]
    length = max(map(len, targets))
    padded = [ids + [processor.tokenizer.pad_token_id] * (length - len(ids)) for ids in targets]
    assert processor.decode_answers(torch.tensor(padded)) == ["a cube", "red"]


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
        MMCoconutProcessor.from_backbones(
            config=model.config, tokenizer=processor.tokenizer, image_processor=processor.image_processor
        )


@pytest.mark.parametrize(
    "call, message",
    [
        ({"images": ["a", "b"], "text": ["1", "2", "3"]}, "2 images for 3 texts: give one image a text"),
        ({"text": ["1", "2"], "num_latents": [1]}, "1 entries in num_latents for 2 texts"),
        ({"images": "a"}, "text is None"),
        ({"text": "1", "truncation": True}, "could cut images or thoughts"),
        ({"text": "1", "rendered": True, "num_latents": 1}, "no effect on rendered text"),
    ],
)
def test_images_texts_and_latents_must_match_in_number(processor, call, message):
    with pytest.raises(ValueError, match=message):
        processor(**call)


@pytest.mark.parametrize("values, message", [({"markers": "end"}, "both, start, none"), ({"num_latents": -1}, "-1")])
def test_impossible_layout_is_refused(processor, values, message):
    with pytest.raises(ValueError, match=message):
        MMCoconutProcessor(processor.image_processor, processor.tokenizer, image_seq_length=4, **values)


@pytest.mark.parametrize("num_latents", [-1, 2.5, "x", True, [1, -1]])
def test_what_is_no_number_of_latents_is_refused(processor, num_latents):
    with pytest.raises(ValueError, match="no number of latents"):
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


def test_a_copy_of_a_rendered_prompt_is_a_question_unless_it_is_said_to_be_rendered(processor, image):
    prompt = str(processor.apply_chat_template([user(image, QUESTION)], add_generation_prompt=True, num_latents=2))
    latents = [
        processor(text=str.__str__(prompt)[:], images=image, rendered=rendered, num_latents=None)["input_ids"][
            0
        ].count(processor.latent_token_id)
        for rendered in (True, False)
    ]
    assert latents == [2, 0]


def test_rendered_text_needs_an_image_for_each_image_token(processor, image):
    prompt = processor.apply_chat_template([user(image, QUESTION)], add_generation_prompt=True)
    with pytest.raises(ValueError, match="has 1 <image> and 2 images are given"):
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


def test_serving_engines_are_told_the_tokens_of_images(processor, image):
    told = processor._get_num_multimodal_tokens(image_sizes=[(16, 16), (40, 20)])
    batch = processor(text=QUESTION, images=[image, image], return_mm_token_type_ids=True, return_tensors="pt")
    assert told.num_image_tokens == [NUM_FEATURES] * 2 and told.num_image_patches == [1, 1]
    image_id = processor.image_token_id
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == image_id).long())
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
    chat = encode_chat(processor, [user(image, QUESTION)], processor_kwargs={**options, **common})
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


@pytest.mark.parametrize("make", [MMCoconutProcessor.from_backbones])
def test_an_unknown_argument_of_a_new_processor_is_refused(processor, make):
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    with pytest.raises(ValueError, match="num_latent is no argument.*did you mean num_latents"):
        make(config=tiny_model().config, num_latent=3, **parts)


@pytest.mark.parametrize("number", [np.int64(3), torch.tensor(3).item(), 3])
def test_any_whole_number_counts_latents(processor, number):
    ids = processor(text=QUESTION, num_latents=number)["input_ids"][0]
    assert ids.count(processor.latent_token_id) == 3
