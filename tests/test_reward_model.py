"""A judge learns from labelled answers, says how well on other questions, and refuses rows that teach it nothing."""

import doctest
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import TEXT_CONFIGS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mmcoconut import reward_model
from mmcoconut.arguments import LIMITS
from mmcoconut.data import Example, to_dataset
from mmcoconut.evaluation import add_scores, described
from mmcoconut.recipe_files import RecipeError, read_recipe_file
from mmcoconut.records import write_lines
from mmcoconut.reward_model import judgement_of, made_up_rows, main, parse_arguments, read_answers
from mmcoconut.rewards import reward_functions
from mmcoconut.tokenizer import train_tokenizer


RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes" / "reward_model").glob("*.yaml"))
NUM_QUESTIONS, NUM_OTHERS = 100, 50
TINY = """
text_config: {model_type: distilbert, dim: 64, n_layers: 1, n_heads: 2, hidden_dim: 64, max_position_embeddings: 64,
  dropout: 0.0, attention_dropout: 0.0, seq_classif_dropout: 0.0, initializer_range: 0.1}
tokenizer: train
tokenizer_vocab_size: 320
learning_rate: 2.0e-3
num_train_epochs: 30
per_device_train_batch_size: 25
logging_strategy: "no"
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
seed: 0
"""
ROW = {"question": "What colour?", "choices": ["red", "blue"], "gold": ["red"], "answer": "red", "correct": True}
WRONG = {**ROW, "answer": "blue", "correct": False}
NO_ANSWER = {**ROW, "answer": "", "correct": False}


def write_recipe(folder: Path, train: list[dict], validation: list[dict], recipe: str = TINY) -> str:
    """A recipe beside its two files."""
    for name, rows in (("train", train), ("validation", validation)):
        write_lines(folder / f"{name}.jsonl", rows)
        recipe += f"{name}_file: {folder / name}.jsonl\n"
    (folder / "tiny.yaml").write_text(recipe + f"output_dir: {folder / 'judge'}\n")
    return str(folder / "tiny.yaml")


def others(rows: list[dict]) -> list[dict]:
    """The same about another question."""
    return [{**row, "question": "Which colour?"} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A judge of colours: its folder, its results, and the questions that it has not learnt from."""
    folder = tmp_path_factory.mktemp("reward_model")
    held_out = made_up_rows(range(NUM_QUESTIONS, NUM_QUESTIONS + NUM_OTHERS), seed=1)
    recipe = write_recipe(folder, made_up_rows(range(NUM_QUESTIONS), seed=0), [*held_out, NO_ANSWER])
    return folder / "judge", main([recipe]), held_out


def test_docstring_examples_are_true():
    results = doctest.testmod(reward_model)
    assert results.failed == 0 and results.attempted > 0


def test_a_judge_tells_right_from_wrong_answers_to_other_questions(trained):
    folder, results, held_out = trained
    assert results["rows"] == {"train": 2 * NUM_QUESTIONS, "validation": 2 * NUM_OTHERS}
    assert results["commonest_share"] == 0.5  # each question has a right and a wrong answer
    assert results["accuracy"]["mean"] > 0.8 and results["accuracy"]["low"] > 0.7
    assert min(results["accuracy_by_label"].values()) > 0.7
    assert json.loads((folder / "results.json").read_text()) == results
    assert {"command", "date", "machine", "versions", "commit"} <= results.keys()


def test_the_saved_judge_rewards_as_often_as_was_measured(trained):
    folder, results, held_out = trained
    functions, weights = reward_functions({"exact_match": 1.0, str(folder): 0.5})
    assert weights == [1.0, 0.5]
    columns = {name: [row[name] for row in held_out] for name in ("question", "choices")}
    completions = [f"box by box\n### {row['answer']}" for row in held_out]
    exact, judged = (
        f(completions=completions, answers=[row["gold"] for row in held_out], **columns) for f in functions
    )
    assert exact == [float(row["correct"]) for row in held_out]
    agrees = [(reward > 0.5) == row["correct"] for reward, row in zip(judged, held_out)]
    assert sum(agrees) / len(agrees) == pytest.approx(results["accuracy"]["mean"])


def test_rows_without_an_answer_are_counted_and_not_judged(trained):
    _, results, _ = trained
    assert results["without_answer"] == {"train": 0, "validation": 1}


def test_the_folder_holds_no_pickle(trained):
    assert not [path for path in trained[0].rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_judgement_stands_beside_the_commonest_label():
    judged, labels = torch.tensor([1, 1, 0, 0, 0, 1]).numpy(), torch.tensor([1, 0, 0, 0, 0, 0]).numpy()
    found = judgement_of(judged, labels, seed=0)
    assert found["accuracy"]["mean"] == pytest.approx(4 / 6)
    assert found["accuracy"]["low"] < 4 / 6 < found["accuracy"]["high"]
    assert (found["commonest_label"], found["commonest_share"]) == ("wrong", pytest.approx(5 / 6))
    assert found["accuracy_by_label"] == {"wrong": pytest.approx(3 / 5), "right": 1.0}


def test_what_evaluation_writes_is_read(tmp_path):
    picture = {"bytes": None, "path": "box.png"}
    example = Example([picture], "What colour?", ["red", "black"], ["look"], ["red", "crimson"], "row 0")
    rows = to_dataset([example] * 3)
    outputs = {"### Red": "Red", "### black": "black", "red": ""}
    lines = [
        {**described({**row, "index": index}, SimpleNamespace(num_latents=2)), "output": output, "answer": answer}
        for index, (row, (output, answer)) in enumerate(zip(rows, outputs.items()))
    ]
    add_scores(lines, rows, "exact_match")
    file = tmp_path / "predictions.jsonl"
    write_lines(file, lines)
    question = {"question": "What colour?\nChoices: red, black", "gold": ["red", "crimson"]}
    right, wrong = (
        {**question, "answer": answer, "correct": answer == "Red", "name": f"{file} row {index}"}
        for index, answer in enumerate(["Red", "black"])
    )
    assert read_answers(str(file)) == ([right, wrong], 1)


def without(field: str) -> dict:
    return {name: value for name, value in ROW.items() if name != field}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("question"), "field 'question': .* missing among these; add it"),
        (without("gold"), "field 'gold': .* missing among these; add it"),
        (without("answer"), "field 'answer': .* missing among these; add it"),
        (without("correct"), "field 'correct': .* missing among these; add it"),
        ({**ROW, "question": 7}, "field 'question': found 7; write a string, not int"),
        ({**ROW, "question": " "}, "field 'question': found ' '; it is empty"),
        ({**ROW, "choices": "red, blue"}, "field 'choices': found 'red, blue'; write a list"),
        ({**ROW, "choices": [1, 2]}, "field 'choices': found 1; write a string"),
        ({**ROW, "gold": "red"}, "field 'gold': found 'red'; write a list"),
        ({**ROW, "gold": []}, r"field 'gold': found \[\]; write at least one accepted answer"),
        ({**ROW, "gold": ["red", ""]}, "field 'gold': found ''; it is empty"),
        ({**ROW, "answer": None}, "field 'answer': found None; write a string"),
        ({**ROW, "correct": 1}, "field 'correct': found 1; write true or false"),
        ({**ROW, "correct": "true"}, "field 'correct': found 'true'; write true or false"),
        ({**ROW, "answer": " "}, "field 'correct': found True; the answer is empty, which is never right"),
        ([ROW], "found .*; write an object with question, gold, answer, correct"),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused_with_its_place(row, message, tmp_path):
    file = tmp_path / "train.jsonl"
    write_lines(file, [ROW, WRONG, row])
    with pytest.raises(ValueError, match=f"{file} row 2.* {message}"):
        read_answers(str(file))


def test_a_line_that_was_cut_is_refused(tmp_path):
    file = tmp_path / "train.jsonl"
    write_lines(file, [ROW, WRONG])
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=f"{file} row 1: not valid JSON .* if it looks cut"):
        read_answers(str(file))


def test_a_last_line_without_its_end_is_read(tmp_path):
    file = tmp_path / "train.jsonl"
    write_lines(file, [ROW, WRONG])
    file.write_text(file.read_text().rstrip("\n"))
    assert len(read_answers(str(file))[0]) == 2


@pytest.mark.parametrize(
    ("rows", "counts"),
    [([ROW, ROW], "2 of 2"), ([WRONG], "0 of 1"), ([ROW, NO_ANSWER], "1 of 1"), ([NO_ANSWER], "0 of 0")],
)
def test_answers_that_are_all_right_or_all_wrong_are_refused(rows, counts, tmp_path):
    recipe = write_recipe(tmp_path, [ROW, WRONG], others(rows))
    with pytest.raises(
        ValueError, match=f"validation.jsonl: {counts} answers are right, .* add some of the other kind"
    ):
        main([recipe])


def test_a_question_on_both_sides_is_refused_with_its_rows(tmp_path):
    rows = [*others([ROW, WRONG]), ROW]
    recipe = write_recipe(tmp_path, [{**ROW, "gold": ["green"], "correct": False}, ROW, WRONG], rows)
    pair = f"{tmp_path}/validation.jsonl row 2 and {tmp_path}/train.jsonl row 1:"
    with pytest.raises(ValueError, match=f"1 of 2 validation questions are .* such as {pair} keep all rows"):
        main([recipe])


def test_the_same_words_with_other_choices_or_accepted_answers_are_another_question(tmp_path):
    blue = {"gold": ["blue"]}
    rows = [{**ROW, "choices": ["blue", "red"]}, {**WRONG, **blue, "correct": True}, {**ROW, **blue, "correct": False}]
    recipe = write_recipe(tmp_path, [ROW, WRONG], rows)
    assert len(reward_model.read(parse_arguments([recipe])[0])[0]["validation"]) == 3


def test_a_text_longer_than_the_positions_is_refused_with_its_row(tmp_path):
    long = {**WRONG, "answer": " ".join(["blue"] * 64)}
    recipe = write_recipe(tmp_path, [ROW, WRONG], others([ROW, WRONG, long]))
    with pytest.raises(ValueError, match=r"validation.jsonl row 2: .* have \d+ tokens, .* at most 64"):
        main([recipe])


def test_a_pretrained_decoder_becomes_a_judge(tmp_path):
    """It has no token for padding, and reads the last token that is none."""
    tokenizer = train_tokenizer(["What colour?\nGiven answer: blue"], vocab_size=300)
    decoder = AutoModelForCausalLM.from_config(TEXT_CONFIGS["gpt2"](vocab_size=len(tokenizer)))
    for part in (decoder, tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    recipe = f"text_model: {tmp_path / 'gpt2'}\nlearning_rate: 0.0\nmax_steps: 1\nuse_cpu: true\ndisable_tqdm: true\n"
    main([write_recipe(tmp_path, [ROW, WRONG], others([ROW, WRONG]), recipe)])
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert saved.config.id2label == {0: "wrong", 1: "right"}
    assert saved.config.pad_token_id == tokenizer.eos_token_id
    for name, weight in decoder.transformer.named_parameters():
        torch.testing.assert_close(saved.transformer.get_parameter(name), weight, rtol=0, atol=0)
    (judge,), _ = reward_functions({str(tmp_path / "judge"): 1.0})
    columns = {"question": ["What?", "What colour?"], "choices": [[], ["red", "blue"]], "answers": [["red"]] * 2}
    together = judge(["### a", "### blue"], **columns)
    alone = judge(["### a"], **{name: values[:1] for name, values in columns.items()})
    assert together[0] == pytest.approx(alone[0], abs=1e-6) and together[0] != pytest.approx(together[1], abs=1e-6)


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    recipe = write_recipe(tmp_path, [ROW, WRONG], others([ROW, WRONG]))
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="judge is not empty: give another --output_dir"):
        main([recipe])
    assert [path.name for path in (tmp_path / "judge").iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        (["--text_model", "a/b"], "text_model", "set either `text_model` or `text_config`"),
        (["--text_config", "null"], "text_model", "set either `text_model` or `text_config`"),
        (["--text_config.model_type", "distilbret"], "text_config", "did you mean `distilbert`"),
        (["--text_config.dims", "3"], "text_config.dims", "did you mean `dim`"),
        (["--text_config", "{dim: 8}"], "text_config", "add `model_type`"),
        (["--tokenizer", "null"], "tokenizer", "set `tokenizer: train`"),
        (["--text_config", "null", "--text_model", "a/b"], "tokenizer", "belong to its own tokenizer"),
        (["--train_file", "null"], "train_file", "name a file of labelled answers"),
        (["--validation_file", "nowhere.jsonl"], "validation_file", "there is no such file"),
        (["--push_to_hub", "true"], "push_to_hub", "upload what it writes"),
        (["--learning_rte", "1.0"], "learning_rte", "did you mean `learning_rate`"),
        (["--learning_rate", "much"], "learning_rate", "expected float"),
        (["--num_train_epochs", "-1"], "num_train_epochs", "must lie between 0"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(words, key, remedy, tmp_path):
    recipe = write_recipe(tmp_path, [ROW, WRONG], others([ROW, WRONG]))
    with pytest.raises(RecipeError) as error:
        main([recipe, *words])
    ((found, _, said),) = error.value.problems
    assert found == key and remedy in said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_in_a_smoke_test(path, tmp_path):
    results = main([str(path), "--smoke_test", "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"])
    folder = tmp_path / "run-smoke"
    assert json.loads((folder / "results.json").read_text()) == results
    _, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_every_number_of_a_recipe_has_limits():
    values = {key: value for path in RECIPES for key, value in read_recipe_file(str(path)).values.items()}
    numbers = {key for key, value in values.items() if type(value) in (int, float)}
    assert numbers and not numbers - LIMITS.keys()


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name}:" in printed for name in (*reward_model.NAMES[0], "smoke_test", "save_strategy"))
