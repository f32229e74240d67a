"""Alignment beside cross-entropy: what is minimised when, what is logged, which checkpoint counts; rates by part."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Image as Picture
from datasets import List
from PIL import Image
from tiny import TEXT_CONFIGS, VISION_CONFIGS, tiny_processor, tiny_tokenizer

import train_hf
from mmcoconut.build import from_backbones
from mmcoconut.data import Example, to_dataset
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.errors import RecipeError
from mmcoconut.models import load_model
from mmcoconut.objectives.alignment import Alignment
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.learning_rates import parts_of_parameters, set_learning_rates


TINY = """
vision_config: {model_type: dinov2, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, image_size: 24,
  patch_size: 8}
text_config: {model_type: bart, d_model: 16, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2,
  decoder_attention_heads: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32, max_position_embeddings: 64, dropout: 0.0}
tokenizer: train
image_fusion: encoder
projector_type: pooled_prefix
num_visual_tokens: 2
freeze: [language_model.encoder]
dataset: arrow_mazes
dataset_options: {grid_size: 3, max_hops: 2, num_rows: {train: 24, validation: 8}, cell_size: 8}
max_new_tokens: 4
mode: no_cot
align_weight: 0.5
align_warmup_epochs: 1
num_train_epochs: 3
per_device_train_batch_size: 8
learning_rate: 3.0e-3
weight_decay: 0.0
logging_steps: 1
eval_strategy: epoch
save_strategy: epoch
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def history_of(folder: Path) -> list[dict]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


def row_of(row_id: str, *, num_images: int = 1, question: str = "Which shape?", answer: str = "red") -> dict:
    image = {"bytes": png_bytes(Image.new("RGB", (16, 16))), "path": None}
    example = Example([image] * num_images, question, choices=[], steps=["green"], answers=[answer], row_id=row_id)
    return {**to_dataset([example]).cast_column("images", List(Picture(decode=False)))[0], "index": 0}


def tiny_collator(**alignment):
    torch.manual_seed(0)
    model = from_backbones(
        image_fusion="encoder",
        vision_config=VISION_CONFIGS["dinov2"](),
        text_config=TEXT_CONFIGS["bart"](),
        tokenizer=tiny_tokenizer(),
        projector_type="pooled_prefix",
    )
    curriculum = Curriculum(mode="no_cot")
    return model, CurriculumCollator(curriculum, tiny_processor(model), alignment=Alignment(0.5, **alignment))


def test_loss_is_the_weighted_sum_of_the_terms_there_are():
    alignment = Alignment(0.5, ce_weight=2.0)
    ce_loss, align_loss = torch.tensor(3.0), torch.tensor(0.4)
    assert alignment.total(ce_loss, align_loss).item() == pytest.approx(6.2)
    assert alignment.total(None, align_loss).item() == pytest.approx(0.2)
    assert alignment.total(ce_loss, None).item() == pytest.approx(6.0)


def test_text_is_that_of_the_first_target_that_has_any():
    row = row_of("row 3", question="Which shape?", answer="a cube")
    assert Alignment(1.0).text(row) == "Which shape?"
    assert Alignment(1.0).text({**row, "question": ""}) == "a cube"
    assert Alignment(1.0, targets=("answer", "question")).text(row) == "a cube"
    assert Alignment(1.0, targets=("text",)).text(row) == "Which shape? green a cube"
    with pytest.raises(ValueError, match="row 3: nothing to align its pictures with among question"):
        Alignment(1.0, targets=("question",)).text({**row, "question": " "})


def test_batch_holds_each_rows_text_once_for_each_of_its_pictures():
    _, collator = tiny_collator()
    rows = [row_of("a", num_images=2), row_of("b", num_images=0), row_of("c", question="Which colour is left?")]
    batch = collator(rows)
    texts = ["Which shape?", "Which shape?", "Which colour is left?"]
    tokenizer = collator.processor.tokenizer
    for ids, mask, text in zip(batch["alignment_input_ids"], batch["alignment_attention_mask"], texts, strict=True):
        assert ids[mask.bool()].tolist() == tokenizer(text)["input_ids"]
    assert len(batch["pixel_values"]) == 3
    assert "alignment_input_ids" not in collator([row_of("b", num_images=0)])


def test_warm_up_batches_hold_nothing_to_answer_with():
    model, collator = tiny_collator(warmup_epochs=1)
    warm_up = collator([row_of("a")])
    assert not {"labels", "decoder_input_ids", "decoder_attention_mask"} & warm_up.keys()
    collator.epoch = 1
    after = collator([row_of("a")])
    assert {name: value.tolist() for name, value in warm_up.items()} == {
        name: after[name].tolist() for name in warm_up
    }
    outputs = model(**warm_up)
    assert outputs.loss is None and outputs.logits is None
    assert outputs.alignment_loss.item() == model(**after).alignment_loss.item()


def test_a_batch_without_pictures_is_refused_in_the_warm_up_and_may_be_evaluated():
    _, collator = tiny_collator(warmup_epochs=1)
    with pytest.raises(ValueError, match="b: align_warmup_epochs trains on pictures alone, and none of the 1 rows"):
        collator([row_of("b", num_images=0)])
    assert "labels" in collator.prompts([row_of("b", num_images=0)])["supervised"]


def test_a_run_that_ends_in_its_warm_up_is_refused(recipe, tmp_path):
    options = ["--align_warmup_epochs", "1", "--max_steps", "1"]
    with pytest.raises(ValueError, match="All 1 updates of this run lie in the 1 epochs of align_warmup_epochs"):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *options])


def test_both_terms_are_logged_and_add_up_in_training_and_evaluation(recipe, tmp_path):
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run")])
    history = history_of(tmp_path / "run")
    training = [record for record in history if "loss" in record]
    assert ["ce_loss" in record for record in training] == [False] * 3 + [True] * 6
    for record in training:
        expected = 0.5 * record["align_loss"] + record.get("ce_loss", 0.0)
        assert record["loss"] == pytest.approx(expected, abs=1e-4)
    evaluations = [record for record in history if "eval_loss" in record]
    assert len(evaluations) == 3
    for record in evaluations:
        assert record["eval_loss"] == pytest.approx(0.5 * record["eval_align_loss"] + record["eval_ce_loss"], abs=1e-4)
    assert training[-1]["align_loss"] < training[0]["align_loss"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(str(folder)).named_parameters())


def changed_parts(before: dict, after: dict) -> set[str]:
    """The first names, behind `model`, of what differs."""
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}


def test_warm_up_trains_the_tower_and_no_word_of_the_answer(recipe, tmp_path):
    options = ["--align_warmup_epochs", "1", "--num_train_epochs", "2", "--eval_strategy", "no"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "none"), *options, "--learning_rate", "0.0"])
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *options])
    start, warm, end = (weights_of(tmp_path / folder) for folder in ("none", "run/checkpoint-3", "run/checkpoint-6"))
    # The projector's adapter is aligned, its visual tokens are not.
    assert changed_parts(start, warm) == {"vision_tower", "multi_modal_projector"}
    assert torch.equal(
        start["model.multi_modal_projector.linear.weight"], warm["model.multi_modal_projector.linear.weight"]
    )
    assert changed_parts(warm, end) == {"vision_tower", "multi_modal_projector", "language_model"}
    encoder = [name for name in start if name.startswith("model.language_model.encoder.")]
    assert encoder and all(torch.equal(start[name], end[name]) for name in encoder)


def test_best_checkpoint_is_never_one_of_the_warm_up(recipe, tmp_path):
    """Every evaluation is as accurate as the next here (0 %), so without the rule the first would be kept."""
    options = ["--align_warmup_epochs", "2", "--max_new_tokens", "1"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *options])
    evaluations = [record for record in history_of(tmp_path / "run") if "eval_accuracy" in record]
    assert [record["eval_accuracy"] for record in evaluations] == [0.0] * 3
    kept = json.loads((tmp_path / "run" / "stages" / "stage-0" / "stage.json").read_text())
    assert kept["global_step"] == 9


def test_best_checkpoint_may_be_chosen_by_the_loss(recipe, tmp_path):
    options = ["--align_warmup_epochs", "0", "--max_new_tokens", "1", "--metric_for_best_model", "loss"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *options])
    evaluations = [record for record in history_of(tmp_path / "run") if "eval_loss" in record]
    best = min(evaluations, key=lambda record: record["eval_loss"])
    assert best["step"] > 3  # else the first, which accuracy would keep
    kept = json.loads((tmp_path / "run" / "stages" / "stage-0" / "stage.json").read_text())
    assert (kept["global_step"], kept["eval_loss"]) == (best["step"], best["eval_loss"])
    with pytest.raises(ValueError, match="metric_for_best_model is 'bleu'. Choose one of accuracy, align_loss"):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "other"), "--metric_for_best_model", "bleu"])


@pytest.mark.parametrize("tolerance", [1e-5])
def test_accumulated_batches_give_the_update_of_one_large_batch(recipe, tmp_path, tolerance):
    """Only where labels are equally many in both halves is the mean over pictures that of the halves: mazes are."""
    options = ["--optim", "sgd", "--align_warmup_epochs", "0", "--num_train_epochs", "1", "--eval_strategy", "no"]
    weights = []
    for name, size, steps in (("one", "8", "1"), ("two", "4", "2")):
        sizes = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps]
        train_hf.main([recipe, "--output_dir", str(tmp_path / name), *options, *sizes])
        weights.append(weights_of(tmp_path / name))
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) <= tolerance
    logged = [[record for record in history_of(tmp_path / name) if "loss" in record] for name in ("one", "two")]
    for one, two in zip(*logged, strict=True):
        assert one["align_loss"] == pytest.approx(two["align_loss"], abs=1e-4)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)


def test_a_part_is_the_most_specific_name_in_the_path():
    tower = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "embeddings": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"vision_tower": tower, "my_vision_tower": torch.nn.Linear(2, 2)})
    parts = parts_of_parameters(model, ["vision_tower", "vision_tower.encoder"])
    assert (
        parts[tower["embeddings"].weight] == "vision_tower" and parts[tower["encoder"].bias] == "vision_tower.encoder"
    )
    assert model["my_vision_tower"].weight not in parts


def test_parts_get_their_rates_and_groups_keep_what_else_they_have():
    model = torch.nn.ModuleDict({"tower": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    set_learning_rates(optimizer, model, {"tower": 5e-5})
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is member for member in group["params"])
    }
    assert found == {
        "tower.weight": (5e-5, 0.1),
        "tower.bias": (5e-5, 0.0),
        "head.weight": (1e-3, 0.1),
        "head.bias": (1e-3, 0.0),
    }


def test_a_rate_of_zero_keeps_a_part_and_an_unknown_part_is_refused(recipe, tmp_path):
    options = ["--align_warmup_epochs", "0", "--num_train_epochs", "2", "--eval_strategy", "no"]
    rates = ["--learning_rates.vision_tower", "0.0", "--learning_rates.language_model", "1.0e-2"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *options, *rates])
    changed = changed_parts(weights_of(tmp_path / "run/checkpoint-3"), weights_of(tmp_path / "run/checkpoint-6"))
    assert changed == {"multi_modal_projector", "language_model"}
    with pytest.raises(ValueError, match="learning_rates: no trained parameter lies in 'visual_tower'"):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "no"), "--learning_rates.visual_tower", "0.1"])


@pytest.mark.parametrize(
    "options, key",
    [
        (["--projector_type", "linear"], "projector_type"),
        (["--image_fusion", "cross_attention"], "image_fusion"),
        (["--align_warmup_epochs", "3"], "align_warmup_epochs"),
        (["--mode", "coconut", "--align_warmup_epochs", "1"], "align_warmup_epochs"),
        (["--align_weight", "0.0"], "align_warmup_epochs"),
        (["--alignment_target", "caption"], "alignment_target"),
        (["--learning_rates.vision_tower", "-1.0"], "learning_rates.vision_tower"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_their_key(recipe, options, key):
    with pytest.raises(RecipeError) as error:
        train_hf.main([recipe, *options])
    assert [problem[0] for problem in error.value.problems] == [key]


def test_thoughts_before_the_answer_of_an_encoder_decoder_are_trained_stage_by_stage(recipe, tmp_path):
    options = ["--mode", "coconut", "--epochs_per_stage", "2", "--max_latent_stage", "1", "--num_train_epochs", "4"]
    results = train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *options])
    assert [(row["stage"], row["num_latents"]) for row in results["stages"]] == [(0, 0), (1, 1)]
    assert {"align_loss", "ce_loss"} <= results["stages"][1].keys()
    assert (tmp_path / "run" / "stages" / "stage-0").is_dir()
