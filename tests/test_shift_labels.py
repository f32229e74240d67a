"""Labels that come shifted, as context parallelism and padding-free collators prepare them."""

import pytest
import torch
from tiny import batch_of, last_labels, max_difference, ragged_batch, seq2seq_batch, tiny_model, tiny_seq2seq, words


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


@pytest.mark.parametrize("num_items", [None, 17])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_labels", [True, False])
def test_shifted_labels_give_the_loss_and_gradients_of_the_labels(with_labels, training, num_items):
    model = tiny_model("qwen2").train(training)
    batch = ragged_batch(model)
    labels = last_labels(batch)
    options = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    expected = model(**batch, labels=labels, **options).loss
    found = model(**batch, shift_labels=shifted(labels), labels=labels if with_labels else None, **options).loss
    assert found.item() == expected.item()
    gradients = [torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in (found, expected)]
    assert max_difference(*gradients) == 0


def test_shifted_labels_replace_those_beside_them():
    model = tiny_model()
    batch = ragged_batch(model)
    labels = last_labels(batch)
    others = torch.where(labels == -100, labels, 7)
    loss = model(**batch, labels=labels, shift_labels=shifted(others)).loss
    assert loss.item() == model(**batch, labels=others).loss.item() != model(**batch, labels=labels).loss.item()


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_latent_after_the_last_shifted_label_is_refused(with_labels):
    model = tiny_model()
    latent = model.config.latent_token_id
    batch = batch_of(model, [[*words(4, 1), latent, latent]])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 3:5] = 7
    given = {"labels": labels} if with_labels else {}
    with pytest.raises(ValueError, match=r"Row 0 .* last labelled token \(column 4\)"):
        model(**batch, **given, shift_labels=shifted(labels))
    behind = shifted(labels)
    behind[0, -1] = 7  # the label of a column that another process has
    assert model(**batch, **given, shift_labels=behind).loss.isfinite()


def test_an_encoder_decoder_refuses_shifted_labels():
    model = tiny_seq2seq()
    batch = seq2seq_batch(model)
    with pytest.raises(ValueError, match="not shifted"):
        model(**batch, labels=batch["decoder_input_ids"], shift_labels=batch["decoder_input_ids"])
