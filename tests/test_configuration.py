"""The configuration: refuses what cannot work, saves and loads without a change, and nests any configuration."""

import json

import pytest
from tiny import TEXT_CONFIGS, TOWER_STRATEGIES, VISION_CONFIGS, tiny_model, tiny_tokenizer
from transformers import AutoConfig, CLIPVisionConfig, GPT2Config

from mmcoconut.build.tokens import add_special_tokens
from mmcoconut.configuration_mmcoconut import CHOICES, SPECIAL_TOKENS, TOKEN_ID_FIELDS, MMCoconutConfig


IDS = dict(zip(TOKEN_ID_FIELDS, (10, 11, 12, 13)))
OTHER_VALUES = {
    "image_fusion": "add",
    "projector_type": "transformer",
    "projector_hidden_act": "relu",
    "projector_num_heads": 4,
    "vision_feature_layer": [-2, -1],
    "vision_feature_select_strategy": "full",
    "image_seq_length": 7,
    "thought_mode": "pause",
    "thought_norm": "projection",
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    **IDS,
}


def tiny_config(**values):
    return MMCoconutConfig(vision_config=VISION_CONFIGS["clip"](), text_config=TEXT_CONFIGS["llama"](), **values)


@pytest.mark.parametrize("field", CHOICES)
def test_a_value_outside_its_choices_is_refused_with_the_choices(field):
    with pytest.raises(ValueError, match=f"{field}='nonsense' is not one of {', '.join(CHOICES[field])}"):
        tiny_config(**{field: "nonsense"})
    for choice in CHOICES[field]:
        needs = {"jacobi_iterations": 2} if choice == "jacobi" else {}
        assert getattr(tiny_config(**{field: choice}, **needs), field) == choice


@pytest.mark.parametrize("field", TOKEN_ID_FIELDS)
@pytest.mark.parametrize("token_id", [-1, 32000])
def test_a_token_outside_the_vocabulary_is_refused_with_both_numbers(field, token_id):
    with pytest.raises(ValueError, match=f"{field}={token_id} is outside text_config.vocab_size=32000"):
        tiny_config(**{**IDS, field: token_id})
    assert getattr(tiny_config(**{field: 31999}), field) == 31999


def test_two_tokens_with_one_id_are_refused():
    with pytest.raises(ValueError, match="latent_token_id and image_token_id are both 10"):
        tiny_config(**{**IDS, "latent_token_id": 10})


def test_heads_that_do_not_divide_the_width_are_refused_only_where_they_are_used():
    with pytest.raises(ValueError, match="projector_num_heads=5 does not divide text_config.hidden_size=32"):
        tiny_config(projector_type="transformer", projector_num_heads=5)
    assert tiny_config(projector_type="mlp", projector_num_heads=5).projector_num_heads == 5


@pytest.mark.parametrize("layers", [3, -4, [-1, 3], [-4]])
def test_a_layer_that_the_tower_lacks_is_refused(layers):
    with pytest.raises(ValueError, match=r"vision_feature_layer=(3|-4) does not exist in a vision tower of 2 layers"):
        tiny_config(vision_feature_layer=layers)
    assert tiny_config(vision_feature_layer=[-3, 2]).vision_feature_layer == [-3, 2]


@pytest.mark.parametrize("values", [{"image_fusion": 3}, {"image_seq_length": "four"}, {"initializer_range": None}])
def test_a_value_of_the_wrong_type_is_refused(values):
    with pytest.raises(Exception, match=f"Validation error for field '{next(iter(values))}'"):
        tiny_config(**values)


def test_saved_and_loaded_configuration_is_the_same(tmp_path):
    config = tiny_config(**OTHER_VALUES)
    config.save_pretrained(tmp_path)
    loaded = MMCoconutConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for field, value in OTHER_VALUES.items():
        assert getattr(loaded, field) == value
    assert type(loaded.text_config) is type(config.text_config)
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()


def test_saved_configuration_says_which_class_loads_it(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "mmcoconut"
    assert saved["mmcoconut_version"]
    assert {name: path.split(".")[0] for name, path in saved["auto_map"].items()} == {
        "AutoConfig": "configuration_mmcoconut",
        "AutoModel": "modeling_mmcoconut",
        "AutoModelForImageTextToText": "modeling_mmcoconut",
        "AutoModelForCausalLM": "modeling_mmcoconut",
    }


@pytest.mark.parametrize("text_type", ["gpt2", "qwen2", "llama", "opt", "gpt_neox", "mistral", "phi"])
@pytest.mark.parametrize(
    "vision_type", ["clip_vision_model", "siglip_vision_model", "vit", "dinov2", "internvl_vision"]
)
def test_configurations_of_any_type_nest_as_objects_and_as_dictionaries(tmp_path, vision_type, text_type):
    vision, text = AutoConfig.for_model(vision_type), AutoConfig.for_model(text_type)
    config = MMCoconutConfig(vision_config=vision, text_config=text)
    from_dicts = MMCoconutConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    assert from_dicts.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = MMCoconutConfig.from_pretrained(tmp_path)
    assert (loaded.vision_config.model_type, loaded.text_config.model_type) == (vision_type, text_type)
    assert loaded.to_dict() == config.to_dict()
    assert config.get_text_config(decoder=True) is config.text_config


def test_without_arguments_it_is_clip_and_gpt2():
    config = MMCoconutConfig()
    assert isinstance(config.vision_config, CLIPVisionConfig)
    assert isinstance(config.text_config, GPT2Config)
    assert config.image_seq_length == (config.vision_config.image_size // config.vision_config.patch_size) ** 2


@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_tied_as_the_language_model_says(tied):
    text = TEXT_CONFIGS["qwen2"]()
    text.tie_word_embeddings = tied
    assert MMCoconutConfig(text_config=text).tie_word_embeddings == tied


@pytest.mark.parametrize("vision, strategy", TOWER_STRATEGIES)
def test_image_seq_length_is_what_the_tower_gives(vision, strategy):
    model = tiny_model(vision=vision, vision_feature_select_strategy=strategy)
    has_class_token = vision != "siglip"
    assert model.config.image_seq_length == 4 + has_class_token - (strategy == "default")


def test_special_tokens_are_added_once_and_the_pad_token_where_there_is_none():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<keep>"]})
    length = len(tokenizer)
    add_special_tokens(tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(length, length + 4))
    assert tokenizer.pad_token == "<|pad|>"
    assert "<keep>" in tokenizer.all_special_tokens
    add_special_tokens(tokenizer)
    assert len(tokenizer) == length + 5
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    add_special_tokens(tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token
