"""Processors of vision-language models with thoughts: what each VLM's own processor gives, and thoughts besides.

Every model type of transformers' registry for which a tiny processor can be made is tested.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmcoconut.build import from_vlm, processor_from_vlm, set_image_options
from mmcoconut.build.processors import PLAIN_TEMPLATE, with_thoughts
from mmcoconut.build.tiny_models import tiny_vlm, write_tiny_vlm
from mmcoconut.build.tiny_processors import NoTinyProcessorError, tiny_vlm_processor
from mmcoconut.build.tokens import add_special_tokens
from mmcoconut.chat_template_mmcoconut import user_message
from mmcoconut.configuration_mmcoconut import THOUGHT_TOKENS, TOKEN_ID_FIELDS
from mmcoconut.data import Example, to_dataset
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.evaluation.answering import Answerer
from mmcoconut.models import load_processor
from mmcoconut.training.collator import CurriculumCollator, encode_size, encode_target, usual_image_length
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.vlm_processing_mmcoconut import COLUMNS, NotLoaded, thinking_processor_class


QUESTION = "What colour is the left square?"
# Types that must work where only Pillow is installed.
NEEDED = (
    "aria",
    "aya_vision",
    "chameleon",
    "emu3",
    "ernie4_5_vl_moe",
    "gemma3",
    "gemma3n",
    "gemma4",
    "glm4v",
    "got_ocr2",
)
NEEDED += (
    "idefics2",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "minicpmv4_6",
    "mllama",
    "ovis2",
)
NEEDED += (
    "paligemma",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "video_llama_3",
)
# What cannot have thoughts, with the reason that is given.
REFUSED = {
    "florence2": "total number of <|image_token|> tokens",  # an encoder-decoder, whose processor places the image
    "hunyuan_vl": "image placeholders must be formatted as",
    "pi0": "moved or dropped marks around 1 images, or put images elsewhere",  # puts images where it likes
    "qianfan_ocr": "total number of <image> tokens",  # its template writes another token than the one it counts
    "shieldgemma2": None,  # a classifier
}
LARGE = ("aria", "emu3", "diffusion_gemma", "gemma4")  # thousands of tokens an image, whatever its size


def picture(width, height, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


WIDE, TALL, SMALL = picture(90, 50), picture(40, 60, 1), picture(32, 32, 2)


def config_for(processor, model_type):
    """What processor_from_vlm reads of a model's configuration, with the ids that from_vlm would give."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    image_token = tokenizer.convert_ids_to_tokens(getattr(processor, "image_token_id", 0))
    add_special_tokens(tokenizer, image_token, model_type=model_type)
    ids = tokenizer.convert_tokens_to_ids([image_token, *THOUGHT_TOKENS])
    return SimpleNamespace(model_type=model_type, **dict(zip(TOKEN_ID_FIELDS, ids)))


def own_and_thinking(model_type, image_fields=None, **kwargs):
    try:
        own = tiny_vlm_processor(model_type, image_fields=image_fields)
    except NoTinyProcessorError as error:
        assert model_type not in NEEDED, error
        pytest.skip(str(error))
    if model_type in REFUSED:
        pytest.skip(f"{model_type} is refused")
    return own, processor_from_vlm(own, config=config_for(own, model_type), **kwargs)


def own_call(own, text, images):
    """Return what the own processor gives for rendered texts, as it is called for chats."""
    name = type(own).__name__
    if name == "PaliGemmaProcessor":  # it writes its bos token and the line end itself
        text = [each.replace(own.tokenizer.bos_token, "").removesuffix("\n") for each in text]
    if name == "Emu3Processor":  # it writes its bos token itself
        text = [each.removeprefix(own.tokenizer.bos_token) for each in text]
    if name == "GotOcr2Processor":
        images = [image for group in images for image in group]
    more = {"return_for_text_completion": True} if name == "ChameleonProcessor" else {}
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
    given = dict(own(images=images or None, text=[str(each) for each in text], **options, **more))
    given.pop("labels", None)
    return given


def chat_of(question, num_images):
    return [user_message(question, num_images)]


def assert_same(found, expected, names=None):
    for name in expected if names is None else names:
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])), name


@pytest.fixture(params=list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES), scope="module")
def pair(request):
    """The own processor and the thinking one; no test may change them."""
    return own_and_thinking(request.param, markers="none")


def test_without_latents_inputs_are_the_own_processors(pair):
    """Images of different sizes, several in a row; a ragged batch, padded on the left."""
    own, processor = pair
    groups, questions = [[WIDE, TALL], [SMALL]], [QUESTION, "Why?"]
    chats = [chat_of(question, len(group)) for question, group in zip(questions, groups)]
    rendered = processor.apply_chat_template(chats, add_generation_prompt=True)
    found = processor(images=groups, text=questions, rendered=False, padding=True, return_tensors="pt")
    expected = own_call(own, rendered, groups)
    expected = {name: value for name, value in expected.items() if name in found or name not in COLUMNS}
    assert {*found} - {*processor.column_names} == {*expected} - {*processor.column_names}
    assert_same(found, expected)
    again = processor(images=groups, text=rendered, padding=True, return_tensors="pt")
    assert_same(again, found)


def test_rows_without_an_image_are_the_own_processors(pair):
    own, processor = pair
    batch = processor(
        images=[[TALL], [], [WIDE]],
        text=[QUESTION, "Why?", QUESTION],
        rendered=False,
        padding=True,
        return_tensors="pt",
    )
    alone = processor(images=[[TALL], [WIDE]], text=[QUESTION] * 2, rendered=False, padding=True, return_tensors="pt")
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][::2, -length:], alone["input_ids"])
    by_row = batch["pixel_values"].shape[0] == 3 if type(own).__name__ == "MllamaProcessor" else False
    for name in alone.keys() - {"input_ids", "attention_mask"}:
        rows = batch[name][::2] if by_row or name in processor.column_names else batch[name]
        assert torch.equal(rows[:, -length:] if name in processor.column_names else rows, alone[name]), name
    if type(own).__name__ not in ("PaliGemmaProcessor", "GotOcr2Processor"):  # which read no text alone
        text = processor.apply_chat_template(chat_of("Why?", 0), add_generation_prompt=True)
        expected = own_call(own, [text], [])
        ids = batch["input_ids"][1][batch["attention_mask"][1].bool()]
        assert torch.equal(ids, torch.as_tensor(expected["input_ids"])[0])
        called = processor(text="Why?", rendered=False, return_tensors="pt")
        assert_same(called, expected)


def test_latents_leave_images_and_text_as_they_are(pair):
    _, processor = pair
    options = {"images": [[WIDE, TALL]], "text": [QUESTION], "rendered": False, "return_tensors": "pt"}
    plain = processor(**options)
    chat = processor.apply_chat_template([chat_of(QUESTION, 2)], num_latents=2, add_generation_prompt=True)
    found = processor(images=[[WIDE, TALL]], text=chat, return_tensors="pt")
    latents = found["input_ids"][0] == processor.latent_token_id
    assert latents.sum() == 2
    assert torch.equal(found["input_ids"][0][~latents], plain["input_ids"][0])
    for name in processor.column_names:
        assert (
            found[name][0][latents] == (name == "token_type_ids" and is_prefix(processor))
        ).all() or "cross" in name
        assert torch.equal(found[name][0][~latents], plain[name][0]), name
    names = plain.keys() - {"input_ids", "attention_mask", *processor.column_names}
    assert_same(found, plain, names)


def is_prefix(processor):
    return type(processor).__name__ == "PaliGemmaProcessor"


def test_text_of_users_never_becomes_a_special_token(pair):
    own, processor = pair
    text = f"Is {processor.image_token} or <|latent|> or {processor.tokenizer.eos_token} red?"
    ids, plain = (
        processor(images=[[SMALL]], text=[each], rendered=False)["input_ids"][0] for each in (text, "Is red?")
    )
    special = set(processor.tokenizer.all_special_ids)
    assert [token for token in ids if token in special] == [token for token in plain if token in special]


def rows_of(groups, history=()):
    examples = [
        Example(
            row_id=f"row {index}",
            images=[{"path": None, "bytes": png_bytes(image)} for image in group],
            question=f"{QUESTION} {'Why? ' * index}",
            steps=[],
            answers=["red"],
            choices=["red", "green"],
            history=[*history],
        )
        for index, group in enumerate(groups)
    ]
    return [{**row, "index": index} for index, row in enumerate(to_dataset(examples))]


COLLATED = ("qwen2_5_vl", "gemma3", "paligemma", "mllama", "idefics3", "internvl", "llava_next", "ernie4_5_vl_moe")


@pytest.mark.parametrize("model_type", COLLATED)
def test_batches_of_the_collator_have_what_rows_alone_have(model_type):
    _, processor = own_and_thinking(model_type)
    curriculum = Curriculum(mode="coconut", c_thought=2, max_latent_stage=1, epochs_per_stage=1)
    collator = CurriculumCollator(curriculum, processor, max_length=2048)
    collator.fixed_stage = 1
    rows = rows_of([[WIDE, TALL], [], [SMALL]])
    batch = collator(rows)
    for index, row in enumerate(rows):
        alone, real = collator([row]), batch["attention_mask"][index].bool()
        assert torch.equal(batch["input_ids"][index][real], alone["input_ids"][0])
        for name in processor.column_names:
            if name in alone:
                size = alone[name].shape[2:3] if alone[name].ndim > 2 else ()
                found = batch[name][index][real]
                assert torch.equal(found[:, : size[0]] if size else found, alone[name][0]), name
        assert collator.longest(row) >= real.sum()
    prompts = collator.prompts(rows)
    for name in processor.column_names:
        assert prompts[name].shape[:2] == prompts["input_ids"].shape
        assert prompts["supervised"][name].shape[:2] == prompts["supervised"]["input_ids"].shape
    ids = encode_size(processor, SMALL.size)
    [[handle]] = processor.encode_images([[SMALL]], return_tensors="pt")[1]
    assert ids == handle
    assert usual_image_length(processor) >= len(processor.image_ids(ids)) > 0


def test_paligemma_reads_both_ways_only_up_to_the_thoughts_or_the_answer():
    _, processor = own_and_thinking("paligemma", num_latents=2)
    curriculum = Curriculum(mode="coconut", c_thought=2, max_latent_stage=1, epochs_per_stage=1)
    collator = CurriculumCollator(curriculum, processor)
    for stage in (0, 1):
        collator.fixed_stage = stage
        batch = collator(rows_of([[TALL], [SMALL]]))
        start = processor.tokenizer.convert_tokens_to_ids("<|start-latent|>")
        for ids, types in zip(batch["input_ids"].tolist(), batch["token_type_ids"].tolist()):
            assert types == [0] * ids.index(start) + [1] * (len(ids) - ids.index(start))
    processor.markers = "none"
    collator.fixed_stage = 0
    batch = collator(rows_of([[TALL], [SMALL]]))
    for labels, types in zip(batch["labels"], batch["token_type_ids"]):
        assert types.argmax() == (labels != -100).int().argmax() > 0


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_turns_of_a_conversation_with_images(model_type):
    _, processor = own_and_thinking(model_type)
    curriculum = Curriculum(mode="coconut", thoughts_per_turn=2, epochs_per_stage=1)
    collator = CurriculumCollator(curriculum, processor)
    [row] = rows_of([[WIDE]], history=[{"question": "Which?", "answer": "blue"}])
    [[handle]] = collator.pixels([row])[1]
    turns, prompt = collator.encode_turns(row, [handle], 2)
    assert len(turns) == 1
    ids = [token for part in (*turns[0], prompt) for token in part]
    assert ids.count(processor.latent_token_id) == 4
    assert any(tuple(ids[at : at + len(handle)]) == handle for at in range(len(ids)))


SAVED = ("qwen2_5_vl", "gemma3", "idefics3", "paligemma", "mllama", "internvl", "llava_next")


@pytest.mark.parametrize("model_type", SAVED)
def test_saved_and_loaded_it_gives_the_same(model_type, tmp_path):
    own, processor = own_and_thinking(model_type, num_latents=3, markers="start")
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    name = type(own).__name__
    assert settings["auto_map"] == {"AutoProcessor": f"vlm_processing_mmcoconut.{name}"}
    assert settings["processor_class"] == name
    options = {"images": [[WIDE]], "text": [QUESTION], "return_tensors": "pt"}
    expected = processor(**options)
    for loaded in (
        load_processor(tmp_path, backend="pil"),
        pickle.loads(pickle.dumps(processor)),
        copy.deepcopy(processor),
    ):
        assert type(loaded) is type(processor) is thinking_processor_class(type(own))
        assert (loaded.num_latents, loaded.markers) == (3, "start")
        assert_same(loaded(**options), expected)


@pytest.mark.parametrize("model_type", ["gemma3", "idefics3", "mllama", "llava_next"])
def test_without_remote_code_the_own_processor_opens_and_writes_no_thoughts(model_type, tmp_path):
    own, processor = own_and_thinking(model_type, num_latents=3)
    processor.save_pretrained(tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False, backend="pil")
    assert type(plain) is type(own)
    answered = [*chat_of(QUESTION, 1), {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    for chat in (chat_of(QUESTION, 1), [*answered, *chat_of("Why?", 0)]):
        text, expected = (each.apply_chat_template(chat, add_generation_prompt=True) for each in (plain, own))
        assert text == expected
    assert_same(own_call(plain, [text], [[WIDE]]), own_call(own, [text], [[WIDE]]))


REMOTE = """
import sys
sys.modules["mmcoconut"] = None  # importing the repository's package is an error from here on
import torch
from PIL import Image
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True, backend="pil")
inputs = processor(images=[[Image.open("image.png")]], text=[sys.argv[2]], return_tensors="pt")
torch.save(dict(inputs), "results.pt")
processor.save_pretrained("again")
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3"])
def test_a_fresh_process_opens_it_with_remote_code(model_type, tmp_path):
    _, processor = own_and_thinking(model_type, num_latents=2)
    processor.save_pretrained(tmp_path / "folder")
    WIDE.save(tmp_path / "image.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "folder"), QUESTION]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(torch.load(tmp_path / "results.pt"), processor(images=[[WIDE]], text=[QUESTION], return_tensors="pt"))
    assert (tmp_path / "again" / "vlm_processing_mmcoconut.py").exists()


def test_markers_stand_in_prompts_without_latents(pair):
    _, processor = pair
    before = processor.markers
    ids = {}
    for processor.markers in ("both", "none"):
        ids[processor.markers] = processor.encode_prompt("What?", num_images=0, num_latents=0)
    processor.markers = before
    wanted = processor.tokenizer.convert_tokens_to_ids(["<|start-latent|>", "<|end-latent|>"])
    where = [index for index, token in enumerate(ids["both"]) if token in wanted]
    assert [ids["both"][index] for index in where] == wanted and where[1] == where[0] + 1
    assert ids["both"][: where[0]] + ids["both"][where[1] + 1 :] == ids["none"]


@pytest.mark.parametrize("markers, written", [("both", (1, 2, 1)), ("start", (1, 2, 0)), ("none", (0, 2, 0))])
def test_markers_and_number_of_latents(markers, written):
    _, processor = own_and_thinking("qwen2_vl", num_latents=2, markers=markers)
    ids = processor(images=[[SMALL]], text=[QUESTION])["input_ids"][0]
    start, end = (processor.tokenizer.convert_tokens_to_ids(f"<|{name}-latent|>") for name in ("start", "end"))
    assert tuple(ids.count(token) for token in (start, processor.latent_token_id, end)) == written
    more = processor(images=[[SMALL]], text=[QUESTION], num_latents=5)["input_ids"][0]
    assert more.count(processor.latent_token_id) == 5


def test_options_of_the_own_image_processor(tmp_path):
    _, processor = own_and_thinking("qwen2_vl", image_options={"max_pixels": 32 * 32})
    [[small]] = processor.encode_images([[WIDE]])[1]
    _, usual = own_and_thinking("qwen2_vl")
    assert len(small) < len(usual.encode_images([[WIDE]])[1][0][0])
    processor.save_pretrained(tmp_path)
    assert load_processor(tmp_path, backend="pil").encode_images([[WIDE]])[1] == [[small]]
    # The processor of Gemma 3 says no at every call, whatever its image processor says.
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_min_ratio_to_activate": 1.0}
    _, processor = own_and_thinking("gemma3", image_options=crops)
    _, usual = own_and_thinking("gemma3")
    [[handle]], [[whole]] = (each.encode_images([[WIDE]])[1] for each in (processor, usual))
    assert len(handle) > len(whole)
    processor.save_pretrained(tmp_path / "gemma")
    assert load_processor(tmp_path / "gemma", backend="pil").encode_images([[WIDE]])[1] == [[handle]]
    with pytest.raises(ValueError, match="max_pixel is no option of Qwen2VLImageProcessor.*did you mean max_pixels"):
        set_image_options(usual_qwen(), {"max_pixel": 3})


def usual_qwen():
    return own_and_thinking("qwen2_vl")[1]


def test_tiles_of_an_image_processor_that_cuts_them():
    _, processor = own_and_thinking("internvl", max_tiles=2)
    [[handle]] = processor.encode_images([[WIDE]])[1]
    assert handle.count(processor.image_token_id) == 3 * 4  # two and the thumbnail
    with pytest.raises(ValueError, match="cuts no tiles, so .* max_tiles=3"):
        own_and_thinking("qwen2_vl", max_tiles=3)


def test_what_does_not_fit_is_refused():
    own, processor = own_and_thinking("qwen2_vl")
    config = config_for(own, "qwen2_vl")
    with pytest.raises(ValueError, match="markers='some' is not one of both, start, none"):
        processor_from_vlm(own, config=config, markers="some")
    with pytest.raises(ValueError, match="num_latents=-1 must be a non-negative integer"):
        processor_from_vlm(own, config=config, num_latents=-1)
    with pytest.raises(ValueError, match="are not the ids of an image: pass what encode_images returned"):
        processor.encode_prompt(QUESTION)
    with pytest.raises(ValueError, match="0 times per image"):
        processor_from_vlm(own, config=config, chat_template="{{ messages[0]['role'] }}")
    config.latent_token_id -= 1
    with pytest.raises(ValueError, match="use the tokenizer that the model was built with"):
        processor_from_vlm(own, config=config)
    own.image_token = None
    with pytest.raises(ValueError, match="Qwen2VLProcessor has no token that stands for an image in text"):
        processor_from_vlm(own, config=config)


def test_an_unknown_input_with_one_entry_a_token_is_refused():
    own, _ = own_and_thinking("llava")

    class OtherProcessor(type(own)):
        def __call__(self, *args, **kwargs):
            inputs = super().__call__(*args, **kwargs)
            return {**inputs, "ple_marks": torch.zeros_like(torch.as_tensor(inputs["input_ids"]))}

    config = config_for(own, "llava")
    own.__class__ = OtherProcessor
    with pytest.raises(ValueError, match="returns ple_marks with one entry per token, which is not supported"):
        processor_from_vlm(own, config=config)


def test_a_processor_that_lacks_a_field_is_refused_with_what_it_lacks():
    own, _ = own_and_thinking("llava")
    own.patch_size = None
    with pytest.raises(ValueError, match="LlavaProcessor cannot read an image .*such as patch_size"):
        processor_from_vlm(own, config=config_for(own, "llava"))


@pytest.mark.parametrize("model_type", sorted(set(REFUSED) - {"shieldgemma2"}))
def test_refused_types_are_refused_at_once(model_type):
    try:
        own = tiny_vlm_processor(model_type)
    except NoTinyProcessorError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match=REFUSED[model_type].replace("|", r"\|")):
        processor_from_vlm(own, config=config_for(own, model_type))


def test_a_part_that_is_not_loaded_keeps_its_settings(tmp_path):
    own = tiny_vlm_processor("qwen2_vl")
    own.video_processor = NotLoaded(video_processor_type="Qwen2VLVideoProcessor", fps=3)
    processor = processor_from_vlm(own, config=config_for(own, "qwen2_vl"))
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path, backend="pil")
    assert {**loaded.video_processor, "auto_map": 0} == {**own.video_processor, "auto_map": 0}
    assert (loaded.video_processor.fps, loaded.video_processor.other) == (3, None)


# What real templates do that thoughts must get along with.
HARD = {
    "thinks first": "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n\n</think>\n\n{% endif %}",
    "trims": "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text | trim }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}\n",
    "plain": PLAIN_TEMPLATE.replace("IMAGE", "<image>").replace("BOS", "''"),
}


@pytest.mark.parametrize("kind", HARD)
def test_thoughts_stand_directly_before_the_answer(kind):
    own, processor = own_and_thinking("llava")
    template = with_thoughts(HARD[kind], own.tokenizer, "<image>", if_asked=True)
    processor.chat_template = template
    thoughts = "<|start-latent|><|latent|><|latent|><|end-latent|>"
    for content in ("red", [{"type": "text", "text": "red"}]):
        chat = [*chat_of(QUESTION, 1), {"role": "assistant", "content": content}, *chat_of("Why?", 0)]
        text = processor.apply_chat_template(chat, num_latents=2, add_generation_prompt=True)
        assert text.endswith(thoughts)
        assert f"{thoughts}red" in text
        assert text.count("<image>") == 1
        own.chat_template = template
        plain = own.apply_chat_template(chat, add_generation_prompt=True)
        assert plain == text.replace(thoughts, "")


SCORED = ("qwen2_5_vl", "paligemma", "mllama", "idefics3", "gemma3", "llava_next")


@pytest.mark.parametrize("model_type", SCORED)
@pytest.mark.parametrize("num_latents", [0, 2])
def test_choices_are_scored_with_their_images_as_each_one_alone(model_type, num_latents):
    """Tensors have one entry a patch, a row or an image; all choices of a row are scored together."""
    vlm, own = tiny_vlm(model_type)
    model = from_vlm(vlm, processor=own, check=False)
    processor = processor_from_vlm(own, config=model.config, markers="both" if num_latents else "none")
    answerer = Answerer(model, processor, num_latents=num_latents, stop_threshold=None)
    [row, _] = rows_of([[WIDE, TALL] if model_type != "paligemma" else [WIDE], [SMALL]])
    row |= {"choices": ["red", "green", "a cube"]}
    for choice, (found, count) in zip(row["choices"], answerer.choice_log_probs(row), strict=True):
        inputs = answerer.inputs([row])
        target = torch.tensor([encode_target(processor, [], choice)])
        said = torch.cat([torch.zeros_like(inputs["input_ids"]), torch.ones_like(target)], dim=1).bool()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], target], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs.update(processor.column_inputs(inputs["input_ids"], inputs["attention_mask"], inputs, said))
        with torch.no_grad():
            log_probs = model(**inputs).logits[:, -count - 1 : -1].log_softmax(dim=-1)  # (1, count, V)
        assert count == target.shape[1]
        assert abs(log_probs.gather(2, target[..., None]).sum().item() - found) <= 1e-3
    begun = Answerer(model, processor, num_latents=num_latents, begin_with="###").inputs([row])
    for name in processor.column_names:
        assert begun[name].shape[:2] == begun["input_ids"].shape
        if model_type == "paligemma":
            assert begun[name][0, -1] == 1
    assert answerer.prompt_length(row) == answerer.inputs([row])["input_ids"].shape[1]


@pytest.mark.parametrize("groups", [[[WIDE, TALL]], [[SMALL]], [[WIDE, TALL], [SMALL]]])
def test_neighbours_of_idefics2_share_their_frame(groups):
    own, _ = own_and_thinking("idefics2")
    own.chat_template = own.chat_template.replace("<image>\\n", "<image>").replace("<image>\n", "<image>")
    processor = processor_from_vlm(own, config=config_for(own, "idefics2"), markers="none")
    chats = [chat_of(QUESTION, len(group)) for group in groups]
    rendered = processor.apply_chat_template(chats, add_generation_prompt=True)
    found = processor(images=groups, text=[QUESTION] * len(groups), rendered=False, padding=True, return_tensors="pt")
    assert_same(found, own_call(own, rendered, groups))
    answered = [[*chat, {"role": "assistant", "content": "red"}] for chat in chats]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for chat, group in zip(answered, groups):
        batch = processor.apply_chat_template([chat], processor_kwargs={"images": [group]}, **options)
        said = [token for token, mask in zip(batch["input_ids"][0], batch["assistant_masks"][0]) if mask]
        assert processor.tokenizer.decode(said) == f"red{own.tokenizer.eos_token}"


def test_settings_of_videos_are_kept_where_their_part_cannot_be_loaded(tmp_path):
    """As the plain processor needs them on a machine that can read videos; from whichever file they stand in."""
    write_tiny_vlm(tmp_path / "plain", "qwen2_5_vl")
    path = tmp_path / "plain" / "processor_config.json"
    settings = {name: value for name, value in json.loads(path.read_text()).items() if name != "video_processor"}
    path.write_text(json.dumps(settings))
    of_videos = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}
    (tmp_path / "plain" / "video_preprocessor_config.json").write_text(json.dumps(of_videos))
    model = from_vlm(str(tmp_path / "plain"), check=False)
    processor = processor_from_vlm(str(tmp_path / "plain"), config=model.config)
    if not isinstance(processor.video_processor, NotLoaded):
        pytest.skip("videos can be read here")
    processor.save_pretrained(tmp_path / "once")
    load_processor(str(tmp_path / "once")).save_pretrained(tmp_path / "again")
    for folder in ("once", "again"):
        saved = json.loads((tmp_path / folder / "processor_config.json").read_text())
        assert of_videos.items() <= saved["video_processor"].items()
