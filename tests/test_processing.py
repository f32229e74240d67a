"""The processor: one layout for every way in, and no way from user text to a special token."""

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
