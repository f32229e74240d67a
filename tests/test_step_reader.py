"""Steps that a run's step decoder reads in thoughts: from the run's folder into audits and the demo."""

import shutil

import pytest
import torch
from tiny import tiny_model, tiny_processor

from mmcoconut.audit import command as audit
from mmcoconut.audit.step_reader import StepReader
from mmcoconut.audit.thoughts import read_thoughts
from mmcoconut.data import load_examples
from mmcoconut.demo.one_question import Asker
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.objectives.step_decoder import StepDecoder


NUM_LATENTS = 3
DATA = {"num_rows": 4, "cell_size": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The folder of a run with a step decoder, two of whose thoughts stand for a step."""
    folder, model = tmp_path_factory.mktemp("run"), tiny_model()
    processor = tiny_processor(model, markers="start", num_latents=NUM_LATENTS)
    for part in (model, processor):
        part.save_pretrained(folder)
    (folder / "recipe.yaml").write_text("c_thought: 2\n")
    decoder = StepDecoder(layers=1, width=8, heads=2, max_tokens=4)
    decoder.build(model)
    with torch.no_grad():
        decoder.reader.weight.mul_(100)  # so that other thoughts are read otherwise
        decoder.decoder.embed_tokens.weight.mul_(10)
    decoder.save(folder / "objectives")
    return str(folder)


def test_thoughts_are_read_by_step_and_the_last_of_fewer_alone(run):
    reader, (_, processor) = StepReader.beside(run), load_checkpoint(run)
    thoughts = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    parts = (thoughts[0:2], thoughts[2:4], thoughts[4:5])
    expected = [reader.decoder.read(part[None], processor.tokenizer)[0] for part in parts]
    assert reader.read(thoughts, processor.tokenizer) == expected
    assert len({*expected}) == 3
    assert reader.read(thoughts[:4], processor.tokenizer) == expected[:2]


def test_a_run_without_a_step_decoder_has_no_reader(run, tmp_path):
    assert StepReader.beside(tmp_path) is None
    assert StepReader.beside("someone/model") is None
    shutil.copytree(f"{run}/objectives", tmp_path / "objectives")
    assert StepReader.beside(tmp_path).thoughts_per_step == 1  # what a recipe without c_thought stands for


def test_an_audit_shows_what_is_read(run, tmp_path):
    options = [word for key, value in DATA.items() for word in (f"--dataset_options.{key}", str(value))]
    options += ["--max_new_tokens", "2", "--num_shown", "1", "--parts", "report"]
    audit.main(["--model", run, "--dataset", "arrow_mazes", *options, "--output_dir", str(tmp_path / "audit")])
    text = (tmp_path / "audit" / "report.html").read_text(encoding="utf-8")
    assert text.count("The run's step decoder reads: step 1 <b>") == 1
    assert "</b>; step 2 <b>" in text and "; step 3 <b>" not in text


def test_the_demo_shows_what_is_read(run):
    model, processor = load_checkpoint(run)
    [row] = load_examples("arrow_mazes", split="test", num_rows=1, cell_size=8)
    reader = StepReader.beside(run)
    asker = Asker(model, processor, max_new_tokens=2, reader=reader)
    asked = asker.ask(row, NUM_LATENTS)
    thoughts = read_thoughts(model, asked.answerer.inputs([row])).thoughts[0]
    assert asker.look(asked).steps == reader.read(thoughts, processor.tokenizer)
    assert Asker(model, processor, max_new_tokens=2).look(asked).steps is None
