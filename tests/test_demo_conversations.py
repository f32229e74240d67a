"""The demo's panels for further questions, for vision-language models, and with a step decoder."""

from functools import lru_cache

import pytest
from demo_parts import NEW_TOKENS, NUM_LATENTS, asker_of, by_name, path_of, tiny_examples
from tiny import max_difference, tiny_image, tiny_model, tiny_seq2seq

from mmcoconut.audit import image_grids
from mmcoconut.audit.interventions import given, intervening, keep, with_other_counts, zero
from mmcoconut.audit.thoughts import read_thoughts
from mmcoconut.build import from_vlm, processor_from_vlm
from mmcoconut.build.tiny_models import tiny_vlm
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.demo.conversation import Conversation, Turn, first_turn, in_last_turn, last_turn
from mmcoconut.demo.one_question import Asker, read_examples, row_of, think, write_examples
from mmcoconut.demo.panels import NO_CONVERSATION, Responder
from mmcoconut.evaluation import answering
from mmcoconut.evaluation.answering import Answerer


HISTORY = [{"question": "What colour is it?", "answer": "red"}]
FURTHER = "Which shape is above?"


@pytest.fixture(autouse=True)
def no_marker_needed(monkeypatch):
    """What random weights write counts as their answer."""
    monkeypatch.setattr(answering, "parse_answer", str.strip)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[dict]:
    return tiny_examples(tmp_path_factory.mktemp("examples"), num_rows=2)


@pytest.fixture(scope="module")
def asker(examples) -> Asker:
    return asker_of(tiny_model(seed=1), examples)


def further_row(example: dict, question: str = FURTHER) -> dict:
    return {**example, "question": question, "history": HISTORY}


def last(shown):
    return list(shown)[-1]


def asked(responder: Responder, example: dict, with_others: bool = False):
    """What the page shows after the first question."""
    return last(responder.ask(path_of(example), "What colour is it?", NUM_LATENTS, NEW_TOKENS, with_others))


def further(responder: Responder, conversation, question: str = FURTHER, num_latents: int = NUM_LATENTS, others=False):
    return last(responder.ask_further(conversation, question, num_latents, NEW_TOKENS, others))


# --- thoughts of one turn --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [{}, {"thought_schedule": "jacobi", "jacobi_iterations": 2}], ids=["one", "all"])
def test_thoughts_that_are_read_are_those_of_the_last_turn(schedule, examples):
    asker = asker_of(tiny_model(seed=1, **schedule), examples)
    row = further_row(examples[0])
    answerer = asker.ask(row, NUM_LATENTS).answerer
    whole = read_thoughts(asker.model, answerer.inputs([row]))
    readings = last_turn(whole, NUM_LATENTS)
    _, thoughts = think(answerer, [row])
    assert whole.thoughts.shape[1] == 2 * NUM_LATENTS and readings.thoughts.shape[1] == NUM_LATENTS
    assert max_difference(readings.thoughts, thoughts) < 1e-4  # read under eager attention
    assert max_difference(whole.thoughts[:, :NUM_LATENTS], thoughts) > 1e-2
    assert readings.tokens.shape[1] == NUM_LATENTS + 1
    assert (readings.tokens[:, -1] == whole.tokens[:, -1]).all()
    assert (readings.image_share(0) == whole.image_share(0)[NUM_LATENTS:]).all()


def test_a_look_at_one_turn_is_what_it_was_before(asker, examples):
    readings = read_thoughts(asker.model, asker.ask(examples[0], NUM_LATENTS).answerer.inputs([examples[0]]))
    same = last_turn(readings, NUM_LATENTS)
    assert (same.thoughts == readings.thoughts).all() and (same.tokens == readings.tokens).all()


def test_earlier_thoughts_are_kept_when_others_are_replaced(asker, examples):
    row = further_row(examples[0])
    found = asker.intervene(asker.ask(row, NUM_LATENTS))
    variants = by_name(found)
    answerer, read = Answerer(asker.model, asker.processor, num_latents=NUM_LATENTS, max_new_tokens=NEW_TOKENS), []

    def zero_behind(position, thought):
        read.append(position)
        return zero(position, thought) if position >= NUM_LATENTS else keep(position, thought)

    with intervening(asker.model, zero_behind):
        expected = answerer.answer([row])[0]["output"]
    assert read == list(range(2 * NUM_LATENTS))
    assert variants["zero"].output == expected
    assert any("the answer sees only the thoughts: " in reason for reason in found.not_run)
    assert {"zero", "noise", "mean", "without_3", "count_0"} <= variants.keys()


def test_a_donors_thoughts_are_counted_from_the_last_turn(asker, examples):
    _, thoughts = think(asker.ask(examples[1], NUM_LATENTS).answerer, [examples[1]])
    own = thoughts[:, 0] + 1
    replace = in_last_turn(given(thoughts), 2)([0])
    assert replace(1, own) is own
    assert all((replace(2 + j, own) == thoughts[:, j]).all() for j in range(NUM_LATENTS))


# --- turns on the page -----------------------------------------------------------------------------------------------
def test_a_further_question_is_read_after_the_first_and_its_answer(asker, examples):
    responder = Responder(asker)
    first = asked(responder, examples[0])
    then = further(responder, first.conversation, others=True)
    [turn] = first.conversation.turns
    row = {**row_of(FURTHER, path_of(examples[0])), "history": [{"question": turn.question, "answer": turn.answer}]}
    expected = asker.ask(row, NUM_LATENTS)
    assert [turn.answer for turn in then.conversation.turns] == [turn.answer, expected.said]
    assert expected.output != asker.ask(row_of(FURTHER, path_of(examples[0])), NUM_LATENTS).output
    assert 'data-turn="2"' in then.answer and FURTHER in then.answer
    assert "the thoughts before answer 2" in then.thoughts and then.thoughts.count("<img") == NUM_LATENTS
    assert 'data-name="zero"' in then.others and "those of earlier turns are kept" in then.others


def test_earlier_turns_keep_their_thoughts_in_sight(asker, examples):
    responder = Responder(asker)
    first = asked(responder, examples[0])
    second = further(responder, first.conversation)
    third = further(responder, second.conversation, "Why?")
    assert (first.earlier.count("<details"), second.earlier.count("<details")) == (0, 1)
    assert third.earlier.count("<details") == 2 and 'data-turn="3"' in third.answer
    assert first.thoughts in second.earlier and second.thoughts in third.earlier
    assert "What colour is it?" in second.earlier


def test_a_first_question_begins_a_new_conversation(asker, examples):
    responder = Responder(asker)
    second = further(responder, asked(responder, examples[0]).conversation)
    again = asked(responder, examples[1])
    assert len(second.conversation.turns) == 2 and len(again.conversation.turns) == 1
    assert again.conversation.images == row_of("Which?", path_of(examples[1]))["images"] and again.earlier == ""


def test_a_further_question_without_a_first_is_a_message(asker):
    shown = further(Responder(asker), None)
    assert NO_CONVERSATION in shown.answer and shown.conversation is None


def test_a_mistake_in_a_further_question_keeps_the_conversation(asker, examples):
    responder = Responder(asker)
    conversation = asked(responder, examples[0]).conversation
    shown = further(responder, conversation, " ")
    assert "The question is empty" in shown.answer and shown.earlier.count("<details") == 1
    assert len(further(responder, shown.conversation).conversation.turns) == 2


def test_a_conversation_that_no_longer_fits_is_a_message(asker, examples):
    conversation = Conversation(examples[0]["images"], [Turn("What colour is it?" * 40, "red")])
    shown = further(Responder(asker), conversation)
    assert "The language model has 128 positions" in shown.answer and "Traceback" not in shown.answer


def test_more_thoughts_are_tried_only_where_every_turn_has_room(asker, examples):
    row = {**further_row(examples[0]), "history": 2 * HISTORY}
    options = {"num_latents": NUM_LATENTS}
    free = 128 - Answerer(asker.model, asker.processor, **options).prompt_length(row)
    # Four positions are left: for one more thought in each of the three turns, not for two.
    answerer = Answerer(asker.model, asker.processor, max_new_tokens=free - 4, **options)
    names = {name for name, *_ in with_other_counts(answerer, [row])}
    assert "count_4" in names and "count_5" not in names
    assert answerer.with_count(4).inputs([row]) is not None
    with pytest.raises(ValueError, match="Lower max_new_tokens or num_latents"):
        answerer.with_count(5).inputs([row])


def test_what_was_said_is_shown_as_text(asker, examples):
    conversation = Conversation(examples[0]["images"], [Turn("<script>1</script>", "<b>", "<i>")])
    shown = further(Responder(asker), conversation, "<u>?")
    assert "<script>" not in shown.earlier and "<i>" not in shown.earlier and "<u>" not in shown.answer


def test_a_control_holds_conversations_too(examples):
    responder = Responder(asker_of(tiny_model(thought_mode="pause"), examples))
    then = further(responder, asked(responder, examples[0]).conversation, others=True)
    assert "thought 3" in then.thoughts and "feeds no hidden state back" in then.others


def test_an_encoder_decoder_reads_one_question(examples):
    responder = Responder(asker_of(tiny_seq2seq(), examples))
    shown = further(responder, asked(responder, examples[0]).conversation)
    assert "reads one question and no further turn" in shown.answer


def test_examples_of_conversations_are_their_first_turns(tmp_path, examples):
    row = {**further_row(examples[0]), "answers": ["a cube"]}
    write_examples(tmp_path, [row])
    [example] = read_examples(tmp_path)
    assert (example["question"], example["answers"]) == ("What colour is it?", ["red"])
    assert example["row_id"] == row["row_id"] and first_turn(examples[0]) == examples[0]


# --- vision-language models, step decoders ---------------------------------------------------------------------------
@lru_cache(maxsize=1)
def vlm_asker(model_type: str = "qwen2_5_vl") -> Asker:
    vlm, own = tiny_vlm(model_type)
    model = from_vlm(vlm, processor=own, check=False)
    processor = processor_from_vlm(own, config=model.config, num_latents=2)
    return Asker(model.eval(), processor, max_new_tokens=2)


def test_a_vision_language_models_maps_are_on_its_own_grid_in_every_turn(examples):
    responder = Responder(vlm_asker())
    first = last(responder.ask(path_of(examples[0]), "What?", 2, 2, True))
    then = last(responder.ask_further(first.conversation, "Why?", 2, 2, False))
    for shown in (first, then):
        assert shown.thoughts.count("<img") == 2 and "There is no heat map" not in shown.thoughts
    assert 'data-name="zero"' in first.others and 'data-turn="2"' in then.answer


def test_every_turn_is_about_all_pictures(examples):
    responder, paths = Responder(vlm_asker()), [path_of(example) for example in examples]
    first = last(responder.ask(paths[0], "What?", 2, 2, False, paths[1:]))
    then = last(responder.ask_further(first.conversation, "Why?", 2, 2, False))
    assert len(then.conversation.images) == 2 and then.thoughts.count("<img") == 2
    alone = asked_of(vlm_asker(), then.conversation.images[:1], first.conversation.turns)
    both = asked_of(vlm_asker(), then.conversation.images, first.conversation.turns)
    assert then.conversation.turns[-1].answer == both.said
    shapes = [one.answerer.inputs([one.row])["input_ids"].shape[1] for one in (alone, both)]
    assert shapes[0] < shapes[1]


def asked_of(asker: Asker, images: list, turns: list):
    return asker.ask(Conversation(images, turns).row_after(row_of("Why?", None)), 2)


def test_a_grid_that_is_unknown_is_explained(examples, monkeypatch):
    reason = "its resampler computes features of the whole picture"
    monkeypatch.setattr(image_grids, "views_of", lambda *args: [reason])
    shown = last(Responder(vlm_asker()).ask(path_of(examples[0]), "What?", 2, 2, False))
    assert f"There is no heat map: {reason}." in shown.thoughts and "<img" not in shown.thoughts
    assert "of attention on picture" in shown.thoughts


class Reader:
    """Reads fixed steps, and keeps the thoughts that it was given."""

    def read(self, thoughts, tokenizer) -> list[str]:
        self.thoughts = thoughts
        return ["left <2>", ""]


def test_steps_are_read_in_the_last_turns_thoughts_and_shown(examples):
    reader = Reader()
    asker = asker_of(tiny_model(seed=1), examples, reader=reader)
    row = further_row(examples[0])
    html = Responder(asker).html.thoughts(asker.look(asker.ask(row, NUM_LATENTS)))
    assert "The run's step decoder reads: step 1 <b>left &lt;2&gt;</b>; step 2 <b>(nothing)</b>" in html
    _, thoughts = think(asker.ask(row, NUM_LATENTS).answerer, [row])
    assert max_difference(reader.thoughts, thoughts[0]) < 1e-4


def test_a_run_without_a_step_decoder_shows_none(asker, examples):
    assert "step decoder" not in asked(Responder(asker), examples[0]).thoughts


def test_pictures_of_a_conversation_are_its_own():
    images = [{"bytes": png_bytes(tiny_image(3)), "path": None}]
    row = Conversation(images, [Turn("a", "b")]).row_after(row_of("c", None))
    assert row["images"] == images and row["history"] == [{"question": "a", "answer": "b"}]
