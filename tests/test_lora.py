"""Adapters: what trains, what gradients reach, what is saved, and that a whole model comes out."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_train import ROOT, losses, recipe  # noqa: F401  (a fixture)
from tiny import TEXT_CONFIGS, checkpoint_activations, last_labels, max_difference, ragged_batch, tiny_model, uncached

import train_hf
from mmcoconut.arguments import conflicts
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.configuration_mmcoconut import TOKEN_ID_FIELDS
from mmcoconut.errors import RecipeError
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.training.lora import (
    add_lora,
    check_whole_model,
    describe_adapters,
    linear_layers,
    load_adapter,
    merged_model,
    save_adapter,
)


pytest.importorskip("peft")

# GPT-2 of these sizes has 4 linear layers a block, Qwen2 has 7; the head of the first is its table of embeddings.
HEADS = {
    "gpt2, tied": (lambda: TEXT_CONFIGS["gpt2"](), 8),
    "qwen2, tied": (lambda: TEXT_CONFIGS["qwen2"](tie_word_embeddings=True), 14),
    "qwen2, untied": (lambda: TEXT_CONFIGS["qwen2"](), 14),
}


def adapted_model(head="gpt2, tied", *, random=True, **config):
    """A tiny model with an adapter; with `random` one that has been somewhere, and not the identity."""
    model = tiny_model(HEADS[head][0](), thought_norm="projection", **config)
    add_lora(model, {"r": 4})
    for parameter in model.parameters():
        if random and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(**batch, labels=last_labels(batch)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_gradients(one: dict, other: dict, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, atol=tolerance, rtol=1e-4, msg=name)


@pytest.mark.parametrize("head", HEADS)
def test_training_changes_adapters_new_rows_and_new_parts_only(head):
    model = tiny_model(HEADS[head][0](), thought_norm="projection")
    batch, before = ragged_batch(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = model(**batch).logits
    layers = set(linear_layers(model))
    assert len(layers) == HEADS[head][1]
    add_lora(model, {"r": 4})
    assert max_difference(model.eval()(**batch).logits, logits) == 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # an adapter's first matrix learns only from the second update on
        gradients(model, batch)
        optimizer.step()
    after = merged_model(model).state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    table = f"model.language_model.{model.embedding_name()}.weight"
    tables = {table, "lm_head.weight"} if "untied" not in head else {table}
    new = {name for name in before if name.startswith(("model.multi_modal_projector", "model.thought_feed"))}
    assert changed == {f"{path}.weight" for path in layers} | tables | new
    rows = (after[table] != before[table]).any(dim=1).nonzero().flatten().tolist()
    assert rows and set(rows) <= {getattr(model.config, field) for field in TOKEN_ID_FIELDS}
    if "untied" not in head:
        assert torch.equal(after["lm_head.weight"], after[table])


def test_frozen_new_part_stays_frozen_and_named_parts_are_trained_in_full():
    model = tiny_model()
    train_hf.freeze(model, ["multi_modal_projector"])
    add_lora(model, {"modules_to_save": ["vision_tower"], "target_modules": ["c_attn"]})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("multi_modal_projector" in name for name in trained)
    assert any("vision_tower.modules_to_save" in name for name in trained)
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained if ".lora_" in name} == {"c_attn"}


def adapted_paths(model) -> set[str]:
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}


def test_bare_names_of_layers_mean_the_language_model():
    model = tiny_model(HEADS["qwen2, untied"][0]())  # whose tower has layers of the same names
    add_lora(model, {"target_modules": ["q_proj", "v_proj"]})
    paths = [f"model.language_model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"]
    assert adapted_paths(model) == {*paths}
    said = describe_adapters(model)
    assert "adapters on 4 layers of language_model (2 q_proj, 2 v_proj)" in said
    assert "4 rows of model.language_model.embed_tokens" in said and "multi_modal_projector" in said


@pytest.mark.parametrize(
    "target", [["c_attn", "encoder.layers.0.self_attn.q_proj"], r".*(h\..*\.c_attn|encoder\.layers\.0\..*\.q_proj)"]
)
def test_longer_names_and_expressions_reach_other_parts(target):
    model = tiny_model()
    add_lora(model, {"target_modules": target})
    tower = {path for path in adapted_paths(model) if "vision_tower" in path}
    assert len(adapted_paths(model) - tower) == 2 and {path[-31:] for path in tower} == {
        "encoder.layers.0.self_attn.q_proj"[-31:]
    }
    assert "1 layers of vision_tower (1 q_proj)" in describe_adapters(model)


@pytest.mark.parametrize("target", [["c_attn", "q_proj"], "q_proj"])
def test_layers_that_the_language_model_lacks_are_refused_with_those_it_has(target):
    with pytest.raises(ValueError, match="language model has no layer 'q_proj'.*c_attn, c_fc, c_proj"):
        add_lora(tiny_model(), {"target_modules": target})


def test_exclusions_of_the_recipe_hold_beside_those_of_other_parts():
    for excluded in (["layers.1.self_attn.q_proj"], r".*\.layers\.1\..*"):
        model = tiny_model(HEADS["qwen2, untied"][0]())
        add_lora(model, {"target_modules": ["q_proj"], "exclude_modules": excluded})
        assert adapted_paths(model) == {"model.language_model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize(
    "head, named",
    [
        ("gpt2, tied", "wte"),
        ("gpt2, tied", "lm_head"),
        ("qwen2, tied", "embed_tokens"),
        ("qwen2, untied", "embed_tokens"),
        ("qwen2, untied", "lm_head"),
    ],
)
def test_named_embedding_or_head_is_trained_whole_saved_and_merged(head, named, tmp_path):
    def adapted():
        model = tiny_model(HEADS[head][0](), thought_norm="projection")
        add_lora(model, {"r": 4, "modules_to_save": [named]})
        return model

    model, original = adapted(), tiny_model(HEADS[head][0](), thought_norm="projection").state_dict()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)  # decays every row
    batch = ragged_batch(model)
    gradients(model, batch)
    optimizer.step()
    merged_model(model.eval()).save_pretrained(tmp_path / "merged")
    merged = MMCoconutForConditionalGeneration.from_pretrained(tmp_path / "merged")
    table = "lm_head.weight" if named == "lm_head" else f"model.language_model.{model.embedding_name()}.weight"
    assert (merged.state_dict()[table] != original[table]).any(dim=1).float().mean() > 0.9
    assert max_difference(merged(**batch).logits, model(**batch).logits) < 1e-5
    if "untied" not in head:
        assert merged.lm_head.weight is merged.get_input_embeddings().weight
    save_adapter(model, tmp_path)
    fresh = adapted().eval()
    load_adapter(fresh, tmp_path)
    assert max_difference(fresh(**batch).logits, model(**batch).logits) == 0


def test_module_to_save_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="modules_to_save: no module 'vision_towr': did you mean 'vision_tower'"):
        add_lora(tiny_model(), {"modules_to_save": ["vision_towr"]})


def test_rows_beside_the_whole_embedding_are_refused():
    with pytest.raises(ValueError, match="names 2 rows of the embedding, and lora.modules_to_save .* remove one"):
        add_lora(tiny_model(), {"modules_to_save": ["wte"], "trainable_token_indices": [1, 2]})


@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_the_adapters_through_the_thoughts(head):
    model = adapted_model(head)
    batch = ragged_batch(model)
    found = gradients(model, batch)
    with uncached(model):
        model.zero_grad()
        model(**batch, labels=last_labels(batch), use_cache=False).loss.backward()
        defined = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert_same_gradients(found, defined, 1e-5)
    handle = model.model.thought_feed.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    cut = gradients(model, batch)
    handle.remove()
    in_adapters = [name for name in found if "lora_" in name]
    assert max(max_difference(found[name], cut[name]) for name in in_adapters) > 1e-2


def test_checkpointing_changes_no_gradient_of_an_adapter():
    model = adapted_model("qwen2, untied")
    batch = ragged_batch(model)
    plain = gradients(model, batch)
    checkpoint_activations(model)
    assert_same_gradients(plain, gradients(model, batch), 1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_merged_model_equals_the_adapted_one_which_keeps_its_weights(head, tmp_path):
    model = adapted_model(head).eval()
    batch, before = ragged_batch(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = model(**batch).logits
    merged_model(model).save_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    loaded, info = MMCoconutForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert max_difference(loaded(**batch).logits, logits) < 1e-5
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens
    assert max_difference(logits, tiny_model(HEADS[head][0](), thought_norm="projection")(**batch).logits) > 0.1


def test_saved_adapter_is_restored_and_another_one_refused(tmp_path):
    model = adapted_model().eval()
    save_adapter(model, tmp_path)
    fresh = adapted_model(random=False).eval()
    load_adapter(fresh, tmp_path)
    batch = ragged_batch(model)
    assert max_difference(fresh(**batch).logits, model(**batch).logits) == 0
    narrow = tiny_model(thought_norm="projection")
    add_lora(narrow, {"r": 4, "target_modules": ["c_attn"]})
    with pytest.raises(ValueError, match=r"target_modules is .* there and \['c_attn'\] here"):
        load_adapter(narrow, tmp_path)
    wide = tiny_model(thought_norm="projection")
    add_lora(wide, {"r": 8})
    with pytest.raises(ValueError, match="r is 4 there and 8 here. Set `lora` and `freeze` as the run was started"):
        load_adapter(wide, tmp_path)
    with pytest.raises(ValueError, match="holds an adapter with r = 4, .* `lora` is not set"):
        check_whole_model(tmp_path)
    with pytest.raises(ValueError, match="holds no adapter: remove `lora`"):
        load_adapter(fresh, tmp_path / "none")


LORA = ["--lora.r", "4", "--lora.lora_dropout", "0.1", "--save_strategy", "steps", "--save_steps", "6"]
FRESH_PROCESS = """
import sys, torch
from mmcoconut.evaluation.answering import load_checkpoint
model, processor = load_checkpoint(sys.argv[1])
inputs = torch.load(sys.argv[2])
torch.save({"logits": model(**inputs).logits, "tokens": model.generate(**inputs, max_new_tokens=2)}, sys.argv[3])
assert not any("lora" in name for name, _ in model.named_parameters())
"""


@pytest.mark.slow
def test_run_resumes_exactly_and_leaves_a_whole_model_beside_its_adapter(recipe, tmp_path):  # noqa: F811
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    results = train_hf.main([recipe, "--output_dir", str(whole), *LORA])
    assert results["trainable_parameters"] < results["parameters"] / 3
    assert not (whole / "checkpoint-6" / "model.safetensors").exists()
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    train_hf.main([recipe, "--output_dir", str(resumed), *LORA, "--resume_from_checkpoint", "true"])
    assert losses(resumed) == losses(whole)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        weights = load_file(whole / file)
        assert all(torch.equal(weight, weights[name]) for name, weight in load_file(resumed / file).items()), file

    model_args, _, curriculum_args, run_args = parse_recipe([recipe, *LORA])
    train_hf.set_seed(run_args.seed)
    rows = train_hf.load_examples("arrow_mazes", split="train", num_rows=48, max_hops=2, cell_size=8, grid_size=3)
    model, processor = train_hf.build(model_args, curriculum_args, rows)
    load_adapter(model, whole / "adapter")
    images = train_hf.open_images(rows[0])
    inputs = dict(processor(images=[images], text=["Which?"], num_latents=2, return_tensors="pt"))
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, str(whole), str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    found = torch.load(tmp_path / "out.pt")
    assert max_difference(found["logits"], model.eval()(**inputs).logits) < 1e-5
    assert torch.equal(found["tokens"], model.generate(**inputs, max_new_tokens=2))
    load_checkpoint(str(whole / "stages" / "stage-1"))  # refuses a model that lacks weights


def test_recipe_of_a_pretrained_model_trains_adapters_in_a_smoke_test(tmp_path):
    arguments = ["--smoke_test", "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true", "--lora", "{}"]
    train_hf.main([str(ROOT / "recipes" / "internvl3_coconut.yaml"), *arguments])
    adapter = json.loads((tmp_path / "run-smoke" / "adapter" / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] is None and len(adapter["trainable_token_indices"]) == 3
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in load_file(
        tmp_path / "run-smoke" / "adapter" / "adapter_model.safetensors") if ".lora_" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora.lora_alhpa", "16"], "lora.lora_alhpa = 16: peft.LoraConfig has no such field.*`lora_alpha`"),
        (["--lora", "{}", "--push_to_hub", "true"], "hub_strategy = None: .*not a whole model"),
    ],
)
def test_recipe_with_a_wrong_adapter_is_refused(recipe, options, message):  # noqa: F811
    with pytest.raises(RecipeError, match=message):
        parse_recipe([recipe, *options])


def test_adapters_without_peft_are_refused_with_what_to_install(recipe, monkeypatch):  # noqa: F811
    monkeypatch.setattr(conflicts, "is_peft_available", lambda: False)
    with pytest.raises(RecipeError, match=r"pip install 'mmcoconut\[lora\]'"):
        parse_recipe([recipe, "--lora", "{}"])
