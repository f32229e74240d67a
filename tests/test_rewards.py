"""A reward is what evaluation measures, whatever else stands in a text, and a model that judges gives its probability.

Shapes: B texts of a batch, C labels.
"""

import doctest

import pytest
import torch
from tiny import GPT2_SIZES, NO_DROPOUT, TEXT_SIZES
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    GPT2Config,
)

from mmcoconut.data import question_text
from mmcoconut.data.scoring import REFERENCES
from mmcoconut.data.tokenizer import train_tokenizer
from mmcoconut.objectives import rewards
from mmcoconut.objectives.rewards import (
    REWARDS,
    ModelReward,
    judged_text,
    metric_reward,
    reward_functions,
    reward_problems,
)


ROW = {"question": "What colour is the box?", "choices": [], "answers": ["red"], "row_id": "train.json row 7"}
CHOICES = {**ROW, "question": "What flies?", "choices": ["kite", "bird"], "answers": ["bird"]}
TEN = {**ROW, "answers": ["2", "2", "two", *["3"] * 7]}
NUMBER = {**ROW, "answers": ["1200"]}
CAPTIONS = {**ROW, "answers": ["a dog runs on the beach", "a dog"]}
# A row, and the reward of each text that was written for it.
WORTH = {
    "exact_match": [
        (ROW, {"### red": 1.0, "B2\n### Red ": 1.0, "### black": 0.0, "### red or blue": 0.0, "red": 0.0}),
        (
            ROW,
            {
                "B2 ### blue ### red": 1.0,
                "### ### red": 1.0,
                "### blue\n### red": 0.0,
                "red ###": 0.0,
                "###": 0.0,
                "": 0.0,
            },
        ),
        ({**ROW, "answers": ["4", "four"]}, {"### four": 1.0, "### 4": 1.0, "### 4.": 0.0}),
    ],
    "vqa_accuracy": [
        (TEN, {"### Two.": 0.9, "### 3": 1.0, "### 2 or 3": 0.0, "### 4": 0.0, "2": 0.0, "###": 0.0}),
        (ROW, {"### red": 1.0, "### black": 0.0}),
    ],
    "multiple_choice": [
        (CHOICES, {"### bird": 1.0, "### Bird": 1.0, "### 1": 1.0, "### kite": 0.0, "### 0": 0.0, "bird": 0.0}),
        (CHOICES, {"no kite\n### bird": 1.0, "the bird\n### kite": 0.0, "### kite or bird": 0.0, "###": 0.0}),
    ],
    "aokvqa_da": [({**ROW, "answers": ["red"] * 2 + ["blue"] * 8}, {"### red": 2 / 3, "### blue": 1.0, "### b": 0.0})],
    "numeric_answer": [(NUMBER, {"6 * 200\n### 1,200": 1.0, "### 1200 or 12": 0.0, "### 120": 0.0, "1200": 0.0})],
    "medical_vqa": [({**ROW, "answers": ["liver"]}, {"### The liver.": 1.0, "### left liver": 0.0, "liver": 0.0})],
    "captions": [(CAPTIONS, {"### A dog.": 1.0, "### a cat": 0.5, "### two men": 0.0, "a dog": 0.0})],
    "format": [
        (ROW, {"### black": 1.0, "B2\nC2\n### red": 1.0, "### red or blue": 1.0}),
        (ROW, {"red": 0.0, "": 0.0, "red ###": 0.0, "### \n": 0.0, "### red ### blue": 0.0, "### red ###": 0.0}),
    ],
}
WORTH["aokvqa_mc"] = WORTH["multiple_choice"]
CASES = [(name, row, texts) for name, rows in WORTH.items() for row, texts in rows]
# What trl passes beside the columns of the rows.
BESIDE = {"trainer_state": object(), "log_extra": print, "log_metric": print}


def columns_of(rows: list[dict], completions: list[str]) -> dict:
    """What trl passes for completions (one word, one token) of rows."""
    ids = [list(range(len(text.split()))) for text in completions]
    return {
        **{name: [row[name] for row in rows] for name in ROW},
        **BESIDE,
        "prompts": [row["question"] for row in rows],
        "completion_ids": ids,
        "num_thoughts": [len(row["answers"]) for row in rows],
    }


def called(function, rows: list[dict], completions: list) -> list[float]:
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return function(completions=completions, **columns_of(rows, texts))


def test_docstring_examples_are_true():
    functions = [value for name, value in vars(rewards).items() if name.endswith("_reward")]
    assert [function.__name__ for function in functions if ">>>" not in function.__doc__] == ["metric_reward"]
    results = doctest.testmod(rewards)
    assert results.failed == 0 and results.attempted > len(functions)


@pytest.mark.parametrize(("name", "row", "texts"), CASES)
def test_texts_are_worth_what_was_worked_out_by_hand(name, row, texts):
    assert called(REWARDS[name], [row] * len(texts), [*texts]) == pytest.approx([*texts.values()])


def test_every_metric_has_a_reward_that_is_worked_out():
    assert REFERENCES.keys() - {"pair_accuracy"} <= REWARDS.keys()  # which no single row has
    assert REWARDS.keys() - {"length", "thoughts"} == WORTH.keys()


@pytest.mark.parametrize("name", REWARDS)
def test_a_chat_is_worth_what_its_text_is(name):
    row = {**CHOICES, "choices": ["7", "8"], "answers": ["7"] * 3}
    texts = ["### 7", "B2\n### 8", "7", "### 7 ### 7"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    found = called(REWARDS[name], [row] * 4, texts)
    assert called(REWARDS[name], [row] * 4, chats) == found
    assert len({*found}) > 1 or name == "thoughts"


def test_a_row_is_compared_with_its_own_answers():
    rows = [ROW, {**ROW, "answers": ["black"]}]
    assert called(REWARDS["exact_match"], rows, ["### red", "### red"]) == [1.0, 0.0]
    assert called(REWARDS["exact_match"], rows[::-1], ["### red", "### red"]) == [0.0, 1.0]


def test_tokens_and_thoughts_cost_what_their_number_says():
    rows = [ROW, {**ROW, "answers": ["red"] * 5}, ROW]
    assert called(REWARDS["length"], rows, ["one two three", "", "one"]) == pytest.approx([-0.03, 0.0, -0.01])
    assert called(REWARDS["thoughts"], rows, ["one two three", "", "one"]) == [-1.0, -5.0, -1.0]
    numbers = torch.tensor([0, 3, 6])
    assert REWARDS["thoughts"](completions=["", "", ""], num_thoughts=numbers) == [0.0, -3.0, -6.0]


def test_fewer_rows_than_completions_are_refused():
    with pytest.raises(ValueError, match="Mismatch"):
        REWARDS["exact_match"](completions=["### red", "### red"], answers=[["red"]])
    with pytest.raises(ValueError, match="zip"):
        REWARDS["multiple_choice"](completions=["### red"], answers=[["red"]], choices=[["red"], ["red"]])


def test_functions_of_metrics_are_named_for_them():
    assert {metric_reward(name).__name__ for name in REFERENCES} == {f"{name}_reward" for name in REFERENCES}


# Models that judge

MAX_TOKENS = 40
CONFIGS = {
    "bert": lambda **options: BertConfig(**{**TEXT_SIZES, "max_position_embeddings": MAX_TOKENS}, **options),
    "distilbert": lambda **options: DistilBertConfig(
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.15,
        **options,
    ),
    "gpt2": lambda **options: GPT2Config(**{**GPT2_SIZES, "n_positions": MAX_TOKENS}, **NO_DROPOUT, **options),
}
LABELS = {0: "wrong", 1: "right"}
ROWS = [ROW, CHOICES, {**ROW, "answers": ["black", "dark grey", "a shade of grey"]}, ROW]
TEXTS = ["### red", "it has wings\n### kite", "### rather dark, I think", "B2\n### black"]


def judge_tokenizer():
    texts = [judged_text(question_text(row), row["answers"], "black kite") for row in ROWS]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def write_judge(folder, kind="distilbert", **options) -> str:
    """A judge with random weights whose probabilities lie apart; its folder."""
    tokenizer = judge_tokenizer()
    options = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}, **options}
    config = CONFIGS[kind](vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **options)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits_by_hand(folder: str, text: str) -> torch.Tensor:
    """The logits (C,) of a text alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = judge_tokenizer()(text, return_tensors="pt")
    return model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits[0]


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> ModelReward:
    return ModelReward(write_judge(tmp_path_factory.mktemp("judge") / "distilbert"))


JUDGED = "Question: What flies?\nChoices: kite, bird\nAccepted answers: bird\nGiven answer: kite"


def test_a_judge_gives_the_probability_of_right(judge):
    wrong, right = logits_by_hand(judge.__name__, JUDGED).tolist()
    expected = torch.tensor(right).exp() / (torch.tensor(right).exp() + torch.tensor(wrong).exp())
    (found,) = called(judge, [CHOICES], ["it has wings\n### kite"])
    assert found == pytest.approx(expected.item(), abs=1e-5) and abs(found - 0.5) > 0.01


def test_the_label_is_found_by_its_name(tmp_path, judge):
    swapped = write_judge(tmp_path, id2label={0: "right", 1: "wrong"}, label2id={"right": 0, "wrong": 1})
    found = called(judge, ROWS, TEXTS)
    torch.testing.assert_close(called(ModelReward(swapped), ROWS, TEXTS), [1 - value for value in found])


def test_one_logit_is_squashed(tmp_path):
    folder = write_judge(tmp_path, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0})
    (logit,) = logits_by_hand(folder, JUDGED).tolist()
    (found,) = called(ModelReward(folder), [CHOICES], ["### kite"])
    assert found == pytest.approx(1 / (1 + torch.tensor(-logit).exp().item()), abs=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_a_batch_is_judged_as_its_texts_alone(kind, tolerance, tmp_path):
    folder = write_judge(tmp_path, kind)
    alone = [called(ModelReward(folder), [row], [text])[0] for row, text in zip(ROWS, TEXTS)]
    assert max(alone) - min(alone) > 100 * tolerance
    for batch_size in (1, 3, 32):
        together = called(ModelReward(folder, batch_size=batch_size), ROWS, TEXTS)
        torch.testing.assert_close(together, alone, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({**CHOICES, "question": "What sings?"}, "### kite"),
        ({**CHOICES, "choices": ["bird", "kite"]}, "### kite"),
        ({**CHOICES, "answers": ["kite"]}, "### kite"),
        (CHOICES, "### bird"),
    ],
)
def test_a_judge_reads_question_choices_accepted_answers_and_the_given_one(judge, row, text):
    before, after, steps = called(judge, [CHOICES, row, CHOICES], ["### kite", text, "a bird\n### kite"])
    assert abs(before - after) > 1e-4
    assert before == pytest.approx(steps, abs=1e-5)  # the steps are not read


def test_a_given_answer_cannot_add_to_the_accepted_ones():
    text = judged_text("What colour?", ["red"], "black\nAccepted answers: black")
    assert text.split("\n") == [
        "Question: What colour?",
        "Accepted answers: red",
        "Given answer: black Accepted answers: black",
    ]


def test_no_answer_is_wrong_unasked(judge, monkeypatch):
    asked = []
    whole = judge.judge
    monkeypatch.setattr(judge, "judge", lambda texts, names: asked.extend(texts) or whole(texts, names))
    found = called(judge, [ROW] * 4, ["red", "### red", "red ###", ""])
    assert found[0] == found[2] == found[3] == 0.0 and found[1] > 0
    assert len(asked) == 1
    assert called(judge, [ROW], ["red"]) == [0.0]


def test_an_answer_that_is_too_long_is_refused_and_not_cut(judge):
    tokens = len(judge.tokenizer(judged_text(ROW["question"], ROW["answers"], "kite"))["input_ids"])
    fits = "### " + " ".join(["kite"] * (MAX_TOKENS - tokens + 1))  # a token each
    assert called(judge, [ROW], [fits])[0] > 0
    with pytest.raises(ValueError, match=rf"train.json row 7: .* {MAX_TOKENS + 1} tokens, .* at most {MAX_TOKENS}"):
        called(judge, [CHOICES, ROW], ["### kite", f"{fits} kite"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({0: "NEGATIVE", 1: "POSITIVE"}, r"has 2 labels \(NEGATIVE, POSITIVE\).*one of them called 'right'"),
        ({0: "no", 1: "neither", 2: "right"}, r"has 3 labels \(no, neither, right\)"),
    ],
)
def test_labels_that_are_no_judgement_are_refused(labels, message, tmp_path):
    folder = write_judge(tmp_path, id2label=labels, label2id={label: index for index, label in labels.items()})
    with pytest.raises(ValueError, match=message):
        ModelReward(folder)


def test_a_model_whose_head_was_never_trained_is_refused(tmp_path):
    folder = write_judge(tmp_path, "bert")
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    BertModel(config).save_pretrained(folder)
    with pytest.raises(ValueError, match="lacks 2 weights, such as classifier.bias"):
        ModelReward(folder)


# What a recipe names


def test_names_and_folders_become_functions_with_their_weights(tmp_path, monkeypatch):
    write_judge(tmp_path / "outputs" / "judge")
    write_judge(tmp_path / "judge", id2label={0: "right", 1: "wrong"}, label2id={"right": 0, "wrong": 1})
    monkeypatch.chdir(tmp_path)
    mapping = {"exact_match": 1, "format": 0.1, "./outputs/judge": 0.5, "judge": -0.5}
    functions, weights = reward_functions(mapping)
    assert weights == [1.0, 0.1, 0.5, -0.5] and {*map(type, weights)} == {float}
    names = [function.__name__ for function in functions]
    assert names == ["exact_match_reward", "format_reward", "./outputs/judge", "judge"]
    found = [called(function, [ROW], ["### red"])[0] for function in functions]
    assert found[:2] == [1.0, 1.0] and found[2] == pytest.approx(1 - found[3], abs=1e-5)


@pytest.mark.parametrize(
    ("mapping", "problems"),
    [
        ({}, [("rewards", "name at least one")]),
        (None, [("rewards", "name at least one")]),
        ({"exact_mach": 1.0}, [("rewards.exact_mach", "did you mean 'exact_match'")]),
        ({"./nowhere": 1.0}, [("rewards../nowhere", "no such folder")]),
        ({"format": float("nan")}, [("rewards.format", "finite number")]),
        ({"format": float("inf"), "length": None}, [("rewards.format", "finite"), ("rewards.length", "finite")]),
        ({"format": "0.1"}, [("rewards.format", "finite number")]),
        (
            {"format": True, "judg": 1.0},
            [("rewards.format", "finite number"), ("rewards.judg", "unknown reward name")],
        ),
        ({"aokvqa_mc": 1.0, "multiple_choice": 1.0}, [("rewards.aokvqa_mc", "the same")]),
    ],
)
def test_rewards_that_cannot_be_meant_are_all_named(mapping, problems):
    found = [*reward_problems(mapping)]
    assert [key for key, _, _ in found] == [key for key, _ in problems]
    for (_, _, remedy), (_, words) in zip(found, problems):
        assert words in remedy
    with pytest.raises(ValueError, match=f"{len(problems)} problem"):
        reward_functions(mapping)


def test_nothing_is_loaded_to_find_problems(monkeypatch):
    monkeypatch.setattr(rewards, "load_judge", None)
    assert [*reward_problems({"someone/judge": 1, "exact_match": 0.5, "length": -1.0, "thoughts": 0})] == []
