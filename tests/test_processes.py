"""Two processes whose batches differ in their latents: nothing waits for ever, and together they equal one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import batch_of, last_labels
from two_processes import CASES, make_model, prompt, rows_of

from mmcoconut.latent_mmcoconut import latent_columns


TESTS = Path(__file__).parent
SECONDS = 240  # a process that waits for the other for ever fails the tests here


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two processes found; all cases in one launch, as starting them takes longest."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    command += [str(TESTS / "two_processes.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt")


def test_the_two_processes_differ_in_their_passes():
    model = make_model("gpt2")
    masks = [
        batch_of(model, rows_of(model.config, rank))["input_ids"] == model.config.latent_token_id for rank in (0, 1)
    ]
    assert [len(latent_columns(mask)) for mask in masks] == [6, 0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_latents_give_the_joined_batch_its_loss_and_gradients(found, case):
    model = make_model(case[1]).train()
    batch = batch_of(model, [row for rank in (0, 1) for row in rows_of(model.config, rank)])
    loss = model(**batch, labels=last_labels(batch)).loss
    loss.backward()
    assert found[case]["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    gradients = found[case]["gradients"]
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert {name for name in gradients if gradients[name] is not None} >= {*names}
    for name in names:
        torch.testing.assert_close(gradients[name], model.get_parameter(name).grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
def test_sharded_model_generates_what_a_whole_one_does_from_ragged_prompts(found, text):
    model = make_model(text)
    for rank, tokens in enumerate(found["generate", text]):
        expected = model.generate(**prompt(model, rank), max_new_tokens=4 + rank)
        assert torch.equal(tokens, expected), rank


def test_sequence_too_short_to_be_cut_is_refused_in_both_processes(found):
    message = "every process runs the decoder 3 times in this step, .* another has 2 columns"
    assert all(re.search(message, error) for error in found["too short"]), found["too short"]
