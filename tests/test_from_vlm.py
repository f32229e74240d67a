"""Models and processors composed of InternVL and LLaVA: the same logits and prompts, and thoughts besides."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import (
    SPREAD,
    TEXT_SIZES,
    checkpoint_activations,
    max_difference,
    padded,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    uncached,
)
from tiny import words as any_words
from tiny_composed import tiny_vlm_config, tiny_vlm_image_processor, tiny_vlm_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    BlipConfig,
    BlipForConditionalGeneration,
    InternVLProcessor,
    LlavaProcessor,
)

import train_hf
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.build import composed_from_vlm, composed_processor_from_vlm
from mmcoconut.configuration_mmcoconut import TOKEN_ID_FIELDS, shuffle_factor
from mmcoconut.errors import RecipeError
from mmcoconut.evaluation.answering import Answerer
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.training.collator import CurriculumCollator, encode_target
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.vision_mmcoconut import PixelShuffle


SIDE = 32  # of a tile: 16 patches of 8 × 8, which InternVL's pixel shuffle makes 4 features
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": 8}
TEXT = {**TEXT_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512}
THOUGHTS = ["<|start-latent|>", "<|latent|>", "<|latent|>", "<|end-latent|>"]
QUESTION = "What colour is the left square?"

# What the checkpoints of each kind differ in: (model type, fields, fields of the tower, tied head).
KINDS = {
    "internvl": ("internvl", {}, {}, False),
    "internvl tied": ("internvl", {}, {}, True),
    "internvl normed": ("internvl", {}, {"use_mean_pooling": False}, False),
    "internvl quarter": ("internvl", {"downsample_ratio": 0.25, "vision_feature_layer": -2}, {}, True),
    "llava": ("llava", {}, {}, False),
    "llava tied": ("llava", {"vision_feature_select_strategy": "full"}, {}, True),
    "llava layers": ("llava", {"vision_feature_layer": [0, -1], "multimodal_projector_bias": False}, {}, False),
}


class ImagesOnlyInternVLProcessor(InternVLProcessor):
    """InternVL's own processor without its processor for videos, which wants torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return None


def tiny_vlm(kind="internvl", seed=0):
    """A VLM of the library with its tokenizer; every weight is random, also those that usually start at 0 or 1."""
    model_type, fields, vision, tied = KINDS[kind]
    tokenizer = tiny_vlm_tokenizer(model_type)
    config = tiny_vlm_config(
        model_type,
        tokenizer,
        vision={**VISION, **vision},
        text={**TEXT, "tie_word_embeddings": tied},
        tie_word_embeddings=tied,
        **fields,
    )
    torch.manual_seed(seed)
    vlm = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter += SPREAD / 2 * torch.randn_like(parameter)
    return vlm, tokenizer


def vlm_processor(kind="internvl", **kwargs):
    """The VLM's own processor."""
    model_type, _, vision, _ = KINDS[kind]
    tokenizer = tiny_vlm_tokenizer(model_type)
    image_processor = tiny_vlm_image_processor(model_type, SIDE)
    if model_type == "internvl":
        parts = {"image_processor": image_processor, "tokenizer": tokenizer, "image_seq_length": 4, **kwargs}
        return ImagesOnlyInternVLProcessor(**parts, chat_template=tokenizer.chat_template)
    features = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(image_processor, tokenizer, **features, chat_template=tokenizer.chat_template)


def thinking(kind="internvl", **config):
    vlm, tokenizer = tiny_vlm(kind)
    return composed_from_vlm(vlm, tokenizer=tokenizer, **config)


def thinking_pair(kind="internvl", *, config=None, **kwargs):
    model = thinking(kind, **(config or {}))
    return model, composed_processor_from_vlm(vlm_processor(kind), config=model.config, **kwargs)


@pytest.fixture(scope="module")
def pair():
    """Model and processor of InternVL; no test may change them."""
    return thinking_pair()


def picture(width, height, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


ONE, WIDE, TALL = picture(40, 40), picture(100, 34, 1), picture(34, 70, 2)


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def chat(processor, messages, **kwargs):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(messages, **{**options, **kwargs})


def words(num_words: int, seed: int) -> list[int]:
    """Ids of ordinary tokens of the tiny tokenizer, which are fewer."""
    return [1 + number % 250 for number in any_words(num_words, seed)]


def vlm_batch(image_token_id, num_features, *, latent=()):
    """Left-padded rows: text; an image; an image of five tiles; images of two, one and three tiles; and their pixels.

    latent: ids of thoughts in front of the last words of every row.
    """
    image = [image_token_id] * num_features
    rows = [
        [*words(9, 1), *latent, *words(2, 2)],
        [*words(3, 3), *image, *words(4, 4), *latent, *words(3, 5)],
        [*words(1, 6), *image * 5, *words(2, 7), *latent, *words(2, 8)],
        [*image * 2, *words(2, 9), *image, *image * 3, *words(5, 10), *latent, *words(1, 11)],
    ]
    pixels = torch.randn(12, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    batch = padded(rows, padding="left", pad_token_id=0)
    return {**batch, "pixel_values": pixels}, torch.tensor([1, 5, 2, 1, 3])


def thoughtful_batch(model, num_latents=2):
    latent = model.config.latent_token_id
    batch, num_tiles = vlm_batch(
        model.config.image_token_id, model.config.image_seq_length, latent=[latent] * num_latents
    )
    return {**batch, "num_tiles": num_tiles}


def num_features_of(vlm):
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    return len(vlm.get_image_features(pixels, return_dict=True).pooler_output[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_logits_and_answers_equal_the_vlms(kind, tolerance):
    vlm, tokenizer = tiny_vlm(kind)
    num_known, tied = len(tokenizer), KINDS[kind][-1]
    batch, num_tiles = vlm_batch(vlm.config.image_token_id, num_features_of(vlm))
    options = {"max_new_tokens": 6, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    with torch.no_grad():
        expected = vlm(**batch).logits
        answers = vlm.generate(**batch, **options, suppress_tokens=[vlm.config.image_token_id])
    model = composed_from_vlm(vlm, tokenizer=tokenizer)
    with torch.no_grad():
        logits = model(**batch, num_tiles=num_tiles).logits[..., :num_known]
    mask = batch["attention_mask"].bool()
    assert expected[mask].std() > 0.3
    assert max_difference(logits[mask], expected[mask]) <= tolerance
    assert torch.equal(model.generate(**batch, num_tiles=num_tiles, **options), answers)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == tied == model.config.text_config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["internvl", "llava"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_batch_equals_its_rows_alone_also_under_beams(kind, tolerance):
    model = thinking(kind)
    batch = thoughtful_batch(model)
    images, rows = [0, 1, 1, 3], []
    num_tiles, pixels = list(batch["num_tiles"].split(images)), batch["pixel_values"]
    with torch.no_grad():
        logits = model(**batch).logits
    beams = model.generate(**batch, num_beams=3, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    for index, mask in enumerate(batch["attention_mask"].bool()):
        row = {"input_ids": batch["input_ids"][index][mask][None]}
        count = int(num_tiles[index].sum())
        if count:
            row |= {"pixel_values": pixels[:count], "num_tiles": num_tiles[index]}
        pixels = pixels[count:]
        with torch.no_grad():
            assert max_difference(model(**row).logits[0], logits[index][mask]) <= tolerance
        rows.append(model.generate(**row, num_beams=3, max_new_tokens=5)[0, int(mask.sum()) :])
    assert all(torch.equal(beam[: len(row)], row) for beam, row in zip(beams, rows))


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 7}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_ways_to_generate_agree_on_tiles_and_thoughts(kind, options):
    model = thinking(kind)
    batch = thoughtful_batch(model)
    expected = model.generate(**batch, max_new_tokens=5)
    assert torch.equal(model.generate(**batch, max_new_tokens=5, **options), expected)


@pytest.mark.parametrize("config", [{}, {"thought_norm": "embedding"}, {"thought_norm": "projection"}])
@pytest.mark.parametrize("kind", ["internvl tied", "llava"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_thoughts_equal_their_definition(kind, config, tolerance):
    """Logits, loss, gradients and answers, over ragged rows of tiles; the definition recomputes everything."""
    model = thinking(kind, **config)
    batch = thoughtful_batch(model, num_latents=3)
    labels = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) < 60, -100)
    labels[:, -1:] = batch["input_ids"][:, -1:]
    mask = batch["attention_mask"]
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    labels = labels.masked_fill(mask * before == 0, -100)  # no label is predicted from padding, which means nothing

    def run(model, **options):
        outputs = model(**batch, labels=labels, **options)
        model.zero_grad()
        outputs.loss.backward()
        gradients = [model.model.multi_modal_projector.linear_1.weight.grad, model.get_input_embeddings().weight.grad]
        return outputs.logits.detach(), [gradient.clone() for gradient in gradients]

    logits, gradients = run(model)
    answers = model.generate(**batch, max_new_tokens=3)
    with uncached(model):
        expected, expected_gradients = run(model, use_cache=False)
        expected_answers = model.generate(**batch, max_new_tokens=3, use_cache=False)
    mask = batch["attention_mask"].bool()
    assert max_difference(logits[mask], expected[mask]) <= tolerance
    for gradient, right in zip(gradients, expected_gradients):
        assert max_difference(gradient, right) <= tolerance * max(1, right.abs().max().item())
    assert torch.equal(answers, expected_answers)
    other = {**batch, "input_ids": batch["input_ids"].where(batch["input_ids"] != model.config.latent_token_id, 7)}
    assert max_difference(model(**other).logits[mask], logits[mask]) > 0.1


def test_pixel_shuffle_joins_squares_of_neighbours():
    grid = torch.arange(16.0).reshape(1, 16, 1)  # a 4 × 4 grid, numbered in reading order
    assert PixelShuffle(2)(grid)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("kind", ["internvl tied", "internvl normed", "llava layers"])
def test_a_folder_is_taken_over_and_nothing_is_lost_in_saving(kind, tmp_path):
    vlm, tokenizer = tiny_vlm(kind)
    for part in (vlm, tokenizer, vlm_processor(kind).image_processor):
        part.save_pretrained(tmp_path / "vlm")
    vlm.load_state_dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm").state_dict())
    model = composed_from_vlm(str(tmp_path / "vlm"))
    batch = thoughtful_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        same = composed_from_vlm(vlm, tokenizer=tokenizer)(**batch).logits
    assert max_difference(expected, same) <= 1e-5

    model.save_pretrained(tmp_path / "saved")
    loaded, info = MMCoconutForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() | {"lm_head.weight"} == model.state_dict().keys()
    with torch.no_grad():
        assert max_difference(loaded(**batch).logits, expected) <= 1e-5
    assert torch.equal(loaded.generate(**batch, max_new_tokens=4), model.generate(**batch, max_new_tokens=4))


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_a_head_of_its_own_is_kept_though_the_configuration_calls_it_tied(kind, tmp_path):
    """InternVL's configuration says tied unless told otherwise; two matrices in the file are the truth."""
    vlm, tokenizer = tiny_vlm(kind)
    vlm.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = True
    path.write_text(json.dumps(values))
    head = vlm.lm_head.weight.detach().clone()
    model = composed_from_vlm(str(tmp_path), tokenizer=tokenizer)
    assert torch.equal(model.lm_head.weight[: len(head)], head)
    model.save_pretrained(tmp_path / "saved")
    loaded = MMCoconutForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight


@pytest.mark.parametrize("token", [None, "s"])
@pytest.mark.parametrize("tolerance", [1e-6])
def test_only_the_latent_and_its_markers_are_new(token, tolerance):
    vlm, tokenizer = tiny_vlm()
    old, image = vlm.get_input_embeddings().weight.detach().clone(), vlm.config.image_token_id
    num_known = len(tokenizer)
    model = composed_from_vlm(vlm, tokenizer=tokenizer, new_token_init=token)
    assert len(tokenizer) == num_known + 3
    assert model.config.image_token_id == image == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    new = model.get_input_embeddings().weight[num_known:]
    expected = old.mean(dim=0) if token is None else old[tokenizer.convert_tokens_to_ids(token)]
    assert max_difference(new, expected.expand(3, -1)) <= tolerance
    assert model.generation_config.suppress_tokens == [getattr(model.config, field) for field in TOKEN_ID_FIELDS]


def test_generation_settings_of_the_vlm_are_kept_and_the_training_text_ends_an_answer():
    vlm, tokenizer = tiny_vlm()
    vlm.generation_config.update(temperature=0.3, do_sample=True, eos_token_id=[5])
    model = composed_from_vlm(vlm, tokenizer=tokenizer)
    settings = model.generation_config
    assert (settings.temperature, settings.do_sample) == (0.3, True)
    assert settings.eos_token_id == [5, tokenizer.eos_token_id]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_model_of_another_dtype_stays_in_it(dtype):
    vlm, tokenizer = tiny_vlm("internvl tied")
    model = composed_from_vlm(vlm.to(dtype), tokenizer=tokenizer, thought_norm="projection")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_layers_for_thoughts_start_as_the_configuration_says():
    layers = thinking(thought_norm="projection", initializer_range=SPREAD).model.thought_feed
    assert layers.linear_1.weight.std().item() == pytest.approx(SPREAD, rel=0.1)
    assert layers.linear_1.bias.abs().max() == 0
    assert torch.equal(layers.norm.weight, torch.ones_like(layers.norm.weight))


@pytest.mark.parametrize("kind", ["internvl", "llava"])
@pytest.mark.parametrize(
    "parts",
    [(QUESTION,), (ONE, QUESTION), (WIDE, TALL, QUESTION), ("Compare", ONE, "with", TALL, "\n please?")],
)
def test_prompt_is_the_vlms_own_and_thoughts(kind, parts):
    own = vlm_processor(kind)
    _, processor = thinking_pair(kind)
    expected, found = chat(own, [user(*parts)]), chat(processor, [user(*parts)], num_latents=2)
    thoughts = processor.tokenizer.convert_tokens_to_ids(THOUGHTS)
    assert found["input_ids"][0].tolist() == [*expected["input_ids"][0].tolist(), *thoughts]
    assert ("pixel_values" in expected) == ("pixel_values" in found)
    if "pixel_values" in expected:
        assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("kind, begins", [("internvl", "<|im_start|>assistant\n"), ("llava", "ASSISTANT:")])
def test_thoughts_stand_before_every_text_of_the_assistant(kind, begins):
    own, (_, processor) = vlm_processor(kind), thinking_pair(kind)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "### red"}]}
    messages = [user(ONE, QUESTION), answer, user("Why?")]
    first, second, third = own.tokenizer.decode(chat(own, messages)["input_ids"][0]).split(begins)
    thoughts, space = "".join(THOUGHTS), " " * second.startswith(" ")  # LLaVA writes one before a text
    expected = begins.join([first, space + thoughts + second.removeprefix(space), thoughts + third])
    ids = chat(processor, messages, num_latents=2)["input_ids"][0]
    assert processor.tokenizer.decode(ids) == expected


def test_thoughts_stand_before_an_assistant_message_that_is_one_string_and_before_no_image(pair):
    _, processor = pair
    texts = [
        {"role": "assistant", "content": content} for content in ("### red", [{"type": "text", "text": "### red"}])
    ]
    first, second = (chat(processor, [user(QUESTION), text, user("Why?")], num_latents=2) for text in texts)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert (first["input_ids"] == processor.latent_token_id).sum() == 4
    with pytest.raises(Exception, match="must begin with text"):
        chat(processor, [user("a"), {**user(ONE), "role": "assistant"}])


@pytest.mark.parametrize("text", [QUESTION, "Is <IMG_CONTEXT> or <img> or <|latent|> red?", "<|im_end|>", ""])
@pytest.mark.parametrize("images", [[], [WIDE], [TALL, ONE]])
def test_every_way_in_gives_the_same_inputs(pair, images, text):
    _, processor = pair
    called = processor(images=[images], text=[text], num_latents=2, return_tensors="pt")
    chatted = chat(processor, [user(*images, text)], num_latents=2)
    pixels, [num_tiles] = processor.encode_images([images], return_tensors="pt")
    assert called["input_ids"][0].tolist() == processor.encode_prompt(text, num_tiles=num_tiles, num_latents=2)
    for name in called.keys() | chatted.keys():
        assert torch.equal(called[name], chatted[name]), name
    assert (called["input_ids"] == processor.image_token_id).sum() == 4 * sum(num_tiles)
    assert pixels.keys() == ({"pixel_values", "num_tiles"} if images else set())


def test_rendered_chat_gives_the_same_inputs(pair):
    _, processor = pair
    text = processor.apply_chat_template([user(WIDE, QUESTION)], add_generation_prompt=True, num_latents=2)
    rendered = processor(images=WIDE, text=text, rendered=True, return_tensors="pt")
    called = processor(images=WIDE, text=QUESTION, num_latents=2, return_tensors="pt")
    assert all(torch.equal(rendered[name], called[name]) for name in called)


@pytest.mark.parametrize("kind", ["internvl", "llava"])
@pytest.mark.parametrize("num_latents", [0, 2])
@pytest.mark.parametrize("copied", [False, True])
def test_what_a_template_rendered_is_known_as_such(kind, num_latents, copied):
    _, processor = thinking_pair(kind)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "### red"}]}
    for messages in ([user(WIDE, QUESTION)], [user(WIDE, QUESTION), answer, user(TALL, "Why?")]):
        text = processor.apply_chat_template(messages, add_generation_prompt=True, num_latents=num_latents)
        text = str.__str__(text) if copied else text
        found = processor(images=[[WIDE, TALL][: text.count(processor.image_token)]], text=[text], return_tensors="pt")
        expected = chat(processor, messages, num_latents=num_latents)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind, written", [("internvl", "### red<|im_end|>"), ("llava", "### red ")])
def test_the_mask_covers_what_the_assistant_writes_behind_tiles_and_thoughts(kind, written):
    """LLaVA's template has `{% generation %}` around the message, in front of which the thoughts stand."""
    _, processor = thinking_pair(kind)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "### red"}]}
    messages = [user(WIDE, QUESTION), answer, user(TALL, "Why <|latent|>?"), answer]
    options = {"num_latents": 2, "add_generation_prompt": False}
    batch = chat(processor, [messages, messages[:2]], return_assistant_tokens_mask=True, **options)
    for count, ids, mask, real in zip((2, 1), batch["input_ids"], batch["assistant_masks"], batch["attention_mask"]):
        assert processor.decode(ids[mask.bool()]) == written * count
        alone = chat(processor, messages[: 2 * count], **options)["input_ids"][0]
        assert torch.equal(ids[real.bool()], alone)


@pytest.mark.parametrize("kind", ["internvl", "llava"])
@pytest.mark.parametrize("settings", [{}, {"use_thumbnail": False}])
def test_serving_engines_are_told_the_tokens_that_are_of_an_image(kind, settings):
    _, processor = thinking_pair(kind, **settings)
    images = [ONE, WIDE, TALL]
    told = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
    batch = processor(images=[images], text=["a"], return_mm_token_type_ids=True, return_tensors="pt")
    assert told.num_image_patches == batch.get("num_tiles", torch.ones(3, dtype=int)).tolist()
    types = batch["mm_token_type_ids"][0].tolist()
    for image, count in zip(images, told.num_image_tokens):
        alone = processor(images=[[image]], text=["a"], return_mm_token_type_ids=True)
        assert sum(alone["mm_token_type_ids"][0]) == count
    assert sum(types) == sum(told.num_image_tokens)
    assert set(batch) - {"mm_token_type_ids"} == set(processor.model_input_names)


def test_an_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="num_latent is no argument.*did you mean num_latents"):
        composed_processor_from_vlm(vlm_processor(), config=thinking().config, num_latent=3)


@pytest.mark.parametrize("writes_bos", [True, False])
def test_bos_stands_in_front_once_where_the_tokenizer_puts_it(writes_bos):
    processor, model = vlm_processor("llava"), thinking("llava")
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    processor.chat_template = "{{ bos_token }}" * writes_bos + processor.chat_template
    expected = chat(processor, [user(ONE, QUESTION)])["input_ids"][0].tolist()
    assert expected.count(tokenizer.bos_token_id) == 1
    processor = composed_processor_from_vlm(processor, config=model.config, markers="none")
    assert chat(processor, [user(ONE, QUESTION)])["input_ids"][0].tolist() == expected
    assert processor.encode_prompt(QUESTION) == expected


@pytest.mark.parametrize(
    "settings, num_tiles",
    [
        ({}, [1, 3 + 1, 2 + 1]),
        ({"max_tiles": 2}, [1, 3, 3]),
        ({"max_tiles": 1}, [1, 1, 1]),
        ({"min_tiles": 4, "max_tiles": 4}, [5, 5, 5]),
        ({"use_thumbnail": False}, [1, 3, 2]),
        ({"use_thumbnail": False, "max_tiles": 1}, [1, 1, 1]),
    ],
)
def test_tiles_are_as_many_as_the_settings_say_also_after_saving(pair, settings, num_tiles, tmp_path):
    model, _ = pair
    processor = composed_processor_from_vlm(vlm_processor(), config=model.config, **settings)
    processor.save_pretrained(tmp_path)
    for each in (processor, MMCoconutProcessor.from_pretrained(tmp_path, backend="pil", trust_remote_code=False)):
        batch = each(images=[[ONE, WIDE], [], [TALL]], text=["a", "b", "c"], num_latents=1, return_tensors="pt")
        assert batch["num_tiles"].tolist() == num_tiles
        assert batch["pixel_values"].shape == (sum(num_tiles), 3, SIDE, SIDE)
        counts = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
        assert counts == [4 * sum(num_tiles[:2]), 0, 4 * num_tiles[2]]
        assert model.generate(**batch, max_new_tokens=1).shape[0] == 3


def test_without_thumbnails_the_other_tiles_stay(pair):
    model, processor = pair
    bare = composed_processor_from_vlm(vlm_processor(), config=model.config, use_thumbnail=False)
    whole, _ = processor.encode_images([[WIDE, TALL]], return_tensors="pt")
    tiles, _ = bare.encode_images([[WIDE, TALL]], return_tensors="pt")
    assert torch.equal(tiles["pixel_values"], whole["pixel_values"][[0, 1, 2, 4, 5]])


def test_tiles_of_another_size_need_fewer_features():
    model, processor = thinking_pair(config={"image_size": 16})
    assert model.config.image_seq_length == 1
    batch = processor(images=[[ONE], [WIDE]], text=["a", "b"], return_tensors="pt")
    assert batch["pixel_values"].shape[-2:] == (16, 16)
    assert (
        (batch["input_ids"] == processor.image_token_id).sum()
        == batch["num_tiles"].sum()
        == len(batch["pixel_values"])
    )
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 2


def rows_with_images(tmp_path):
    """Three rows of `mmcoconut.data`: two images of different shapes, none, one."""
    pictures = [[ONE, WIDE], [], [TALL]]
    rows = []
    for index, images in enumerate(pictures):
        paths = [tmp_path / f"{index}-{number}.png" for number in range(len(images))]
        for path, image in zip(paths, images):
            image.save(path)
        items = [{"bytes": None, "path": str(path)} for path in paths]
        fields = {"question": QUESTION, "choices": [], "steps": ["red", "green"], "answers": ["red"]}
        rows.append({"images": items, **fields, "row_id": f"row {index}", "index": index})
    return rows


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_a_stage_is_trained_and_answered_with_images_of_different_sizes(kind, tmp_path):
    model, processor = thinking_pair(kind)
    collator = CurriculumCollator(Curriculum(c_thought=2, max_latent_stage=2), processor)
    collator.fixed_stage = 1
    rows = rows_with_images(tmp_path)
    batch, prompts = collator(rows), collator.prompts(rows)
    tiles = [1 + 4, 0, 3] if kind == "internvl" else [2, 0, 1]
    counts = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert counts == [model.config.image_seq_length * number for number in tiles]
    for row, ids, mask, labels in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"]):
        target = encode_target(processor, row["steps"][1:], row["answers"][0])
        messages = [user(*[Image.open(item["path"]) for item in row["images"]], QUESTION)]
        prompt = chat(processor, messages, num_latents=2)["input_ids"][0].tolist()
        assert ids[mask.bool()].tolist() == prompt + target
        assert labels[labels != -100].tolist() == target

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    gradients = {name: parameter.grad for name, parameter in model.model.multi_modal_projector.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    model.eval()
    for name in ("index", "supervised"):
        prompts.pop(name)
    assert model.generate(**prompts, max_new_tokens=2).shape[0] == 3


def test_checkpointed_training_has_the_same_gradients(tmp_path):
    model, processor = thinking_pair()
    collator = CurriculumCollator(Curriculum(c_thought=2, max_latent_stage=2), processor)
    collator.fixed_stage = 1
    batch = collator(rows_with_images(tmp_path))
    model.train()
    model(**batch).loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    model.zero_grad()
    checkpoint_activations(model)
    model(**batch).loss.backward()
    assert all(max_difference(p.grad, expected[name]) <= 1e-6 for name, p in model.named_parameters())


def test_choices_are_scored_with_the_tiles_of_the_row(pair, tmp_path):
    model, processor = pair
    row = {**rows_with_images(tmp_path)[0], "choices": ["red", "a cube"]}
    answerer = Answerer(model, processor, num_latents=2, max_new_tokens=3)
    scores = answerer.choice_log_probs(row)
    inputs = answerer.inputs([row])
    for choice, (score, count) in zip(row["choices"], scores):
        target = encode_target(processor, [], choice)
        ids = torch.cat([inputs["input_ids"], torch.tensor([target])], dim=1)
        pixels = {name: inputs[name] for name in ("pixel_values", "num_tiles")}
        with torch.no_grad():
            log_probs = model(ids, **pixels).logits[0, -len(target) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(log_probs[range(len(target)), target].sum().item(), abs=1e-4)
        assert count == len(target)


def test_tiles_that_do_not_match_are_refused_with_both_numbers(pair):
    model, processor = pair
    batch = processor(images=[[WIDE], [TALL]], text=["a", "a"], return_tensors="pt")  # 4 and 3 tiles
    with pytest.raises(ValueError, match=r"num_tiles counts 8 tiles \(\[4, 4\] an image\), but pixel_values holds 7"):
        model(**{**batch, "num_tiles": torch.tensor([4, 4])})
    with pytest.raises(ValueError, match="28 <image> placeholders.*but 24 image features"):
        model(**{**batch, "num_tiles": torch.tensor([3, 3]), "pixel_values": batch["pixel_values"][:6]})
    swapped = {**batch, "num_tiles": torch.tensor([3, 4])}
    for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"Row 0 .* 4 tiles .* rows have \[4, 3\] tiles and the images \[3, 4\]"):
            call(**swapped)
    prompt = torch.tensor([processor.encode_prompt("a")])
    with pytest.raises(ValueError, match="4 <image> placeholders.*but 16 image features"):
        model(prompt, pixel_values=batch["pixel_values"][:4], num_tiles=torch.tensor([4]))


def test_settings_that_cannot_be_met_are_refused():
    model = thinking()
    with pytest.raises(ValueError, match="At least 5 and at most 3 tiles"):
        composed_processor_from_vlm(vlm_processor(), config=model.config, min_tiles=5, max_tiles=3)
    llava = thinking("llava")
    with pytest.raises(ValueError, match="cuts no tiles, so .* max_tiles=3"):
        composed_processor_from_vlm(vlm_processor("llava"), config=llava.config, max_tiles=3)
    untold = vlm_processor()
    untold.chat_template = None
    with pytest.raises(ValueError, match="chat template is NoneType"):
        composed_processor_from_vlm(untold, config=model.config)
    with pytest.raises(ValueError, match="writes <IMG_CONTEXT> 0 times per image"):
        composed_processor_from_vlm(untold, config=model.config, chat_template="{{ messages[0]['role'] }}")
    with pytest.raises(ValueError, match=r"has none at the model's image_token_id=\d+: use the tokenizer"):
        composed_processor_from_vlm(vlm_processor(), config=tiny_model().config)
    model.config.latent_token_id -= 1
    with pytest.raises(ValueError, match="use the tokenizer that the model was built with"):
        composed_processor_from_vlm(vlm_processor(), config=model.config)


def test_what_is_no_internvl_and_no_llava_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    blip = BlipForConditionalGeneration(BlipConfig(text_config=sizes, vision_config={**sizes, "image_size": 32}))
    with pytest.raises(ValueError, match="cannot take apart a blip, only internvl, llava"):
        composed_from_vlm(blip, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="has no tokenizer"):
        composed_from_vlm(tiny_vlm()[0])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 2.0, -0.5])
def test_ratio_that_joins_no_squares_is_refused(ratio):
    with pytest.raises(ValueError, match=f"downsample_ratio={ratio} is not 1 over a whole number"):
        shuffle_factor(ratio)


def test_pixel_shuffle_joins_backbones_too():
    """Of a CLIP tower with four patches; with its class token they are no square."""
    model = tiny_model(projector_type="pixel_shuffle")
    assert model.config.image_seq_length == len(model.get_image_features(torch.zeros(1, 3, 16, 16)).pooler_output[0])
    with pytest.raises(ValueError, match="2 × 2 of the 5 tokens of a picture, which are no square"):
        tiny_model(projector_type="pixel_shuffle", vision_feature_select_strategy="full")


def test_checkpoints_without_the_new_fields_load_as_before(tmp_path):
    model = tiny_model("qwen2", projector_type="mlp")
    processor = tiny_processor(model, num_latents=2)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    new = {"config.json": ("projector_bias", "downsample_ratio", "image_size")}
    new["processor_config.json"] = ("image_token", "start_image_token", "end_image_token", "use_thumbnail")
    for file, fields in new.items():
        values = json.loads((tmp_path / file).read_text())
        for field in fields:
            values.pop(field, None)
        (tmp_path / file).write_text(json.dumps(values))
    loaded, info = MMCoconutForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, trust_remote_code=False
    )
    assert not any(info.values()), info
    inputs = processor(images=ONE, text=QUESTION, return_tensors="pt")
    reloaded = MMCoconutProcessor.from_pretrained(tmp_path, backend="pil", trust_remote_code=False)
    again = reloaded(images=ONE, text=QUESTION, return_tensors="pt")
    assert again.keys() == inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert max_difference(loaded(**again).logits, model(**inputs).logits) <= 1e-5


REMOTE = """
import sys
sys.modules["mmcoconut"] = None  # importing the repository's package is an error from here on

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

torch.set_num_threads(1)
folder, question = sys.argv[1:]
images = [Image.open(name) for name in ("0.png", "1.png")]
processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=True)
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
inputs = processor(images=[images], text=[question], return_tensors="pt")
with torch.no_grad():
    results = {"info": dict(info), "inputs": dict(inputs), "logits": model.eval()(**inputs).logits}
results["generated"] = model.generate(**inputs, max_new_tokens=4)
content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
pipe = pipeline("image-text-to-text", model=model, processor=processor)
options = {"max_new_tokens": 4, "return_full_text": False}
results["chat"] = pipe(text=[{"role": "user", "content": content}], **options)[0]["generated_text"]
torch.save(results, "results.pt")
"""


@pytest.mark.slow
def test_remote_code_loads_everything_and_answers_the_same(pair, tmp_path):
    model, processor = pair
    processor.num_latents = 2
    for part in (model, processor):
        part.save_pretrained(tmp_path / "checkpoint")
    WIDE.save(tmp_path / "0.png")
    TALL.save(tmp_path / "1.png")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "checkpoint"), QUESTION]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    assert not any(results["info"].values())
    inputs = processor(images=[[WIDE, TALL]], text=[QUESTION], return_tensors="pt")
    assert inputs.keys() == results["inputs"].keys()
    assert all(torch.equal(inputs[name], results["inputs"][name]) for name in inputs)
    with torch.no_grad():
        assert max_difference(model(**inputs).logits, results["logits"]) <= 1e-5
    generated = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(generated, results["generated"])
    new = generated[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(new, skip_special_tokens=True) == results["chat"]
    processor.num_latents = 0


def recipe_of(tmp_path, **values):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"vlm": "a/b", "dataset": "arrow_mazes", **values}))  # JSON is YAML
    return str(path)


@pytest.mark.parametrize(
    "values, key",
    [
        ({"vision_model": "c"}, "vision_model"),
        ({"tokenizer": "c"}, "tokenizer"),
        ({"projector_type": "mlp"}, "projector_type"),
        ({"model": "c"}, "vlm"),
        ({"vlm": None, "vision_model": "c", "text_model": "d", "max_tiles": 3}, "max_tiles"),
    ],
)
def test_recipe_that_says_what_the_vlm_decides_is_refused(tmp_path, values, key):
    with pytest.raises(RecipeError) as error:
        parse_recipe([recipe_of(tmp_path, **values)])
    assert [problem[0] for problem in error.value.problems] == [key]


def test_recipe_with_a_llava_trains_in_a_smoke_test(tmp_path):
    values = {"vlm_model_type": "llava", "composed": True, "max_latent_stage": 1, "thought_norm": "embedding"}
    recipe = recipe_of(tmp_path, **values)
    options = ["--smoke_test", "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true", "--use_cpu", "true"]
    results = train_hf.main([recipe, *options])
    assert [row["num_latents"] for row in results["stages"]] == [0, 1]
    with pytest.raises(ValueError, match="unnamed architecture: set vlm_model_type to .* such as qwen2_5_vl"):
        train_hf.main([recipe_of(tmp_path), *options])
