"""Conversations: every answer is learnt and thought before, whole turns are cut, and a chat goes on over its cache."""

import json

import pytest
import torch
from tiny import (
    NUM_FEATURES,
    max_difference,
    tiny_image,
    tiny_model,
    tiny_processor,
    tiny_seq2seq,
    uncached,
)
from tiny_composed import TINY_VLMS, write_tiny_vlm
from transformers import LogitsProcessor

from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.audit.interventions import Study
from mmcoconut.build import composed_from_vlm, composed_processor_from_vlm
from mmcoconut.data import Example, load_examples, loader_of, open_images, to_dataset
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.data.conversations import fit_rows, further_turn, without_last_turn
from mmcoconut.errors import RecipeError
from mmcoconut.evaluation import evaluate as evaluation
from mmcoconut.evaluation.answering import Answerer
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.training.collator import IGNORED, CurriculumCollator, encode_target, encode_turns
from mmcoconut.training.curriculum import Curriculum, RowPlan
from mmcoconut.training.grouping import row_lengths


TURNS = (("Which colour?", "red"), ("Which shape is it?", "a cube"), ("Is it left?", "no"))
PER_TURN = 2
# Texts of a tokenizer's own special tokens, which stay text wherever they stand.
ATTACK = "Is <|latent|> or <image> red?"


def conversation(num_turns: int, seed: int = 0, num_images: int = 1, turns=TURNS) -> Example:
    *history, (question, answer) = turns[:num_turns]
    return Example(
        images=[{"bytes": png_bytes(tiny_image(seed + i)), "path": None} for i in range(num_images)],
        question=question,
        choices=[],
        steps=[],
        answers=[answer],
        row_id=f"talk row {seed}",
        history=[{"question": asked, "answer": answered} for asked, answered in history],
    )


def rows_of(*num_turns: int, **fields) -> list[dict]:
    made = to_dataset(conversation(number, seed, **fields) for seed, number in enumerate(num_turns))
    return [{**row, "index": index} for index, row in enumerate(made)]


def collator(processor, *, mode="coconut", per_turn=PER_TURN, **options) -> CurriculumCollator:
    options = {"max_length": 256, "max_new_tokens": 8, **options}
    return CurriculumCollator(Curriculum(mode=mode, thoughts_per_turn=per_turn), processor, **options)


def messages_of(row: dict) -> list[dict]:
    """The row as chat messages, its last answer included."""
    turns = [*((turn["question"], turn["answer"]) for turn in row["history"]), (row["question"], row["answers"][0])]
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": f"### {answer}"}]})
    messages[0]["content"][:0] = [{"type": "image", "image": image} for image in open_images(row)]
    return messages


def real_ids(batch: dict, row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_model())


# The sequence


def test_only_answers_and_their_ends_are_labelled(processor):
    """The whole row by hand: what is read, and in brackets what is written."""
    batch = collator(processor)(rows_of(2))
    tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    thoughts = ["<|start-latent|>", "<|latent|>", "<|latent|>", "<|end-latent|>"]
    split = processor.tokenizer.tokenize
    pieces = [
        (["<image>"] * NUM_FEATURES + split("Which colour?\n") + thoughts, False),
        ([*split("### red"), "<|endoftext|>"], True),
        (split("Which shape is it?\n") + thoughts, False),
        ([*split("### a cube"), "<|endoftext|>"], True),
    ]
    assert tokens == [token for piece, _ in pieces for token in piece]
    written = [is_written for piece, is_written in pieces for _ in piece]
    labels = batch["labels"][0]
    assert [label != IGNORED for label in labels.tolist()] == written
    assert torch.equal(labels[written], batch["input_ids"][0][written])


@pytest.mark.parametrize("markers", ["both", "start", "none"])
@pytest.mark.parametrize("mode", ["coconut", "no_cot"])
def test_row_is_the_chat_template_of_its_messages(processor, markers, mode):
    processor.markers = markers if mode == "coconut" else "none"
    turns = (("Which? ", "red\nor not "), (ATTACK, "<|endoftext|> ###"), ("", "no"))
    made = collator(processor, mode=mode)
    for row in rows_of(1, 2, 3, turns=turns):
        chat = processor.apply_chat_template(
            messages_of(row), tokenize=True, return_dict=True, num_latents=PER_TURN * (mode == "coconut")
        )
        assert real_ids(made([row]), 0) == chat["input_ids"][0]
    processor.markers = "both"


@pytest.mark.parametrize("model_type", TINY_VLMS)
def test_row_is_the_chat_template_of_a_vision_language_model_too(model_type, tmp_path):
    """InternVL's template ends each answer, which is learnt; LLaVA's goes on behind it."""
    write_tiny_vlm(tmp_path, model_type)
    config = composed_from_vlm(str(tmp_path)).config
    processor = composed_processor_from_vlm(str(tmp_path), config=config)
    (row,) = rows_of(3)
    made = collator(processor, max_length=None)
    turns = made.encode_row(row, RowPlan(0, PER_TURN), made.pixels([row])[1][0])
    chat = processor.apply_chat_template(
        messages_of(row)[:-1], tokenize=True, return_dict=True, num_latents=PER_TURN, add_generation_prompt=True
    )
    ids = [token for turn in turns for part in turn for token in part]
    assert ids == [*chat["input_ids"][0], *encode_target(processor, [], "no")]
    ends = {"internvl": [processor.tokenizer.eos_token_id], "llava": []}[model_type]
    assert [[*written] for _, written in turns[:-1]] == [
        [*processor.encode_text(f"### {answer}"), *ends] for _, answer in TURNS[:2]
    ]


def test_template_that_rewrites_answers_is_refused(processor):
    template = processor.chat_template.replace("else part['text']", "else part['text'] | upper")
    parts = (processor.image_processor, processor.tokenizer)
    shouting = MMCoconutProcessor(*parts, image_seq_length=NUM_FEATURES, chat_template=template)
    with pytest.raises(ValueError, match="does not write the answer of turn 1, 'red', as the model does: set a chat"):
        encode_turns(shouting, "Why?", (("Which?", "red"),), "both", num_tiles=(), num_latents=0)


@pytest.mark.parametrize(
    "mode, latents", [("coconut", 2), ("pause", 2), ("no_thoughts", 0), ("no_cot", 0), ("cot", 0)]
)
def test_every_turn_has_the_latents_of_the_mode_at_every_epoch(processor, mode, latents):
    made = collator(processor, mode=mode)
    assert made.curriculum.last_stage == 0
    for epoch in (0, 9):
        made.epoch = epoch
        batch = made(rows_of(3, 1))
        assert (batch["input_ids"] == processor.latent_token_id).sum(1).tolist() == [3 * latents, latents]
        assert made.curriculum.num_latents(made.stage) == latents


def test_evaluation_prompt_is_all_before_the_last_answer(processor):
    made, rows = collator(processor), rows_of(2, 3, 1)
    prompts, training = made.prompts(rows), made(rows)
    for index, row in enumerate(rows):
        last = encode_target(processor, [], row["answers"][0])
        assert real_ids(prompts, index) + last == real_ids(training, index)
    assert torch.equal(prompts["supervised"]["labels"], training["labels"])


def test_answerer_reads_the_prompts_of_training():
    model = tiny_model()
    processor = tiny_processor(model, num_latents=PER_TURN)
    rows = rows_of(2, 3, 1)
    answerer = Answerer(model, processor, max_new_tokens=4)
    inputs, prompts = answerer.inputs(rows), collator(processor).prompts(rows)
    assert torch.equal(inputs["input_ids"], prompts["input_ids"])
    assert torch.equal(inputs["attention_mask"], prompts["attention_mask"])
    assert [answerer.prompt_length(row) for row in rows] == prompts["attention_mask"].sum(1).tolist()
    passes = [line["decoder_passes"] - line["generated_tokens"] for line in answerer.answer(rows)]
    assert passes == [2 * PER_TURN, 3 * PER_TURN, PER_TURN]


def test_lengths_count_every_turn(processor):
    rows = to_dataset(conversation(number, number) for number in (1, 3))
    made = collator(processor)
    for row, lengths in zip(rows, row_lengths(rows, processor)):
        plan = RowPlan(0, PER_TURN)
        num_turns = 1 + len(row["history"])
        assert lengths.latents(plan) == PER_TURN * num_turns
        whole = sum(len(part) for turn in made.encode_row(row, plan, [1]) for part in turn)
        # Two markers and the end of the answer; the line break is one token with the question mark.
        assert whole - lengths.under(plan) == 3 * num_turns


# The loss


@pytest.mark.parametrize("image_fusion", ["replace", "add"])
@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_loss_and_gradients_of_thoughts_in_every_turn_equal_the_definition(text, image_fusion, tolerance):
    model = tiny_model(text, image_fusion=image_fusion)
    batch = collator(tiny_processor(model))(rows_of(2, 3, 1))

    def run(**options):
        model.zero_grad(set_to_none=True)
        loss = model(**batch, **options).loss
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with uncached(model):
        expected_loss, expected = run(use_cache=False)
    loss, gradients = run()
    assert abs(loss - expected_loss) <= tolerance
    assert gradients.keys() == expected.keys()
    assert max(max_difference(gradients[name], expected[name]) for name in expected) <= tolerance


@pytest.mark.parametrize("tolerance", [1e-5])
def test_loss_of_a_batch_is_that_of_its_rows(tolerance):
    model = tiny_model("qwen2")
    made, rows = collator(tiny_processor(model)), rows_of(2, 1, 3)
    alone = [made([row]) for row in rows]
    counts = [int((batch["labels"] != IGNORED).sum()) for batch in alone]
    with torch.no_grad():
        mean = sum(model(**batch).loss * count for batch, count in zip(alone, counts)) / sum(counts)
        assert abs(model(**made(rows)).loss - mean) <= tolerance


# A chat over the kept cache


class EndsAt(LogitsProcessor):
    """Row b ends with its ends[b]-th new token."""

    def __init__(self, ends: list[int], eos_token_id: int):
        self.ends, self.eos_token_id, self.step = ends, eos_token_id, 0

    def __call__(self, input_ids, scores):
        self.step += 1
        others = torch.arange(scores.shape[1]) != self.eos_token_id
        for row, end in enumerate(self.ends):
            scores[row, others if self.step == end else ~others] = -torch.inf
        return scores


def chat_step(model, inputs, ends, **options):
    recorded = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    processors = [EndsAt(ends, model.generation_config.eos_token_id)]
    return model.generate(**inputs, max_new_tokens=5, logits_processor=processors, **recorded, **options)


@pytest.mark.parametrize("image_fusion", ["replace", "add"])
@pytest.mark.parametrize("text", ["gpt2", "qwen2"])
@pytest.mark.parametrize("tolerance", [1e-5])
def test_chat_over_the_kept_cache_equals_the_whole_conversation_anew(text, image_fusion, tolerance):
    """Three turns with thoughts; rows end after 2 and 5 tokens, and one (9) is cut off before its end."""
    model = tiny_model(text, image_fusion=image_fusion)
    processor = tiny_processor(model, num_latents=PER_TURN)
    images = [[tiny_image(0)], [], [tiny_image(1), tiny_image(2)]]
    inputs = processor(images=images, text=["Which?", "Why not red?", "What?"], return_tensors="pt")
    ends, chats, eos = [2, 5, 9], [real_ids(inputs, row) for row in range(3)], processor.tokenizer.eos_token_id
    answered = chat_step(model, inputs, ends)
    for texts, next_ends in ((["And then?", "Is it a cube?", "Left?"], [5, 9, 2]), (["Red?"] * 3, [1, 2, 3])):
        further = further_turn(processor, answered.sequences, inputs["attention_mask"], texts)
        for row, (text, end) in enumerate(zip(texts, ends)):
            written = answered.sequences[row, inputs["input_ids"].shape[1] :][:end].tolist()
            chats[row] += [*written, *[eos] * (end > 5), *processor.encode_prompt(text, num_images=0)]
        assert [real_ids(further, row) for row in range(3)] == chats
        ends = next_ends
        whole = processor.pad_prompts(chats, padding=True, return_tensors="pt")
        with uncached(model):
            pixels = {"pixel_values": processor.encode_images(images, return_tensors="pt")[0]["pixel_values"]}
            anew = chat_step(model, {**whole, **pixels}, ends, use_cache=False)
        inputs = further
        answered = chat_step(model, {**further, "past_key_values": answered.past_key_values}, ends)
        new = len(anew.logits)
        assert torch.equal(answered.sequences[:, -new:], anew.sequences[:, -new:])
        for row, end in enumerate(ends):
            for logits, expected in zip(answered.logits[:end], anew.logits[:end]):
                assert max_difference(logits[row], expected[row]) <= tolerance


def test_further_turn_is_the_chat_template_of_all_turns(processor):
    processor.num_latents = PER_TURN
    images, answers = [[tiny_image(0)], []], ["red", "a cube"]
    prompts = processor(images=images, text=["Which?", "What shape?"], return_tensors="pt")
    written = processor.tokenizer.pad(
        {"input_ids": [encode_target(processor, [], answer) for answer in answers]},
        padding_side="right",
        return_tensors="pt",
    )
    sequences = torch.cat([prompts["input_ids"], written["input_ids"]], dim=1)
    further = further_turn(processor, sequences, prompts["attention_mask"], ["Why?", ATTACK])
    asked = [("Which?", "Why?", 1), ("What shape?", ATTACK, 0)]
    for row, ((first, second, num_images), answer) in enumerate(zip(asked, answers)):
        expected = processor.encode_prompt(second, num_images=num_images, history=[(first, answer)])
        assert real_ids(further, row) == expected
    processor.num_latents = 0


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_further_turn_wants_a_sequence_a_mask_and_a_text_a_row(processor, sizes):
    sequences, mask = torch.ones(sizes[0], 5, dtype=torch.long), torch.ones(sizes[1], 3, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{sizes[0]} sequences, {sizes[1]} masks and {sizes[2]} texts"):
        further_turn(processor, sequences, mask, ["Why?"] * sizes[2])


def test_history_goes_with_texts_and_not_with_rendered_ones(processor):
    with pytest.raises(ValueError, match="1 entries in history for 2 texts"):
        processor(text=["a", "b"], history=[[]])
    with pytest.raises(ValueError, match="no effect on rendered text"):
        processor(text="a", history=[[]], rendered=True)


# Too long


def test_whole_turns_are_cut_from_the_end_and_counted(processor):
    rows = to_dataset(conversation(number, number) for number in (3, 1, 2, 3))
    made = collator(processor)
    lengths = [made.longest(row) for row in rows_of(1, 2, 3)]
    assert lengths == sorted(set(lengths))

    same, cut = fit_rows(rows, made.longest, lengths[2])
    assert same is rows and cut.asdict() == {"rows": 0, "turns": 0, "left_out": 0}
    two, cut = fit_rows(rows, made.longest, lengths[2] - 1)
    assert [1 + len(row["history"]) for row in two] == [2, 1, 2, 2]
    assert [(row["question"], row["answers"]) for row in two][0] == ("Which shape is it?", ["a cube"])
    assert cut.asdict() == {"rows": 2, "turns": 2, "left_out": 0}
    one, cut = fit_rows(rows, made.longest, lengths[1] - 1)
    assert cut.asdict() == {"rows": 3, "turns": 5, "left_out": 0}
    assert one.features == rows.features and one["row_id"][:] == rows["row_id"][:]
    assert [row["images"] for row in one] == [row["images"] for row in rows]
    made(rows_of(1))  # what is left can be laid out
    with pytest.raises(ValueError, match="None of the 4 rows fits into"):
        fit_rows(rows, made.longest, lengths[0] - 1)


def test_row_whose_first_turn_is_too_long_is_left_out(processor):
    made = collator(processor)
    rows = to_dataset([conversation(1), conversation(2, turns=(("Which? " * 40, "red"), ("Why?", "no")))])
    kept, cut = fit_rows(rows, made.longest, made.longest(rows[0]))
    assert kept["row_id"][:] == ["talk row 0"] and cut.asdict() == {"rows": 1, "turns": 0, "left_out": 1}


def test_rows_leave_room_for_what_evaluation_writes(processor):
    made, (row,) = collator(processor), rows_of(2)
    prompt = len(made.encode_prompt(row, [1], PER_TURN))
    assert made.longest(row, room=50) == prompt + 50
    assert made.longest(row, room=1) == prompt + len(encode_target(processor, [], "a cube"))


def test_conversation_that_loses_its_last_turn_ends_with_the_one_before():
    (three,), (two,) = rows_of(3), rows_of(2)
    assert without_last_turn(three) == two


# Refused


@pytest.mark.parametrize(
    "turn", [{"question": "Why?"}, {"question": "", "answer": "a"}, {"question": "a", "answer": "b", "x": "c"}]
)
def test_earlier_turn_without_question_or_answer_is_refused(turn):
    with pytest.raises(ValueError, match="talk row 0, field 'history': found .* give a question and an answer"):
        Example([], "Why?", [], [], ["a"], "talk row 0", history=[turn])


def test_conversation_with_steps_is_refused():
    with pytest.raises(ValueError, match=r"field 'steps': found \['x'\] after 1 earlier turns; a conversation has no"):
        Example([], "Why?", [], ["x"], ["a"], "talk row 0", history=[{"question": "a", "answer": "b"}])


def test_conversation_has_no_thoughts_by_stage(processor):
    for mode in ("coconut", "pause"):
        with pytest.raises(ValueError, match=f"talk row 0: the row has 2 .* {mode} needs stages.* Set thoughts_per"):
            collator(processor, mode=mode, per_turn=0)(rows_of(2))
    collator(processor, mode="no_cot", per_turn=0)(rows_of(2))
    maze = {**load_examples("arrow_mazes", split="train", num_rows=1)[0], "index": 0}
    with pytest.raises(ValueError, match="With thoughts_per_turn=2 no stage replaces its .* steps. Set it to 0"):
        collator(processor)([maze])


def test_encoder_decoder_reads_no_conversation():
    processor = tiny_processor(tiny_seq2seq())
    with pytest.raises(ValueError, match=r"An encoder-decoder reads one question. Set dataset_options.max_turns to 1"):
        collator(processor)(rows_of(2))
    with pytest.raises(ValueError, match="An encoder-decoder reads one question"):
        further_turn(processor, torch.ones(1, 4), torch.ones(1, 2), ["Why?"])


def test_audit_of_conversations_is_refused():
    model = tiny_model()
    answerer = Answerer(model, tiny_processor(model, num_latents=PER_TURN))
    with pytest.raises(ValueError, match="talk row 1: a conversation of 2 turns .* set --dataset_options.max_turns 1"):
        Study(answerer, rows_of(1, 2), metric="exact_match")


@pytest.mark.parametrize("key, value", [("c_thought", 2), ("max_latent_stage", 1), ("uniform_prob", 0.5)])
def test_key_of_stages_contradicts_thoughts_per_turn(key, value, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("vision_model: a/b\ntext_model: c/d\nuse_cpu: true\nthoughts_per_turn: 2\n")
    with pytest.raises(RecipeError) as error:
        parse_recipe([str(recipe), f"--{key}", str(value)])
    assert error.value.problems == [(key, value, "with `thoughts_per_turn` there are no stages: remove this key")]
    assert parse_recipe([str(recipe)])[2].thoughts_per_turn == 2


# The whole


def test_sample_holds_conversations_of_one_to_three_turns(tmp_path):
    options = loader_of("llava_instruct").write_sample(tmp_path, num_rows=3, seed=0)
    for split in ("train", "validation"):
        rows = load_examples("llava_instruct", split=split, **options)
        assert [len(row["history"]) for row in rows] == [0, 1, 2]


def test_run_says_once_what_it_cut(tmp_path, caplog):
    import train_hf

    arguments = ["recipes/gpt2_clip_add_llava.yaml", "--smoke_test", "--output_dir", str(tmp_path / "run")]
    caplog.set_level("INFO")
    results = train_hf.main([*arguments, "--disable_tqdm", "true", "--max_length", "60", "--metric", "exact_match"])
    cut = results["long_rows"]
    assert cut == {"train": {"rows": 2, "turns": 2, "left_out": 0}, "eval": {"rows": 3, "turns": 3, "left_out": 0}}
    assert [row["num_latents"] for row in results["stages"]] == [2]
    said = [record.message for record in caplog.records if "rows too long" in record.message]
    assert said == [
        f"{name}: {part['rows']} rows too long: {part['turns']} turns cut from their ends, 0 rows left out"
        for name, part in cut.items()
    ]
    saved = json.loads((tmp_path / "run-smoke" / "results.json").read_text())
    assert saved["long_rows"] == cut

    caplog.clear()
    options = ["--split", "validation", "--output_dir", str(tmp_path / "out"), "--long_rows", "cut"]
    record = evaluation.main(["--model", str(tmp_path / "run-smoke"), *options])
    assert (record["n"], record["num_latents"]) == (8, 2)
    assert f"{said[0].removeprefix('eval: ')}" in [record.message for record in caplog.records]
    (row, *_) = evaluation.read_lines(tmp_path / "out" / "predictions.jsonl")
    assert row["num_latents"] == 2
