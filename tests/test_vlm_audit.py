"""Audit, demo and server of vision-language models in their own class: the readings are theirs, on their own grid."""

import json
from functools import lru_cache

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import max_difference
from vlm_families import OTHERS, by_definition, picture

from mmcoconut import serve
from mmcoconut.audit import command as audit
from mmcoconut.audit.interventions import given, intervening, with_images_of
from mmcoconut.audit.thought_pictures import GAP
from mmcoconut.audit.thoughts import read_thoughts
from mmcoconut.build import from_vlm, processor_from_vlm
from mmcoconut.build.tiny_models import tiny_vlm
from mmcoconut.configuration_mmcoconut import THOUGHT_TOKENS
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.data.image_grids import View, counts_of, of_patches, of_runs, on_picture, rows_and_columns, views_of
from mmcoconut.demo.one_question import Asker
from mmcoconut.evaluation import answering
from mmcoconut.evaluation.answering import Answerer, load_checkpoint
from mmcoconut.training.generating import thought_latents


def fast_and_slow(fast: str, slow: str) -> list:
    return [*fast.split(), *(pytest.param(name, marks=pytest.mark.slow) for name in slow.split())]


SLOW = "qwen3_vl qwen3_5 internvl llava llava_next llava_onevision smolvlm idefics3 paligemma glm4v qwen2_vl"
READ = fast_and_slow("qwen2_5_vl gemma3 mllama", " ".join((SLOW, *OTHERS)))
ROWS = (((60, 40), "What?", 2), ((30, 50), "a longer question?", 2))


@lru_cache(maxsize=4)
def thinking(model_type: str, **fields):
    """A thinking model, its plain class with the same weights, and the processor."""
    vlm, own = tiny_vlm(model_type)
    model = from_vlm(vlm, processor=own, check=False, **fields)
    plain = getattr(transformers, type(model).__name__)(model.config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    return model.eval(), plain, processor_from_vlm(own, config=model.config)


def batch_of(processor, rows=ROWS):
    images = [[picture(size, seed=size[0])] for size, *_ in rows]
    texts, counts = [text for _, text, _ in rows], [count for *_, count in rows]
    return processor(images=images, text=texts, num_latents=counts, return_tensors="pt", padding=True)


def row_of(question="What?", answer="red", images=((60, 40),), seed=0, **fields) -> dict:
    pictures = [{"bytes": png_bytes(picture(size, seed + n)), "path": None} for n, size in enumerate(images)]
    row = {"question": question, "images": pictures, "answers": [answer], "row_id": f"{question}{seed}"}
    return {**row, "choices": [], "steps": ["a"], **fields}


# --- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_type", READ)
def test_the_lens_of_the_last_layer_is_what_the_model_would_write(model_type):
    model, _, processor = thinking(model_type)
    batch = batch_of(processor)
    readings = read_thoughts(model, batch, top_k=4)
    with torch.no_grad():
        outputs = model(**batch, output_thoughts=True)
    expected = outputs.logits[:, -1].float().softmax(dim=-1).topk(4)
    assert torch.equal(readings.tokens[:, -1, -1], expected.indices)
    assert max_difference(readings.probabilities[:, -1, -1], expected.values) <= 1e-5
    assert max_difference(readings.thoughts, outputs.thoughts) <= 1e-4  # read under eager attention
    sees_all = model.get_decoder().sees_all_columns or model_type in ("gemma3", "mllama", "qwen3_5")
    assert (readings.image_share(0).min() > 0 or not sees_all) and readings.image_share(0).max() <= 1 + 1e-5


def test_the_lens_reads_what_the_model_does_beside_its_head():
    model, _, processor = thinking("paligemma")
    batch, own_forward = batch_of(processor), model.own_class.forward

    def bounded(self, *args, **kwargs):
        outputs = own_forward(self, *args, **kwargs)
        outputs.logits = 0.1 * torch.tanh(outputs.logits)
        return outputs

    model.own_class = type("Bounded", (), {"forward": bounded})  # of this instance alone
    try:
        readings = read_thoughts(model, batch, top_k=3)
        with torch.no_grad():
            expected = model(**batch).logits[:, -1].softmax(dim=-1).topk(3)
    finally:
        del model.own_class
    assert max_difference(readings.probabilities[:, -1, -1], expected.values) <= 1e-6
    assert expected.values.max() < 1.3 / model.config.get_text_config().vocab_size


@pytest.mark.parametrize("model_type", READ[:3])
def test_text_alone_is_read(model_type):
    model, _, processor = thinking(model_type)
    readings = read_thoughts(model, processor(text=["What?"], num_latents=2, return_tensors="pt"))
    assert readings.image_attention[0].shape[1:] == (2, 0) and readings.image_share(0).tolist() == [0, 0]


@pytest.mark.parametrize("model_type", READ)
def test_attention_maps_of_the_passes_are_those_of_the_definition(model_type, table):
    model, plain, processor = thinking(model_type)
    batch, found = batch_of(processor, (ROWS[0], (ROWS[1][0], ROWS[1][1], 3))), []
    decoders = [model.get_decoder(), plain.get_decoder().base_model]
    before = decoders[0].config._attn_implementation
    hooks = [decoder.register_forward_hook(lambda _, __, output: found.append(output)) for decoder in decoders]
    try:
        for decoder in decoders:
            decoder.set_attn_implementation("eager")
        with torch.no_grad():
            model(**batch, output_attentions=True)
            by_definition(plain, batch["input_ids"] == model.config.latent_token_id, output_attentions=True, **batch)
    finally:
        for hook, decoder in zip(hooks, decoders):
            hook.remove()
            decoder.set_attn_implementation(before)
    real = batch["attention_mask"].bool()  # (B, T)
    assert len(found[0].attentions) == len(found[-1].attentions) > 0
    for ours, expected in zip(found[0].attentions, found[-1].attentions):
        assert max_difference(ours.transpose(1, 2)[real], expected.transpose(1, 2)[real]) <= 2e-5
    table.found(model_type, "audit")


@pytest.mark.parametrize("model_type", READ[:2])
def test_given_thoughts_are_read_in_the_place_of_the_models(model_type):
    model, plain, processor = thinking(model_type)
    batch = batch_of(processor)
    thoughts = torch.randn(2, 2, model.config.get_text_config().hidden_size)
    with torch.no_grad(), intervening(model, given(thoughts)([0, 1])):
        logits = model(**batch).logits

    def write(module, args, kwargs):
        latents = batch["input_ids"] == model.config.latent_token_id
        embeds = kwargs["inputs_embeds"].masked_scatter(latents[..., None], thoughts)
        return args, {**kwargs, "inputs_embeds": embeds}

    hook = plain.get_decoder().base_model.register_forward_pre_hook(write, with_kwargs=True)
    with torch.no_grad():
        expected = plain(**batch).logits
    hook.remove()
    real = batch["attention_mask"].bool()
    assert max_difference(logits[real], expected[real]) <= 1e-4


# --- grids -----------------------------------------------------------------------------------------------------------
SPOTS = ((0.2, 0.3), (0.8, 0.75))


def features_of(model, processor, image) -> torch.Tensor:
    """(P, D): what the decoder reads of an image."""
    batch, read = processor(images=[[image]], text=["What?"], return_tensors="pt"), {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, __, inputs: read.update(inputs), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    if read.get("cross_attention_states") is not None:
        return read["cross_attention_states"].flatten(0, -2)
    return read["inputs_embeds"][0][batch["input_ids"][0] == model.config.image_token_id]


def spot_found(model, processor, size, spot) -> tuple[tuple[float, float], tuple[int, int]]:
    """Where (across, down) on a picture of a size the features change most that a spot changes, and the grid."""
    width, height = size
    pixels = np.random.default_rng(0).integers(110, 130, (height, width, 3), dtype=np.uint8)
    spotted, (x, y), reach = pixels.copy(), (int(spot[0] * width), int(spot[1] * height)), max(3, min(size) // 12)
    spotted[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = [255, 0, 40]
    images = [Image.fromarray(each) for each in (pixels, spotted)]
    before, after = (features_of(model, processor, image) for image in images)
    change = (after - before).norm(dim=-1).numpy()  # (P,)
    [views] = views_of(model, processor, images[:1], counts_of(model, processor, images[:1], len(change)))
    grid = on_picture(change, views)
    row, column = np.unravel_index(grid.argmax(), grid.shape)
    return ((column + 0.5) / grid.shape[1], (row + 0.5) / grid.shape[0]), grid.shape


@pytest.mark.parametrize(
    "model_type",
    fast_and_slow(
        "qwen2_5_vl internvl llava_next smolvlm mllama",
        "qwen2_vl qwen3_vl qwen3_5 glm4v llava_onevision idefics3 gemma3 paligemma gemma4 video_llama_3 ovis2",
    ),
)
def test_a_spot_on_a_picture_is_found_where_it_is(model_type):
    model, _, processor = thinking(model_type)
    for size in ((60, 40), (30, 90)):
        for spot in SPOTS:
            (across, down), (rows, columns) = spot_found(model, processor, size, spot)
            assert abs(across - spot[0]) <= 0.75 / columns + 0.08, (size, spot, rows, columns)
            assert abs(down - spot[1]) <= 0.75 / rows + 0.08, (size, spot, rows, columns)


def test_a_processor_that_cuts_the_edges_off_has_a_grid_of_the_middle():
    model, _, processor = thinking("llava")
    [[view]] = views_of(model, processor, [picture((90, 30), 0)])
    assert (view.rows, view.columns) == (4, 4)
    assert (view.top, view.height) == (0, 1) and view.left == pytest.approx(1 / 3) == view.width
    grid = on_picture(np.ones(16), [view])
    assert grid[:, :4].sum() == grid[:, -4:].sum() == 0 and grid.sum() == 16


def test_rows_that_a_token_ends_are_the_grids_rows():
    assert of_runs([5, 5, 5], ["", "", ""], [(7,), (7,)], 1.0) == [View(0, 3, 5, 5)]
    for runs, gaps in (([4, 4], [(1, 2)]), ([4, 5], [(1,)]), ([4, 4, 4], [(1,), (2,)])):
        assert "do not give their positions" in of_runs(runs, [""] * len(runs), gaps, 1.0)
    assert "not form a square" in of_runs([3], ["<row_1_col_1>"], [], 1.0)
    assert "do not fit" in of_patches(7, 4, 4)


@pytest.mark.parametrize(
    "count, ratio, layout", [(6, 1.4, (2, 3)), (6, 0.7, (3, 2)), (4, 1, (2, 2)), (3, 0.1, (3, 1))]
)
def test_cells_are_laid_out_as_the_picture_is(count, ratio, layout):
    assert rows_and_columns(count, ratio) == layout


def test_views_share_their_weights_out_and_padding_gets_none():
    whole, fine = View(0, 2, 2, 2), View(4, 4, 4, 5)  # a break ends each row of the finer one
    weights = np.arange(24.0)
    grid = on_picture(weights, [whole, fine])
    breaks = weights[[8, 13, 18, 23]].sum()
    assert grid.shape == (4, 4) and grid.sum() == pytest.approx(weights.sum() - breaks)
    assert grid[0, 0] == weights[0] / 4 + weights[4] and grid[3, 3] == weights[3] / 4 + weights[22]
    padded = on_picture(np.array([1.0, 2.0]), [View(0, 2, 1, 1, height=2.0)])  # the second is below the picture
    assert padded.tolist() == [[1.0]]


def test_a_number_that_changes_with_the_shape_makes_no_square(monkeypatch):
    """Of a processor that says nothing of its patches, 4 features might be 4 × 1."""
    model, _, processor = thinking("qwen2_5_vl")
    own_encode = processor.encode_images

    def without_grid(groups, **kwargs):
        tensors, handles = own_encode(groups, **kwargs)
        return {name: value for name, value in tensors.items() if name != "image_grid_thw"}, handles

    monkeypatch.setattr(processor, "encode_images", without_grid)
    reasons = views_of(model, processor, [picture((32, 32), 0), picture((60, 40), 0)])
    assert "changes with a picture's shape" in reasons[0] and "do not form a square" in reasons[1]


@pytest.mark.slow
def test_features_of_the_whole_picture_have_no_grid():
    model, _, processor = thinking("idefics2")
    [reason] = views_of(model, processor, [picture((40, 30), 0)])
    assert "PerceiverResampler computes features of the whole picture" in reason


# --- stopping, and thoughts together ---------------------------------------------------------------------------------
MIXED = (((60, 40), "What?"), ((30, 50), "a longer question?"), ((64, 64), "red"), ((20, 80), "one two three"))


@pytest.mark.parametrize("model_type", fast_and_slow("qwen2_5_vl", "qwen2_vl qwen3_vl glm4v internvl smolvlm mllama"))
def test_a_row_that_stops_is_the_row_with_fewer_latents(model_type):
    model, _, processor = thinking(model_type, stop_head=True)
    counts, options = [1, 3, 0, 2], {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "eos_token_id": None}
    threshold = torch.tensor([[float(j < count) for j in range(3)] for count in counts])
    batch = batch_of(processor, [(*row, 3) for row in MIXED])
    together = model.generate(**batch, stop_threshold=threshold, **options)
    latents = batch["input_ids"] == model.config.latent_token_id
    assert thought_latents(together.past_key_values, latents).sum(dim=1).tolist() == counts
    for index, (row, count) in enumerate(zip(MIXED, counts)):
        alone = model.generate(**batch_of(processor, [(*row, 3)]), stop_threshold=threshold[[index]], **options)
        fewer = model.generate(**batch_of(processor, [(*row, count)]), stop_threshold=1.0, **options)
        for outputs, place in ((together, index), (alone, 0)):
            assert torch.equal(outputs.sequences[place, -4:], fewer.sequences[0, -4:])
            for ours, expected in zip(outputs.logits, fewer.logits):
                known = expected[0].isfinite()
                assert max_difference(ours[place][known], expected[0][known]) <= 1e-4


@pytest.mark.parametrize(
    "model_type", fast_and_slow("qwen2_5_vl paligemma", "qwen3_vl gemma3 mllama qwen3_5 internvl")
)
def test_as_many_updates_as_thoughts_are_the_sequential_thoughts(model_type):
    model, _, processor = thinking(model_type)
    batch = batch_of(processor, [(*row, count) for row, count in zip(MIXED, (3, 1, 2, 1))])
    real, options = batch["attention_mask"].bool(), {"max_new_tokens": 3, "do_sample": False}
    found = []
    try:
        for schedule in ("sequential", "jacobi"):
            model.config.thought_schedule, model.config.jacobi_iterations = schedule, 3
            with torch.no_grad():
                found.append((model(**batch).logits[real], model.generate(**batch, **options)))
    finally:
        model.config.thought_schedule, model.config.jacobi_iterations = "sequential", None
    (logits, tokens), (together, written) = found
    assert max_difference(logits, together) <= 1e-4 and torch.equal(tokens, written)


def test_a_model_that_makes_its_own_masks_says_that_rows_cannot_stop():
    model, _, processor = thinking("gemma3", stop_head=True)
    with pytest.raises(ValueError, match="prepares its decoder's masks itself.*stop_threshold=None"):
        model.generate(**batch_of(processor), stop_threshold=0.5, max_new_tokens=1)


# --- commands --------------------------------------------------------------------------------------------------------
def save(folder, model_type: str) -> str:
    model, _, processor = thinking(model_type)
    processor.num_latents = 2
    for part in (model, processor):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model_type", fast_and_slow("qwen2_5_vl", "mllama smolvlm"))
def test_a_whole_audit(model_type, tmp_path):
    options = ["--dataset", "arrow_mazes", "--dataset_options.num_rows", "4", "--dataset_options.cell_size", "8"]
    options += ["--max_new_tokens", "2", "--batch_size", "4", "--num_shown", "1", "--num_latents", "1"]
    folder = tmp_path / "audit"
    record = audit.main(["--model", save(tmp_path, model_type), *options, "--output_dir", str(folder)])
    assert {"zero", "noise", "mean", "other_image", "other_question", "count_0"} <= record["interventions"].keys()
    assert (folder / "pictures" / "row_0.png").is_file()
    assert json.loads((folder / "audit.json").read_text())["n"] == 4
    assert "No heat map" not in (folder / "report.html").read_text()
    hides = record["interventions"].keys() & {"only_thoughts", "no_image"}
    refused = [reason for reason in record["not_run"] if "answer_sees" in reason]
    assert (len(hides), len(refused)) == ((0, 2) if model_type == "mllama" else (2, 0))


def test_one_question_with_two_pictures(monkeypatch):
    monkeypatch.setattr(answering, "parse_answer", str.strip)
    model, _, processor = thinking("qwen2_5_vl")
    row, other = row_of(images=((60, 40), (30, 50))), row_of(images=((40, 40), (50, 30)), seed=5)
    asker = Asker(model, processor, [other], max_new_tokens=3)
    asked = asker.ask(row, 2)
    [expected] = Answerer(model, processor, num_latents=2, max_new_tokens=3).answer([row])
    assert (asked.output, asked.num_thoughts) == (expected["output"], 2)
    look = asker.look(asked)
    sizes = [thought.heat_map.size for thought in look.thoughts]
    assert look.no_map is None and sizes == [(360, 240 + GAP + 400)] * 2  # six times (60, 40), eight times (30, 50)
    variants = asker.intervene(asked)
    assert {"zero", "noise", "mean"} <= {variant.name for variant in variants.replaced}
    text = asker.look(asker.ask(row_of(images=()), 2))
    assert text.no_map == "the question has no picture"


def test_thoughts_on_another_picture_come_from_its_own_processing():
    model, _, processor = thinking("qwen2_5_vl")
    row, donor = row_of(), row_of(images=((30, 90),), seed=3)
    answerer = Answerer(model, processor, num_latents=2)
    inputs = answerer.inputs([with_images_of(row, donor)])
    expected = processor(images=[[picture((30, 90), 3)]], text=["What?"], num_latents=2, return_tensors="pt")
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], value.to(inputs[name].dtype)) for name, value in expected.items())


@pytest.mark.parametrize("model_type", ["qwen2_5_vl"])
def test_likelihoods_of_choices_are_the_models(model_type):
    model, _, processor = thinking(model_type)
    row = row_of(choices=["red", "blue green"])
    answerer = Answerer(model, processor, num_latents=2)
    found = answerer.choice_log_probs(row)
    for choice, (total, count) in zip(row["choices"], found):
        inputs = answerer.inputs([row])
        target = torch.tensor([answering.encode_target(processor, [], choice)])
        ids = torch.cat([inputs["input_ids"], target], dim=1)
        mask = torch.ones_like(ids)
        inputs.update({"input_ids": ids, "attention_mask": mask, **processor.column_inputs(ids, mask)})
        with torch.no_grad():
            log_probs = model(**inputs).logits[0, -count - 1 : -1].log_softmax(dim=-1)
        assert count == target.shape[1]
        assert total == pytest.approx(log_probs.gather(1, target.T).sum().item(), abs=1e-3)


def test_the_server_loads_models_with_thoughts_and_plain_ones_without(tmp_path, monkeypatch):
    for library in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(library, reason="the server needs pip install mmcoconut[serve]")
    from transformers.cli.serving import model_manager, utils

    auto_classes = (transformers.AutoModelForMultimodalLM, transformers.AutoProcessor)
    for auto_class in auto_classes:
        monkeypatch.setattr(auto_class, "from_pretrained", auto_class.from_pretrained)
    folder = save(tmp_path / "thinking", "qwen2_5_vl")
    for part in tiny_vlm("qwen2_5_vl"):
        part.save_pretrained(tmp_path / "plain")
    serve.let_vlms_think()
    manager = model_manager.ModelManager(device="cpu", force_model=folder)
    model, processor = manager.load_model_and_processor(f"{folder}@main")
    assert (type(model), type(processor)) == tuple(map(type, load_checkpoint(folder)))
    assert processor.tokenizer.response_template["start_anchor"] == ["<|im_start|>assistant\n", *THOUGHT_TOKENS]
    chat = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, num_latents=2, **given)
    answer = processor.tokenizer("red", return_tensors="pt")["input_ids"][0]
    text, *_ = utils.parse_assistant_message(processor, model, answer, inputs["input_ids"], "red")
    assert text == "red"  # and no latents of the prompt before it
    plain = auto_classes[0].from_pretrained(str(tmp_path / "plain"), revision="main", trust_remote_code=False)
    assert type(plain) is transformers.Qwen2_5_VLForConditionalGeneration
