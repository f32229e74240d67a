"""Any vision-language model of transformers with thoughts, over the registry; see vlm_families.py."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from tiny import max_difference
from transformers import AutoModelForImageTextToText
from vlm_families import (
    CLASS_NAMES,
    ROWS,
    TOLERANCE,
    VARIANTS,
    Family,
    answers,
    by_definition,
    checkpointing,
    family,
    gradients_of,
    relative_difference,
    without_float32,
)

from mmcoconut.build.tokens import SPARE_TOKENS
from mmcoconut.models import load_model


# These must be taken over, whatever else is.
WANTED = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
WANTED += ("qwen3_5", "smolvlm", "idefics3", "gemma3", "paligemma", "mllama", "glm4v", *VARIANTS)
PLAIN_TOO = "no, nor the plain class"
OF_EXPERTS = 1e-5  # in float32, in which a loaded model runs its experts in another order than one made for float64
FAST = ("qwen2_5_vl", "gemma3", "smolvlm")


def types_of(names) -> list:
    """Return the model types as parameters, those that take the fast suite's time marked slow."""
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


def taken_over(name: str, table) -> Family:
    """Return a family of the registry; skip one that is not taken over with the reason, if it need not be."""
    found = family(name)
    if isinstance(found, str):
        is_claimed = not table.writes and table.is_of_this_release and name in table.known
        assert name not in WANTED and not is_claimed, found
        table.left_out(name, found)
        pytest.skip(found)
    found.model.eval()
    return found


@pytest.fixture(params=types_of([*CLASS_NAMES, *VARIANTS]), scope="module")
def each(request, table) -> Family:
    return taken_over(request.param, table)


def test_without_latents_it_is_the_plain_model(each):
    batch = each.inputs(latents=False)
    assert not each.latents_of(batch).any()
    with torch.no_grad():
        assert torch.equal(each.model(**batch).logits, each.plain(**batch).logits)


def test_values_and_gradients_equal_the_definition_also_checkpointed(each, table):
    batch = each.inputs()
    latents, real = each.latents_of(batch), batch["attention_mask"].bool()
    assert latents.sum() == sum(count for *_, count in ROWS)
    with torch.no_grad():
        without = each.plain(**batch).logits
    with without_float32():
        expected = by_definition(each.plain, latents, **batch)
        of_plain = gradients_of(each.plain, expected, real)
        assert (without - expected)[real].abs().max() > 1e-2  # thoughts matter
        found = each.model(**batch).logits
        assert (found - expected)[real].abs().max() <= TOLERANCE
        assert relative_difference(gradients_of(each.model, found, real), of_plain) <= TOLERANCE
        with checkpointing(each.model):
            try:
                found = each.model(**batch).logits
            except ValueError as error:  # a kind of cache that no pass can read again
                assert each.model_type not in WANTED and "cannot be read again" in str(error)
                table.found(each.model_type, "matches the definition", f"{each.how_images_are_read}, not checkpointed")
                return
            assert (found - expected)[real].abs().max() <= TOLERANCE
            assert relative_difference(gradients_of(each.model, found, real), of_plain) <= TOLERANCE
    table.found(each.model_type, "matches the definition", each.how_images_are_read)


def test_a_ragged_batch_with_images_of_different_sizes_equals_its_rows(each, table):
    batch = each.inputs()
    real = batch["attention_mask"].bool()
    if each.model_type not in WANTED and not each.plain_rows_are_equal():
        table.found(each.model_type, "batches", PLAIN_TOO)
        pytest.skip("rows of the plain class differ in a batch and alone")
    with torch.no_grad(), without_float32():
        logits, new_tokens = each.model(**batch).logits, answers(each.model, batch)
        for row in range(len(ROWS)):
            alone = each.inputs(ROWS[row : row + 1])
            assert (each.model(**alone).logits[0] - logits[row, real[row]]).abs().max() <= each.row_tolerance
            assert torch.equal(answers(each.model, alone)[0], new_tokens[row])
    table.found(each.model_type, "batches")


@pytest.mark.parametrize("model_type", types_of(["gemma3", "paligemma", "paligemma (2)", "gemma4"]))
def test_a_latent_may_stand_in_another_rows_two_way_block(model_type):
    """The pass up to it is tried with the whole block, and run again: as the definition, and as the row alone."""
    found = family(model_type)
    seen = found.inputs(ROWS[:1])
    images = (seen["input_ids"][0] == found.model.config.image_token_id).nonzero()[:, 0]
    text = torch.randint(20, 60, seen["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    text[0, images[1:3]] = found.model.config.latent_token_id
    ids = torch.cat([text, seen["input_ids"]])
    written = torch.zeros_like(ids, dtype=torch.bool)
    pixels = {name: value for name, value in seen.items() if name not in ("input_ids", "attention_mask")}
    batch = {**pixels, **inputs_of(found.processor, ids, pixels, written)}
    alone = inputs_of(found.processor, text, {}, written[:1])
    with torch.no_grad(), without_float32():
        expected = by_definition(found.plain, found.latents_of(batch), **batch)
        logits = found.model(**batch).logits
        assert (logits - expected).abs().max() <= TOLERANCE
        assert (logits[:1] - found.model(**alone).logits).abs().max() <= TOLERANCE


def inputs_of(processor, ids: torch.Tensor, pixels: dict, written: torch.Tensor) -> dict:
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, **processor.column_inputs(ids, mask, pixels, written)}


def test_cached_greedy_and_beam_search_equal_uncached(each, table):
    batch, without = each.inputs(), each.inputs(latents=False)
    with without_float32():
        for options in ({}, {"num_beams": 2}):
            plain_options = {**options, "suppress_tokens": each.model.generation_config.suppress_tokens}  # no images
            plainly = [answers(each.plain, without, use_cache=cached, **plain_options) for cached in (True, False)]
            if not torch.equal(*plainly):
                table.found(each.model_type, "beams", PLAIN_TOO)
                pytest.skip("the plain class does not answer so with and without a cache")
            cached = answers(each.model, batch, **options)
            assert torch.equal(answers(each.model, batch, use_cache=False, **options), cached)
    table.found(each.model_type, "beams")


def with_longer_vocabulary(model, tied: bool, *, num_new: int = 5):
    """Return a copy of a model in float32 with a few more tokens, its head tied to its embeddings or not."""
    model = copy.deepcopy(model).float()
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = tied
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = embeddings.weight if tied else torch.nn.Parameter(head.weight.detach() + 0.01)
    if num_new:
        model.resize_token_embeddings(embeddings.weight.shape[0] + num_new)
    return model


def reads_longer_vocabulary(plain, tied: bool, folder) -> bool:
    """Return True if a plain model with a few more tokens can be saved and loaded."""
    with_longer_vocabulary(plain, tied).save_pretrained(folder)
    try:
        AutoModelForImageTextToText.from_pretrained(folder)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("tied", [False, True])
def test_a_longer_vocabulary_is_saved_and_opens_with_thoughts_and_as_the_plain_class(each, tied, table, tmp_path):
    """Tied and untied; of a plain class of this release that cannot read its own longer vocabulary back, as it is."""
    head, embeddings = each.model.get_output_embeddings(), each.model.get_input_embeddings()
    if tied and (not each.model._tied_weights_keys or head.weight.shape != embeddings.weight.shape):
        pytest.skip("its class does not tie them, or its head has other rows than its embeddings")
    grows = each.model_type not in SPARE_TOKENS
    if each.model_type not in WANTED and not reads_longer_vocabulary(each.plain, tied, tmp_path / "plain"):
        pytest.skip("the plain class does not read its own checkpoint with a longer vocabulary back")
    model = with_longer_vocabulary(each.model, tied, num_new=5 if grows else 0)
    model.save_pretrained(tmp_path)
    batch = {name: value.float() if value.is_floating_point() else value for name, value in each.inputs().items()}
    without = {
        name: value.float() if value.is_floating_point() else value
        for name, value in each.inputs(latents=False).items()
    }
    thinking = load_model(str(tmp_path), dtype=torch.float32).eval()
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(plain).__module__.startswith("transformers.") and type(plain).__name__ == type(model).__name__
    with torch.no_grad():
        assert max_difference(thinking(**batch).logits, model(**batch).logits) <= OF_EXPERTS
        assert max_difference(plain(**without).logits, model(**without).logits) <= OF_EXPERTS
        assert max_difference(plain(**batch).logits, model(**batch).logits) > 100 * OF_EXPERTS
    table.found(each.model_type, "saved, resized")


REMOTE = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
batch = torch.load(f"{folder}/batch.pt")
torch.set_num_threads(batch["threads"])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
assert type(model).__module__.startswith("transformers_modules.") and "mmcoconut" not in sys.modules
with torch.no_grad():
    assert (model(**batch["inputs"]).logits - batch["logits"]).abs().max() <= batch["tolerance"]
assert torch.equal(model.generate(**batch["inputs"], max_new_tokens=3, do_sample=False), batch["answers"])
"""


@pytest.mark.slow
def test_a_fresh_process_opens_a_checkpoint_with_remote_code(each, tmp_path):
    model = copy.deepcopy(each.model).float()
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in each.inputs().items()}
    with torch.no_grad():
        logits = model(**inputs).logits
    batch = {"inputs": inputs, "logits": logits, "tolerance": OF_EXPERTS}
    batch["threads"] = torch.get_num_threads()  # others sum in another order
    batch["answers"] = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save(batch, tmp_path / "checkpoint" / "batch.pt")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HOME")}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_hidden_states_are_those_of_all_columns(each):
    batch = each.inputs()
    with torch.no_grad():
        outputs = each.model(**batch, output_hidden_states=True, output_thoughts=True)
    columns = batch["input_ids"].shape[1]
    assert all(states is None or columns in states.shape[1:-1] for states in outputs.hidden_states)
    counts = outputs.thought_mask.sum(dim=1).tolist()
    assert counts == [count for *_, count in ROWS]
