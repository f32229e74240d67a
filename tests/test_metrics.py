"""The metrics equal values worked out by hand, load offline from their folders, and refuse rows they cannot score."""

import doctest
import math
import random
import re
import runpy
import socket
import sys
from pathlib import Path

import evaluate
import evaluate.utils
import pytest
import yaml
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU


METRICS = Path(__file__).resolve().parents[1] / "metrics"
NAMES = [
    "aokvqa_da",
    "aokvqa_mc",
    "captions",
    "exact_match",
    "medical_vqa",
    "numeric_answer",
    "pair_accuracy",
    "vqa_accuracy",
]

# A prediction and a reference that score 1, and a prediction that scores 0 with the same reference.
SAMPLES = {
    "aokvqa_da": ("kite", {"direct_answers": ["kite"] * 10, "difficult_direct_answer": False}, "bird"),
    "aokvqa_mc": ("kite", {"choices": ["kite", "bird"], "correct_choice_idx": 0}, "bird"),
    "captions": ("a kite", ["Birds.", "A kite."], "two men"),
    "exact_match": ("kite", ["bird", "kite"], "kites"),
    "medical_vqa": ("liver", "liver", "heart"),
    "numeric_answer": ("### 7", "7", "### 8"),
    "pair_accuracy": ("kite", {"answers": ["kite"]}, "bird"),
    "vqa_accuracy": ("kite", ["kite"] * 10, "bird"),
}


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Started from the root of the repository, without a network, with the rows stored in a folder of the test."""

    def refuse(*args):
        raise AssertionError(f"a metric asked for the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.chdir(METRICS.parent)


def load(name):
    return evaluate.load(f"metrics/{name}")


def module_of(metric):
    return sys.modules[type(metric).__module__]


def with_partner(name, *pairs):
    """The same rows; each of pair_accuracy is followed by another one of its pair, which is right."""
    if name != "pair_accuracy":
        return pairs
    numbered = [(prediction, {**reference, "pair": str(n)}) for n, (prediction, reference) in enumerate(pairs)]
    return [row for prediction, reference in numbered for row in ((prediction, reference), ("kite", reference))]


def compute(name, *pairs):
    predictions, references = zip(*pairs)
    return load(name).compute(predictions=list(predictions), references=list(references))


def test_every_folder_is_a_metric_under_test():
    assert sorted(path.parent.name for path in METRICS.glob("*/*.py") if path.stem == path.parent.name) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_metric_loads_offline_from_its_folder(name):
    metric = load(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name
    assert metric.citation.strip().startswith("@")
    assert metric.description.strip() and metric.inputs_description.strip()


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_returns_its_mean_its_scores_and_their_number(name):
    right, reference, wrong = SAMPLES[name]
    texts = (right, wrong, wrong, right)
    rows = with_partner(name, *((text, reference) for text in texts))
    results = compute(name, *rows)
    each = len(rows) // len(texts)  # 2 where rows are scored in pairs
    expected = [score for score in (1.0, 0.0, 0.0, 1.0) for _ in range(each)]
    assert (results[name], results["scores"], results["n"]) == (0.5, expected, 4 * each)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples_hold(name):
    metric = load(name)
    module = module_of(metric)
    examples = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, f"{name}: Examples", None, 0)
    assert len(examples.examples) >= 3  # import, load, compute
    runner = doctest.DocTestRunner()
    runner.run(examples)
    for found in doctest.DocTestFinder(recurse=True).find(module):
        if not found.name.endswith(type(metric).__name__):  # the class repeats the Examples above, indented
            runner.run(found)
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries == Path(module.__file__).read_text(encoding="utf-8").count(">>> ")  # those of functions too


@pytest.mark.parametrize("name", NAMES)
def test_batches_add_up_to_one_call(name):
    right, reference, wrong = SAMPLES[name]
    *first, last = rows = with_partner(name, (right, reference), (wrong, reference), (right, reference))
    metric = load(name)
    predictions, references = zip(*first)
    metric.add_batch(predictions=list(predictions), references=list(references))
    metric.add(prediction=last[0], reference=last[1])
    assert metric.compute() == compute(name, *rows)


def test_metrics_of_the_same_inputs_combine():
    both = evaluate.combine([load("medical_vqa"), load("numeric_answer")])
    results = both.compute(predictions=["### 7", "7"], references=["7", "7"])
    assert results["numeric_answer_scores"] == [1.0, 0.0]  # the marker is needed
    assert results["medical_vqa_scores"] == [1.0, 1.0]  # punctuation goes
    assert (results["numeric_answer"], results["medical_vqa"]) == (0.5, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_space_files_name_the_metric(name, monkeypatch):
    launched = []
    monkeypatch.setattr(evaluate.utils, "launch_gradio_widget", launched.append)
    text = (METRICS / name / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert metadata["sdk"] == "gradio" and metadata["title"] and metadata["description"]
    assert {"evaluate", "metric"} <= set(metadata["tags"])
    runpy.run_path(str(METRICS / name / metadata["app_file"]))
    assert [metric.name for metric in launched] == [name]
    documented = set(re.findall(r"`(\w+)`", text))
    assert set(compute(name, *with_partner(name, SAMPLES[name][:2]))) <= documented


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_predictions_and_references_must_agree(name):
    (prediction, reference), *_ = with_partner(name, SAMPLES[name][:2])
    with pytest.raises(ValueError, match=r"predictions \(2\) and references \(1\)"):
        load(name).compute(predictions=[prediction] * 2, references=[reference])


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_are_refused(name):
    with pytest.raises(ValueError, match="no rows to score.*add"):
        load(name).compute(predictions=[], references=[])


@pytest.mark.parametrize("name", NAMES)
def test_missing_prediction_is_refused_with_its_row(name):
    prediction, reference, _ = SAMPLES[name]
    (first, of_first), (_, of_second), *_ = with_partner(name, *[(prediction, reference)] * 2)
    with pytest.raises(ValueError, match="row 1: the prediction is None; give ''"):
        compute(name, (first, of_first), (None, of_second))


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        ("vqa_accuracy", [], r"row 1: the reference is \[\]; give one or more"),
        ("vqa_accuracy", None, "row 1: the reference is None; give one or more"),
        ("aokvqa_mc", {"choices": [], "correct_choice_idx": 0}, r"row 1: the choices are \[\]; give"),
        (
            "aokvqa_mc",
            {"choices": ["kite", "bird"], "correct_choice_idx": 2},
            "row 1: correct_choice_idx is 2 for 2 choices; give an index from 0 to 1",
        ),
        (
            "aokvqa_mc",
            {"choices": ["kite"], "correct_choice_idx": -1},
            "row 1: correct_choice_idx is -1 for 1 choices",
        ),
        ("aokvqa_mc", {"choices": ["kite"], "correct_choice_idx": None}, "row 1: correct_choice_idx is None"),
        (
            "aokvqa_da",
            {"direct_answers": [], "difficult_direct_answer": False},
            r"row 1: direct_answers is \[\]; give one or more",
        ),
        (
            "aokvqa_da",
            {"direct_answers": ["kite"], "difficult_direct_answer": None},
            "row 1: difficult_direct_answer is None; give True or False",
        ),
        ("captions", [], r"row 1: the references are \[\]; give one or more captions"),
        ("captions", ["A kite.", " ..."], r"row 1: the references are \['A kite.', ' ...'\]; .* a word of a-z"),
        ("captions", None, "row 1: the references are None; give one or more"),
        ("medical_vqa", " ", "row 1: the reference is ' '; give the gold answer"),
        ("medical_vqa", None, "row 1: the reference is None; give the gold answer"),
        ("pair_accuracy", {"answers": [], "pair": "1"}, r"row 1: the answers are \[\]; give one or more"),
        ("pair_accuracy", {"answers": ["kite"], "pair": ""}, "row 1: the pair is '', which 1 rows share; give both"),
        ("numeric_answer", "seven", "row 1: the reference is 'seven'; give a number"),
        ("numeric_answer", "### 7 apples", "row 1: the reference is '### 7 apples'; give a number"),
        ("numeric_answer", None, "row 1: the reference is None; give a number"),
    ],
)
def test_reference_that_cannot_be_scored_is_refused_with_its_row(name, reference, message):
    prediction, good, _ = SAMPLES[name]
    rows = [(prediction, good), (prediction, reference)]
    if name == "pair_accuracy":  # the good row has a partner, behind the other one
        good = {**good, "pair": "1" if reference["pair"] else "2"}
        rows = [(prediction, good), rows[1], *[(prediction, good)] * (not reference["pair"])]
    with pytest.raises(ValueError, match=message):
        compute(name, *rows)


@pytest.mark.parametrize(
    ("matches", "score"),
    [
        (0, 0.0),
        (1, 0.3),  # left out once: 0; nine times 1/3: (0 + 9 * 1/3) / 10
        (2, 0.6),  # twice 1/3, eight times 2/3: (2/3 + 16/3) / 10
        (3, 0.9),  # three times 2/3, seven times 1: (2 + 7) / 10
        (4, 1.0),  # at least three matches remain in every subset
        (10, 1.0),
    ],
)
def test_vqa_accuracy_of_k_matches_in_ten(matches, score):
    # The other answers differ from one another, so that nothing but the matches counts.
    answers = ["kite"] * matches + [f"bird {row}" for row in range(10 - matches)]
    assert compute("vqa_accuracy", ("kite", answers))["scores"] == [score]


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        (["kite"], 1.0),  # nothing to leave out: equal or not
        (["bird"], 0.0),
        (["kite", "kite"], 1 / 3),  # each subset holds one match: (1/3 + 1/3) / 2
        (["kite", "bird"], 1 / 6),  # left out: 0, else 1/3: (0 + 1/3) / 2
        (["kite", "kite", "kite"], 2 / 3),
        (["kite", "kite", "bird"], 4 / 9),  # (1/3 + 1/3 + 2/3) / 3
        (["kite"] * 4, 1.0),
        (["kite"] * 3 + ["bird"] * 8, 10 / 11),  # (3 * 2/3 + 8 * 1) / 11
    ],
)
def test_vqa_accuracy_of_other_numbers_of_answers(answers, score):
    assert compute("vqa_accuracy", ("kite", answers))["scores"] == [pytest.approx(score, abs=1e-12)]


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Dog.", "dog"),
        ("a man and an apple", "man and apple"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),  # the table ends at ten
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("lets", "lets"),  # not in the official table
        ("somebody'd", "somebodyd"),  # a slip of the official table, kept
        ("t-shirt", "t shirt"),  # no space beside the mark: it becomes one
        ("red, white", "red white"),  # a space beside the mark: it goes
        ("red ,white-blue", "red white blue"),
        ("10,000-20,000", "1000020000"),  # a comma between digits: all marks go
        ("black & white", "black & white"),  # & is no mark of the official list
        ("it's: 5", "it's: 5"),  # neither are ' and :
        ("3.5", "3.5"),
        ("5.", "5"),
        ("U.S.A.", "usa"),
        ("is it?!", "is it"),
        ("n/a", "n"),  # "n a", and then the article goes
    ],
)
def test_vqa_normalisation_is_the_official_one(text, normalised):
    module = module_of(load("vqa_accuracy"))
    assert module.process_digit_article(module.process_punctuation(text)) == normalised


def test_vqa_normalises_both_sides_unless_all_answers_are_the_same():
    mixed, same = ["Two dogs!"] * 9 + ["3"], ["two dogs"] * 10
    results = compute(
        "vqa_accuracy", ("2 dogs", mixed), ("the two-dogs", mixed), ("2 dogs", same), ("two dogs\n", same)
    )
    assert results["scores"] == [1.0, 1.0, 0.0, 1.0]


def test_vqa_empty_prediction_scores_zero():
    # "a" and "the" are empty after normalisation; a model that said nothing has not said them.
    assert compute("vqa_accuracy", (" ", ["a"] * 5 + ["the"] * 5), ("", [""] * 10))["scores"] == [0.0, 0.0]


CHOICES = ["toothpick", "food", "Popsicle stick", "cigarette"]


@pytest.mark.parametrize(
    ("prediction", "choices", "correct", "score"),
    [
        ("cigarette", CHOICES, 3, 1.0),
        (" CIGARETTE\n", CHOICES, 3, 1.0),
        ("3", CHOICES, 3, 1.0),
        ("4", CHOICES, 3, 0.0),  # the index counts from 0
        ("-1", CHOICES, 3, 0.0),
        ("03", CHOICES, 3, 0.0),
        ("D", CHOICES, 3, 0.0),
        ("(3)", CHOICES, 3, 0.0),
        ("food", CHOICES, 3, 0.0),
        ("food or cigarette", CHOICES, 3, 0.0),  # two choices
        ("1 3", CHOICES, 3, 0.0),
        ("3 : cigarette", CHOICES, 3, 0.0),
        ("a cigarette", CHOICES, 3, 0.0),
        ("", CHOICES, 3, 0.0),
        ("", ["s", "", "b", "f"], 1, 0.0),  # an empty choice, as one row of the validation set has it
        ("1", ["s", "", "b", "f"], 1, 1.0),
        ("road", ["air", "road", "water", "road"], 3, 1.0),  # the same text twice
        ("1", ["air", "road", "water", "road"], 3, 1.0),
        ("air", ["air", "road", "water", "road"], 3, 0.0),
        ("2", ["2", "1", "4", "3"], 0, 1.0),  # text before index
        ("2", ["2", "1", "4", "3"], 2, 0.0),
        ("0", ["2", "1", "4", "3"], 0, 1.0),
        ("ll", ["LL", "ll"], 1, 1.0),  # case tells the choices apart
        ("LL", ["LL", "ll"], 1, 0.0),
        ("Ll", ["LL", "ll"], 1, 0.0),
    ],
)
def test_aokvqa_mc_takes_the_text_or_the_index_of_one_choice(prediction, choices, correct, score):
    reference = {"choices": choices, "correct_choice_idx": correct}
    assert compute("aokvqa_mc", (prediction, reference))["scores"] == [score]


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 1.0), (10, 1.0)])
def test_aokvqa_da_of_k_matches_in_ten(matches, score):
    answers = ["kite"] * matches + ["bird"] * (10 - matches)
    reference = {"direct_answers": answers, "difficult_direct_answer": False}
    assert compute("aokvqa_da", ("kite", reference))["scores"] == [pytest.approx(score, abs=1e-12)]


def test_aokvqa_da_normalises_nothing():
    reference = {"direct_answers": ["two kites"] * 10, "difficult_direct_answer": False}
    texts = ["two kites", "Two kites", "2 kites", "the two kites", "two kites.", "two kites "]
    assert compute("aokvqa_da", *((text, reference) for text in texts))["scores"] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_aokvqa_da_leaves_difficult_questions_out_and_counts_them():
    easy = {"direct_answers": ["kite"] * 2 + ["bird"] * 8, "difficult_direct_answer": False}
    difficult = {"direct_answers": ["kite"] * 10, "difficult_direct_answer": True}
    results = compute("aokvqa_da", ("kite", difficult), ("kite", easy), ("kite", difficult), ("bird", easy))
    assert results["aokvqa_da"] == pytest.approx(5 / 6)  # (2/3 + 1) / 2; with the difficult ones it would be 11/12
    assert results["scores"] == [pytest.approx(2 / 3), 1.0]
    assert (results["n"], results["rows"], results["excluded"]) == (2, [1, 3], 2)


def test_aokvqa_da_refuses_to_average_over_difficult_questions_only():
    difficult = {"direct_answers": ["kite"] * 10, "difficult_direct_answer": True}
    with pytest.raises(ValueError, match="all 2 are marked difficult_direct_answer; add one"):
        compute("aokvqa_da", ("kite", difficult), ("kite", difficult))


def test_medical_vqa_keeps_yes_no_apart_from_open_questions():
    results = compute(
        "medical_vqa",
        ("Yes.", "yes"),
        ("yes", "No"),
        ("no", "no"),
        ("The left lower lobe", "left lobe"),  # precision 2/3, recall 1: F1 = 2 * 2 / (3 + 2) = 0.8
        ("liver", "the Liver!"),  # equal after normalisation: F1 = 1
        ("yes", "in the kidney"),  # nothing in common; an answer yes does not make a yes/no question
    )
    assert results["is_yes_no"] == [True, True, True, False, False, False]
    assert results["scores"] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert results["f1_scores"] == [1.0, 0.0, 1.0, 0.8, 1.0, 0.0]
    assert results["yes_no_accuracy"] == pytest.approx(2 / 3)
    assert results["open_exact_match"] == pytest.approx(1 / 3)
    assert results["open_f1"] == pytest.approx(0.6)  # (0.8 + 1 + 0) / 3
    assert results["medical_vqa"] == 0.5
    assert (results["n"], results["n_yes_no"], results["n_open"]) == (6, 3, 3)


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("lung lung", "lung", 2 / 3),  # a repeated token is common once: 2 * 1 / (2 + 1)
        ("lung lung heart", "lung lung", 0.8),  # common twice: 2 * 2 / (3 + 2)
        ("lobe lower", "lower lobe", 1.0),  # order does not count in F1
        ("", "lung", 0.0),
        ("left-sided", "left sided", 0.0),  # the hyphen goes without a space: one word against two
        ("a", "A", 1.0),  # an answer of nothing but an article is kept
        ("", "A", 0.0),
        ("the", "A", 0.0),
    ],
)
def test_medical_vqa_token_f1(prediction, gold, f1):
    assert compute("medical_vqa", (prediction, gold))["f1_scores"] == [pytest.approx(f1, abs=1e-12)]


@pytest.mark.parametrize(("gold", "empty"), [("yes", ["open_exact_match", "open_f1"]), ("lung", ["yes_no_accuracy"])])
def test_medical_vqa_mean_of_no_questions_is_none(gold, empty):
    results = compute("medical_vqa", (gold, gold))
    assert sorted(key for key, value in results.items() if value is None) == empty


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("3 + 4 = 7\n### 7", "7", 1.0),
        ("#### 7", "so 3 + 4 = <<3+4=7>>7\n#### 7", 1.0),  # GSM8k's own marker and solution
        ("### 3.0", "3", 1.0),
        ("### 3", "3.00", 1.0),
        ("### .5", "0.5", 1.0),
        ("### 0.1", "0.10000000000000001", 0.0),  # decimals, no floats
        ("### 1,234,567", "1234567", 1.0),
        ("### 1234", "1,234", 1.0),
        ("### $1,200.00", "1200", 1.0),
        ("### 1200 €", "1200", 1.0),
        ("### -$5", "-5", 1.0),
        ("### $-5", "-5", 1.0),
        ("### 5", "-5", 0.0),
        ("### +5", "5", 1.0),
        ("### --5", "5", 0.0),
        ("### 50%", "50", 1.0),
        ("### 50%", "0.5", 0.0),
        ("### 18.", "18", 1.0),
        ("### 18.5.", "18.5", 1.0),
        ("### 6 ### 7", "7", 1.0),  # the last marker counts
        ("### 7 ### 6", "7", 0.0),
        ("7", "7", 0.0),  # no marker
        ("## 7", "7", 0.0),
        ("### ", "7", 0.0),
        ("", "7", 0.0),
        ("### 7 or 8", "7", 0.0),
        ("### 7 apples", "7", 0.0),
        ("### seven", "7", 0.0),
        ("### 7 8", "78", 0.0),
    ],
)
def test_numeric_answer_is_the_number_after_the_last_marker(prediction, gold, score):
    assert compute("numeric_answer", (prediction, gold))["scores"] == [score]


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("A dog runs .", ["a DOG runs!"], 1.0),  # neither case nor marks count
        ("a dog runs", ["a red dog runs"], 6 / 7),  # three words in order: precision 1, recall 3/4
        ("dog a runs", ["a red dog runs"], 4 / 7),  # two in order: precision 2/3, recall 1/2
        ("a red dog", ["the dog", "a dog", "cats"], 0.8),  # the best: precision 2/3, recall 1
        ("running dogs", ["run dog"], 0.0),  # not stemmed
        ("a a a", ["a"], 0.5),
        ("", ["a dog"], 0.0),
        ("?!", ["a dog"], 0.0),
    ],
)
def test_captions_score_of_a_row_is_rouge_l_with_the_best_reference(prediction, references, score):
    assert compute("captions", (prediction, references))["scores"] == [pytest.approx(score, abs=1e-12)]


def test_captions_bleu4_by_hand():
    # Matching n-grams: 6 of 6, 5 of 5, 3 of 4 (not "the cat is"), 2 of 3; as long as the references.
    results = compute("captions", ("The cat is on the mat", ["the cat sat on the mat", "A cat is on the mat"]))
    assert results["bleu4"] == pytest.approx((3 / 4 * 2 / 3) ** 0.25)


def test_captions_bleu4_is_of_the_whole_set_and_counts_marks_and_length():
    pairs = [("a dog runs on the beach .", ["A dog runs on the beach."]), ("two men", ["two men are cooking"])]
    # All n-grams match; 9 words, marks counted, for 11 in the references.
    assert compute("captions", *pairs)["bleu4"] == pytest.approx(math.exp(1 - 11 / 9))


def test_captions_cider_by_hand():
    dog, men = "A dog runs fast.", "two men are cooking"
    # Every word is of one picture only, so all weigh the same: ten times the mean cosine of 1- to 4-grams.
    assert compute("captions", (dog, [dog]), (men, [men]))["cider"] == pytest.approx(10)
    assert compute("captions", (dog, [dog]), (dog, [men]))["cider"] == pytest.approx(5)
    assert compute("captions", (dog, [dog, "kites"]), ("", [men]))["cider"] == pytest.approx(2.5)  # the mean of two
    assert compute("captions", (dog, [dog]), (dog, [dog]))["cider"] == 0  # what every picture has weighs nothing
    assert compute("captions", (dog, [dog]))["cider"] == 0


def test_captions_equal_the_libraries_called_directly():
    draw = random.Random(0)
    vocabulary = [
        "a",
        "the",
        "Dog",
        "red",
        "runs",
        "men",
        "two",
        "beach",
        "on",
        "near",
        "kite",
        "-",
        ",",
        '"',
        "man's",
    ]

    def caption():
        return " ".join(["a", *draw.choices(vocabulary, k=draw.randint(2, 9))]) + draw.choice([".", " .", ""])

    references = [[caption() for _ in range(draw.randint(1, 5))] for _ in range(40)]
    predictions = [*(caption() for _ in range(30)), *(captions[-1] for captions in references[30:39]), ""]
    results = compute("captions", *zip(predictions, references))
    streams = [[captions[i] if i < len(captions) else "" for captions in references] for i in range(5)]
    assert results["bleu4"] == pytest.approx(BLEU(lowercase=True).corpus_score(predictions, streams).score / 100)
    one_by_one = RougeScorer(["rougeL"])
    assert results["scores"] == [
        max(one_by_one.score(reference, text)["rougeL"].fmeasure for reference in captions)
        for text, captions in zip(predictions, references)
    ]
    unmarked = str.maketrans("", "", '.,-"')
    gold = {row: [text.lower().translate(unmarked) for text in captions] for row, captions in enumerate(references)}
    written = {row: [text.lower().translate(unmarked)] for row, text in enumerate(predictions)}
    assert results["cider"] == pytest.approx(Cider().compute_score(gold, written)[0])
    assert 0.1 < results["bleu4"] < results["rouge_l"] < 0.9 and 0.1 < results["cider"] < 9


@pytest.mark.parametrize("library", ["sacrebleu", "rouge_score", "pycocoevalcap"])
def test_captions_without_a_library_say_what_to_install(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"pip install {library}"):
        load("captions")


@pytest.mark.parametrize(
    ("predictions", "pairs", "questions"),
    [
        (["open", "closed", "open", "closed"], [1.0, 1.0, 1.0, 1.0], 1.0),
        (["OPEN ", "closed", "open", "open"], [1.0, 1.0, 0.0, 0.0], 0.75),
        (["open", "open", "closed", "closed"], [0.0, 0.0, 0.0, 0.0], 0.5),  # one answer for both pictures
        (["", "closed", "closed", "open"], [0.0, 0.0, 0.0, 0.0], 0.25),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)])
def test_a_pair_is_right_where_both_answers_are(predictions, pairs, questions, order):
    references = [{"answers": [answer], "pair": pair} for pair in ("1", "2") for answer in ("open", "closed")]
    results = compute("pair_accuracy", *[(predictions[index], references[index]) for index in order])
    assert results["scores"] == [pairs[index] for index in order]
    assert (results["pair_accuracy"], results["question_accuracy"]) == (sum(pairs) / 4, questions)


def test_a_pair_with_a_third_row_is_refused():
    reference = {"answers": ["open"], "pair": "7"}
    with pytest.raises(ValueError, match="row 0: the pair is '7', which 3 rows share.*even number"):
        compute("pair_accuracy", *[("open", reference)] * 3)
