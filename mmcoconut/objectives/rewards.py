"""Rewards of generated texts: functions by name, as trl calls them, and judge models.

A reward says whether an answer is right, and takes its values from metrics/, so that training optimises what
evaluation measures. Similarity to the accepted answer by sentence embeddings is not a reward: "red" and "black"
are close, because both are colours, but if one is right the other is wrong. If right answers have many wordings, use a
judge model trained on right and wrong answers (`ModelReward`).

Functions are called as `f(completions=…, completion_ids=…, **columns)`. A completion is a text, or a list of messages
with `content`; a column, such as `answers` or `choices` of `mmcoconut.data`, is a list with one entry per completion.
They return one number per completion. Other arguments from trl (`prompts`, `trainer_state`, …) are ignored.

Shapes: B texts of a batch, T tokens, C labels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER, parse_answer
from mmcoconut.data import nearest, question_text
from mmcoconut.data.scoring import OF_SEVERAL_ROWS, REFERENCES, score
from mmcoconut.errors import RecipeError, is_missing_folder


ROW_COLUMNS = ("question", "choices", "answers", "row_id")  # row fields that a metric or a judge reads
WRONG, RIGHT = "wrong", "right"
LABELS = (WRONG, RIGHT)  # of a judge model, by the index of their logits
A_TOKEN = 0.01


def text_of(completion: str | Sequence[Mapping]) -> str:
    """Return the text of a completion, which may be a list of messages.

    >>> text_of("### red"), text_of([{"role": "assistant", "content": "### red"}])
    ('### red', '### red')
    """
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def rows_of(columns: Mapping) -> list[dict]:
    """Return the rows of the completions, with those fields of ROW_COLUMNS that are given.

    >>> rows_of({"answers": [["red"], ["4", "four"]], "trainer_state": None})
    [{'answers': ['red']}, {'answers': ['4', 'four']}]
    """
    names = [name for name in ROW_COLUMNS if name in columns]
    return [dict(zip(names, values)) for values in zip(*(columns[name] for name in names), strict=True)]


def metric_scores(metric: str, completions: Sequence, columns: Mapping) -> list[float]:
    """Return each completion's score by a metric of `mmcoconut.data.scoring.REFERENCES`, as in evaluation."""
    texts = [text_of(completion) for completion in completions]
    return score(metric, texts, [parse_answer(text) for text in texts], rows=rows_of(columns))["scores"]


def metric_reward(metric: str) -> Callable:
    """Return the reward function of a metric, named after it."""

    def reward(completions, **columns) -> list[float]:
        return metric_scores(metric, completions, columns)

    reward.__name__ = f"{metric}_reward"
    return reward


def exact_match_reward(completions, **columns) -> list[float]:
    """Return 1.0 if the answer after `###` is accepted by metrics/exact_match, else 0.0, per completion.

    >>> exact_match_reward(["B2\\n### Red", "### red or blue", "red"], answers=[["red", "crimson"]] * 3)
    [1.0, 0.0, 0.0]
    """
    return metric_scores("exact_match", completions, columns)


def vqa_accuracy_reward(completions, **columns) -> list[float]:
    """Return the metrics/vqa_accuracy of the answer after `###`, per completion: a share if few annotators gave it.

    >>> vqa_accuracy_reward(["### Two.", "### 4", "2"], answers=[["2", "2", "two", *["3"] * 7]] * 3)
    [0.9, 0.0, 0.0]
    """
    return metric_scores("vqa_accuracy", completions, columns)


def multiple_choice_reward(completions, **columns) -> list[float]:
    """Return 1.0 if the answer after `###` is exactly the right choice (metrics/aokvqa_mc), else 0.0.

    >>> columns = {"choices": [["kite", "bird"]] * 3, "answers": [["bird"]] * 3, "row_id": ["row 0"] * 3}
    >>> multiple_choice_reward(["no kite\\n### Bird", "### kite or bird", "### kite"], **columns)
    [1.0, 0.0, 0.0]
    """
    return metric_scores("aokvqa_mc", completions, columns)


def format_reward(completions, **columns) -> list[float]:
    """Return 1.0 if the text has `###` exactly once, with an answer after it, else 0.0, per completion.

    >>> format_reward(["B2\\n### red", "### red ### blue", "red ###", "red"])
    [1.0, 0.0, 0.0, 0.0]
    """
    texts = [text_of(completion) for completion in completions]
    return [float(text.count(ANSWER_MARKER) == 1 and parse_answer(text) != "") for text in texts]


def length_reward(completions, completion_ids, **columns) -> list[float]:
    """Return -0.01 per generated token: the reward's weight is the cost of a hundred tokens.

    >>> length_reward(["### red", "B2\\n### red"], completion_ids=[[7, 8], [5, 6, 7, 8]])
    [-0.02, -0.04]
    """
    return [-A_TOKEN * len(ids) for ids in completion_ids]


def thoughts_reward(completions, num_thoughts, **columns) -> list[float]:
    """Return minus the number of thoughts before the text: the reward's weight is the cost of one thought.

    >>> thoughts_reward(["### red", "### red"], num_thoughts=[1, 6])
    [-1.0, -6.0]
    """
    return [-float(number) for number in num_thoughts]


# By name in recipes; every metric that scores rows independently has one.
REWARDS = {
    **{metric: metric_reward(metric) for metric in REFERENCES if metric not in OF_SEVERAL_ROWS},
    "aokvqa_mc": multiple_choice_reward,
    "exact_match": exact_match_reward,
    "format": format_reward,
    "length": length_reward,
    "multiple_choice": multiple_choice_reward,
    "thoughts": thoughts_reward,
    "vqa_accuracy": vqa_accuracy_reward,
}


def judged_text(question: str, accepted: Sequence[str], answer: str) -> str:
    """Return the text that a judge model reads for an answer.

    Args:
        question: with its choices, as `question_text` writes them.
        accepted: all answers that count as right.
        answer: the given answer; joined to one line, so that it cannot add accepted answers.

    >>> print(judged_text("What colour?\\nChoices: red, blue", ["red", "crimson"], "dark\\nred"))
    Question: What colour?
    Choices: red, blue
    Accepted answers: red; crimson
    Given answer: dark red
    """
    given = " ".join(answer.split())
    return f"Question: {question}\nAccepted answers: {'; '.join(accepted)}\nGiven answer: {given}"


def max_tokens_of(config, tokenizer) -> int:
    """Return the maximum text length of a model and its tokenizer, in tokens."""
    return min(getattr(config, "max_position_embeddings", math.inf), tokenizer.model_max_length)


def encode(tokenizer, texts: Sequence[str], names: Sequence[str], *, max_tokens: int):
    """Return the texts as lists of token ids, neither padded nor truncated.

    Args:
        names: where each text comes from, for errors.

    Raises:
        ValueError: a text has more than `max_tokens`; a truncated text would lose the answer at its end.
    """
    encoded = tokenizer(list(texts))
    for name, ids in zip(names, encoded["input_ids"], strict=True):
        if len(ids) > max_tokens:
            raise ValueError(
                f"{name}: question, accepted answers and given answer have {len(ids)} tokens, but the judge "
                f"model reads at most {max_tokens}: lower max_new_tokens, leave the row out, or use a model with "
                "more positions."
            )
    return encoded


def labels_of(config) -> list[str]:
    """Return a model's labels in the order of its logits."""
    return [config.id2label[index] for index in sorted(config.id2label)]


def check_labels(name: str, config) -> None:
    """Raise ValueError unless the configuration is that of a judge model."""
    labels = labels_of(config)
    if len(labels) != 1 and (len(labels) != 2 or RIGHT not in labels):
        raise ValueError(
            f"{name} has {len(labels)} labels ({', '.join(labels)}), but a judge needs one or two: give a "
            f"sequence-classification model with two labels, one of them called {RIGHT!r}, or "
            "with one label, such as from trl's RewardTrainer."
        )


def load_judge(name: str):
    """Load a sequence-classification model from a folder or Hub id, in eval mode, without running remote code.

    Raises:
        ValueError: the labels are not those of a judge, or weights are missing, which would be random.
    """
    check_labels(name, AutoConfig.from_pretrained(name, trust_remote_code=False))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name, trust_remote_code=False, output_loading_info=True
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}: give a whole checkpoint.")
    return model.eval()


class ModelReward:
    """The probability that an answer is right, by a sequence-classification model that reads `judged_text`.

    With two labels it is the probability of the one called `right`, with one label the sigmoid of its logit. A
    completion without an answer gets 0.0 without running the model, as in all metrics.

    Args:
        name: folder or Hub id, and the name in trl's logs.
        batch_size: texts that are judged at once.
        device: of the model; default: this process's.

    Raises:
        ValueError: the model cannot judge; when called, an answer is too long for it.
    """

    def __init__(self, name: str, *, batch_size: int = 32, device=None):
        self.__name__ = str(name)
        self.batch_size = batch_size
        self.model = load_judge(name).to(PartialState().device if device is None else device)
        # Decoders count positions by column: with left padding a score would depend on the batch.
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, padding_side="right")

    def __call__(self, completions, **columns) -> list[float]:
        rows = rows_of(columns)
        answers = [parse_answer(text_of(completion)) for completion in completions]
        asked = [index for index, answer in enumerate(answers) if answer]
        texts = [judged_text(question_text(rows[index]), rows[index]["answers"], answers[index]) for index in asked]
        names = [rows[index].get("row_id", f"completion {index}") for index in asked]
        rewards = [0.0] * len(answers)
        for index, reward in zip(asked, self.judge(texts, names), strict=True):
            rewards[index] = reward
        return rewards

    @torch.no_grad()
    def judge(self, texts: Sequence[str], names: Sequence[str]) -> list[float]:
        """Return the probability that each text's answer is right, from 0 to 1."""
        if not texts:
            return []
        encoded = encode(self.tokenizer, texts, names, max_tokens=max_tokens_of(self.model.config, self.tokenizer))
        probabilities = []
        for start in range(0, len(texts), self.batch_size):
            part = {name: values[start : start + self.batch_size] for name, values in encoded.items()}
            batch = self.tokenizer.pad(part, return_tensors="pt").to(self.model.device)
            probabilities += self.probability(self.model(**batch).logits.float()).tolist()
        return probabilities

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the probability of `right`, (B,), from logits (B, C)."""
        if logits.shape[1] == 1:
            return logits[:, 0].sigmoid()  # (B,)
        return logits.softmax(dim=-1)[:, labels_of(self.model.config).index(RIGHT)]  # (B,)


def reward_problems(rewards: Mapping | None) -> Iterator[tuple]:
    """Yield the problems of a recipe's `rewards`, as (key, value found, remedy), without loading models.

    >>> for key, value, remedy in reward_problems({"format": "much"}):
    ...     print(f"{key} = {value!r}: {remedy}")
    rewards.format = 'much': a weight is a finite number: write one, such as 1.0
    """
    if not rewards:
        yield "rewards", rewards, "there is nothing to learn from: name at least one, such as {exact_match: 1.0}"
        return
    for name, weight in rewards.items():
        key, folder = f"rewards.{name}", str(name)
        if name not in REWARDS and "/" not in folder and not Path(folder).is_dir():
            yield (
                key,
                weight,
                f"unknown reward name or model path; {nearest(name, REWARDS)}, or a model's folder or id",
            )
        elif name not in REWARDS and is_missing_folder(folder):
            yield key, weight, "no such folder: give an existing one, or a Hub id"
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            yield key, weight, "a weight is a finite number: write one, such as 1.0"
    if not any(rewards.values()):
        yield "rewards", dict(rewards), "all weights are 0, so there is nothing to learn from: set one"
    if {"aokvqa_mc", "multiple_choice"} <= rewards.keys():
        yield "rewards.aokvqa_mc", rewards["aokvqa_mc"], "it is the same as multiple_choice: keep one of them"


def reward_functions(rewards: Mapping[str, float], *, device=None) -> tuple[list[Callable], list[float]]:
    """Return the functions of a recipe's `rewards`, each with a unique name, and their weights.

    Args:
        rewards: weights by name in REWARDS, or by folder or Hub id of a model for `ModelReward`.
        device: of the models; default: this process's.

    Raises:
        ValueError: `reward_problems` finds a problem, or a model cannot judge.
    """
    problems = [*reward_problems(rewards)]
    if problems:
        raise RecipeError("rewards", problems)
    functions = [REWARDS[name] if name in REWARDS else ModelReward(name, device=device) for name in rewards]
    return functions, [float(weight) for weight in rewards.values()]
