"""A checkpoint of the original Coconut code has the same logits here, with and without thoughts."""

import pytest
import torch
from tiny import TEXT_CONFIGS, tiny_tokenizer
from transformers import AutoModel, AutoProcessor, GPT2LMHeadModel

from mmcoconut.convert_coconut import convert, main
from mmcoconut.errors import RecipeError


NUM_LATENTS = 3
QUESTION = "What colour is the left square?"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained GPT-2 as the Hub has it, and the model that the original code made of it and trained."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = TEXT_CONFIGS["gpt2"](
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    trained = GPT2LMHeadModel(config).eval()
    trained.save_pretrained(folder)
    trained.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
    trained.transformer.wte.weight.data.normal_(std=0.15)
    return folder, trained


def wrapped(trained, prefix: str = "") -> dict:
    """The state_dict of the original's `Coconut` module, whose embeddings stand in it a second time."""
    state = {f"{prefix}base_causallm.{name}": weight for name, weight in trained.state_dict().items()}
    return {**state, f"{prefix}embedding.weight": trained.transformer.wte.weight.data}


FORMS = {
    "coconut": wrapped,
    "coconut of several processes": lambda trained: wrapped(trained, "module."),
    "stage 0": lambda trained: dict(trained.state_dict()),
}


@torch.no_grad()
def original_logits(trained, input_ids, latent_id: int) -> torch.Tensor:
    """The original's algorithm without a cache: (1, T, V)."""
    embeds = trained.transformer.wte(input_ids)  # (1, T, D)
    for column in (input_ids[0] == latent_id).nonzero().flatten().tolist():
        states = trained.transformer(inputs_embeds=embeds[:, :column]).last_hidden_state
        embeds[:, column] = states[:, -1]
    return trained(inputs_embeds=embeds).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_logits_are_those_of_the_original(base, form, tolerance, tmp_path):
    folder, trained = base
    torch.save(FORMS[form](trained), tmp_path / "checkpoint_1")
    out = tmp_path / "converted"
    words = {"checkpoint": tmp_path / "checkpoint_1", "text_model": folder, "num_latents": NUM_LATENTS}
    main([word for name, value in {**words, "output_dir": out}.items() for word in (f"--{name}", str(value))])
    model = AutoModel.from_pretrained(out)
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    inputs = processor(text=QUESTION, return_tensors="pt")
    vocab_size = trained.config.vocab_size
    start, end, latent = (len(tiny_tokenizer()) + offset for offset in range(3))  # in the original's order
    prompt = tiny_tokenizer()(QUESTION + "\n", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"].tolist() == [[*prompt, start, *[latent] * NUM_LATENTS, end]]
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = original_logits(trained, inputs["input_ids"], latent)
    torch.testing.assert_close(logits[..., :vocab_size], expected, atol=tolerance, rtol=0)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_a_checkpoint_of_another_model_is_refused(base, tmp_path):
    folder, trained = base
    state = {name: weight for name, weight in trained.state_dict().items() if "h.1.attn.c_attn" not in name}
    torch.save(state, tmp_path / "short")
    with pytest.raises(ValueError, match="h.1.attn.c_attn"):
        convert(tmp_path / "short", folder, num_latents=0)
    torch.save({"model": trained.state_dict()}, tmp_path / "nested")
    with pytest.raises(ValueError, match="not a state_dict"):
        convert(tmp_path / "nested", folder, num_latents=0)
    narrow = {**trained.state_dict(), "transformer.wpe.weight": torch.zeros(4, 32)}
    torch.save(narrow, tmp_path / "narrow")
    with pytest.raises(ValueError, match="wpe"):
        convert(tmp_path / "narrow", folder, num_latents=0)


def test_a_file_that_would_run_code_is_not_opened(base, tmp_path):
    torch.save({"model": base[1]}, tmp_path / "whole")
    with pytest.raises(ValueError, match="more than tensors"):
        convert(tmp_path / "whole", base[0], num_latents=0)


@pytest.mark.parametrize("content", [b"", b"eight arrows\n", b"no"])
def test_a_file_that_is_no_checkpoint_is_refused(base, content, tmp_path):
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(ValueError, match="notes (was not written by torch.save|holds more than tensors)"):
        convert(tmp_path / "notes", base[0], num_latents=0)


def test_too_few_embeddings_for_the_tokens_are_refused(base, tmp_path):
    folder, _ = base
    plain = GPT2LMHeadModel.from_pretrained(folder)
    torch.save(plain.state_dict(), tmp_path / "plain")
    with pytest.raises(ValueError, match=f"embeds {plain.config.vocab_size} tokens"):
        convert(tmp_path / "plain", folder, num_latents=0)


def test_all_that_is_missing_is_said_at_once(tmp_path):
    with pytest.raises(RecipeError) as error:
        main(["--checkpoint", str(tmp_path / "none")])
    for name in ("checkpoint", "text_model", "num_latents", "output_dir"):
        assert name in str(error.value)
