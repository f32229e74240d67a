"""A card says what was measured, and nothing else."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from tiny import VISION_SIZES, tiny_model, tiny_processor, tiny_seq2seq
from transformers import CLIPVisionConfig

from mmcoconut.hub.card import Evidence, base_models, hub_dataset, model_card, write_card
from mmcoconut.tables import stage_rows


MAZES = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "mazes"
NUM_LATENTS = 3
STAGES = [
    {"stage": 0, "num_latents": 0, "generated_tokens": 7.25, "accuracy": 0.875, "n": 8},
    {"stage": 1, "num_latents": 3, "generated_tokens": 3.5, "accuracy": 0.375, "n": 8},
]
RESULTS = {"mode": "coconut", "metric": "exact_match", "split": "validation", "stages": STAGES}
RECIPE = {"dataset": "arrow_mazes", "c_thought": 2, "epochs_per_stage": [4, 1], "max_new_tokens": 14}


def read(name: str) -> dict:
    return json.loads((MAZES / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    """All that can be measured: the stages above, and a real comparison and audit."""
    return Evidence(
        recipe=RECIPE,
        results=RESULTS,
        compare=read("compare.json"),
        audit=read("audit.json"),
        audit_section=(MAZES / "card.md").read_text(encoding="utf-8"),
        asked={"question": "Which colour?", "gold": ["red"], "untouched": "blue"},
        figures={"thoughts": MAZES / "row_1.png", "modes": MAZES / "compare.png"},
    )


@pytest.fixture(scope="module")
def checkpoint():
    model = tiny_model("gpt2")
    return {"config": model.config, "processor": tiny_processor(model, num_latents=NUM_LATENTS, markers="start")}


def sections(card: ModelCard) -> list[str]:
    return re.findall(r"^## (.*)$", card.text, re.MULTILINE)


def test_sections_without_figures_are_left_out(checkpoint, evidence):
    empty = model_card("user/name", Evidence(), **checkpoint)
    assert sections(empty) == ["Use", "Sequence", "Limits", "Citation"]
    assert "None" not in str(empty) and "%" not in empty.text and "![" not in empty.text
    assert "Its answers were not evaluated." in empty.text
    assert "model-index" not in empty.data.to_dict()
    whole = sections(model_card("user/name", evidence, **checkpoint))
    assert whole == ["Use", "Sequence", "Curriculum", "Controls", "Do the thoughts matter?", "Limits", "Citation"]


@pytest.mark.parametrize("left_out", ["results", "compare", "audit"])
def test_a_limit_stands_for_what_was_not_measured(checkpoint, evidence, left_out):
    said = {
        "results": "Its answers were not evaluated.",
        "compare": "No control was trained:",
        "audit": "It was not audited",
    }
    cut = replace(evidence, **{left_out: None}, **({"audit_section": None} if left_out == "audit" else {}))
    for what, limit in said.items():
        assert (limit in model_card("user/name", cut, **checkpoint).text) == (what == left_out)
        assert limit not in model_card("user/name", evidence, **checkpoint).text


def test_figures_in_the_card_are_those_that_were_measured(checkpoint, evidence):
    text = model_card("user/name", evidence, **checkpoint).text
    assert "| 0 | 0 | 7.2 | 87.5 % | 8 |\n| 1 | 3 | 3.5 | 37.5 % | 8 |" in text
    for record in evidence.compare["modes"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{record['mode']}` | "))
        assert f"| {100 * record['accuracy']['mean']:.1f} % [" in row
    assert evidence.audit["verdict"]["sentence"] in text
    assert "Asked: *Which colour?* Answered: `blue`, right: `red`." in text
    assert "| `epochs_per_stage` | 4, 1 |" in text and "`uniform_prob`" not in text


def test_metadata_survives_being_written_and_read(checkpoint, evidence, tmp_path):
    evaluation = {
        "split": "test",
        "metric": "exact_match",
        "accuracy": {"mean": 0.25, "low": 0.0, "high": 0.5},
        "n": 4,
    }
    evaluation |= {"by_num_steps": {"2": {"mean": 0.25, "low": 0.0, "high": 0.5, "n": 4}}, "generated_tokens": 3.0}
    evaluation |= {"decoder_passes": 6.0, "machine": "a machine", "date": "2026-01-01"}
    results = {**RESULTS, "test": {"test_accuracy": 0.75, "test_n": 8}}
    known = replace(evidence, results=results, evaluation=evaluation)
    write_card(tmp_path, model_card("user/name", known, license="mit", **checkpoint), known)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-text-to-text", "mit")
    assert {"mmcoconut", "coconut"} < {*data.tags} and data.metrics == ["exact_match"]
    found = {(result.dataset_split, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {("validation", "exact_match"): 0.375, ("test", "exact_match"): 0.25}  # not the test in training
    assert {result.dataset_name for result in data.eval_results} == {"arrow_mazes"}
    assert (data.model_name, data.get("base_model"), data.get("datasets")) == ("name", None, None)
    assert (tmp_path / "thoughts.png").read_bytes() == (MAZES / "row_1.png").read_bytes()
    assert not (tmp_path / ".eval_results").exists()


def test_bases_and_data_are_named_by_their_hub_ids_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/cot").mkdir(parents=True)
    recipe = {"vision_model": "openai/clip-vit-base-patch32", "text_model": "gpt2/", "model": "outputs/cot"}
    assert base_models(recipe) == ["openai/clip-vit-base-patch32"]
    assert base_models({"vlm": "./vlm", "model": None}) == []
    assert hub_dataset({"dataset_options": {"path": "flaviagiammarino/path-vqa"}}) == "flaviagiammarino/path-vqa"
    assert hub_dataset({"dataset_options": {"path": "data/a/b"}}) is None
    assert hub_dataset({"dataset_options": {"path": "outputs/cot"}}) is None


def test_results_on_a_data_set_of_the_hub_stand_beside_it(checkpoint, tmp_path):
    options = {"path": "flaviagiammarino/path-vqa"}
    known = Evidence(recipe={"dataset": "path_vqa", "dataset_options": options}, results=RESULTS)
    card = model_card("user/name", known, **checkpoint)
    write_card(tmp_path, card, known)
    entries = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "path_vqa.yaml").read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("flaviagiammarino/path-vqa", "default", 0.375)
    ]
    assert card.data.datasets == ["flaviagiammarino/path-vqa"]


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_the_card_shows_the_prompt_that_the_processor_makes(family):
    model = tiny_model("gpt2") if family == "decoder" else tiny_seq2seq()
    processor = tiny_processor(model, num_latents=NUM_LATENTS)
    text = model_card("user/name", Evidence(), config=model.config, processor=processor).text
    shown = f"<image>×{processor.image_seq_length}Your question?\n<|start-latent|><|latent|>×3<|end-latent|>\n"
    assert f"```\n{shown}```" in text
    assert "processor.decode_answers(tokens, inputs)" in text
    assert 'name, options = "user/name", {"trust_remote_code": True}' in text


@pytest.mark.parametrize(
    "mode, num_latents, said",
    [
        ("coconut", 3, "feeds its own last\nhidden state back as the next input embedding, 3 times, before it writes"),
        ("coconut", 1, "next input embedding, once, before it writes"),
        ("coconut", 0, "still writes every\nstep, and thinks none"),
        ("pause", 3, "mode `pause` feeds no hidden state back"),
    ],
)
def test_a_control_is_not_called_thinking(mode, num_latents, said):
    model = tiny_model("gpt2")
    processor = tiny_processor(model, num_latents=num_latents)
    known = Evidence(recipe=RECIPE, results={**RESULTS, "mode": mode})
    text = model_card("user/name", known, config=model.config, processor=processor).text
    assert said in text
    assert ("It was not audited" in text) == (mode == "coconut" and num_latents > 0)


def test_the_last_evaluation_of_a_stage_counts_without_its_speed():
    log = [
        {"loss": 2.0, "step": 1},
        {"eval_stage": 1, "eval_accuracy": 0.5, "eval_runtime": 1.0, "step": 4},
        {"eval_stage": 0, "eval_accuracy": 0.1, "eval_runtime": 1.0, "step": 2},
        {"eval_stage": 1, "eval_accuracy": 0.25, "eval_bleu4": 0.5, "eval_runtime": 1.0, "step": 6},
    ]
    assert stage_rows(log) == [{"stage": 0, "accuracy": 0.1}, {"stage": 1, "accuracy": 0.25, "bleu4": 0.5}]


def test_the_card_of_a_model_for_text_alone_speaks_of_no_picture():
    one_patch = CLIPVisionConfig(**VISION_SIZES | {"image_size": 8})
    model = tiny_model(vision=one_patch)
    card = model_card("user/name", Evidence(), config=model.config, processor=tiny_processor(model))
    assert card.data.pipeline_tag == "text-generation"
    for word in ("picture", "vision-language", "clip", "PIL", "<image>"):
        assert word not in card.text, word
