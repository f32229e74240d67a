"""Train a model that judges answers, for RL: `python -m mmcoconut.reward_model recipe.yaml [--key value …]`.

It learns from answers that are labelled right or wrong, in JSON Lines of `{"question", "choices", "gold", "answer",
"correct"}`, which is what `python -m mmcoconut.evaluation` writes as predictions.jsonl. It reads no picture: question,
accepted answers and given answer, as `mmcoconut.rewards.judged_text` writes them, must say what is right. The folder
that it writes is a name in a recipe's `rewards`.
"""

import json
import logging
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import SaveStrategy

from mmcoconut.arguments import as_types, help_text, read_values, unknown_fields
from mmcoconut.data import question_text
from mmcoconut.data.json_steps import check_list, check_text, field_error, field_of, read_text
from mmcoconut.provenance import provenance
from mmcoconut.recipe_files import RecipeError, name_sources, run_command
from mmcoconut.records import RESULTS_FILE, write_json, write_lines
from mmcoconut.rewards import LABELS, ModelReward, encode, judged_text, max_tokens_of
from mmcoconut.smoke import TINY_TEXT, tiny_config
from mmcoconut.statistics import Estimate, bootstrap_mean, percent
from mmcoconut.tokenizer import train_tokenizer
from mmcoconut.uploads import quiet_requests


logger = logging.getLogger("mmcoconut")

USAGE = "python -m mmcoconut.reward_model recipe.yaml [--key value ...]"
FILES = ("train_file", "validation_file")
NUM_SHOWN = 3  # of the questions that stand in both files
COLOURS = ("red", "black", "blue", "green")
SMOKE_NUMBERS = (range(8), range(8, 16))  # of the questions in FILES


@dataclass
class RewardModelArguments:
    """What is learnt from, and the model that learns it."""

    train_file: str | None = HfArg(default=None, help="JSON Lines of labelled answers, such as a predictions.jsonl.")
    validation_file: str | None = HfArg(default=None, help="The same of other questions, to see how well it judges.")
    text_model: str | None = HfArg(default=None, help="Folder or Hub id of the pretrained language model.")
    text_config: dict | None = HfArg(default=None, help="From scratch: {model_type: distilbert, ...}.")
    text_model_type: str | None = HfArg(default=None, help="Architecture of text_model, for a smoke test.")
    tokenizer: str | None = HfArg(default=None, help="Folder, Hub id or `train`; default: text_model's.")
    tokenizer_vocab_size: int = HfArg(default=1000, help="Entries of a tokenizer trained on the training texts.")


@dataclass(repr=False)  # the inherited __repr__ hides tokens
class RewardModelRun(TrainingArguments):
    """transformers.TrainingArguments, of which save_strategy is `no` here unless a recipe says otherwise."""

    smoke_test: bool = HfArg(default=False, help="Tiny model and made-up data: does the recipe run at all?")
    save_strategy: SaveStrategy | str = HfArg(default="no", help="When to save what a run can be resumed from.")


CLASSES = (RewardModelArguments, RewardModelRun)
NAMES = [[field.name for field in fields(cls) if field.init] for cls in CLASSES]
TYPES = {name: get_type_hints(cls)[name] for cls, names in zip(CLASSES, NAMES, strict=True) for name in names}


def conflicts(values: Mapping) -> Iterator[tuple]:
    """What is wrong with typed values together, as (key, value found, remedy)."""
    text_model, text_config, tokenizer = (values[key] for key in ("text_model", "text_config", "tokenizer"))
    if (text_model is None) == (text_config is None):
        yield "text_model", text_model, "set either `text_model` or `text_config`"
    elif text_model is not None and tokenizer is not None:
        yield "tokenizer", tokenizer, "the embeddings of `text_model` belong to its own tokenizer: remove this key"
    elif text_config is not None and tokenizer is None:
        yield "tokenizer", None, "a `text_config` has none: set `tokenizer: train`, a folder or a Hub id"
    if text_config is not None and "model_type" not in text_config:
        yield "text_config", text_config, "name the architecture: add `model_type`"
    yield from unknown_fields({"vision_config": None, "text_config": text_config})
    if values.get("push_to_hub"):
        yield "push_to_hub", True, "this command does not upload: remove this key, and upload what it writes"
    for key in FILES if not values.get("smoke_test") else ():
        if values[key] is None:
            yield key, None, "name a file of labelled answers"
        elif not Path(values[key]).is_file():
            yield key, values[key], "there is no such file: correct the path"


def parse_arguments(argv: list[str]) -> tuple[RewardModelArguments, RewardModelRun]:
    """The arguments of `recipe.yaml [--key value ...]`; RecipeError lists everything that is wrong with them."""
    if {"-h", "--help"} & {*argv}:
        print(help_text(USAGE, CLASSES))
        print("and every field of transformers.TrainingArguments.")
        raise SystemExit(0)
    recipe, *words = argv or [""]
    values, sources, problems = read_values(recipe, words)
    values = as_types(values, TYPES, problems)
    values["output_dir"] = values.get("output_dir") or f"outputs/{Path(recipe).stem}"
    if values.get("smoke_test") and not torch.cuda.is_available():
        values |= {"bf16": False, "fp16": False}
    own, run = ({name: values[name] for name in names if name in values} for names in NAMES)
    arguments, wrong = RewardModelArguments(**own), {key for key, _, _ in problems}
    problems += [problem for problem in conflicts({**run, **vars(arguments)}) if problem[0] not in wrong]
    if problems:
        raise RecipeError(recipe, name_sources(problems, sources, recipe))
    return arguments, RewardModelRun(**run)


def made_up_rows(numbers: Iterable[int], *, seed: int) -> list[dict]:
    """A right and a wrong answer to a question for each number.

    >>> made_up_rows([7], seed=0)[1]
    {'question': 'What colour is box 7?', 'choices': [], 'gold': ['green'], 'answer': 'black', 'correct': False}
    """
    rng, rows = random.Random(seed), []
    for number in numbers:
        right, wrong = rng.sample(COLOURS, 2)
        row = {"question": f"What colour is box {number}?", "choices": [], "gold": [right]}
        rows += [{**row, "answer": answer, "correct": answer == right} for answer in (right, wrong)]
    return rows


def smoke_arguments(
    arguments: RewardModelArguments, run: RewardModelRun
) -> tuple[RewardModelArguments, RewardModelRun]:
    """The recipe with made-up rows, the same architecture in tiny sizes, and one epoch."""
    folder = Path(run.output_dir)
    folder = folder.with_name(f"{folder.name}-smoke")
    files = {key: folder / f"{key}.jsonl" for key in FILES}
    with run.main_process_first(desc="writing sample data"):
        if run.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for file, numbers in zip(files.values(), SMOKE_NUMBERS, strict=True):
                write_lines(file, made_up_rows(numbers, seed=0))
    arguments = replace(
        arguments,
        **{key: str(file) for key, file in files.items()},
        text_model=None,
        text_config=tiny_config(
            arguments.text_model_type,
            arguments.text_config,
            arguments.text_model,
            sizes=TINY_TEXT,
            key="text_model_type",
        ),
        tokenizer="train",
        tokenizer_vocab_size=400,
    )
    run.output_dir, run.num_train_epochs, run.max_steps = str(folder), 1, -1
    return arguments, run


def parse_line(text: str, file: str, index: int) -> dict:
    """The object that a line of JSON Lines is; ValueError for a line that is none."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "write one whole object a line, or copy the file again if it looks cut"
        raise ValueError(f"{file} row {index}: not valid JSON ({error.msg}); {remedy}") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{file} row {index}: found {text[:100]}; write an object with question, gold, answer, correct"
        )
    return row


def texts_in(row: Mapping, field: str, name: str) -> list[str]:
    return [check_text(text, field, name) for text in check_list(field_of(row, field, name), field, name)]


def labelled_answer(row: Mapping, name: str) -> dict:
    """What is read of a row: its question with the choices, its accepted answers, the given one, whether it is right.

    Raises:
        ValueError: a field that is missing or that holds something else, with the remedy.
    """
    question, answer, correct = (field_of(row, field, name) for field in ("question", "answer", "correct"))
    choices = texts_in(row, "choices", name) if "choices" in row else []
    question = question_text({"question": check_text(question, "question", name), "choices": choices})
    gold = texts_in(row, "gold", name)
    if not gold:
        raise field_error(name, "gold", gold, "write at least one accepted answer")
    if not isinstance(answer, str):
        raise field_error(name, "answer", answer, "write a string, '' where none was given")
    if not isinstance(correct, bool):
        raise field_error(name, "correct", correct, "write true or false")
    if correct and not answer.strip():
        raise field_error(name, "correct", correct, "the answer is empty, which is never right: write it, or false")
    return {"question": question, "gold": gold, "answer": answer.strip(), "correct": correct, "name": name}


def read_answers(file: str) -> tuple[list[dict], int]:
    """The rows with an answer, and how many have none; these are wrong unasked, and there is nothing to judge.

    Raises:
        ValueError: a row that cannot be read, or answers that are all right or all wrong.
    """
    lines = [line for line in read_text(Path(file)).split("\n") if line.strip()]
    rows = [labelled_answer(parse_line(line, file, index), f"{file} row {index}") for index, line in enumerate(lines)]
    answered = [row for row in rows if row["answer"]]
    num_right = sum(row["correct"] for row in answered)
    if num_right in (0, len(answered)):
        raise ValueError(
            f"{file}: {num_right} of {len(answered)} answers are right, so there is nothing to tell apart: add some "
            "of the other kind, such as the answers of an earlier checkpoint."
        )
    return answered, len(rows) - len(answered)


def check_apart(rows: Mapping[str, Sequence[Mapping]]) -> None:
    """Raise ValueError for questions that stand in both files: of them, validation would measure the memory.

    A question is what the model reads of it: its text with the choices, and its accepted answers.
    """
    questions = {split: {} for split in rows}
    for split, found in questions.items():
        for row in rows[split]:
            found.setdefault((row["question"], *row["gold"]), row["name"])
    both = [key for key in questions["validation"] if key in questions["train"]]
    if both:
        pairs = [f"{questions['validation'][key]} and {questions['train'][key]}" for key in both[:NUM_SHOWN]]
        raise ValueError(
            f"{len(both)} of {len(questions['validation'])} validation questions are training questions too, such as "
            f"{'; '.join(pairs)}: keep all rows with the same question and accepted answers in one of the two files."
        )


def read(arguments: RewardModelArguments) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """The rows of `train` and `validation`, and how many of each were left out because they hold no answer."""
    found = {key.removesuffix("_file"): read_answers(getattr(arguments, key)) for key in FILES}
    rows = {split: answered for split, (answered, _) in found.items()}
    check_apart(rows)
    return rows, {split: without for split, (_, without) in found.items()}


def texts_of(rows: Sequence[Mapping]) -> list[str]:
    return [judged_text(row["question"], row["gold"], row["answer"]) for row in rows]


def build_tokenizer(arguments: RewardModelArguments, train_rows: Sequence[Mapping]):
    """Padding behind the text, with the end of a text where there is no token for it."""
    if arguments.tokenizer == "train":
        tokenizer = train_tokenizer(texts_of(train_rows), vocab_size=arguments.tokenizer_vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.text_model, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(arguments: RewardModelArguments, tokenizer):
    """The language model with a new head for the two LABELS, in float32; the Trainer tells it the tokenizer's pad."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    if arguments.text_config is not None:
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        values = {**arguments.text_config, **labels, **ids, "vocab_size": len(tokenizer)}
        return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**values))
    return AutoModelForSequenceClassification.from_pretrained(
        arguments.text_model, trust_remote_code=False, dtype=torch.float32, **labels
    )


def encoded_rows(rows: Sequence[Mapping], tokenizer, *, max_tokens: int) -> list[dict]:
    """What the Trainer is given: a row's ids and the index of its label; ValueError for a row that is too long."""
    encoded = encode(tokenizer, texts_of(rows), [row["name"] for row in rows], max_tokens=max_tokens)
    columns = {**encoded, "labels": [int(row["correct"]) for row in rows]}
    return [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]


def likeliest(logits, labels) -> torch.Tensor:
    """The label (B,) of logits (B, 2), which some models give first of several tensors."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def build_trainer(model, tokenizer, rows: Mapping[str, Sequence[Mapping]], run: RewardModelRun) -> Trainer:
    max_tokens = max_tokens_of(model.config, tokenizer)
    splits = {split: encoded_rows(some, tokenizer, max_tokens=max_tokens) for split, some in rows.items()}
    return Trainer(
        model=model,
        args=run,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        preprocess_logits_for_metrics=likeliest,
        compute_metrics=accuracy,
    )


def judgement_of(judged: np.ndarray, labels: np.ndarray, *, seed: int) -> dict:
    """How often judged labels are the given ones, both (n,); beside it, how often the commonest label would be.

    The interval is over rows, as if those of one question had nothing to do with each other.
    """
    label, count = Counter(labels.tolist()).most_common(1)[0]
    return {
        "accuracy": bootstrap_mean(judged == labels, seed=seed).asdict(),
        "commonest_label": LABELS[label],
        "commonest_share": count / len(labels),
        "accuracy_by_label": {
            name: float((judged[labels == index] == index).mean()) for index, name in enumerate(LABELS)
        },
    }


def check_output(run: RewardModelRun) -> None:
    """Refuse to mix two runs in one folder."""
    folder = Path(run.output_dir)
    if run.resume_from_checkpoint is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: give another --output_dir, delete it, or go on with the run in it by "
            "--resume_from_checkpoint and the folder of one of its checkpoints."
        )


def results_of(trainer: Trainer, rows: Mapping[str, Sequence], left_out: dict[str, int], seconds: float) -> dict:
    """The record of a run: how well it judges the validation rows, and what that was made with."""
    prediction = trainer.predict(trainer.eval_dataset)
    return {
        "rows": {split: len(some) for split, some in rows.items()},
        "without_answer": left_out,
        **judgement_of(prediction.predictions, prediction.label_ids, seed=trainer.args.seed),
        "seed": trainer.args.seed,
        "train_steps": trainer.state.global_step,
        "train_seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "processes": trainer.args.world_size,
        **provenance(trainer.args.device),
    }


def save(trainer: Trainer, results: dict) -> None:
    """Model, tokenizer and results.json; not by the Trainer, which adds its arguments as a pickle."""
    folder = Path(trainer.args.output_dir)
    for part in (trainer.model, trainer.processing_class):
        part.save_pretrained(folder)
    write_json(folder / RESULTS_FILE, results)


def check_reload(folder: str, row: Mapping) -> None:
    """The end of a smoke test: what was saved judges an answer."""
    columns = {"question": [row["question"]], "choices": [[]], "answers": [row["gold"]]}
    (reward,) = ModelReward(folder)([f"### {row['answer']}"], **columns)
    logger.info("reloaded, and it judges: %.3f", reward)


def report(results: Mapping, folder: str) -> None:
    share, by_label = percent(results["commonest_share"]), results["accuracy_by_label"]
    print(
        f"{Estimate.of(results['accuracy'])} of {results['rows']['validation']} validation answers are judged as they "
        f"are labelled, in brackets the 95 % interval; always {results['commonest_label']!r} would be {share}"
    )
    print("\n".join(f"  of the {label} ones: {percent(right)}" for label, right in by_label.items()))
    for split, without in results["without_answer"].items():
        if without:
            print(f"left out of {split}: {without} without an answer, which are wrong unasked")
    print(f"written to {folder}; as a reward: rewards: {{{folder}: 1.0}}")


def main(argv: list[str] | None = None) -> dict:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    quiet_requests()
    arguments, run = parse_arguments(sys.argv[1:] if argv is None else argv)
    if run.smoke_test:
        arguments, run = smoke_arguments(arguments, run)
    else:
        check_output(run)
    set_seed(run.seed)
    rows, left_out = read(arguments)
    tokenizer = build_tokenizer(arguments, rows["train"])
    trainer = build_trainer(build_model(arguments, tokenizer), tokenizer, rows, run)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
    results = results_of(trainer, rows, left_out, time.perf_counter() - began)
    if trainer.is_world_process_zero():
        save(trainer, results)
        report(results, run.output_dir)
        if run.smoke_test:
            check_reload(run.output_dir, rows["validation"][0])
    # Without this, processes that leave at different moments abort each other.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return results


if __name__ == "__main__":
    run_command(main)
