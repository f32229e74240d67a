"""The captioner and JEPA as runs: resumed, evaluated by beams; each in stages that think."""

import shutil
from pathlib import Path

import pytest
import torch
from test_train import TINY, losses
from transformers.generation import GenerationMixin

import train_hf
from mmcoconut.evaluation import evaluate as evaluation
from mmcoconut.models import load_model


ENCODER_DECODER = """  d_model: 16
  encoder_layers: 1
  decoder_layers: 2
  encoder_attention_heads: 2
  decoder_attention_heads: 2
  encoder_ffn_dim: 32
  decoder_ffn_dim: 32
  max_position_embeddings: 64
  dropout: 0.0
  hidden_size: null
  num_hidden_layers: null
  num_attention_heads: null
  resid_pdrop: null
  embd_pdrop: null
  attn_pdrop: null
"""
FAMILIES = {
    "cross_attention": "image_fusion: cross_attention\ntext_config:\n  model_type: marian\n" + ENCODER_DECODER,
    "encoder": "image_fusion: encoder\nprojector_type: attention_prefix\nprojector_num_heads: 2\n"
    "num_visual_tokens: 3\nalign_weight: 0.5\nfreeze: [language_model.encoder]\ntext_config:\n  model_type: bart\n"
    + ENCODER_DECODER,
}


def write_recipe(family: str, folder: Path) -> str:
    (folder / "tiny.yaml").write_text(TINY)
    path = folder / f"{family}.yaml"
    path.write_text(f"base: tiny.yaml\n{FAMILIES[family]}")
    return str(path)


@pytest.fixture(params=FAMILIES)
def recipe(request, tmp_path):
    return write_recipe(request.param, tmp_path)


@pytest.mark.slow
def test_run_resumed_inside_a_stage_continues_exactly(recipe, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = ["--save_strategy", "steps", "--save_steps", "4", "--text_config.dropout", "0.1"]
    train_hf.main([recipe, "--output_dir", str(whole), *options])
    shutil.copytree(whole / "checkpoint-8", resumed / "checkpoint-8")
    train_hf.main([recipe, "--output_dir", str(resumed), *options, "--resume_from_checkpoint", "true"])
    assert losses(resumed) == losses(whole)
    weights = [load_model(str(folder)).state_dict() for folder in (whole, resumed)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=0, rtol=0, msg=name)


def test_training_and_evaluation_search_by_as_many_beams_as_the_recipe_says(recipe, tmp_path, monkeypatch):
    searched = []
    stock = GenerationMixin.generate
    monkeypatch.setattr(
        GenerationMixin,
        "generate",
        lambda self, *args, **kwargs: (searched.append(kwargs["num_beams"]), stock(self, *args, **kwargs))[1],
    )
    run = tmp_path / "run"
    train_hf.main([recipe, "--output_dir", str(run), "--num_beams", "3"])
    assert {*searched} == {3}
    for options, num_beams in ([], 3), (["--num_beams", "2"], 2):
        searched.clear()
        words = ["--model", str(run), "--split", "validation", "--output_dir", str(tmp_path / f"by {num_beams}")]
        evaluation.main([*words, *options])
        assert {*searched} == {num_beams}
