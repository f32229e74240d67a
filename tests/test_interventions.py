"""Interventions replace what is read and nothing else; the verdict tells apart models that think and that do not."""

import itertools
from copy import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import DECODERS, batch_of, max_difference, tiny_model, tiny_processor, words
from torch import nn

from mmcoconut import thinking_mmcoconut
from mmcoconut.audit.interventions import (
    Study,
    counts_to_try,
    given,
    images_key,
    intervening,
    keep,
    knock_outs,
    mean_thought,
    noise_like,
    only_at,
    other_counts,
    other_image,
    other_question,
    other_rows,
    read_last,
    recording,
    replacements,
    room_for_more,
    shuffled,
    zero,
)
from mmcoconut.audit.necessity import feeding_nothing, only_thoughts, own_embedding, seeing
from mmcoconut.audit.verdict import CANNOT_TELL, DEPENDS, DOES_NOT, MARGIN, WOULD_DO, positions_of, verdict_of
from mmcoconut.data import load_examples, question_text
from mmcoconut.evaluation.answering import Answerer
from mmcoconut.passes_mmcoconut import column_lists
from mmcoconut.schedules_mmcoconut import think_together_uncached
from mmcoconut.statistics import Estimate, bootstrap_mean
from mmcoconut.thinking_mmcoconut import Thoughts, think_uncached


NUM_LATENTS = 3


def prompts(model, num_latents: int = NUM_LATENTS) -> dict:
    """Two left-padded prompts, each with an image and latents at its end."""
    config = model.config
    image = [config.image_token_id] * config.image_seq_length
    thoughts = [config.start_latent_token_id, *[config.latent_token_id] * num_latents]
    return batch_of(model, [[*image, *words(4, 1), *thoughts], [*image, *words(7, 2), *thoughts]])


def replaced_by_definition(model, inputs: dict, put) -> torch.Tensor:
    """Logits (B, T, V) of the definition without a cache, with put(j, thought) as its j-th thought."""
    base, positions = model.model, itertools.count()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = base.get_input_embeddings()(ids)
    features = torch.cat(list(base.get_image_features(inputs["pixel_values"]).pooler_output))
    read = base.fuse(embeds, features, ids == model.config.image_token_id)
    embeds = read.pop("inputs_embeds")
    with torch.no_grad():
        thoughts = Thoughts(ids == model.config.latent_token_id, feed=lambda state: put(next(positions), state))
        thoughts.columns = column_lists(thoughts.latents)[0]
        masks = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        hidden, _ = think_uncached(base.language_model, embeds, thoughts, **masks, **read)
        return model.lm_head(hidden)


def zero_at_1(position, thought):
    return torch.zeros_like(thought) if position == 1 else thought


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("put", [zero, zero_at_1], ids=["all", "one"])
def test_intervention_equals_its_definition(text, put):
    """Replacing a thought also changes the thoughts that are computed after it."""
    model = tiny_model(text)
    inputs = prompts(model)
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), intervening(model, put):
        logits = model(**inputs).logits
    expected = replaced_by_definition(model, inputs, put)
    untouched = replaced_by_definition(model, inputs, lambda position, thought: thought)
    assert max_difference(logits[real], expected[real]) < 1e-4
    assert max_difference(untouched[real], expected[real]) > 1e-2


def replaced_together_by_definition(model, inputs: dict, put) -> torch.Tensor:
    """As `replaced_by_definition`, where all thoughts are updated together: the thoughts (B, N, D) and the logits."""
    base, ids, mask = model.model, inputs["input_ids"], inputs["attention_mask"]
    embeds = base.get_input_embeddings()(ids)
    features = torch.cat(list(base.get_image_features(inputs["pixel_values"]).pooler_output))
    read = base.fuse(embeds, features, ids == model.config.image_token_id)
    latents = ids == model.config.latent_token_id
    columns = column_lists(latents)[0]

    def feed(states):
        replaced = states.clone()
        for j, column in enumerate(columns):
            replaced[:, column] = put(j, states[:, column])
        return replaced

    with torch.no_grad():
        masks = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        options = {"num_iterations": model.config.jacobi_iterations, **masks, **read}
        embeds = options.pop("inputs_embeds")
        hidden, embeds = think_together_uncached(base.language_model, embeds, Thoughts(latents, feed), **options)
        return embeds[:, columns], model.lm_head(hidden)


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("put", [zero, zero_at_1, keep], ids=["all", "one", "none"])
def test_intervention_on_thoughts_that_are_updated_together_equals_its_definition(put, iterations):
    """A thought is replaced in every update, so that the others are made from what was put there."""
    model = tiny_model(thought_schedule="jacobi", jacobi_iterations=iterations)
    inputs, seen = prompts(model), []
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), intervening(model, recording(put, seen)):
        logits = model(**inputs).logits
    thoughts, expected = replaced_together_by_definition(model, inputs, put)
    assert max_difference(logits[real], expected[real]) < 1e-4
    assert len(seen) == NUM_LATENTS * iterations
    if put is keep:
        assert max_difference(read_last(seen, NUM_LATENTS), thoughts) < 1e-4
    else:
        with torch.no_grad():
            assert max_difference(model(**inputs).logits[real], expected[real]) > 1e-2


def test_nothing_stays_behind_after_an_intervention():
    model = tiny_model()
    inputs = prompts(model)
    with torch.no_grad():
        before = model(**inputs).logits
        with pytest.raises(RuntimeError, match="on purpose"), intervening(model, zero):
            model(**inputs)
            raise RuntimeError("on purpose")
        assert torch.equal(model(**inputs).logits, before)


def test_checkpoint_without_feedback_is_refused():
    model = tiny_model(thought_mode="pause")
    with pytest.raises(ValueError, match="'pause'.*mode: coconut"), intervening(model, zero):
        pass


@pytest.mark.parametrize("sees", ["no_image", "thoughts"])
def test_seeing_less_equals_its_definition(sees):
    """One pass over the model's own thoughts, under a mask that hides the rest from what stands behind the last."""
    model = tiny_model()
    inputs = prompts(model)
    more = torch.tensor([words(3, 5), words(3, 6)])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
    inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    base, ids, mask = model.model, inputs["input_ids"], inputs["attention_mask"].bool()
    latents, last = ids == model.config.latent_token_id, ids.shape[1] - 4
    hidden = ids == model.config.image_token_id if sees == "no_image" else ~latents  # (B, T)
    columns = torch.arange(ids.shape[1])
    visible = (columns[:, None] >= columns) & mask[:, None]  # (B, T, T)
    visible &= ~((columns[:, None] > last) & (hidden & (columns < last))[:, None])
    with torch.no_grad():
        own = model(**inputs, output_view=True)
        embeds = {"inputs_embeds": own.view.read, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
        expected = model.lm_head(base.language_model(**embeds, attention_mask=visible[:, None]).last_hidden_state)
        with seeing(model, sees):
            found = model(**inputs).logits
    assert max_difference(found[mask], expected[mask]) < 1e-4
    upto = mask[:, : last + 1]  # which the thoughts themselves end
    assert max_difference(found[:, : last + 1][upto], own.logits[:, : last + 1][upto]) < 1e-5
    assert max_difference(found[:, -3:], own.logits[:, -3:]) > 1e-3
    assert model.config.answer_sees == "all"


@pytest.mark.parametrize("text", DECODERS)
def test_feeding_nothing_equals_its_definition(text):
    """The latents read the embedding of their token, at the positions and in the columns of thoughts."""
    model = tiny_model(text)
    inputs, before = prompts(model), copy(model.config.to_dict())
    real = inputs["attention_mask"].bool()
    own = model.get_input_embeddings()(inputs["input_ids"].new_tensor([model.config.latent_token_id]))  # (1, D)
    with torch.no_grad(), feeding_nothing(model):
        logits = model(**inputs).logits
    expected = replaced_by_definition(model, inputs, lambda position, thought: own.to(thought).expand_as(thought))
    assert max_difference(logits[real], expected[real]) < 1e-4
    assert model.config.to_dict() == before
    with torch.no_grad():
        assert max_difference(model(**inputs).logits[real], logits[real]) > 1e-2


def test_feeding_nothing_is_the_same_where_thoughts_are_updated_together():
    model = tiny_model()
    inputs, logits = prompts(model), []
    for schedule, iterations in (("sequential", None), ("jacobi", 2)):
        model.config.thought_schedule, model.config.jacobi_iterations = schedule, iterations
        with torch.no_grad(), feeding_nothing(model):
            logits.append(model(**inputs).logits)
        assert (model.config.thought_mode, model.config.thought_schedule) == ("feedback", schedule)
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_noise_has_the_norm_of_the_thought_and_another_direction():
    thought = torch.randn(50, 64) * torch.linspace(0.1, 10, 50)[:, None]
    noise = noise_like(thought, torch.Generator().manual_seed(12345))
    torch.testing.assert_close(noise.norm(dim=-1), thought.norm(dim=-1))
    assert torch.cosine_similarity(noise, thought, dim=-1).abs().max() < 0.6


def test_mean_thought_is_the_mean_of_its_position():
    thoughts = torch.arange(12.0).view(2, 3, 2)
    put = mean_thought(thoughts)([1])
    assert put(2, torch.zeros(1, 2)).tolist() == [[(4 + 10) / 2, (5 + 11) / 2]]


def test_given_thoughts_are_those_of_the_partners():
    thoughts = torch.arange(12.0).view(3, 2, 2)
    put = given(thoughts, partners=[2, 0, 1])([0, 1])
    assert put(1, torch.zeros(2, 2)).tolist() == [[10.0, 11.0], [2.0, 3.0]]


def test_only_one_position_is_replaced():
    put = only_at(1, lambda indices: zero)([0])
    thought = torch.ones(1, 4)
    assert [put(j, thought).sum().item() for j in range(3)] == [4, 0, 4]


def test_partners_have_another_key_and_where_possible_the_same_group():
    keys = ["a", "a", "b", "c", "a", "d"]
    groups = [1, 1, 1, 2, 2, 3]
    for seed in range(20):
        partners = other_rows(keys, seed, groups)
        assert all(keys[partner] != key for partner, key in zip(partners, keys))
        assert all(groups[partner] == group for partner, group in list(zip(partners, groups))[:5])
    assert other_rows(["a", "a"], 0) is None


def test_partners_are_the_same_for_a_seed_and_differ_between_seeds():
    assert other_rows(list(range(50)), 3) == other_rows(list(range(50)), 3)
    assert other_rows(list(range(50)), 3) != other_rows(list(range(50)), 4)


def test_counts_go_down_to_none_and_up_to_twice_where_there_is_room():
    assert counts_to_try(3, room=10) == [0, 1, 2, 4, 5, 6]
    assert counts_to_try(3, room=2) == [0, 1, 2, 4, 5]
    assert counts_to_try(16, room=16) == [0, 1, 4, 8, 12, 15, 17, 18, 32]


def maze_rows(num_rows: int) -> list[dict]:
    return list(load_examples("arrow_mazes", split="test", num_rows=num_rows, grid_size=2, cell_size=8))


def study_of(model, num_rows: int = 40, **kwargs) -> Study:
    """A study whose gold answers are the model's own, so that every effect of an intervention shows as an error."""
    processor = tiny_processor(model, markers="start", num_latents=NUM_LATENTS)
    answerer = Answerer(model, processor, max_new_tokens=3, begin_with="###")
    rows = maze_rows(num_rows)
    answers = [line["answer"] for start in range(0, num_rows, 8) for line in answerer.answer(rows[start : start + 8])]
    rows = [{**row, "answers": [answer]} for row, answer in zip(rows, answers) if answer]
    assert len(rows) > num_rows / 2
    return Study(answerer, rows, metric="exact_match", batch_size=8, **kwargs)


class Restless(nn.Module):
    """Thoughts that differ much from row to row, as those of a model with random weights need not."""

    def forward(self, hidden_state, embedding_norm=None):
        return torch.sin(20 * hidden_state)


@pytest.fixture(scope="module")
def thinking() -> Study:
    """Constructed to depend: the last thought stands in the prompt's last column, whose state writes the answer."""
    model = tiny_model()
    model.model.thought_feed = Restless()
    return study_of(model)


@pytest.fixture
def deaf(monkeypatch) -> Study:
    """Constructed not to depend: thoughts are computed and handed over, but the latent's own embedding is read."""
    monkeypatch.setattr(thinking_mmcoconut, "put_first", lambda piece, is_latent, thought: piece)
    return study_of(tiny_model(thought_norm="embedding"), num_rows=120)


def swaps(study: Study) -> tuple[list, list[str]]:
    """The thoughts of other rows: what was run, and why something was not."""
    results = [shuffled(study), other_image(study), other_question(study)]
    reasons = [result for result in results if isinstance(result, str)]
    return [result for result in results if result not in reasons], reasons


def outcomes_of(study: Study) -> dict:
    swapped, reasons = swaps(study)
    assert reasons == []
    others = [own_embedding(study), *replacements(study), *knock_outs(study)]
    return {outcome.name: outcome for outcome in [*swapped, *others]}


def test_model_that_reads_its_thoughts_is_found_to_depend_on_them(thinking):
    outcomes = outcomes_of(thinking)
    verdict = verdict_of(thinking, outcomes)
    assert verdict.label == DEPENDS
    assert verdict.sentence.startswith("The answer depends on the thoughts")
    for name in ("shuffled", "other_image", "other_question", "zero", "noise", "mean"):
        assert outcomes[name].difference.high < 0 and outcomes[name].changed.low > MARGIN, name
    assert outcomes["without_3"].changed.low > 0


@pytest.mark.slow
def test_model_that_does_not_read_its_thoughts_is_found_not_to_depend_on_them(deaf):
    outcomes = outcomes_of(deaf)
    verdict = verdict_of(deaf, outcomes)
    assert verdict.label == DOES_NOT
    assert verdict.sentence.startswith("The answer does not depend on the thoughts")
    for outcome in outcomes.values():
        assert (outcome.difference.mean, outcome.changed.mean) == (0, 0), outcome.name
    assert positions_of(deaf, outcomes).label == WOULD_DO  # nobody fed anything back before either


def test_positions_alone_break_a_model_that_reads_its_thoughts(thinking):
    outcome = own_embedding(thinking)
    assert outcome.difference.high < 0 and outcome.changed.low > MARGIN
    found = positions_of(thinking, {outcome.name: outcome})
    assert found.label == CANNOT_TELL and "`--controls`" in found.notes[0]


def test_answers_that_lose_their_form_alone_are_begun(thinking, monkeypatch):
    """A stand-in breaks what is written where nothing was begun; what is begun is answered under the mask."""
    study = copy(thinking)
    study.answerer = thinking.answerer.with_count(NUM_LATENTS)  # begins with nothing
    free, expected = Answerer.answer, thinking.run(around=seeing(thinking.answerer.model, "thoughts")).texts

    def answer(self, rows):
        lines = free(thinking.answerer, rows)
        return lines if self.begin_with else [{**line, "answer": "", "output": "babble"} for line in lines]

    monkeypatch.setattr(Answerer, "answer", answer)
    outcome = only_thoughts(study)
    assert outcome.description == "the answer sees only the thoughts and is begun with ###"
    assert outcome.texts == expected and all(expected)
    monkeypatch.setattr(study, "untouched", replace(study.untouched, texts=[""] * len(study.rows)))
    assert only_thoughts(study).description == "the answer sees only the thoughts"


def test_too_few_rows_cannot_tell(deaf):
    few = Study(deaf.answerer, deaf.rows[:10], metric="exact_match", batch_size=8)
    verdict = verdict_of(few, {outcome.name: outcome for outcome in swaps(few)[0]})
    assert verdict.label == CANNOT_TELL
    assert verdict.sentence.startswith("It cannot be told with 10 examples")


def test_verdict_says_that_something_must_stand_there(deaf):
    outcomes = {outcome.name: outcome for outcome in [shuffled(deaf), *replacements(deaf)]}
    outcomes["zero"] = replace(outcomes["zero"], difference=Estimate(-0.5, -0.6, -0.4))
    verdict = verdict_of(deaf, outcomes)
    assert verdict.label == DOES_NOT
    assert any("fall with zero: it needs thoughts there" in note for note in verdict.notes)


def test_untouched_accuracy_and_own_thoughts_are_exact(thinking):
    """Reading the recorded thoughts again gives the same answers, so that no difference comes from recording."""
    assert thinking.untouched.scores == [1.0] * len(thinking.rows)
    again = thinking.run(given(thinking.untouched.thoughts))
    assert again.texts == thinking.untouched.texts
    torch.testing.assert_close(again.thoughts, thinking.untouched.thoughts, rtol=1e-5, atol=1e-6)


def test_recorded_thoughts_are_those_of_the_forward_pass(thinking):
    answerer = thinking.answerer
    with torch.no_grad():
        outputs = answerer.model(**answerer.inputs(thinking.rows[:8]), output_thoughts=True)
    torch.testing.assert_close(thinking.untouched.thoughts[:8], outputs.thoughts, rtol=1e-4, atol=1e-5)


def test_thoughts_of_another_image_are_those_of_this_question_with_that_image(thinking):
    """What donors think is checked against a plain forward pass over donor rows."""
    rows, seed = thinking.rows, thinking.seed
    partners = other_rows([images_key(row) for row in rows], seed, groups=[question_text(row) for row in rows])
    donors = [{**row, "images": rows[partner]["images"]} for row, partner in zip(rows, partners)]
    own = thinking.run(lambda indices: lambda position, thought: thought, donors=donors)
    assert own.scores is None  # a donor has no gold answer
    with torch.no_grad():
        plain = thinking.answerer.model(**thinking.answerer.inputs(donors[:8]), output_thoughts=True).thoughts
    torch.testing.assert_close(own.thoughts[:8], plain, rtol=1e-4, atol=1e-5)


def test_changed_and_followed_answers_are_counted(thinking):
    before = thinking.untouched
    half = len(before.texts) // 2
    texts = ["other"] * half + before.texts[half:]
    scores = [0.0] * half + [1.0] * (len(texts) - half)
    donors = ["other"] + before.texts[1:]  # only the first donor was answered otherwise than its row
    answers = replace(before, texts=texts, outputs=texts, scores=scores)
    outcome = thinking.outcome("made", "made up", answers, donors)
    assert outcome.changed.mean == half / len(texts)
    assert outcome.difference.mean == pytest.approx(-half / len(texts))
    assert (outcome.num_lost, outcome.num_gained) == (half, 0)
    assert (outcome.follows_donor.mean, outcome.num_donors_that_differ) == (1.0, 1)


def test_donor_without_an_answer_is_not_followed(thinking):
    before = thinking.untouched
    nothing = [""] * len(before.texts)
    answers = replace(before, texts=nothing, outputs=nothing, scores=[0.0] * len(nothing))
    outcome = thinking.outcome("made", "made up", answers, nothing)
    assert (outcome.follows_donor, outcome.num_donors_that_differ) == (None, 0)


def test_answers_that_were_and_stay_empty_change_with_what_is_written(thinking):
    own = thinking.untouched
    empty = replace(own, texts=[""] * len(own.texts))
    study = copy(thinking)
    study.untouched = empty
    outputs = ["babble"] + own.outputs[1:]
    outcome = study.outcome("made", "made up", replace(empty, outputs=outputs))
    assert outcome.changed.mean == 1 / len(own.texts)


def verdict_on(study: Study, lost: int, gained: int, *, changed: float, untouched=None, num_rows: int = 500):
    """The verdict on a made-up shuffled run of so many rows, half of them right before."""
    before = [1.0] * (num_rows // 2) + [0.0] * (num_rows - num_rows // 2)
    after = [1.0 - before[i] if i < lost or i >= num_rows - gained else before[i] for i in range(num_rows)]
    made = copy(study)
    made.rows = [study.rows[0]] * num_rows
    texts = untouched if untouched is not None else ["red"] * num_rows
    made.untouched = replace(study.untouched, texts=texts, outputs=texts, scores=before)
    answers = replace(made.untouched, scores=after)
    num_changed = int(changed * num_rows)
    changes = bootstrap_mean([1.0] * num_changed + [0.0] * (num_rows - num_changed))
    outcome = replace(made.outcome("shuffled", "", answers), changed=changes)
    return verdict_of(made, {"shuffled": outcome})


@pytest.mark.parametrize(
    ("lost", "gained", "changed", "label"),
    [
        (4, 0, 0.01, DOES_NOT),  # p = 0.125, and far within the margin
        (12, 0, 0.03, DOES_NOT),  # surely some, but less than the margin
        (60, 20, 0.3, DEPENDS),  # -8 points
        (40, 25, 0.3, CANNOT_TELL),  # many answers change, as many for the better
        (0, 0, 0.3, CANNOT_TELL),
        (0, 60, 0.3, CANNOT_TELL),  # better without its own thoughts
    ],
)
def test_verdict_follows_size_and_certainty(thinking, lost, gained, changed, label):
    verdict = verdict_on(thinking, lost, gained, changed=changed)
    assert verdict.label == label
    assert f"{lost} answers turn wrong, {gained} right" in verdict.sentence


def test_model_that_answers_nothing_is_not_said_to_do_without_thoughts(thinking):
    verdict = verdict_on(thinking, 0, 0, changed=0.0, untouched=[""] * 500)
    assert verdict.label == CANNOT_TELL
    assert "100.0 % of the untouched answers are empty." in verdict.notes


def test_few_rows_need_the_sign_test(thinking):
    """Four of forty turn wrong: the bootstrap's interval lies below 0, the exact test allows chance."""
    verdict = verdict_on(thinking, 4, 0, changed=0.1, num_rows=40)
    assert verdict.label == CANNOT_TELL


def test_shuffled_thoughts_come_from_rows_that_were_answered_otherwise(thinking):
    partners = other_rows(thinking.untouched.texts, thinking.seed)
    assert all(thinking.untouched.texts[p] != text for p, text in zip(partners, thinking.untouched.texts))
    alike = copy(thinking)
    alike.untouched = replace(thinking.untouched, texts=["red"] * len(thinking.rows))
    outcomes, reasons = swaps(alike)
    assert "shuffled was not run: all rows were answered alike" in reasons
    verdict = verdict_of(alike, {outcome.name: outcome for outcome in outcomes})
    assert verdict.label == CANNOT_TELL and "all were answered alike" in verdict.sentence


def test_other_counts_change_the_prompt_and_name_themselves(thinking):
    outcomes = {outcome.name: outcome for outcome in other_counts(thinking)}
    free = [name for name in outcomes if not name.endswith("_at_once")]
    assert free == ["count_0", "count_1", "count_2", "count_4", "count_5", "count_6"]
    assert outcomes["count_1"].description == "1 thought instead of 3"
    own = thinking.answerer
    fewer = Answerer(own.model, own.processor, num_latents=1, max_new_tokens=3)
    expected = [line["answer"] for start in range(0, 16, 8) for line in fewer.answer(thinking.rows[start : start + 8])]
    assert outcomes["count_1"].texts[:16] == expected


def test_room_is_what_the_longest_prompt_leaves(thinking):
    answerer, rows = thinking.answerer, thinking.rows[:5]
    begun = len(answerer.processor.encode_text("###"))
    longest = answerer.inputs(rows)["attention_mask"].sum(dim=1).max().item() - begun
    limit = answerer.model.config.text_config.max_position_embeddings
    assert room_for_more(answerer, rows) == limit - longest - answerer.max_new_tokens


def test_data_without_images_or_with_one_question_say_why_swaps_are_missing(thinking):
    build = partial(Study, thinking.answerer, metric="exact_match", batch_size=8)
    text_only = [{**row, "images": []} for row in thinking.rows[:8]]
    outcomes, reasons = swaps(build(text_only))
    assert [outcome.name for outcome in outcomes] == ["shuffled"]
    assert len(reasons) == 2 and "equally many images" in reasons[0] and "have no image" in reasons[1]
    one_question = [{**row, "question": "Which?"} for row in thinking.rows[:8]]
    outcomes, reasons = swaps(build(one_question))
    assert [outcome.name for outcome in outcomes] == ["shuffled", "other_image"]
    assert reasons == ["other_question was not run: all rows ask the same question"]


@pytest.mark.parametrize(("num_rows", "num_latents", "message"), [(1, 3, "1 rows"), (4, 0, "num_latents 0")])
def test_study_that_could_show_nothing_is_refused(thinking, num_rows, num_latents, message):
    own = thinking.answerer
    answerer = Answerer(own.model, own.processor, num_latents=num_latents)
    with pytest.raises(ValueError, match=message):
        Study(answerer, thinking.rows[:num_rows], metric="exact_match")
