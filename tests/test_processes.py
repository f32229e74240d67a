"""Two processes whose batches differ in their latents: nothing waits for ever, and together they equal one process."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from test_train import TINY, losses
from tiny import batch_of, max_difference, ragged_rows
from two_processes import CASES, labelled_batch, make_model, prompt, rows_of

import train_hf
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.passes_mmcoconut import column_lists
from mmcoconut.training.sharing import check_sharding


pytestmark = pytest.mark.slow


TESTS = Path(__file__).parent
ACCELERATE = sorted((TESTS.parent / "recipes" / "accelerate").glob("*.yaml"))
SECONDS = 240  # a process that waits for the other for ever fails the tests here
QWEN2 = {"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN2 |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}


def torchrun(script: str, *arguments: str, **variables: str) -> None:
    """The script in two processes; accelerate's own launcher starts one on a machine without GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, **variables}
    command += [str(TESTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def launched(config: Path):
    """The options of `accelerate launch --config_file config train_hf.py`, as it reads and completes them."""
    words = ["--config_file", str(config), "train_hf.py", "recipe.yaml"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two processes found; all cases in one launch, as starting them takes longest."""
    folder = tmp_path_factory.mktemp("processes")
    torchrun("two_processes.py", str(folder))
    return torch.load(folder / "found.pt")


def test_the_two_processes_differ_in_their_passes():
    model = make_model("gpt2")
    masks = [
        batch_of(model, rows_of(model.config, rank))["input_ids"] == model.config.latent_token_id for rank in (0, 1)
    ]
    assert [len(column_lists(mask)[0]) for mask in masks] == [6, 0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_model_cut_across_processes_computes_what_it_does_whole(found, tied, tolerance):
    model = make_model("qwen2 tied" if tied else "qwen2")
    batch = batch_of(model, ragged_rows(model.config))
    with torch.no_grad():
        logits = model(**batch).logits
    cut = found["tensor parallel", tied]
    assert max_difference(cut["logits"], logits) <= tolerance
    assert cut["tokens"].equal(model.generate(**batch, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_latents_give_the_joined_batch_its_loss_and_gradients(found, case):
    model = make_model(case[1]).train()
    loss = model(**labelled_batch(model, (0, 1))).loss
    loss.backward()
    assert found[case]["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    gradients = found[case]["gradients"]
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name in gradients if gradients[name] is not None} >= expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
def test_sharded_model_generates_what_a_whole_one_does_from_ragged_prompts(found, text):
    model = make_model(text)
    for rank, tokens in enumerate(found["generate", text]):
        expected = model.generate(**prompt(model, rank), max_new_tokens=4 + rank)
        assert torch.equal(tokens, expected), rank


def test_sequence_too_short_to_be_cut_is_refused_in_both_processes(found):
    message = "every process runs the decoder 3 times in this step, .* one has only 2 columns"
    assert all(re.search(message, error) for error in found["too short"]), found["too short"]


def test_parallel_thoughts_are_refused_in_both_processes_of_a_sharded_model(found):
    assert all("does not work with FSDP" in error for error in found["in parallel"]), found["in parallel"]


def thought_norms(folder: Path) -> list[float]:
    """What was tracked of the thoughts, out of the last checkpoint's log."""
    history = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    norms = [record["eval_thought_norm"] for record in history if "eval_thought_norm" in record]
    assert norms
    return norms


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Runs by name: of one process, sharded with `fsdp2_8gpu.yaml`, and that resumed in other processes.

    The launcher hands that file's settings over in the environment. `kept` starts from a checkpoint, as
    cpu_ram_efficient_loading concerns what is loaded; both processes fill one folder of features.
    """
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "tiny.yaml").write_text(TINY)
    fsdp = prepare_multi_gpu_env(launched(TESTS.parent / "recipes" / "accelerate" / "fsdp2_8gpu.yaml"))
    fsdp = {name: value for name, value in fsdp.items() if "FSDP" in name}
    qwen2 = ["--text_config", json.dumps({**QWEN2, "tie_word_embeddings": False})]

    def run(name: str, options: list[str]) -> list[str]:
        return [str(folder / "tiny.yaml"), "--output_dir", str(folder / name), *options]

    train_hf.main(run("started", [*qwen2, "--max_steps", "1"]))
    ragged = ["--uniform_prob", "0.5", "--pad_latent_to_max", "false", "--thought_norm", "embedding", *qwen2]
    ragged += ["--report_to", "tensorboard", "--objectives.step_tokens", "0.5"]
    kept = ["--model", str(folder / "started"), "--freeze", "vision_tower"]
    kept += [word for key in ("vision_config", "text_config", "tokenizer") for word in (f"--{key}", "null")]
    cases = {name: [*options, "--num_train_epochs", "2"] for name, options in (("ragged", ragged), ("kept", kept))}
    for name, options in cases.items():
        train_hf.main(run(f"{name}, one", options))
        options += ["--per_device_train_batch_size", "4"]
    kept_features = ["--precompute_image_features", "true", "--image_features_cache", str(folder / "cache")]
    cases["kept"] += kept_features
    torchrun("several_runs.py", json.dumps([run(name, options) for name, options in cases.items()]), **fsdp)
    for name, options in cases.items():
        for step in (6, 12):
            shutil.copytree(folder / name / f"checkpoint-{step}", folder / f"{name}, resumed" / f"checkpoint-{step}")
        (folder / f"{name}, resumed" / "checkpoint-12" / "scheduler.pt").unlink()  # so both processes take the other
        options += ["--resume_from_checkpoint", "true"]
    cases["ragged"] += ["--activation_checkpointing"]
    resumed = [run(f"{name}, resumed", options) for name, options in cases.items()]
    torchrun("several_runs.py", json.dumps(resumed), **fsdp)
    return folder


@pytest.mark.parametrize("name", ["ragged", "ragged, resumed"])
def test_sharded_training_saves_and_resumes_and_equals_one_process(sharded, name):
    one, folder = sharded / "ragged, one", sharded / name
    assert list(losses(folder).values()) == pytest.approx(list(losses(one).values()), abs=2e-4)
    assert thought_norms(folder) == pytest.approx(thought_norms(one), abs=1e-4)
    stages = [json.loads((run / "results.json").read_text())["stages"] for run in (folder, one)]
    assert [row["generated_tokens"] for row in stages[0]] == [row["generated_tokens"] for row in stages[1]]
    terms = [[row["step_tokens_loss"] for row in rows] for rows in stages]
    assert terms[0] == pytest.approx(terms[1], abs=2e-4) and terms[0][1] > 0
    expected = load_checkpoint(str(one))[0].state_dict()
    for weight_name, weight in load_checkpoint(str(folder))[0].state_dict().items():
        torch.testing.assert_close(weight, expected[weight_name], atol=1e-3, rtol=0, msg=weight_name)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"].startswith("modeling_mmcoconut.MMCoconut")
    assert (folder / "modeling_mmcoconut.py").exists() and (folder / "thinking_mmcoconut.py").exists()


@pytest.mark.parametrize("name", ["kept", "kept, resumed"])
def test_sharded_training_reads_kept_features_also_when_it_resumes(sharded, name):
    expected = list(losses(sharded / "kept, one").values())
    assert list(losses(sharded / name).values()) == pytest.approx(expected, abs=2e-4)
    assert len(list((sharded / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    "changed, adapted, message",
    [
        ({"fsdp_version": 1}, False, "fsdp_version is 1: set 2"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, False, "saves no loadable model: set FULL_STATE_DICT"),
        ({}, True, "`lora` is not merged from sharded weights"),
    ],
)
def test_sharding_that_leaves_no_model_is_refused(changed, adapted, message):
    plugin = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    check_sharding(SimpleNamespace(**plugin), adapted=False)
    with pytest.raises(ValueError, match=message):
        check_sharding(SimpleNamespace(**{**plugin, **changed}), adapted=adapted)


@pytest.mark.parametrize("config", ACCELERATE, ids=lambda path: path.name)
def test_file_for_accelerate_has_no_key_that_accelerate_lacks(config):
    read = load_config_from_file(str(config))  # refuses unknown keys, but for those of fsdp_config
    assert read.num_processes in (1, 8 * read.num_machines)
    assert (read.fsdp_config or {}).keys() <= vars(launched(config)).keys()
    for key, value in (read.fsdp_config or {}).items():
        assert str(getattr(launched(config), key)).lower() == str(value).lower(), key
