"""from_vlm: any vision-language model in its own class, its new tokens, and the check against the definition."""

import json
import re
import subprocess
import sys

import pytest
import torch
from tiny import SPREAD, max_difference, tiny_tokenizer
from tiny_composed import tiny_vlm_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    BlipConfig,
    CLIPVisionConfig,
    GPT2Config,
    Kosmos2Config,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)

from mmcoconut.build import check as checks
from mmcoconut.build import from_backbones, from_vlm, reason_against
from mmcoconut.build.tiny_models import tiny_vlm as tiny_vlm_and_processor
from mmcoconut.build.tiny_models import write_tiny_vlm
from mmcoconut.build.tokens import SPARE_TOKENS
from mmcoconut.configuration_mmcoconut import THOUGHT_FIELDS, THOUGHT_TOKENS, TOKEN_ID_FIELDS
from mmcoconut.errors import UsageError
from mmcoconut.models import load_model, read_config
from mmcoconut.thinking_mmcoconut import ThinkingDecoder
from mmcoconut.vlm_mmcoconut import ThinkingVLM


TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 48, "max_position_embeddings": 512, "initializer_range": SPREAD}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 32, "patch_size": 8}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
MLLAMA = {"cross_attention_layers": [1], "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1}
CONFIGS = {
    "llava": {"vision_config": TOWER, "text_config": {**TEXT, "model_type": "llama"}},
    "internvl": {"vision_config": TOWER, "text_config": {**TEXT, "model_type": "qwen2"}},
    "qwen2_5_vl": {"vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [1]}, "text_config": {**TEXT, **MROPE}},
    "paligemma": {
        "vision_config": {**TOWER, "projection_dim": 32},
        "text_config": {**TEXT, "model_type": "gemma2", "head_dim": 8},
        "projection_dim": 32,
    },
    "mllama": {
        "vision_config": {
            **TOWER,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        "text_config": {**TEXT, **MLLAMA},
    },
}
KNOWN_WORDS = 250  # ids below are ordinary tokens
# Llama 3.2's head has fewer rows than its embeddings, so they cannot be tied.
KINDS = [
    (model_type, tied) for model_type in CONFIGS for tied in (False, True) if (model_type, tied) != ("mllama", True)
]


def tokenizer_of(model_type: str) -> PreTrainedTokenizerFast:
    """A tokenizer with an image token, and with the spare tokens of a model type that has some."""
    tokenizer = tiny_vlm_tokenizer("internvl")
    spare = SPARE_TOKENS.get(model_type, ())
    if spare:
        tokenizer.add_special_tokens({"extra_special_tokens": list(spare)}, replace_extra_special_tokens=False)
    return tokenizer


def tiny_vlm(model_type: str = "llava", *, tied: bool = False, spare_rows: int = 0, seed: int = 0):
    """A plain VLM of random weights and its tokenizer; its embeddings may have rows that no token has."""
    tokenizer = tokenizer_of(model_type)
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in CONFIGS[model_type].items()}
    ends = {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": tied}
    values["text_config"] |= {"vocab_size": len(tokenizer) + spare_rows, **ends}
    config = AutoConfig.for_model(model_type, **values, tie_word_embeddings=tied)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    torch.manual_seed(seed)
    vlm = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter += SPREAD / 2 * torch.randn_like(parameter)
    return vlm, tokenizer


def thinking(model_type: str = "llava", *, tied: bool = False, spare_rows: int = 0, **options):
    vlm, tokenizer = tiny_vlm(model_type, tied=tied, spare_rows=spare_rows)
    return from_vlm(vlm, tokenizer=tokenizer, **options)


def some_ids(num_columns: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, KNOWN_WORDS, (2, num_columns), generator=torch.Generator().manual_seed(seed))


def with_latents(model, num_columns: int = 12) -> dict:
    ids = some_ids(num_columns)
    ids[:, 5:7] = model.config.latent_token_id
    return {"input_ids": ids}


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("spare_rows", [0, 40])
@pytest.mark.parametrize("model_type, tied", KINDS)
def test_a_model_thinks_in_place_with_the_same_logits(model_type, tied, spare_rows):
    vlm, tokenizer = tiny_vlm(model_type, tied=tied, spare_rows=spare_rows)
    own_class, num_known, size = type(vlm), len(tokenizer), vlm.get_input_embeddings().weight.shape[0]
    kept = vlm.get_decoder().layers[0].input_layernorm.weight
    inputs = {"input_ids": some_ids()}
    expected, image_token_id = logits_of(vlm, inputs), vlm.config.image_token_id
    model = from_vlm(vlm, tokenizer=tokenizer)
    assert model is vlm and isinstance(model, ThinkingVLM) and isinstance(model, own_class)
    assert type(model).__name__ == own_class.__name__ and not model.training
    assert isinstance(model.get_decoder(), ThinkingDecoder)
    assert model.get_decoder().layers[0].input_layernorm.weight is kept
    assert model.config.image_token_id == image_token_id
    ids = tokenizer.convert_tokens_to_ids(list(THOUGHT_TOKENS))
    assert [getattr(model.config, name) for name in TOKEN_ID_FIELDS[1:]] == ids
    old = [number for number in range(num_known) if number not in ids]
    assert max_difference(logits_of(model, inputs)[..., old], expected[..., old]) == 0
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    grown = max(size, num_known + (0 if model_type in SPARE_TOKENS else 3))
    assert len(embeddings) == grown and (head is embeddings) == tied
    assert model.config.get_text_config().vocab_size == len(head)
    before = embeddings[: min(ids)].mean(dim=0)
    assert max_difference(embeddings[ids], before.expand(3, -1)) <= 1e-5
    assert {*model.generation_config.suppress_tokens} == {image_token_id, *ids}
    changed = logits_of(model, with_latents(model))
    model.config.thought_mode = "pause"
    assert max_difference(changed, logits_of(model, with_latents(model))) > 0.01


@pytest.mark.parametrize("model_type, tied", KINDS)
def test_a_checkpoint_opens_with_thoughts_and_as_the_plain_model(model_type, tied, tmp_path):
    """By a folder's name, saved, and loaded without code from the folder."""
    vlm, tokenizer = tiny_vlm(model_type, tied=tied)
    for part in (vlm, tokenizer):
        part.save_pretrained(tmp_path / "vlm")
    model = from_vlm(str(tmp_path / "vlm"), tokenizer=tokenizer, stop_head=True, thought_norm="projection")
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["architectures"] == [type(vlm).__name__] and values.keys() >= {*THOUGHT_FIELDS, "mmcoconut_version"}
    assert (tmp_path / "saved" / "vlm_mmcoconut.py").is_file()
    config = read_config(saved)
    assert type(config) is type(vlm.config) and config.stop_head and config.thought_norm == "projection"
    loaded = load_model(saved)
    assert type(loaded) is type(model)
    inputs = with_latents(model)
    assert max_difference(logits_of(loaded, inputs), logits_of(model, inputs)) <= 1e-6
    plain = AutoModelForImageTextToText.from_pretrained(saved, trust_remote_code=False)
    assert type(plain) is type(vlm)
    zero = {"input_ids": some_ids()}
    assert max_difference(logits_of(plain, zero), logits_of(loaded, zero)) == 0


REMOTE = """
import sys
sys.modules["mmcoconut"] = None  # importing the repository's package is an error from here on
import torch
from transformers import AutoModelForImageTextToText
folder, ids, logits = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert "vlm_mmcoconut" in type(model).__module__, type(model)
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, logits)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2_5_vl"])
def test_a_fresh_process_thinks_the_same_by_the_code_of_the_checkpoint(model_type, tmp_path):
    model = thinking(model_type, thought_norm="projection")
    model.save_pretrained(tmp_path / "saved")
    inputs = with_latents(model)
    torch.save(inputs["input_ids"], tmp_path / "ids.pt")
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REMOTE, *(str(tmp_path / name) for name in ("saved", "ids.pt", "logits.pt"))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert max_difference(torch.load(tmp_path / "logits.pt"), logits_of(model, inputs)) <= 1e-5


@pytest.mark.parametrize("token", ["s", None])
def test_new_tokens_start_at_a_named_token_or_at_the_mean(token):
    vlm, tokenizer = tiny_vlm()
    embeddings, head = (layer.weight.detach().clone() for layer in (vlm.get_input_embeddings(), vlm.lm_head))
    row = slice(None) if token is None else [tokenizer.convert_tokens_to_ids(token)]
    model = from_vlm(vlm, tokenizer=tokenizer, new_token_init=token)
    for old, new in ((embeddings, model.get_input_embeddings().weight), (head, model.lm_head.weight)):
        assert max_difference(new[len(old) :], old[row].mean(dim=0).expand(3, -1)) <= 1e-6


def test_llamas_spare_tokens_become_the_thoughts_and_keep_their_ids(tmp_path):
    vlm, tokenizer = tiny_vlm("mllama")
    ids = tokenizer.convert_tokens_to_ids(list(SPARE_TOKENS["mllama"]))
    size = len(tokenizer)
    from_vlm(vlm, tokenizer=tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert each.convert_tokens_to_ids(list(THOUGHT_TOKENS)) == ids and len(each) == size
        text = f"a{''.join(THOUGHT_TOKENS)}b"
        assert each(text, add_special_tokens=False)["input_ids"][1:-1] == ids
        assert each.decode(ids, skip_special_tokens=True) == ""
    with pytest.raises(ValueError, match=r"has no <\|reserved_special_token_10\|> to be renamed"):
        from_vlm(tiny_vlm("mllama")[0], tokenizer=tokenizer_of("llava"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", None])
def test_weights_have_the_dtype_that_is_asked_for(dtype):
    vlm, tokenizer = tiny_vlm()
    model = from_vlm(vlm, tokenizer=tokenizer, dtype=dtype, stop_head=True)
    expected = torch.float32 if dtype is None else torch.bfloat16
    assert {weight.dtype for weight in model.parameters()} == {expected} == {model.dtype}
    assert model.config.dtype == (expected if dtype else model.config.dtype)


def test_ends_and_settings_of_generation_are_kept():
    vlm, tokenizer = tiny_vlm()
    vlm.generation_config.update(eos_token_id=[5], suppress_tokens=[7])
    settings = from_vlm(vlm, tokenizer=tokenizer).generation_config
    assert settings.eos_token_id == [5, tokenizer.eos_token_id] and settings.pad_token_id == tokenizer.pad_token_id
    assert settings.suppress_tokens[0] == 7 and len(settings.suppress_tokens) == 5


# --- what is refused -------------------------------------------------------------------------------------------------
def test_fields_that_are_not_of_thoughts_are_refused_with_a_remedy():
    vlm, tokenizer = tiny_vlm()
    for name, remedy in (
        ("image_size", "image_options of processor_from_vlm"),
        ("latent_token_id", "the tokenizer decides it"),
        ("thougt_norm", "did you mean 'thought_norm'"),
        ("projector_type", "what it takes are thought_mode"),
    ):
        with pytest.raises(ValueError, match=f"takes no '{name}'.*{remedy}"):
            from_vlm(vlm, tokenizer=tokenizer, **{name: 1})
    with pytest.raises(ValueError, match="has no tokenizer"):
        from_vlm(vlm)
    with pytest.raises(ValueError, match="new_token_init='nothing' is not a token"):
        from_vlm(vlm, tokenizer=tokenizer, new_token_init="nothing")
    with pytest.raises(ValueError, match="neither a folder that holds a config.json nor found"):
        from_vlm("/no/such/folder", tokenizer=tokenizer)


def test_a_model_that_thinks_already_is_refused(tmp_path):
    model = thinking()
    model.save_pretrained(tmp_path)
    for each in (model, str(tmp_path)):
        with pytest.raises(ValueError, match="has thoughts already: load it as it is"):
            from_vlm(each, tokenizer=tokenizer_of("llava"))


def test_a_plain_model_is_no_checkpoint_to_start_from(tmp_path):
    tiny_vlm()[0].save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match="is a 'llava', not an mmcoconut checkpoint.*start from this model with .*`vlm`"
    ):
        load_model(str(tmp_path))


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
REJECTED = {
    "blip": (BlipConfig(text_config=SMALL, vision_config={**SMALL, "image_size": 32}), "takes no inputs_embeds"),
    "bart": (BartConfig(d_model=16, encoder_layers=1, decoder_layers=1), "encoder-decoder"),
    "kosmos2": (
        Kosmos2Config(
            text_config={"embed_dim": 16, "layers": 1, "attention_heads": 2, "ffn_dim": 16, "vocab_size": 50},
            vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        ),
        "get_decoder|hidden_size|head",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_lacks_a_part_is_rejected_with_the_part(name):
    config, reason = REJECTED[name]
    assert re.search(reason, reason_against(config))


def test_reasons_are_given_for_configurations_classes_and_models():
    vlm, _ = tiny_vlm()
    assert [reason_against(each) for each in (vlm, vlm.config, type(vlm))] == [None, None, None]
    assert reason_against(Qwen2_5_VLForConditionalGeneration) is None
    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    with pytest.raises(ValueError, match="cannot take over a bart: .* encoder-decoder.*; take another"):
        from_vlm(BartForConditionalGeneration(config), tokenizer=tokenizer_of("llava"))


# --- the check -------------------------------------------------------------------------------------------------------
def prompt_of(model, tokenizer) -> dict:
    return {"input_ids": torch.tensor([checks._text_prompt(model, tokenizer)])}


def unchecked(model_type="llava", dtype=torch.float32):
    vlm, tokenizer = tiny_vlm(model_type)
    model = from_vlm(vlm, tokenizer=tokenizer, check=False, dtype=dtype)
    return model, prompt_of(model, tokenizer)


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_right_models_pass_in_each_dtype_and_stay_as_they_are(model_type, dtype):
    model, inputs = unchecked(model_type, dtype)
    model.train()
    model.config.thought_mode, passes = "pause", []
    model.get_decoder().layers[0].register_forward_hook(lambda *_: passes.append(1))
    checks.check_thoughts(model, inputs)
    assert model.training and model.config.thought_mode == "pause"
    assert all(weight.grad is None for weight in model.parameters())
    assert len(passes) == 6  # three of the whole text, and three pieces


def misled(model, change) -> None:
    """Let `change` lead every pass of the decoder astray: it gets and returns the arguments of the pass."""
    decoder = model.get_decoder()
    own = decoder.own_forward
    decoder.own_forward = lambda **inputs: own(**change(dict(inputs)))


def marks_not_cut(inputs: dict) -> dict:
    """The first columns' marks are read in every pass, as of an argument with one entry per token that nobody cuts."""
    embeds = inputs["inputs_embeds"]
    marks = torch.linspace(-1, 1, 60, dtype=embeds.dtype)[: embeds.shape[1], None]
    return {**inputs, "inputs_embeds": embeds + 0.5 * marks}


def mask_not_cut(inputs: dict) -> dict:
    """The mask of the first columns is read in every pass, so that later ones see a part of what they should."""
    embeds, cache = inputs["inputs_embeds"], inputs.get("past_key_values", inputs.get("cache"))
    length, past = embeds.shape[1], 0 if cache is None else int(cache.get_seq_length())
    mask = torch.ones(length, length + past, dtype=torch.bool).tril()[None, None]
    return {**inputs, "attention_mask": mask}


def positions_not_cut(inputs: dict) -> dict:
    return {**inputs, "position_ids": torch.arange(inputs["inputs_embeds"].shape[1])[None]}


BROKEN = {"marks": marks_not_cut, "mask": mask_not_cut, "positions": positions_not_cut}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_not_cut_is_found_in_each_dtype(broken, dtype):
    model, inputs = unchecked(dtype=dtype)
    misled(model, broken)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"the state of column \d+ of \d+ differs by .* may be rounding in {name}"):
        checks.check_thoughts(model, inputs)


def test_an_unknown_argument_with_an_entry_a_token_is_named():
    """It reaches the layers whole in every pass, so the shorter pieces do not fit it."""
    vlm, tokenizer = tiny_vlm()
    model = from_vlm(vlm, tokenizer=tokenizer, check=False)
    decoder = model.get_decoder()
    own_think, own = decoder.forward_with_thoughts, decoder.own_forward
    length = len(checks._text_prompt(model, tokenizer))
    decoder.forward_with_thoughts = lambda thoughts, **kw: own_think(thoughts, ple_marks=torch.ones(1, length), **kw)

    def marked(*, ple_marks=None, **inputs):
        marks = 0 if ple_marks is None else ple_marks[..., None]
        return own(**{**inputs, "inputs_embeds": inputs["inputs_embeds"] * marks})

    decoder.own_forward = marked
    match = r"it fails with RuntimeError: .* Its decoder takes ple_marks, with one entry per token.*check=False"
    with pytest.raises(ValueError, match=match):
        checks.check_thoughts(model, prompt_of(model, tokenizer))


def test_a_folder_without_a_processor_is_checked_by_a_text(tmp_path, caplog):
    for part in tiny_vlm():
        part.save_pretrained(tmp_path)
    assert isinstance(from_vlm(str(tmp_path)), ThinkingVLM)
    assert "not checked, because there is no processor" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "smolvlm", "paligemma"])
def test_a_processor_has_thoughts_behind_an_image_checked(model_type, dtype, caplog, monkeypatch):
    asked, check = [], checks.check_thoughts
    monkeypatch.setattr("mmcoconut.build.vlms.check_thoughts", lambda *given: (asked.append(given), check(*given)))
    vlm, processor = tiny_vlm_and_processor(model_type)
    from_vlm(vlm, processor=processor, dtype=dtype)
    ((model, inputs),) = asked
    assert "pixel_values" in inputs and int((inputs["input_ids"] == model.config.latent_token_id).sum()) == 2
    assert "not checked" not in caplog.text


def test_the_check_can_be_left_out(monkeypatch):
    def refuse(*args):
        raise AssertionError("checked")

    monkeypatch.setattr("mmcoconut.build.vlms.check_thoughts", refuse)
    thinking(check=False)
    with pytest.raises(AssertionError, match="checked"):
        thinking()


def test_a_model_that_rounding_turns_around_is_not_judged(caplog, monkeypatch):
    model, inputs = unchecked()
    misled(model, marks_not_cut)
    monkeypatch.setattr(checks, "TOO_MUCH", 0.0)
    checks.check_thoughts(model, inputs)
    assert "cannot be told in float32" in caplog.text


def test_prefixes_are_refused_with_what_to_do_instead():
    model = thinking("llava")
    for call in (lambda: model.prefill(some_ids()), lambda: model.generate(some_ids(), prefix=object())):
        with pytest.raises(
            NotImplementedError, match="LlavaForConditionalGeneration has no prefixes.*composed_from_vlm"
        ):
            call()


def test_a_whole_vision_language_model_is_no_backbone(tmp_path):
    write_tiny_vlm(tmp_path / "vlm", "gemma3")
    text = {"text_config": GPT2Config(n_embd=32, n_layer=1, n_head=2), "tokenizer": tiny_tokenizer()}
    with pytest.raises(ValueError, match="lacks .* weights of .*from_vlm"):
        from_backbones(str(tmp_path / "vlm"), vision_feature_select_strategy="full", **text)
    with pytest.raises(ValueError, match="is a gemma3, of which the language model is a part.*from_vlm"):
        from_backbones(vision_config=CLIPVisionConfig(hidden_size=48), text=str(tmp_path / "vlm"))
