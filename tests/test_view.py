"""A view of the thoughts against the states of the whole call; given thoughts against their definition."""

import pytest
import torch
from test_vlm_calls import prompt, thinking_pair
from tiny import max_difference, ragged_batch, seq2seq_batch, tiny_model, tiny_seq2seq


MODELS = ("gpt2", "qwen2", "cross_attention", "seq2seq", "qwen2_5_vl")


def model_and_batch(name: str) -> tuple:
    """Return a tiny model and rows with different numbers of latents, at least where rows are ragged."""
    if name == "seq2seq":
        model = tiny_seq2seq()
        return model, seq2seq_batch(model)
    if name == "qwen2_5_vl":
        model, processor = thinking_pair(name)
        return model, prompt(processor)
    model = tiny_model("gpt2", image_fusion=name) if name == "cross_attention" else tiny_model(name)
    return model, ragged_batch(model)


def latents_of(model, batch: dict) -> torch.Tensor:
    ids = batch["decoder_input_ids"] if "decoder_input_ids" in batch else batch["input_ids"]
    return ids == model.config.latent_token_id


@pytest.mark.parametrize("name", MODELS)
def test_a_view_holds_the_states_around_each_latent(name):
    model, batch = model_and_batch(name)
    latents = latents_of(model, batch)  # (B, T)
    view = model(**batch, output_view=True, output_hidden_states=True).view
    assert torch.equal(view.mask.sum(dim=1), latents.sum(dim=1))
    found = set(zip(*(part.tolist() for part in (view.mask.nonzero()[:, 0], view.columns[view.mask]))))
    assert found == set(map(tuple, latents.nonzero().tolist()))
    for row, place in view.mask.nonzero().tolist():
        column = int(view.columns[row, place])
        assert torch.equal(view.before[row, place], view.states[row, column - 1])
        assert torch.equal(view.thoughts[row, place], view.read[row, column])
        assert torch.equal(view.after[row, place], view.states[row, column])
        assert torch.equal(view.thoughts[row, place], view.before[row, place])  # thought_norm is none
    assert not view.before[~view.mask].any() and not view.after[~view.mask].any()
    assert len(view.hidden_states) > 1 and view.hidden_states[-1].shape == view.states.shape
    assert torch.equal(view.head(view.states), model(**batch).logits)


@pytest.mark.parametrize("model_type", ["gemma4", "paligemma", "granite_docling", "hyperclovax_vision_v2"])
def test_a_views_head_caps_and_scales_logits_as_the_models_own_class_does(model_type):
    model, processor = thinking_pair(model_type)
    config = model.config.get_text_config()
    config.final_logit_softcapping, config.logits_scaling = 0.05, 3.0
    with torch.no_grad():
        outputs = model(**prompt(processor), output_view=True)
        plain = model.get_output_embeddings()(outputs.view.states)
    assert max_difference(outputs.view.head(outputs.view.states), outputs.logits) < 1e-6
    assert max_difference(plain, outputs.logits) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_a_views_states_have_gradients(name):
    model, batch = model_and_batch(name)
    view = model(**batch, output_view=True).view
    weights = [weight for weight in model.get_decoder().parameters() if weight.requires_grad]
    for part in (view.before, view.thoughts, view.after):
        gradients = torch.autograd.grad(part[view.mask].square().sum(), weights, retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["gpt2", "qwen2_5_vl"])
def test_image_features_are_those_that_the_decoder_read(name):
    model, batch = model_and_batch(name)
    view = model(**batch, output_view=True).view
    features, mask = view.image_features()
    is_image = batch["input_ids"] == model.config.image_token_id
    assert torch.equal(mask.sum(dim=1), is_image.sum(dim=1))
    assert torch.equal(features[mask], view.read[is_image])
    plain = model.get_input_embeddings()(batch["input_ids"])
    assert (features[mask] != plain[is_image]).any(dim=1).all()


@pytest.mark.parametrize("name", ["cross_attention", "seq2seq"])
def test_images_beside_the_text_are_no_columns(name):
    model, batch = model_and_batch(name)
    with pytest.raises(ValueError, match="reads its images by cross-attention or in an encoder"):
        model(**batch, output_view=True).view.image_features()


def some_vectors(latents: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return vectors (B, N, D), and True for the first latent of each row alone (B, N)."""
    shape = len(latents), int(latents.sum(dim=1).max())
    vectors = torch.randn(*shape, width, generator=torch.Generator().manual_seed(1))
    where = torch.zeros(shape, dtype=torch.bool)
    where[:, 0] = True
    return vectors, where & (torch.arange(shape[1]) < latents.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_given_thoughts_are_read_and_the_others_are_thought_from_there(name, tolerance):
    """Equal to thoughts that are replaced one by one, as the audit does; a batch with all of them given takes one
    pass."""
    model, batch = model_and_batch(name)
    model.eval()
    latents = latents_of(model, batch)  # (B, T)
    vectors, where = some_vectors(latents, model.config.get_text_config().hidden_size)
    if name == "qwen2_5_vl":  # of one row, whose second latent is thought
        assert latents.sum() == 2
    with torch.no_grad():
        view = model(**batch, output_view=True, given_thoughts=lambda read, image_mask: (vectors, where)).view
        assert torch.equal(view.thoughts[where], vectors[where])
        for row, place in (view.mask & ~where).nonzero().tolist():
            assert torch.equal(view.thoughts[row, place], view.before[row, place])
        again = model(**batch, output_view=True, given_thoughts=lambda *_: (view.thoughts, view.mask)).view
    real = batch["decoder_attention_mask" if "decoder_attention_mask" in batch else "attention_mask"].bool()
    assert max_difference(again.states[real], view.states[real]) < tolerance
    assert torch.equal(again.mask, view.mask)


def test_all_given_is_one_pass_and_gradients_reach_what_was_given():
    model, batch = model_and_batch("gpt2")
    latents, calls = latents_of(model, batch), []
    vectors, _ = some_vectors(latents, model.config.text_config.hidden_size)
    vectors.requires_grad_()
    everywhere = torch.ones(vectors.shape[:2], dtype=torch.bool)
    handle = model.get_decoder().h[0].register_forward_hook(lambda *_: calls.append(1))
    view = model(**batch, output_view=True, given_thoughts=lambda *_: (vectors, everywhere)).view
    handle.remove()
    assert len(calls) == 1
    view.states.square().sum().backward()
    assert (vectors.grad.abs().sum(dim=-1) > 0)[view.mask].all() and not vectors.grad[~view.mask].any()


def test_given_thoughts_of_another_shape_are_refused():
    model, batch = model_and_batch("gpt2")
    vectors, where = some_vectors(latents_of(model, batch), model.config.text_config.hidden_size)
    with pytest.raises(ValueError, match=r"given_thoughts returned vectors .* but this call has 4 rows with up to"):
        model(**batch, given_thoughts=lambda *_: (vectors[:, 1:], where))
