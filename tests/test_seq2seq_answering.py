"""Around a seq2seq model: the processor's two sides, answers, readings of thoughts, the audit, adapters."""

import json

import numpy as np
import pytest
import torch
from tiny import (
    decoder_side,
    last_labels,
    max_difference,
    seq2seq_batch,
    seq2seq_rows_alone,
    tiny_image,
    tiny_processor,
    tiny_seq2seq,
    uncached,
)

from mmcoconut.audit import command as audit
from mmcoconut.audit.interventions import given, intervening, keep, recording, room_for_more, zero
from mmcoconut.audit.thoughts import eager_attention, read_thoughts
from mmcoconut.configuration_mmcoconut import LATENT_TOKEN, START_LATENT_TOKEN
from mmcoconut.data import load_examples
from mmcoconut.evaluation.answering import Answerer, load_checkpoint
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.seq2seq_mmcoconut import MMCoconutForSeq2SeqLM
from mmcoconut.training.collator import encode_target
from mmcoconut.training.lora import add_lora, merged_model


QUESTIONS = ["What colour is the left square?", "Which"]
NUM_LATENTS = 2


@pytest.fixture(scope="module")
def parts():
    """Model and processor that the tests below read and do not change."""
    model = tiny_seq2seq("attention_prefix")
    return model, tiny_processor(model, num_latents=NUM_LATENTS, markers="start")


@pytest.fixture(scope="module")
def rows():
    return list(load_examples("arrow_mazes", split="test", num_rows=4, cell_size=8))


def sides(processor, question: str, num_latents: int, *, num_images: int = 1) -> tuple[list[int], list[int]]:
    """What the encoder reads and what the decoder begins with, put together by hand."""
    tokenizer = processor.tokenizer
    latent = tokenizer.convert_tokens_to_ids(LATENT_TOKEN)
    start = tokenizer.convert_tokens_to_ids(START_LATENT_TOKEN)
    text = tokenizer.encode(f"{question}\n", add_special_tokens=False)
    encoder = [*[processor.image_token_id] * num_images, *text, tokenizer.eos_token_id]
    return encoder, [processor.decoder_start_token_id, start, *[latent] * num_latents]


@pytest.mark.parametrize("num_latents", [0, 1, 3, [3, 1]])
def test_the_encoder_gets_the_question_and_the_decoder_the_thoughts(parts, num_latents):
    _, processor = parts
    batch = processor(
        images=[tiny_image(), tiny_image(1)], text=QUESTIONS, num_latents=num_latents, return_tensors="pt"
    )
    counts = num_latents if isinstance(num_latents, list) else [num_latents] * 2
    for row, (question, count) in enumerate(zip(QUESTIONS, counts)):
        encoder, decoder = sides(processor, question, count)
        mask, decoder_mask = batch["attention_mask"][row], batch["decoder_attention_mask"][row]
        assert batch["input_ids"][row][mask.bool()].tolist() == encoder
        assert batch["decoder_input_ids"][row][decoder_mask.bool()].tolist() == decoder
        assert mask[0] == 1 and decoder_mask[-1] == 1  # padded behind the question, before the thoughts
    assert (batch["input_ids"][1] == processor.tokenizer.pad_token_id).sum() > 0


@pytest.mark.parametrize("return_tensors", ["pt", None])
@pytest.mark.parametrize("num_latents", [0, 3])
def test_a_chat_gives_what_the_call_gives(parts, num_latents, return_tensors):
    _, processor = parts
    images = [tiny_image(), tiny_image(1)]
    options = {"num_latents": num_latents, "return_tensors": return_tensors}
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, QUESTIONS)
    ]
    chat = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, **options}
    expected = processor(images=images, text=QUESTIONS, **options)
    found = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **chat)
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name
    text_alone = [[{"role": "user", "content": [{"type": "text", "text": "Which"}]}]]
    found = processor.apply_chat_template(text_alone, **chat)
    expected = processor(text=["Which"], **options)
    assert {name: type(value) for name, value in found.items()} == {name: type(v) for name, v in expected.items()}
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_chat_with_an_answer_is_refused(parts):
    """Its thoughts and its answer would be read by the encoder."""
    chat = [{"role": "user", "content": "Which"}, {"role": "assistant", "content": "### red"}]
    with pytest.raises(ValueError, match="has text after its thoughts"):
        parts[1].apply_chat_template([chat], tokenize=True, return_dict=True)


def test_a_saved_processor_gives_the_same(parts, tmp_path):
    _, processor = parts
    processor.save_pretrained(tmp_path)
    loaded = MMCoconutProcessor.from_pretrained(tmp_path, backend="pil")
    call = {"images": [tiny_image(), tiny_image(1)], "text": QUESTIONS, "num_latents": [1, 3], "return_tensors": "pt"}
    expected, found = processor(**call), loaded(**call)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert loaded.prompt_names == ("decoder_input_ids", "decoder_attention_mask")


def test_answers_are_what_is_generated_after_the_prompt(parts, rows):
    model, processor = parts
    answerer = Answerer(model, processor, max_new_tokens=5)
    inputs = answerer.inputs(rows)
    assert (inputs["decoder_input_ids"] == model.config.latent_token_id).sum(dim=1).tolist() == [NUM_LATENTS] * 4
    with uncached(model):
        sequences = model.generate(**inputs, max_new_tokens=5, use_cache=False)
    texts = processor.tokenizer.batch_decode(sequences[:, inputs["decoder_input_ids"].shape[1] :], True)
    answers = answerer.answer(rows)
    assert [answer["output"] for answer in answers] == texts
    assert [answer["output"] for row in rows for answer in answerer.answer([row])] == texts
    begun = Answerer(model, processor, max_new_tokens=5, begin_with="###").answer(rows)
    assert all(answer["output"].startswith("###") for answer in begun)


@pytest.mark.parametrize("tolerance", [1e-4])
def test_log_probabilities_of_choices_equal_a_forward_by_hand(parts, rows, tolerance):
    """Tolerance: sums over a choice's tokens, of size 10."""
    model, processor = parts
    row = {**rows[0], "choices": ["red", "a blue cube", "1"]}
    answerer = Answerer(model, processor)
    inputs = answerer.inputs([row])
    prompt = inputs["decoder_input_ids"]
    found = answerer.choice_log_probs(row)
    for choice, (log_prob, num_tokens) in zip(row["choices"], found, strict=True):
        target = torch.tensor([encode_target(processor, [], choice)])
        ids = torch.cat([prompt, target[:, :-1]], dim=1)
        encoder = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad():
            logits = model(**encoder, decoder_input_ids=ids).logits[0, prompt.shape[1] - 1 :]
        expected = logits.log_softmax(dim=-1).gather(1, target[0][:, None]).sum().item()
        assert log_prob == pytest.approx(expected, abs=tolerance)
        assert num_tokens == target.shape[1]


def two_thoughts(model) -> dict:
    """Rows with two latents each, ragged on both sides; of no, one and two images."""
    batch = seq2seq_batch(model)
    latent = model.config.latent_token_id
    for row in range(4):
        real = batch["decoder_attention_mask"][row].nonzero().flatten()
        ids = batch["decoder_input_ids"][row]
        ids[ids == latent] = 7
        ids[real[1:3]] = latent
    return batch


def cross_attentions(model, alone: dict) -> torch.Tensor:
    """(L, T, keys) of a row by itself, mean over heads, by the definition of the loop."""
    with eager_attention(model.get_decoder()), torch.no_grad(), uncached(model):
        maps = model.model(**alone, output_attentions=True, use_cache=False).cross_attentions
    return torch.stack([layer[0].mean(dim=0) for layer in maps])


@pytest.mark.parametrize("tolerance", [1e-5])
def test_readings_are_of_the_decoders_thoughts_and_its_view_of_the_pictures(parts, tolerance):
    model, _ = parts
    batch = two_thoughts(model)
    readings = read_thoughts(model, batch, top_k=3)
    with torch.no_grad():
        outputs = model.model(**batch, output_thoughts=True)
    assert max_difference(readings.thoughts, outputs.thoughts) <= tolerance
    assert [row.shape[-1] for row in readings.image_attention] == [2, 4, 0, 2]  # two visual tokens an image
    # The state in the prompt's last column writes the first token.
    with torch.no_grad():
        first = model(**batch).logits[:, -1].softmax(dim=-1).topk(3)
    assert max_difference(readings.probabilities[:, -1, -1], first.values) <= tolerance
    assert torch.equal(readings.tokens[:, -1, -1], first.indices)
    for found, alone in zip(readings.image_attention, seq2seq_rows_alone(model, batch), strict=True):
        maps = cross_attentions(model, alone)  # (L, T, keys)
        columns = alone["decoder_input_ids"][0] == model.config.latent_token_id
        assert torch.allclose(found, maps[:, columns, : found.shape[-1]], atol=tolerance)
    assert model.get_decoder().config._attn_implementation != "eager"


@pytest.mark.parametrize("tolerance", [1e-5])
def test_replaced_thoughts_are_what_the_decoder_reads(parts, rows, tolerance):
    model, processor = parts
    batch = Answerer(model, processor).inputs(rows)
    seen = []
    with torch.no_grad():
        with intervening(model, zero):
            assert model(**batch, output_thoughts=True).thoughts.abs().max() == 0
        with intervening(model, recording(keep, seen)):
            own = model(**batch, output_thoughts=True)
        assert torch.equal(torch.stack(seen, dim=1), own.thoughts)
        order = [1, 0, 3, 2]
        with intervening(model, given(own.thoughts, order)([0, 1, 2, 3])):
            swapped = model(**batch, output_thoughts=True)
    assert max_difference(swapped.thoughts, own.thoughts[order]) <= tolerance
    assert max_difference(swapped.logits[:, -1], own.logits[:, -1]) > 0.1


def test_room_is_what_the_decoders_side_leaves(parts, rows):
    model, processor = parts
    answerer = Answerer(model, processor, max_new_tokens=5)
    prompt = answerer.inputs(rows)["decoder_input_ids"].shape[1]
    assert room_for_more(answerer, rows) == 128 - prompt - 5


def test_an_audit_of_a_seq2seq_checkpoint_is_whole(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--dataset", "arrow_mazes", "--dataset_options.num_rows", "8"]
    words += ["--dataset_options.cell_size", "8", "--max_new_tokens", "3", "--num_shown", "1", "--batch_size", "4"]
    audit.main([*words, "--output_dir", str(tmp_path / "audit")])
    record = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert {"zero", "noise", "mean", "without_1", "without_2", "count_0", "count_4"} <= record["interventions"].keys()
    assert len(record["geometry"]["norm_mean"]) == NUM_LATENTS
    assert (tmp_path / "audit" / "report.html").stat().st_size > 0


def adapted_model() -> MMCoconutForSeq2SeqLM:
    """One with an adapter that has been somewhere, and not the identity."""
    model = tiny_seq2seq(thought_norm="projection")
    add_lora(model, {"r": 4})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("tolerance", [1e-5])
def test_adapters_are_the_decoders_and_merge_into_a_whole_model(tmp_path, tolerance):
    pytest.importorskip("peft")
    model = adapted_model()
    batch = seq2seq_batch(model)
    model.train()(**batch, labels=last_labels(decoder_side(batch))).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in trained.values())
    adapted = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    assert {"encoder_attn", "self_attn"} <= {name.split(".")[-2] for name in adapted}
    assert all(name.startswith("model.language_model.decoder.layers") for name in adapted)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    merged_model(model).save_pretrained(tmp_path)
    loaded, info = MMCoconutForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert max_difference(loaded(**batch).logits, expected) <= tolerance


def test_a_checkpoint_answers_as_before_it_was_saved(parts, rows, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path)
    before = Answerer(*parts, max_new_tokens=5).answer(rows)
    assert Answerer(*load_checkpoint(str(tmp_path)), max_new_tokens=5).answer(rows) == before
