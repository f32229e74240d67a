"""VQA accuracy as the official VQAv2 script has it: normalised, the mean of min(1, matches / 3) over subsets."""

import re

import datasets
import evaluate


_DESCRIPTION = """
VQA accuracy of the official VQAv2 evaluation. Several people answered each question; a prediction earns
min(1, matches / 3) against every subset that leaves one of them out, and the score is the mean over these subsets.
With ten answers, 0, 1, 2, 3 or more matches give 0, 0.3, 0.6, 0.9 and, from 4 on, 1.
"""

_CITATION = """
@inproceedings{goyal2017making,
  title = {Making the {V} in {VQA} Matter: Elevating the Role of Image Understanding in Visual Question Answering},
  author = {Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2017}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): one answer a question, e.g. the text after `###`. An empty answer scores 0.
    references (list of list of str): the answers people gave to each question, one or more. Prediction and answers
        are normalised (punctuation, case, number words, articles, contractions) unless all answers of the question
        are the same; they are then compared as they stand.
Returns:
    vqa_accuracy (float): mean score, from 0 to 1.
    scores (list of float): the score of each question, in order.
    n (int): number of questions.
Examples:

    >>> import evaluate
    >>> metric = evaluate.load("metrics/vqa_accuracy")
    >>> answers = ["2", "2", "two", "3", "3", "3", "3", "4", "4", "5"]
    >>> metric.compute(predictions=["Two.", "4"], references=[answers, answers])
    {'vqa_accuracy': 0.75, 'scores': [0.9, 0.6], 'n': 2}
"""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}

# The official table maps each of these, written with one apostrophe missing, to its right spelling.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_SPELLINGS = {
    word[:position] + word[position + 1 :]: word
    for word in _CONTRACTIONS.split()
    for position, letter in enumerate(word)
    if letter == "'"
}
_SPELLINGS["somebody'd"] = "somebodyd"  # the one entry of the official table that takes the apostrophe away


def process_punctuation(text):
    """Marks go where they touch a space, or everywhere if a comma stands between digits; others become a space.

    >>> process_punctuation("well-lit room!"), process_punctuation("$1,000 (U.S.)"), process_punctuation("3.5 cm.")
    ('well lit room ', '$1000 US', '3.5 cm')
    """
    has_number_comma = re.search(r"\d,\d", text) is not None
    processed = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        processed = processed.replace(mark, "" if touches_space or has_number_comma else " ")
    return re.sub(r"\.(?!\d)", "", processed)


def process_digit_article(text):
    """Lower case, number words as digits, no articles, contractions with their apostrophes, single spaces.

    >>> process_digit_article("The two  dogs dont bark"), process_digit_article("None")
    ("2 dogs don't bark", '0')
    """
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def score_answer(prediction, answers):
    """Mean over the answers left out of min(1, matches among the others / 3).

    With k matches of n answers: leaving a match out (k ways) leaves k - 1, leaving another out (n - k ways) leaves k.
    A single answer has no others: it is compared as a whole, 0 or 1.

    >>> [score_answer("yes", ["yes"] * k + ["no"] * (10 - k)) for k in (0, 1, 2, 3, 4, 10)]
    [0.0, 0.3, 0.6, 0.9, 1.0, 1.0]
    """
    prediction, *answers = (re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers))
    if not prediction:
        return 0.0
    if len(set(answers)) > 1:
        prediction, *answers = (process_digit_article(process_punctuation(text)) for text in (prediction, *answers))
    n, k = len(answers), answers.count(prediction)
    if n == 1:
        return float(k)
    return (k * min(3, k - 1) + (n - k) * min(3, k)) / (3 * n)


def check_rows(predictions, references):
    """Raises ValueError, with the row and what to do, for rows that cannot be scored."""
    if not predictions:
        raise ValueError("no rows to score; add at least one prediction with its reference")
    for row, (prediction, answers) in enumerate(zip(predictions, references)):
        if prediction is None:
            raise ValueError(f"row {row}: the prediction is None; give '' where the model gave no answer")
        if not answers or None in answers:
            raise ValueError(f"row {row}: the reference is {answers}; give one or more answers or leave the row out")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VqaAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            homepage="https://visualqa.org/evaluation.html",
            reference_urls=["https://arxiv.org/abs/1612.00837", "https://github.com/GT-Vision-Lab/VQA"],
        )

    def _compute(self, predictions, references):
        check_rows(predictions, references)
        scores = [score_answer(prediction, answers) for prediction, answers in zip(predictions, references)]
        return {"vqa_accuracy": sum(scores) / len(scores), "scores": scores, "n": len(scores)}
