"""Options of the processor and its chats: nothing is ignored, no text is lost, servers are told what a call makes."""

import pytest
import torch
from test_from_vlm import ONE, TALL, WIDE, thinking, vlm_processor
from tiny import tiny_image, tiny_model, tiny_processor, tiny_seq2seq

from mmcoconut.build import composed_processor_from_vlm, processor_from_backbones
from mmcoconut.processing_mmcoconut import MMCoconutProcessor


QUESTION = "What colour is the left square?"
IMAGE = tiny_image()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_model())


def call(processor, **options):
    return processor(text=QUESTION, images=IMAGE, **options)


def message(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def chat(processor, **options):
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, **options}
    return processor.apply_chat_template([message(IMAGE, QUESTION)], **options)


def chat_in_a_group(processor, **options):
    return chat(processor, processor_kwargs=options)


@pytest.mark.parametrize("way", [call, chat, chat_in_a_group])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"padding": False, "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 has no effect with padding=False"),
        ({"text_kwargs": {"padding": "do_not_pad"}, "common_kwargs": {"pad_to_multiple_of": 8}}, "has no effect with"),
        ({"padding_side": "top"}, "padding_side='top' is not one of left, right"),
    ],
)
def test_options_without_effect_are_refused(processor, way, options, message):
    with pytest.raises(ValueError, match=message):
        way(processor, **options)


@pytest.mark.parametrize("way", [call, chat, chat_in_a_group])
def test_a_multiple_pads_a_single_row_too(processor, way):
    assert len(way(processor, pad_to_multiple_of=32)["input_ids"][0]) == 32


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokenise": True}, "tokenise is no option of apply_chat_template: did you mean tokenize"),
        ({"padding": True, "processor_kwargs": {"padding": False}}, "padding is given twice, by itself and in proc"),
        (
            {"num_latents": 1, "processor_kwargs": {"num_latents": 2}},
            "num_latents is given twice, by itself and",
        ),
        ({"processor_kwargs": {"pading": 2}}, "pading is no option of the processor: did you mean padding"),
    ],
)
def test_names_of_a_chat_that_are_unknown_or_given_twice_are_refused(processor, options, message, tokenize):
    with pytest.raises(ValueError, match=message):
        chat(processor, **{"tokenize": tokenize, **options})


def test_unknown_arguments_of_a_new_processor_are_refused_with_the_nearest(processor):
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    for name, close in (("num_latent", "num_latents"), ("min_tile", "min_tiles"), ("markes", "markers")):
        with pytest.raises(ValueError, match=f"{name} is no argument .*did you mean {close}"):
            composed_processor_from_vlm(vlm_processor(), config=thinking().config, **{name: 1})
    with pytest.raises(ValueError, match="visoin is no argument .*did you mean vision"):
        processor_from_backbones(visoin="a", config=tiny_model().config, **parts)


@pytest.mark.parametrize("texts", [[1], ["a", None]])
def test_texts_must_be_strings(processor, texts):
    with pytest.raises(ValueError, match="is no list of texts: .*each as a string"):
        processor(text=texts)


@pytest.mark.parametrize(
    "messages, error",
    [
        (
            [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
            "type='video': this model reads 'text'",
        ),
        ([{"role": "user", "content": [{"text": "a"}]}], "type=None: this model reads 'text'"),
        ([{"content": "a"}], "give each chat as a list of"),
    ],
)
def test_messages_that_would_be_read_as_nothing_are_refused(processor, messages, error):
    for tokenize in (True, False):
        with pytest.raises(ValueError, match=error):
            processor.apply_chat_template(messages, tokenize=tokenize)


@pytest.mark.parametrize("text", ["\ue000a\ue001", "\ue002\ue003\ue004", "\U000f0000 and \U000f0001<image>\U000f0002"])
def test_characters_of_private_use_in_messages_are_kept(processor, text):
    for ids in (
        processor.apply_chat_template([message(text)], tokenize=True)[0],
        processor(text=text, num_latents=0)["input_ids"][0][:-2],  # without the markers
    ):
        assert processor.tokenizer.decode(ids) == f"{text}\n"
        assert processor.image_token_id not in ids


@pytest.mark.parametrize(
    "part, expected",
    [
        ("[:11]", "<|end-late"),  # of a quoted token its first mark and ten characters
        (".split('<|end-latent|>')[-1]", " and <image> more"),  # as templates take what follows a reasoning
        (".split('<|end-latent|>')[0]", ""),
    ],
)
def test_a_template_that_cuts_a_quoted_token_off_makes_no_text_a_token_and_no_token_text(processor, part, expected):
    template = "{% for message in messages %}{{ message['content']" + part + " }}{% endfor %}<|latent|>end"
    messages = [{"role": "user", "content": "<|end-latent|> and <image> more"}]
    [ids] = processor.apply_chat_template(messages, chat_template=template, tokenize=True)
    assert processor.tokenizer.decode(ids) == f"{expected}<|latent|>end"
    special = [token for token in ids if token in processor.tokenizer.all_special_ids]
    assert special == [processor.latent_token_id]


SIZES = [(40, 40), (34, 100), (70, 34)]  # height and width of ONE, WIDE, TALL


@pytest.mark.parametrize(
    "settings, options",
    [
        ({}, {}),
        ({"use_thumbnail": False, "max_tiles": 2}, {}),
        ({}, {"max_patches": 2}),
        ({}, {"images_kwargs": {"crop_to_patches": False}}),
        ({"use_thumbnail": False}, {"images_kwargs": {"min_patches": 4, "max_patches": 4}}),
        ({}, {"common_kwargs": {"max_patches": 3}, "return_mm_token_type_ids": True}),
        ({}, {"size": {"height": 16, "width": 16}, "max_patches": 2}),
    ],
)
def test_servers_are_told_the_tokens_and_tiles_that_a_call_makes(settings, options):
    processor = composed_processor_from_vlm(vlm_processor(), config=thinking().config, **settings)
    told = processor._get_num_multimodal_tokens(image_sizes=SIZES, **options)
    batch = processor(text=["a"] * 3, images=[ONE, WIDE, TALL], **{"return_mm_token_type_ids": True, **options})
    assert told.num_image_tokens == [sum(types) for types in batch["mm_token_type_ids"]]
    assert told.num_image_patches == [int(number) for number in batch["num_tiles"]]


def test_servers_are_told_the_tokens_of_images_that_are_one_tile(processor):
    for each in (processor, tiny_processor(tiny_seq2seq())):
        told = each._get_num_multimodal_tokens(image_sizes=[(16, 16), (40, 20)])
        ids = each(text=QUESTION, images=[IMAGE, IMAGE])["input_ids"][0]
        assert sum(told.num_image_tokens) == ids.count(each.image_token_id)
        assert told.num_image_patches == [1, 1]
    with pytest.raises(ValueError, match="did you mean max_length"):
        processor._get_num_multimodal_tokens(image_sizes=[(1, 1)], max_lenght=3)


def test_a_saved_processor_is_the_one_that_was_saved(processor, tmp_path):
    tiled = composed_processor_from_vlm(vlm_processor(), config=thinking().config, max_tiles=2)
    for number, each in enumerate((processor, tiled, tiny_processor(tiny_seq2seq(), num_latents=2))):
        first, second = (tmp_path / f"{number} {time}" for time in ("first", "second"))
        each.save_pretrained(first)
        loaded = MMCoconutProcessor.from_pretrained(first, backend="pil")
        loaded.save_pretrained(second)
        for file in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
            assert (second / file).read_text() == (first / file).read_text(), file
        expected, found = call(each, return_tensors="pt"), call(loaded, return_tensors="pt")
        assert found.keys() == expected.keys() == set(each.model_input_names)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
