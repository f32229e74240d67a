"""InternVL and LLaVA between the composed form and their own class: equal logits and answers, and back unchanged."""

import json

import pytest
import torch
from PIL import Image
from test_from_vlm import KINDS, thinking, tiny_vlm, vlm_processor
from tiny import max_difference, tiny_model
from transformers import InternVLProcessor

from mmcoconut import convert_vlm
from mmcoconut.build import composed_processor_from_vlm, from_vlm, processor_from_vlm
from mmcoconut.configuration_mmcoconut import MMCoconutConfig
from mmcoconut.errors import UsageError
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.models import load_model, load_processor
from mmcoconut.vlm_mmcoconut import ThinkingVLM
from mmcoconut.vlm_processing_mmcoconut import NotLoaded


OPTIONS = {"thought_norm": "projection", "stop_head": True}
QUESTIONS = ["What colour is the left square?", "Which?"]


def pictures() -> list:
    """One image for the first question, and none for the second."""
    pixels = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [[Image.fromarray(pixels.numpy())], []]


def composed_pair(kind: str):
    model = thinking(kind, **OPTIONS)
    processor = composed_processor_from_vlm(vlm_processor(kind), config=model.config, num_latents=2)
    return model, processor


def own_processor(kind: str):
    """The VLM's own processor, of the class that a checkpoint names, without its part for videos."""
    processor = vlm_processor(kind)
    if kind.startswith("internvl"):
        processor.__class__, processor.video_processor = InternVLProcessor, NotLoaded()
    return processor


def answers_of(model, processor) -> tuple:
    inputs = processor(images=pictures(), text=QUESTIONS, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    return inputs["input_ids"], logits, model.generate(**inputs, max_new_tokens=4, stop_threshold=1.0)


def files_of(folder) -> dict:
    """What a checkpoint says: its configuration and its processor's, without who wrote it when."""
    values = {name: json.loads((folder / name).read_text()) for name in ("config.json", "processor_config.json")}
    for each in values.values():
        for name in ("auto_map", "transformers_version"):
            each.pop(name, None)
    return values


def save(folder, *parts) -> str:
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_composed_to_own_and_back_is_the_same(kind, tolerance, tmp_path):
    model, processor = composed_pair(kind)
    ids, logits, answers = answers_of(model, processor)
    first = save(tmp_path / "composed", model, processor)
    convert_vlm.main([first, str(tmp_path / "own"), "--to", "own"])
    own, own_processor = load_model(str(tmp_path / "own")), load_processor(str(tmp_path / "own"))
    assert isinstance(own, ThinkingVLM) and type(own).__name__.startswith(("InternVL", "Llava"))
    assert type(own_processor).__name__ in ("InternVLProcessor", "LlavaProcessor") and own_processor.num_latents == 2
    own_ids, own_logits, own_answers = answers_of(own, own_processor)
    assert torch.equal(own_ids, ids) and torch.equal(own_answers, answers)
    assert logits.std() > 0.3 and max_difference(own_logits, logits) <= tolerance

    convert_vlm.main([str(tmp_path / "own"), str(tmp_path / "back"), "--to", "composed"])
    back = load_model(str(tmp_path / "back"))
    assert type(back) is MMCoconutForConditionalGeneration
    before = load_model(first).state_dict()
    assert before.keys() == back.state_dict().keys()
    assert all(torch.equal(before[name], weight) for name, weight in back.state_dict().items())
    assert files_of(tmp_path / "back") == files_of(tmp_path / "composed")
    assert back.generation_config.to_diff_dict() == load_model(first).generation_config.to_diff_dict()


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_own_to_composed_and_back_is_the_same(kind, tmp_path):
    vlm, tokenizer = tiny_vlm(kind)
    model = from_vlm(vlm, tokenizer=tokenizer, **OPTIONS)
    processor = processor_from_vlm(own_processor(kind), config=model.config, num_latents=2)
    expected = answers_of(model, processor)
    first = save(tmp_path / "own", model, processor)
    convert_vlm.main([first, str(tmp_path / "composed"), "--to", "composed"])
    convert_vlm.main([str(tmp_path / "composed"), str(tmp_path / "back"), "--to", "own"])
    back = load_model(str(tmp_path / "back"))
    before = load_model(first).state_dict()
    assert before.keys() == back.state_dict().keys()
    assert all(torch.equal(before[name], weight) for name, weight in back.state_dict().items())
    found = answers_of(back, load_processor(str(tmp_path / "back")))
    assert all(max_difference(one.float(), other.float()) <= 1e-5 for one, other in zip(found, expected))


def test_a_composed_model_of_other_parts_is_refused_with_what_it_has():
    reasons = {
        "image_fusion is 'add'": {"image_fusion": "add", "projector_type": "mlp"},
        "projector_type is 'linear'": {"projector_type": "linear"},
        "vision_last_norm is True": {"projector_type": "mlp", "vision_last_norm": True},
        "its tower": {"projector_type": "pixel_shuffle"},
    }
    for reason, options in reasons.items():
        with pytest.raises(ValueError, match=f"has no own form: {reason}.*. Keep it unchanged"):
            convert_vlm.to_own(tiny_model("qwen2", **options))
    with pytest.raises(ValueError, match="image_size is 16, and its tower's is 32"):
        convert_vlm.to_own(thinking(image_size=16))
    model, processor = composed_pair("internvl")
    processor.use_thumbnail = False
    config = convert_vlm.to_own(model).config
    with pytest.raises(ValueError, match="no own form: use_thumbnail is False"):
        convert_vlm.processor_to_own(processor, config)


def test_what_has_that_form_already_is_refused():
    vlm, tokenizer = tiny_vlm()
    own = from_vlm(vlm, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="it is internvl in its own class already"):
        convert_vlm.to_own(own)
    with pytest.raises(ValueError, match="has no composed form: it is mmcoconut and not one of internvl, llava"):
        convert_vlm.to_composed(thinking())
    processor = processor_from_vlm(own_processor("internvl"), config=own.config)
    processor.image_options = {"max_patches": 3}
    with pytest.raises(ValueError, match="no composed form: image_options are"):
        convert_vlm.processor_to_composed(processor, MMCoconutConfig())


def test_the_command_line_is_checked_as_a_whole(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError) as found:
        convert_vlm.main(["a/b", str(tmp_path), "--to", "else"])
    assert [problem[0] for problem in found.value.problems] == ["to", "target"]
    with pytest.raises(UsageError, match="source = None: give it"):
        convert_vlm.main(["--to", "own"])
