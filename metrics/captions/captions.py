"""How near written captions come to people's captions of the same pictures: ROUGE-L, BLEU-4 and CIDEr."""

import re

import datasets
import evaluate
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU


_DESCRIPTION = """
Captions against several references each. The score of a row is ROUGE-L: the F1 of the longest common subsequence of
words, with the reference for which it is highest (rouge_score; words are runs of a-z and 0-9 after lower-casing, not
stemmed). Of the whole set: BLEU-4, where n-grams may match any reference (sacrebleu, tokenizer 13a, lower-cased,
exponential smoothing, divided by 100), and CIDEr-D (pycocoevalcap), on the words of 13a, lower-cased, without
punctuation marks. METEOR is left out, because it needs WordNet's files.
"""

_CITATION = """
@inproceedings{papineni2002bleu,
  title = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year = {2002}
}
@inproceedings{post2018call,
  title = {A Call for Clarity in Reporting {BLEU} Scores},
  author = {Post, Matt},
  booktitle = {Conference on Machine Translation},
  year = {2018}
}
@inproceedings{lin2004rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year = {2004}
}
@inproceedings{vedantam2015cider,
  title = {{CIDEr}: Consensus-based Image Description Evaluation},
  author = {Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2015}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): one caption a picture. An empty caption scores 0.
    references (list of list of str): the captions that people wrote for each picture, at least one.
Returns:
    captions (float): mean score, from 0 to 1; the same number as rouge_l.
    scores (list of float): ROUGE-L of each caption, in order.
    n (int): number of captions.
    rouge_l (float): mean ROUGE-L, from 0 to 1.
    bleu4 (float): BLEU-4 of the whole set, from 0 to 1.
    cider (float): mean CIDEr-D, from 0 to 10; its word weights come from these references, so that it compares only
        between captions of the same pictures, and is 0 for a single picture.
Examples:

    >>> import evaluate
    >>> metric = evaluate.load("metrics/captions")
    >>> results = metric.compute(
    ...     predictions=["A dog runs on the beach.", "two men"],
    ...     references=[["A dog runs on the beach.", "a dog"], ["Two men are cooking", "two women eat"]],
    ... )
    >>> [round(score, 4) for score in results["scores"]], results["n"]
    ([1.0, 0.6667], 2)
    >>> [round(results[name], 4) for name in ("captions", "rouge_l", "bleu4", "cider")]
    [0.8333, 0.8333, 0.8948, 4.0238]
"""

WORD = re.compile("[A-Za-z0-9]")  # what ROUGE-L takes for a word; in captions without one nothing can match


def rouge_l(predictions, references):
    """ROUGE-L of each caption with the reference for which it is highest.

    >>> rouge_l(["a red dog", ""], [["dogs", "A dog."], ["a cat"]])
    [0.8, 0.0]
    """
    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer())  # named, it is not logged at every call
    pairs = zip(predictions, references)
    return [float(scorer.score_multi(captions, text)["rougeL"].fmeasure) for text, captions in pairs]


def bleu4(predictions, references):
    """BLEU-4 of the whole set, from 0 to 1; rows may have different numbers of references."""
    most = max(len(captions) for captions in references)
    streams = [[captions[i] if i < len(captions) else None for captions in references] for i in range(most)]
    # force: captions that end in " ." are no mistake, and no reason for a warning
    return BLEU(tokenize="13a", lowercase=True, force=True).corpus_score(predictions, streams).score / 100


def words(text, tokenizer):
    """The words of a caption as CIDEr takes them: 13a, lower case, without marks, with single spaces.

    >>> words('A man\\'s dog, "Rex".', BLEU(tokenize="13a", lowercase=True).tokenizer)
    "a man's dog rex"
    """
    return " ".join(token for token in tokenizer(text.lower()).split() if any(map(str.isalnum, token)))


def cider(predictions, references):
    """The mean of CIDEr-D, which weighs n-grams by the number of pictures whose references lack them."""
    tokenizer = BLEU(tokenize="13a").tokenizer
    gold = {row: [words(text, tokenizer) for text in captions] for row, captions in enumerate(references)}
    written = {row: [words(text, tokenizer)] for row, text in enumerate(predictions)}
    return float(Cider().compute_score(gold, written)[0])


def check_rows(predictions, references):
    """Raises ValueError, with the row and what to do, for rows that cannot be scored."""
    if not predictions:
        raise ValueError("no rows to score; add at least one prediction with its reference")
    for row, (prediction, captions) in enumerate(zip(predictions, references)):
        if prediction is None:
            raise ValueError(f"row {row}: the prediction is None; give '' where the model gave no answer")
        if not captions or None in captions or not all(WORD.search(text) for text in captions):
            raise ValueError(
                f"row {row}: the references are {captions}; give one or more captions, each with a word of a-z or 0-9"
            )


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Captions(evaluate.Metric):
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
            codebase_urls=["https://github.com/mjpost/sacrebleu", "https://github.com/salaniz/pycocoevalcap"],
            reference_urls=[
                "https://aclanthology.org/P02-1040",
                "https://aclanthology.org/W04-1013",
                "https://arxiv.org/abs/1411.5726",
            ],
        )

    def _compute(self, predictions, references):
        check_rows(predictions, references)
        scores = rouge_l(predictions, references)
        mean = sum(scores) / len(scores)
        return {
            "captions": mean,
            "scores": scores,
            "n": len(scores),
            "rouge_l": mean,
            "bleu4": bleu4(predictions, references),
            "cider": cider(predictions, references),
        }
