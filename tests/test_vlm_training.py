"""Training of vision-language models in their own class: parts by role, adapters, rewards, and what a run leaves.

The slow tests go through all families that must be taken over, and through the commands as a user would.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hub import Hub
from safetensors.torch import load_file
from test_conversations import rows_of
from test_train import ROOT, launch, losses
from tiny import checkpoint_activations, max_difference, tiny_image
from transformers import AutoModelForImageTextToText
from vlm_families import OTHERS, relative_difference

import train_hf
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.build import from_vlm, processor_from_vlm
from mmcoconut.build.tiny_models import tiny_vlm, write_tiny_vlm
from mmcoconut.errors import RecipeError, UsageError
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.hub.card import Evidence, model_card
from mmcoconut.rl.policy import Rollout, Sampling, likelihood, read_prompts, sample
from mmcoconut.rl.stops import check_can_stop
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.learning_rates import set_learning_rates
from mmcoconut.training.lora import add_lora, describe_adapters, load_adapter, merged_model, save_adapter
from mmcoconut.training.parts import parameters_named, roles_of


FAST = ("qwen2_5_vl", "smolvlm")
SLOW = ("llava", "llava_next", "llava_onevision", "internvl", "idefics3", "gemma3", "paligemma", "mllama", "glm4v")
SLOW += ("qwen2_vl", "qwen3_vl", "qwen3_5", *OTHERS)
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
NUM_LATENTS = 2
# Their decoders keep a state, or are given masks for all columns of a call.
NEVER_STOP = ("gemma3", "paligemma", "qwen3_5")


def new_pair(model_type: str, **fields):
    """A tiny vision-language model that thinks, and its processor."""
    vlm, own = tiny_vlm(model_type)
    vlm.config._experts_implementation = "eager"
    model = from_vlm(vlm, processor=own, check=False, **fields)
    return model, processor_from_vlm(own, config=model.config)


@lru_cache(maxsize=1)
def pair_of(model_type: str):
    return new_pair(model_type)


def collator_of(processor, **options) -> CurriculumCollator:
    curriculum = Curriculum(max_latent_stage=NUM_LATENTS)
    collator = CurriculumCollator(curriculum, processor, **{"max_new_tokens": 5, **options})
    collator.fixed_stage = NUM_LATENTS
    return collator


def some_rows(model_type: str = "") -> list[dict]:
    """Rows with one picture, the first of them twice, with none, and with two."""
    one, other = rows_of(1, 1)
    [none], [two] = rows_of(1, num_images=0), rows_of(1, num_images=2)
    rows = [one, one, {**other, "index": 1}, {**none, "index": 2}, {**two, "index": 3}]
    # GLM-4V tells images apart by what its own template adds, and in a batch Llama 3.2 Vision lets what stands before
    # an image read the padding of rows with fewer.
    return rows[: {"glm4v": 4, "mllama": 3}.get(model_type)]


# --- parts by their role ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_type", FAMILIES)
def test_roles_are_parts_of_any_model_that_share_no_parameter(model_type):
    model, _ = new_pair(model_type, thought_norm="projection")
    parts = {name: parameters_named(model, name) for name in roles_of(model)}
    assert list(parts) == ["vision_tower", "multi_modal_projector", "language_model"] and all(parts.values())
    names = [name for part in parts.values() for name in part]
    assert len(names) == len({*names})
    embeddings = model.get_input_embeddings().weight
    assert any(weight is embeddings for weight in parts["language_model"].values())
    train_hf.freeze(model, ["vision_tower", "multi_modal_projector"])
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    frozen = {*parts["vision_tower"], *parts["multi_modal_projector"]}
    assert trained == {name for name, _ in model.named_parameters()} - frozen
    assert any("thought_feed" in name for name in trained)


def test_names_of_parts_come_before_roles_and_unknown_ones_are_refused_with_those_there_are():
    model, _ = pair_of("qwen2_5_vl")
    assert {*parameters_named(model, "visual")} > {*parameters_named(model, "vision_tower")}
    with pytest.raises(ValueError, match="no sub-module 'vision_towr'.*vision_tower"):
        train_hf.freeze(model, ["vision_towr"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="no trained parameter lies in 'tower'.*multi_modal_projector.*visual"):
        set_learning_rates(optimizer, model, {"tower": 0.1})
    with pytest.raises(ValueError, match="no trained parameter lies in 'visual': all are frozen: remove it.*lora"):
        set_learning_rates(torch.optim.SGD(model.lm_head.parameters(), lr=1.0), model, {"visual": 0.1})
    set_learning_rates(optimizer, model, {"visual": 0.1, "multi_modal_projector": 0.2, "language_model": 0.3})
    rates = {weight: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    expected = {"visual.merger.mlp.0.weight": 0.2, "visual.patch_embed.proj.weight": 0.1, "lm_head.weight": 1.0}
    expected |= {"language_model.norm.weight": 0.3}
    found = {
        name.removeprefix("model."): rates[weight] for name, weight in model.named_parameters() if weight in rates
    }
    assert {name: found[name] for name in expected} == expected


# --- adapters --------------------------------------------------------------------------------------------------------
def training_batch(model, processor) -> dict:
    return collator_of(processor)(some_rows(model.config.model_type))


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if "glm4v_moe" not in str(name)])
def test_adapters_learn_are_saved_and_merged_into_a_model_that_opens_as_the_plain_one(model_type, table, tmp_path):
    """With activation checkpointing; only adapters of the decoder and the rows of the thoughts' tokens change."""
    model, processor = new_pair(model_type)
    batch, before = (
        training_batch(model, processor),
        {name: weight.clone() for name, weight in model.state_dict().items()},
    )
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    train_hf.freeze(model, ["vision_tower"])
    add_lora(model, {"r": 4})
    assert "3 rows of" in describe_adapters(model)
    with torch.no_grad():
        assert max_difference(model(**batch).logits, logits) == 0
    checkpoint_activations(model)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05 if model_type in ("gemma4", "glm4v_moe", "lfm3_vl") else 0.5)
    for _ in range(2):  # an adapter's first matrix learns only from the second update on
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        adapted = model(**batch).logits
    assert max_difference(adapted, logits) > 1e-3
    merged = merged_model(model)
    after, decoder = merged.state_dict(), roles_of(model)["language_model"][0]
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    tables = {name for name in changed if "embed" in name or "lm_head" in name}
    assert len(changed) >= 8 and all(name.startswith(f"{decoder}.") for name in changed - tables)
    new = [model.config.latent_token_id, model.config.start_latent_token_id, model.config.end_latent_token_id]
    for name in tables:
        assert {*(after[name] != before[name]).any(dim=1).nonzero()[:, 0].tolist()} <= {*new}
    save_adapter(model, tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    fresh, _ = new_pair(model_type)
    add_lora(fresh, {"r": 4})
    load_adapter(fresh, tmp_path / "adapter")
    loaded, reloaded = load_checkpoint(str(tmp_path / "merged"))
    with torch.no_grad():
        assert max_difference(fresh.eval()(**batch).logits, adapted) == 0
        assert max_difference(loaded(**batch).logits, adapted) <= 1e-4
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", trust_remote_code=False)
        assert type(plain) is type(model).own_class
        thoughtless = reloaded(text=["red?"], num_latents=0, return_tensors="pt")
        assert max_difference(plain(**thoughtless).logits, loaded(**thoughtless).logits) == 0
    table.found(model_type, "LoRA")


@pytest.mark.parametrize("model_type", ["qwen2_5_vl"])
def test_the_projector_is_trained_in_full_by_its_role(model_type):
    model, processor = new_pair(model_type)
    add_lora(model, {"r": 4, "modules_to_save": ["multi_modal_projector"]})
    assert "model.visual.merger" in describe_adapters(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and "visual" in name}
    assert trained and all(".merger.modules_to_save." in name for name in trained)
    set_learning_rates(
        optimizer := torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1.0),
        model,
        {"multi_modal_projector": 0.1},
    )
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.1, 1.0]
    model.train()(**training_batch(model, processor)).loss.backward()
    optimizer.step()
    merged, before = merged_model(model).state_dict(), new_pair(model_type)[0].state_dict()
    assert not torch.equal(merged["model.visual.merger.mlp.0.weight"], before["model.visual.merger.mlp.0.weight"])


# --- rewards ---------------------------------------------------------------------------------------------------------
def rollouts_of(model, processor, *, noise: float = 0.5) -> tuple[list[Rollout], dict]:
    """Answers to rows, and the batch that trl makes of them: prompts padded in front, answers behind."""
    prompts = read_prompts(collator_of(processor), some_rows(model.config.model_type))
    sampling = Sampling(noise, {"max_new_tokens": 5, "do_sample": True})
    answers, rollouts = sample(model, processor, prompts, sampling)
    answers = [answer[: 5 - row % 2] for row, answer in enumerate(answers)]
    rows = [
        ([*rollout.prompt.begun, *answer], len(rollout.prompt.begun)) for rollout, answer in zip(rollouts, answers)
    ]
    pad, longest = processor.tokenizer.pad_token_id, max(start for _, start in rows)
    length = longest + max(map(len, answers))
    ids = [[pad] * (longest - start) + row + [pad] * (length - longest + start - len(row)) for row, start in rows]
    mask = [[0] * (longest - start) + [1] * len(row) for row, start in rows]
    mask = [[*row, *[0] * (length - len(row))] for row in mask]
    return rollouts, {"ids": torch.tensor(ids), "mask": torch.tensor(mask), "num_written": length - longest}


def alone(model, processor, rollout: Rollout, ids, mask, num_written: int) -> torch.Tensor:
    """log P (C,) of a row's last tokens by a forward pass of it alone, as its collator and processor lay it out."""
    keep = mask.bool() & ((ids != processor.latent_token_id) | (torch.arange(len(ids)) >= len(ids) - num_written))
    latents = (ids == processor.latent_token_id) & mask.bool()
    latents[-num_written:] = False
    keep[latents] = torch.tensor(rollout.thought)
    row, written = ids[keep][None], int(mask[-num_written:].sum())
    images, _ = processor.encode_images([rollout.prompt.images], return_tensors="pt")
    said = (torch.arange(row.shape[1]) >= row.shape[1] - written)[None]
    inputs = {**images, **processor.column_inputs(row, torch.ones_like(row), images, said)}
    if rollout.noise is not None:
        inputs["thought_noise"] = rollout.noise[: len(rollout.thought)][rollout.thought][None]
    logits = model(input_ids=row, attention_mask=torch.ones_like(row), **inputs).logits[0, -written - 1 : -1]
    return logits.log_softmax(dim=-1).gather(1, row[0, -written:, None])[:, 0]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_log_probabilities_and_their_gradients_are_those_of_single_rows(model_type, table):
    """Rows with no, one and two pictures of which one recurs; where rows can stop thinking, some did."""
    stops = model_type not in (*NEVER_STOP, "mllama")
    model, processor = new_pair(model_type, stop_head=stops)
    if stops:
        try:
            check_can_stop(model, processor)
        except UsageError:
            assert model_type in OTHERS
            stops, (model, processor) = False, new_pair(model_type)
    if stops:
        torch.nn.init.constant_(model.base_model.stop_head.bias, 0.0)
    rollouts, batch = rollouts_of(model, processor)
    placeholders = [model.config.image_token_id, getattr(model.config, "video_token_id", None)]
    assert {*placeholders} - {None} <= {*model.generation_config.suppress_tokens}
    if model_type not in OTHERS:
        assert (len({rollout.num_thoughts for rollout in rollouts}) > 1) == stops
    found = likelihood(model, processor, rollouts, **batch)
    found.log_probs.mul(batch["mask"][:, -batch["num_written"] :]).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    for row, rollout in enumerate(rollouts):
        expected = alone(model, processor, rollout, batch["ids"][row], batch["mask"][row], batch["num_written"])
        assert max_difference(found.log_probs[row, : len(expected)], expected) <= 1e-4, row
        expected.sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert relative_difference({name: gradients[name] for name in expected}, expected) <= (
        5e-4 if model_type == "qwen3_5" else 1e-4
    )
    table.found(model_type, "GRPO")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", NEVER_STOP)
def test_a_stop_head_is_refused_where_rows_cannot_stop(model_type):
    model, processor = new_pair(model_type, stop_head=True)
    with pytest.raises(UsageError, match=f"stop_head: true does not work with a {model_type}: remove `stop_head`"):
        check_can_stop(model, processor)


# --- runs ------------------------------------------------------------------------------------------------------------
RECIPE = """
vlm: vlm
freeze: [vision_tower]
dataset: arrow_mazes
dataset_options: {grid_size: 3, max_hops: 2, num_rows: {train: 16, validation: 8}, cell_size: 8}
max_new_tokens: 4
max_latent_stage: 1
epochs_per_stage: 1
num_train_epochs: 2
per_device_train_batch_size: 8
learning_rate: 3.0e-3
learning_rates: {language_model: 1.0e-3}
logging_steps: 1
save_strategy: epoch
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a tiny vision-language model and a recipe, in which the test runs."""
    write_tiny_vlm(tmp_path / "vlm", "qwen2_5_vl")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, *options: str) -> dict:
    return train_hf.main(["tiny.yaml", "--output_dir", name, *options])


def test_accumulated_batches_are_one_batch(folder):
    """Although the plain class asks the trainer for means of each batch, which have other numbers of tokens."""
    options = ["--num_train_epochs", "1", "--max_train_samples", "8", "--max_eval_samples", "2"]
    run("one", *options)
    run("parts", *options, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    assert losses(folder / "one") == pytest.approx(losses(folder / "parts"), abs=1e-5)


@pytest.mark.slow
def test_no_way_to_save_memory_and_no_interruption_changes_a_run(folder):
    run("run")
    expected = losses(folder / "run")
    assert len(expected) == 4
    grouped = ["--train_sampling_strategy", "group_by_length"]
    checkpointing = ["--activation_checkpointing", "true"]
    for name, options in {
        "checkpointed": checkpointing,
        "first": [*checkpointing, "--checkpointed_passes", "first"],
        "deferred": ["--defer_weight_gradients", "true"],
    }.items():
        run(name, *options)
        assert losses(folder / name) == pytest.approx(expected, abs=1e-4), name
    run("run", "--resume_from_checkpoint", str(folder / "run" / "checkpoint-2"))
    assert losses(folder / "run") == pytest.approx(expected, abs=1e-6)
    run("grouped", *grouped)
    assert len(losses(folder / "grouped")) == 4


@pytest.mark.slow
def test_two_processes_learn_what_one_does(folder):
    run("one", "--lora", "{r: 4}")
    launch("tiny.yaml", "--output_dir", "two", "--lora", "{r: 4}", "--per_device_train_batch_size", "4", folder=folder)
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo", "rloo"])
@pytest.mark.parametrize("lora", [False, True])
def test_rewards_change_a_model_but_for_what_is_frozen(objective, lora, folder):
    """The reward of short answers differs from answer to answer, whatever these are."""
    options = ["--objective", objective, "--rewards", "{length: -1.0}", "--thought_noise", "0.2"]
    options += ["--rl", "{num_generations: 4, beta: 0.01}", *(["--lora", "{r: 4}"] if lora else [])]
    run("run", *options, "--hub_strategy", "end")
    before, after = (AutoModelForImageTextToText.from_pretrained(name).state_dict() for name in ("vlm", "run"))
    same = {
        name for name in before if before[name].shape == after[name].shape and torch.equal(before[name], after[name])
    }
    changed = before.keys() - same
    assert any("language_model.layers" in name for name in changed)
    assert any("visual.merger" in name for name in changed) != lora
    assert not any("visual.blocks" in name for name in changed)


@pytest.mark.slow
def test_a_stop_head_is_distilled_and_modes_are_compared(folder):
    results = train_hf.main(
        [
            "tiny.yaml",
            "--output_dir",
            "compared",
            "--compare",
            "coconut,pause",
            "--save_strategy",
            "no",
        ]
    )
    assert [record["mode"] for record in results["modes"]] == ["coconut", "pause"]
    run("run")
    (folder / "stops.yaml").write_text(
        RECIPE.replace("vlm: vlm", "model: run").replace("freeze: [vision_tower]", "objective: distill_stops")
        + "stop_head: true\n"
    )
    options = ["--output_dir", "stops", "--learning_rates", "null", "--num_train_epochs", "1"]
    before = load_file(folder / "run" / "model.safetensors")
    train_hf.main(["stops.yaml", *options])
    after = load_file(folder / "stops" / "model.safetensors")
    assert after.keys() - before.keys() == {"model.stop_head.weight", "model.stop_head.bias"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["model.stop_head.weight"].any()


def test_what_needs_a_model_of_parts_is_refused_before_anything_is_loaded(folder):
    with pytest.raises(RecipeError, match="align_weight = 0.1: a vlm has no single vector per image.*combine"):
        parse_recipe(["tiny.yaml", "--output_dir", "run", "--align_weight", "0.1"])
    model, processor = new_pair("qwen2_5_vl")
    for part in (model, processor):
        part.save_pretrained("saved")
    (folder / "tiny.yaml").write_text(RECIPE.replace("vlm: vlm", "model: saved"))
    with pytest.raises(RecipeError) as caught:
        run("run", "--align_weight", "0.1", "--precompute_image_features", "true", "--mode", "coconut")
    assert [problem[0] for problem in caught.value.problems] == ["precompute_image_features", "align_weight"]
    assert "convert_vlm" in str(caught.value)


def test_the_card_says_how_it_opens_with_thoughts_and_without():
    model, processor = pair_of("qwen2_5_vl")
    model.config.architectures = [type(model).__name__]
    evidence = Evidence(recipe={"vlm": "Qwen/Qwen2.5-VL-7B-Instruct", "mode": "coconut"})
    card = model_card("user/name", evidence, config=model.config, processor=processor)
    assert card.data.base_model == ["Qwen/Qwen2.5-VL-7B-Instruct"] and card.data.pipeline_tag == "image-text-to-text"
    assert "A `Qwen2_5_VLForConditionalGeneration` of transformers" in card.text
    with_thoughts, plain = (
        "from_pretrained(name, **options)",
        "plain = AutoModelForImageTextToText.from_pretrained(name)",
    )
    assert f"AutoModelForImageTextToText.{with_thoughts}" in card.text and plain in card.text


# --- as a user would -------------------------------------------------------------------------------------------------
LOAD = """
import sys
sys.modules["mmcoconut"] = None  # importing the repository's package is an error from here on

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

image, name, found = Image.open("image.png"), "user/vlm", {}
for remote in (True, False):
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=remote).eval()
    found[remote] = {"module": type(model).__module__, "class": type(model).__name__}
    if remote:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, backend="pil")
        inputs = processor(images=[[image]], text=["Which colour?"], return_tensors="pt")
        unthought = processor(images=[[image]], text=["Which colour?"], num_latents=0, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=3)
        found["answers"] = processor.decode_answers(tokens, inputs)
        found["latents"] = int((inputs["input_ids"] == model.config.latent_token_id).sum())
    with torch.no_grad():
        found[remote]["logits"] = model(**unthought).logits
torch.save(found, "found.pt")
"""


@pytest.mark.slow
def test_a_recipe_trains_evaluates_audits_and_publishes_a_model_that_opens_both_ways(tmp_path):
    with Hub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}

        def start(*words: str, path: str = str(ROOT)) -> None:
            command = [sys.executable, "-P", *words]
            variables = {**environment, "PYTHONPATH": path}
            done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr[-3000:]

        recipe, data = (
            str(ROOT / "recipes" / "qwen2_5_vl_coconut.yaml"),
            ["--model", "run-smoke", "--split", "validation"],
        )
        start(str(ROOT / "train_hf.py"), recipe, "--smoke_test", "true", "--output_dir", "run")
        start("-m", "mmcoconut.evaluation", *data, "--output_dir", "evaluated")
        start("-m", "mmcoconut.audit", *data, "--output_dir", "audited", "--max_samples", "4", "--num_shown", "1")
        measured = ["--evaluation", "evaluated", "--audit", "audited"]
        start("-m", "mmcoconut.publish", "--model", "run-smoke", "--repo_id", "user/vlm", *measured)
        files = hub.files("user/vlm")
        assert {"vlm_mmcoconut.py", "vlm_processing_mmcoconut.py", "model.safetensors", "thoughts.png"} <= files.keys()
        config = json.loads(files["config.json"])
        assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"] and config["latent_token_id"]
        card = files["README.md"].decode()
        assert "## Evaluation" in card and "plain = AutoModelForImageTextToText" in card
        tiny_image().save(tmp_path / "image.png")
        start("-c", LOAD, path="")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found[True]["module"].startswith("transformers_modules.") and found["latents"] > 0
    assert found[False]["module"] == "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
    assert torch.equal(found[True]["logits"], found[False]["logits"]) and len(found["answers"]) == 1
