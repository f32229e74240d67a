"""Any vision-language model of transformers with thoughts, over the registry; see vlm_families.py."""

import pytest
import torch
from vlm_families import (
    CLASS_NAMES,
    ROWS,
    TOLERANCE,
    Family,
    answers,
    by_definition,
    family,
    gradients_of,
    relative_difference,
    without_float32,
)


# These must be taken over, whatever else is.
WANTED = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
WANTED += ("qwen3_5", "smolvlm", "idefics3", "gemma3", "paligemma", "mllama", "glm4v")
FAST = ("qwen2_5_vl", "gemma3", "smolvlm")


def types_of(names) -> list:
    """Return the model types as parameters, those that take the fast suite's time marked slow."""
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


@pytest.fixture(params=types_of(CLASS_NAMES), scope="module")
def each(request) -> Family:
    """A family of the registry; one that is not taken over is skipped with the reason, if it need not be."""
    found = family(request.param)
    if isinstance(found, str):
        assert request.param not in WANTED, found
        pytest.skip(found)
    found.model.eval()
    return found


def test_without_latents_it_is_the_plain_model(each):
    batch = each.inputs(latents=False)
    assert not each.latents_of(batch).any()
    with torch.no_grad():
        assert torch.equal(each.model(**batch).logits, each.plain(**batch).logits)


def test_values_and_gradients_equal_the_definition_also_checkpointed(each):
    batch = each.inputs()
    latents, real = each.latents_of(batch), batch["attention_mask"].bool()
    assert latents.sum() == sum(count for *_, count in ROWS)
    with without_float32():
        expected = by_definition(each.plain, latents, **batch)
        of_plain = gradients_of(each.plain, expected, real)
        found = each.model(**batch).logits
        gradients = gradients_of(each.model, found, real)
        each.model.train()
        for module in each.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        each.model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = each.model(**batch).logits
        again = gradients_of(each.model, checkpointed, real)
        each.model.gradient_checkpointing_disable()
    with torch.no_grad():
        without = each.plain(**batch).logits
    assert (without - expected)[real].abs().max() > 1e-2  # thoughts matter
    assert (found - expected)[real].abs().max() <= TOLERANCE
    assert relative_difference(gradients, of_plain) <= TOLERANCE
    assert (checkpointed - expected)[real].abs().max() <= TOLERANCE
    assert relative_difference(again, of_plain) <= TOLERANCE


def test_a_ragged_batch_with_images_of_different_sizes_equals_its_rows_and_uncached_generation(each):
    batch = each.inputs()
    real = batch["attention_mask"].bool()
    with torch.no_grad(), without_float32():
        logits, new_tokens = each.model(**batch).logits, answers(each.model, batch)
        assert torch.equal(answers(each.model, batch, use_cache=False), new_tokens)
        beams = answers(each.model, batch, num_beams=2)
        assert torch.equal(answers(each.model, batch, num_beams=2, use_cache=False), beams)
        for row in range(len(ROWS)):
            alone = each.inputs(ROWS[row : row + 1])
            assert (each.model(**alone).logits[0] - logits[row, real[row]]).abs().max() <= each.row_tolerance
            assert torch.equal(answers(each.model, alone)[0], new_tokens[row])
