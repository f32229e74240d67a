"""What the audit reads in thoughts, against values worked out by hand and against plain forward passes.

Shapes: n rows, N thoughts a row, D hidden, L layers, P image features.
"""

import json
import math
import sys

import pytest
import torch
from PIL import Image
from tiny import (
    DECODERS,
    NUM_FEATURES,
    batch_of,
    max_difference,
    rows_alone,
    tiny_image,
    tiny_model,
    tiny_processor,
    uncached,
    words,
)
from transformers import AutoModel, OpenAIGPTConfig, OPTConfig

from mmcoconut.audit.thought_pictures import HEAT, geometry_figure, heat_map, probe_figure, thought_strip
from mmcoconut.audit.thoughts import (
    MAX_CLASSES,
    MIN_ROWS,
    final_norm,
    geometry,
    held_out_half,
    lens_text,
    linear_probe,
    probe_targets,
    read_thoughts,
    wilson_interval,
)
from mmcoconut.data.image_grids import picture_grid


NUM_THOUGHTS = 3


def prompt_rows(config) -> list[list[int]]:
    """Rows of different lengths with NUM_THOUGHTS latents: one image; two images; none, and latents apart."""
    image = [config.image_token_id] * config.image_seq_length
    latent, start, end = config.latent_token_id, config.start_latent_token_id, config.end_latent_token_id
    return [
        [*image, *words(4, 1), start, latent, latent, latent, end],
        [*words(2, 3), *image, *words(1, 4), *image, *words(3, 5), start, latent, latent, latent],
        [*words(5, 6), start, latent, *words(2, 7), latent, latent, end, *words(2, 8)],
    ]


def prompts(model, padding="left") -> dict:
    return batch_of(model, prompt_rows(model.config), padding=padding)


def real_columns(batch, row: int) -> list[int]:
    return batch["attention_mask"][row].nonzero().flatten().tolist()


def latent_columns(model, batch, row: int) -> list[int]:
    return (batch["input_ids"][row] == model.config.latent_token_id).nonzero().flatten().tolist()


@pytest.mark.parametrize("tolerance", [1e-12])
def test_geometry_of_vectors_worked_by_hand(tolerance):
    thoughts = torch.tensor(
        [
            [[3.0, 4.0], [1.0, 0.0]],
            [[3.0, 4.0], [0.0, 1.0]],
            [[6.0, 8.0], [-1.0, 0.0]],
        ]
    )  # norms 5, 5, 10 and 1, 1, 1
    result = geometry(thoughts, torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    expected = {
        "norm_mean": [20 / 3, 1.0],
        "norm_std": [math.sqrt(50 / 9), 0.0],
        "norm_ratio": [20 / 9, 1 / 3],
        "embedding_norm_mean": 3.0,
        "embedding_norm_std": 1.0,
        "cosine_to_next": [(0.6 + 0.8 - 0.6) / 3],
        "cosine_across_rows": [1.0, -1 / 3],  # pairs 0, −1, 0
        # Position 0 varies along one direction. Position 1: variances 2 and 2/3 of 8/3, so p = 3/4, 1/4.
        "effective_rank": [1.0, 4 / 3**0.75],
    }
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, abs=tolerance), key
    assert result["collapsed"] == [0]
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("tolerance", [1e-12])
def test_cosine_across_rows_is_the_mean_over_all_pairs(tolerance):
    thoughts = torch.randn(7, 2, 5)
    cosines = torch.nn.functional.cosine_similarity(thoughts[:, None].double(), thoughts[None].double(), dim=-1)
    others = ~torch.eye(7, dtype=torch.bool)
    expected = [cosines[..., position][others].mean().item() for position in range(2)]
    assert geometry(thoughts, thoughts[0])["cosine_across_rows"] == pytest.approx(expected, abs=tolerance)


def test_equal_thoughts_have_no_rank_and_are_collapsed():
    result = geometry(torch.randn(1, 2, 8).expand(30, 2, 8), torch.randn(5, 8))
    assert result["effective_rank"] == [0.0, 0.0] and result["collapsed"] == [0, 1]


@pytest.mark.parametrize("tolerance", [0.1])
def test_isotropic_thoughts_have_nearly_full_rank(tolerance):
    result = geometry(torch.randn(4000, 1, 6), torch.randn(5, 6))
    assert result["effective_rank"] == pytest.approx([6.0], abs=tolerance)
    assert abs(result["cosine_across_rows"][0]) < 0.01 and result["collapsed"] == []


def test_geometry_refuses_one_row_and_numbers_that_are_not_finite():
    with pytest.raises(ValueError, match="got 1: give"):
        geometry(torch.ones(1, 2, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="1 of the 12 numbers"):
        geometry(torch.tensor([[[math.inf, *[1.0] * 5]], [[1.0] * 6]]), torch.ones(4, 6))


@pytest.mark.parametrize("text, name", [("gpt2", "ln_f"), ("qwen2", "norm"), ("llama", "norm")])
def test_final_norm_is_the_decoders_own(text, name):
    decoder = tiny_model(text).get_decoder()
    assert final_norm(decoder) is getattr(decoder, name)
    assert not any(module._forward_hooks for module in decoder.children())


def test_final_norm_may_lie_deeper_and_is_the_identity_after_post_norm_layers():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    deeper = AutoModel.from_config(OPTConfig(ffn_dim=16, word_embed_proj_dim=16, **sizes)).eval()
    assert final_norm(deeper) is deeper.decoder.final_layer_norm
    post_norm = AutoModel.from_config(OpenAIGPTConfig(n_embd=16, n_layer=2, n_head=2, vocab_size=50)).eval()
    assert isinstance(final_norm(post_norm), torch.nn.Identity)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_lens_at_the_last_layer_is_what_the_model_would_write_there(text, padding, tolerance):
    model = tiny_model(text)
    batch = prompts(model, padding)
    readings = read_thoughts(model, batch, top_k=4)
    with torch.no_grad():
        probabilities = model(**batch).logits.softmax(dim=-1)  # (n, T, V)
    for row in range(3):
        columns = [column - 1 for column in latent_columns(model, batch, row)] + [real_columns(batch, row)[-1]]
        expected = probabilities[row, columns].topk(4)  # (N + 1, 4)
        assert torch.equal(readings.tokens[row, :, -1], expected.indices)
        assert max_difference(readings.probabilities[row, :, -1], expected.values) <= tolerance


@pytest.mark.parametrize("text, name", [("gpt2", "ln_f"), ("qwen2", "norm"), ("llama", "norm")])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_lens_of_a_layer_is_head_of_final_norm_of_its_state(text, name, tolerance):
    model = tiny_model(text)
    batch = prompts(model)
    readings = read_thoughts(model, batch)
    norm = getattr(model.get_decoder(), name)
    with torch.no_grad():
        hidden_states = model(**batch, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            expected = model.lm_head(norm(hidden_states[layer])).softmax(dim=-1)  # (n, T, V)
            for row in range(3):
                columns = [column - 1 for column in latent_columns(model, batch, row)]
                best = expected[row, columns].topk(5)
                assert torch.equal(readings.tokens[row, :-1, layer], best.indices)
                assert max_difference(readings.probabilities[row, :-1, layer], best.values) <= tolerance
    assert readings.tokens.shape == (3, NUM_THOUGHTS + 1, 3, 5)  # the embeddings and two layers


def test_layer_0_is_what_the_first_layer_reads():
    model = tiny_model("qwen2", tie_word_embeddings=False)
    model.lm_head.weight.data = model.get_input_embeddings().weight.data  # now a token's own state decodes to itself
    readings = read_thoughts(model, prompts(model))
    assert readings.tokens[0, 0, 0, 0] == readings.tokens[2, 0, 0, 0] == model.config.start_latent_token_id


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_padded_rows_read_as_rows_alone(text, tolerance):
    model = tiny_model(text)
    batch = prompts(model)
    together = read_thoughts(model, batch)
    for row, alone in enumerate(read_thoughts(model, single) for single in rows_alone(model, batch)):
        assert torch.equal(together.tokens[row], alone.tokens[0])
        assert max_difference(together.probabilities[row], alone.probabilities[0]) <= tolerance
        assert max_difference(together.thoughts[row], alone.thoughts[0]) <= tolerance
        assert together.image_attention[row].shape == alone.image_attention[0].shape
        assert torch.allclose(together.image_attention[row], alone.image_attention[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_attention_is_that_of_one_plain_pass_over_the_filled_sequence(text, padding, tolerance):
    model = tiny_model(text)
    batch = prompts(model, padding)
    readings = read_thoughts(model, batch)
    model.set_attn_implementation("eager")
    with torch.no_grad(), uncached(model):
        outputs = model(**batch, use_cache=False, output_attentions=True)
    maps = outputs.cross_attentions or outputs.attentions  # (n, H, T, keys) each
    for row, num_images in enumerate([1, 2, 0]):
        latents = latent_columns(model, batch, row)
        images = (batch["input_ids"][row] == model.config.image_token_id).nonzero().flatten()  # (P,)
        if outputs.cross_attentions:
            images = torch.arange(NUM_FEATURES * num_images)  # (P,)
        expected = torch.stack([layer[row].mean(dim=0)[latents][:, images] for layer in maps])  # (L, N, P)
        assert expected.shape == (2, NUM_THOUGHTS, NUM_FEATURES * num_images)
        assert torch.allclose(readings.image_attention[row], expected, rtol=0, atol=tolerance)
        assert torch.allclose(readings.image_map(row), expected.mean(dim=0), rtol=0, atol=tolerance)
        assert torch.allclose(readings.image_share(row), expected.mean(dim=0).sum(dim=-1), rtol=0, atol=tolerance)
    assert readings.image_share(0).min() > 0.01 and readings.image_share(2).max() == 0


def test_attention_implementation_is_as_before_also_after_an_error():
    model = tiny_model()
    before = model.get_decoder().config._attn_implementation
    assert before != "eager"
    assert read_thoughts(model, prompts(model), attention=False).image_attention is None
    read_thoughts(model, prompts(model))
    assert model.get_decoder().config._attn_implementation == before
    broken = {**prompts(model), "pixel_values": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(ValueError, match="image features"):
        read_thoughts(model, broken)
    assert model.get_decoder().config._attn_implementation == before


@pytest.mark.parametrize("tolerance", [1e-5])
def test_thoughts_are_the_models_own(tolerance):
    model = tiny_model(thought_norm="embedding")
    batch = prompts(model)
    with torch.no_grad():
        expected = model(**batch, output_thoughts=True).thoughts
    assert max_difference(read_thoughts(model, batch).thoughts, expected) <= tolerance


def test_readings_take_what_the_processor_gives_and_turn_to_text():
    model = tiny_model()
    processor = tiny_processor(model, num_latents=2)
    inputs = processor(images=[tiny_image(0), tiny_image(1)], text=["Which shape?", "What?"], return_tensors="pt")
    readings = read_thoughts(model, inputs)
    texts = lens_text(readings, processor.tokenizer, 1)
    assert len(texts) == 3
    for number, text in enumerate(texts):
        token, probability = readings.tokens[1, number, -1, 0], readings.probabilities[1, number, -1, 0]
        assert text == f"{processor.tokenizer.decode([token]).strip()} {100 * probability:.0f} %"
    readings.tokens[1, 0, -1, 0] = processor.tokenizer.encode("\n")[0]
    assert lens_text(readings, processor.tokenizer, 1)[0].startswith("\\n ")


def test_readings_refuse_ragged_latents_and_training():
    model = tiny_model()
    rows = prompt_rows(model.config)
    with pytest.raises(ValueError, match=r"\[3, 2\] latents"):
        read_thoughts(model, batch_of(model, [rows[0], rows[0][:-2]]))
    with pytest.raises(ValueError, match="training mode"):
        read_thoughts(model.train(), prompts(model))


def encoded_thoughts(codes: torch.Tensor, noise: float = 0.1) -> torch.Tensor:
    """(n, N, 8) thoughts of which position j holds a code for class codes[:, j]; nothing else."""
    directions = torch.eye(8)[: int(codes.max()) + 1]  # one a class
    return directions[codes] + noise * torch.randn(*codes.shape, 8)


def as_targets(codes: torch.Tensor) -> list[list[str]]:
    return [[f"cell {code}" for code in row] for row in codes.tolist()]


def test_probe_finds_target_k_in_thought_k_and_nowhere_else():
    codes = torch.randint(0, 4, (400, 3))
    result = linear_probe(encoded_thoughts(codes), as_targets(codes), names=["step 1", "step 2", "answer"])
    assert result["targets"] == ["step 1", "step 2", "answer"] and result["reasons"] == [None] * 3
    assert result["n_train"] == result["n_test"] == [200] * 3 and result["n_classes"] == [4] * 3
    for j in range(3):
        for k in range(3):
            if j == k:
                assert result["accuracy"][j][k] > 0.98
                assert result["interval"][j][k][0] > 0.95
            else:
                assert abs(result["accuracy"][j][k] - 0.25) < 0.12
            assert result["shuffled"][j][k] < 0.45
            low, high = result["interval"][j][k]
            assert low <= result["accuracy"][j][k] <= high
    assert json.loads(json.dumps(result)) == result


def test_probe_of_random_thoughts_is_no_better_than_its_baselines():
    codes = (torch.rand(400, 1) > 0.3).long()
    result = linear_probe(torch.randn(400, 2, 8), as_targets(codes))
    held_out = torch.tensor(held_out_half(range(400), 0))
    counts = codes[held_out].flatten().bincount()
    assert result["majority"] == [pytest.approx(counts.max().item() / 200)]
    for position in range(2):
        assert result["accuracy"][position][0] < result["majority"][0] + 0.05
        assert result["accuracy"][position][0] == pytest.approx(result["shuffled"][position][0], abs=0.12)


def test_probe_gives_the_same_numbers_each_time():
    codes = torch.randint(0, 3, (60, 1))
    thoughts = encoded_thoughts(codes, noise=1.0)
    first = linear_probe(thoughts, as_targets(codes))
    torch.rand(3)
    assert linear_probe(thoughts, as_targets(codes)) == first
    assert linear_probe(thoughts, as_targets(codes), seed=1) != first


def test_halves_share_no_group():
    groups = [f"picture {number % 37}" for number in range(200)]
    held_out = held_out_half(groups, 0)
    inside = {group for group, out in zip(groups, held_out) if out}
    outside = {group for group, out in zip(groups, held_out) if not out}
    assert not inside & outside and len(inside) == 18 and len(outside) == 19


def test_groups_keep_the_probe_from_remembering_rows():
    """Random thoughts and labels, each row four times: without groups the copies leak."""
    labels, thoughts = torch.randint(0, 2, (60, 1)).repeat(4, 1), torch.randn(60, 1, 100).repeat(4, 1, 1)
    leaked = linear_probe(thoughts, as_targets(labels))
    grouped = linear_probe(thoughts, as_targets(labels), groups=[number % 60 for number in range(240)])
    assert leaked["accuracy"][0][0] > 0.85
    assert grouped["accuracy"][0][0] < 0.7


def test_probe_says_why_it_refuses_a_target():
    rows = 2 * (MAX_CLASSES + 1)
    many = [f"c{row}" for row in range(rows)]
    few = ["a" if row % 2 else "b" for row in range(MIN_ROWS)] + [None] * (rows - MIN_ROWS)
    good = ["a" if row % 3 else "b" for row in range(rows)]
    result = linear_probe(torch.randn(rows, 2, 4), list(zip(many, few, ["a"] * rows, [None] * rows, good)))
    assert result["reasons"][0] == f"{rows} classes, more than {MAX_CLASSES}"
    assert result["reasons"][1] == f"{result['n_test'][1]} held-out rows, fewer than {MIN_ROWS}"
    assert result["n_test"][1] + result["n_train"][1] == MIN_ROWS
    assert result["reasons"][2] == "only one class in the training rows"
    assert result["reasons"][3] == f"0 held-out rows, fewer than {MIN_ROWS}"
    assert result["reasons"][4] is None
    for row in result["accuracy"]:
        assert row[:4] == [None] * 4 and row[4] is not None
    assert result["majority"][:4] == [None] * 4


def test_rows_without_a_target_are_left_out_of_its_column_only():
    codes = torch.randint(0, 4, (300, 2))
    targets = as_targets(codes)
    for row in range(0, 300, 3):
        targets[row][1] = None
    result = linear_probe(encoded_thoughts(codes), targets)
    assert result["n_train"][0] + result["n_test"][0] == 300 and result["n_train"][1] + result["n_test"][1] == 200
    assert result["accuracy"][0][0] > 0.98 and result["accuracy"][1][1] > 0.98


def test_probe_refuses_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="4 rows of thoughts, 3 of targets"):
        linear_probe(torch.ones(4, 1, 2), [["a"]] * 3)
    with pytest.raises(ValueError, match=r"\[1, 2\] targets"):
        linear_probe(torch.ones(2, 1, 2), [["a"], ["a", "b"]])


def test_wilson_interval_of_a_known_case():
    assert wilson_interval(0.9, 10) == pytest.approx([0.5958, 0.9821], abs=1e-4)
    assert wilson_interval(1.0, 20)[1] == 1.0 and wilson_interval(0.0, 20)[0] == 0.0


def test_targets_are_steps_and_answer():
    rows = [{"steps": ["A1", "B1"], "answers": ["red", "dark red"]}, {"steps": ["C3"], "answers": ["blue"]}]
    names, targets = probe_targets(rows)
    assert names == ["step 1", "step 2", "answer"]
    assert targets == [["A1", "B1", "red"], ["C3", None, "blue"]]


@pytest.mark.parametrize(
    "num_features, grid", [(1, (1, 1)), (9, (3, 3)), (10, (3, 3)), (49, (7, 7)), (50, (7, 7)), (12, None), (0, None)]
)
def test_grid_is_a_square_with_or_without_a_class_token(num_features, grid):
    assert picture_grid(num_features) == grid


def heat_of(picture: Image.Image, cell: tuple[int, int], *, grid_size: int) -> float:
    """How near a spot of a cell, away from its number, is to the heat's colour: 0 is equal."""
    row, column = cell
    spot = picture.getpixel(((column + 0.1) * picture.width / grid_size, (row + 0.1) * picture.height / grid_size))
    return math.dist(spot, HEAT)


@pytest.mark.parametrize("class_token", [False, True])
def test_the_hottest_cell_has_the_greatest_weight(class_token):
    weights = torch.full((9,), 0.05)
    weights[5] = 0.4  # row 1, column 2
    if class_token:
        weights = torch.cat([torch.tensor([0.9]), weights])  # has no place in the picture
    picture = heat_map(torch.randn(3, 48, 48), weights)
    assert picture.size == (240, 240)
    cells = [(row, column) for row in range(3) for column in range(3)]
    distances = {cell: heat_of(picture, cell, grid_size=3) for cell in cells}
    assert min(distances, key=distances.get) == (1, 2)
    assert distances[1, 2] < 0.6 * min(distance for cell, distance in distances.items() if cell != (1, 2))


def test_a_picture_without_heat_keeps_its_pixels_places():
    pixels = torch.zeros(3, 16, 16)
    pixels[0, :8, 8:] = 2.0  # red at the top right, in the processor's units
    picture = heat_map(pixels, torch.zeros(100))
    assert picture.getpixel((200, 20))[0] == 255 and picture.getpixel((200, 20))[1] < 160
    assert picture.getpixel((20, 20)) == picture.getpixel((200, 200)) != picture.getpixel((200, 20))


def test_heat_map_refuses_features_without_a_square():
    with pytest.raises(ValueError, match="12 image features"):
        heat_map(torch.zeros(3, 16, 16), torch.ones(12))


def test_a_strip_shows_the_first_image_with_one_scale():
    pixels = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    maps = torch.zeros(2, 18)
    maps[0, 0], maps[1, 8], maps[1, 9:] = 0.5, 0.25, 0.9  # the second image's features do not set the scale
    strip = thought_strip(pixels, maps, ["thought 1 · reads: B3 71 %", "thought 2 · reads: " + "red " * 30])
    assert strip.width == 2 * 240 + 8 and strip.height > 300
    first, second = strip.crop((0, 0, 240, 240)), strip.crop((248, 0, 488, 240))
    assert heat_of(first, (0, 0), grid_size=3) < heat_of(second, (2, 2), grid_size=3)
    assert heat_of(second, (2, 2), grid_size=3) < heat_of(second, (0, 0), grid_size=3)
    assert strip.crop((0, 240, 240, strip.height)).convert("L").getextrema() == (0, 255)  # black text on white


def test_a_strip_refuses_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="2 maps for 1 captions"):
        thought_strip(torch.zeros(1, 3, 16, 16), torch.zeros(2, 9), ["one"])
    with pytest.raises(ValueError, match="9 image features for 2 images"):
        thought_strip(torch.zeros(2, 3, 16, 16), torch.zeros(1, 9), ["one"])


def probe_result(accuracy: float) -> dict:
    return {
        "targets": ["step 1", "answer"],
        "accuracy": [[accuracy, None]],
        "interval": [[[0.0, 1.0], None]],
        "shuffled": [[0.5, None]],
        "majority": [0.5, None],
        "n_train": [20, 3],
        "n_test": [20, 3],
        "n_classes": [2, 3],
        "reasons": [None, "3 held-out rows, fewer than 20"],
    }


def test_probe_figure_shows_accuracy_as_brightness():
    def brightness(accuracy):
        picture = probe_figure(probe_result(accuracy)).convert("L")
        assert picture.width == 800
        return picture.getpixel((200, picture.height // 5))

    assert brightness(0.0) < brightness(0.5) < brightness(1.0)


@pytest.mark.parametrize("num_thoughts", [1, 4])
def test_geometry_figure_draws_any_number_of_thoughts(num_thoughts):
    blank = geometry_figure(geometry(torch.ones(5, num_thoughts, 8), torch.ones(5, 8)))
    drawn = geometry_figure(geometry(torch.randn(5, num_thoughts, 8), torch.ones(5, 8)))
    assert blank.size == drawn.size == (800, 600) and blank.tobytes() != drawn.tobytes()


@pytest.mark.parametrize(
    "module, call",
    [
        ("sklearn.linear_model", lambda: linear_probe(torch.randn(60, 1, 2), [["a"], ["b"]] * 30)),
        ("matplotlib.figure", lambda: geometry_figure(geometry(torch.randn(3, 1, 2), torch.ones(3, 2)))),
    ],
)
def test_missing_packages_are_named_with_the_remedy(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install mmcoconut\[audit\]"):
        call()
