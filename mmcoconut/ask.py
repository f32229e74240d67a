"""Ask a checkpoint one question: `mmcoconut ask outputs/quickstart --image maze.png "Follow the arrows …"`.

Prints the answer, what each thought decodes to by the logit lens and, where the run trained one, by its step decoder,
and the time.
"""

import argparse
import logging
from difflib import get_close_matches
from pathlib import Path

from mmcoconut.audit.step_reader import StepReader
from mmcoconut.demo.one_question import Asked, Asker, Look, row_of, with_bytes
from mmcoconut.errors import UsageError
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.evaluation.asking import NEW_TOKENS, join_processes
from mmcoconut.training.layout import recipe_of


SHOWN_TOKENS = 3


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Parse the command line; argparse ends the process with status 2 for an invalid one."""
    parser = argparse.ArgumentParser(prog="mmcoconut ask", description="Ask a checkpoint one question.")
    parser.add_argument("model", help="folder or Hub id of a trained checkpoint")
    parser.add_argument("question")
    parser.add_argument("--image", action="append", default=[], help="file of a picture; may be given several times")
    parser.add_argument("--num_latents", type=int, help="number of thoughts; default: the checkpoint's")
    parser.add_argument("--max_new_tokens", type=int, help=f"maximum tokens; default: the recipe's, or {NEW_TOKENS}")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    known = [option for action in parser._actions for option in action.option_strings]
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known and (near := get_close_matches(option, known, n=1)):
            raise UsageError(f"{option}: no such option; did you mean {near[0]}? mmcoconut ask --help lists all")
    return parser.parse_args(words)


def row_asked(question: str, images: list[str]) -> dict:
    """Return the question and the files of its pictures as a row.

    Raises:
        UsageError: a missing file, or no question.
    """
    missing = next((file for file in images if not Path(file).is_file()), None)
    if missing is not None:
        raise UsageError(f"--image {missing}: no such file. Correct the path.")
    return {**row_of(question, None), "images": [with_bytes(file) for file in images]}


def lines_of(asked: Asked, look: Look | None) -> list[str]:
    """Return the answer, the thoughts, and the time, as lines."""
    lines = [f"answer: {asked.said}"]
    if look is not None:
        for number, thought in enumerate(look.thoughts, start=1):
            tokens = "  ".join(f"{text!r} {100 * p:.0f} %" for text, p in thought.tokens)
            lines.append(f"thought {number}, logit lens: {tokens}")
        lines += [f"step {number}, step decoder: {text}" for number, text in enumerate(look.steps or (), start=1)]
    counts = f"thoughts: {asked.num_thoughts}, tokens: {asked.generated_tokens}"
    return [*lines, f"time: {asked.seconds:.2f} s ({counts}, decoder passes: {asked.decoder_passes})"]


def main(argv: list[str]) -> None:
    """Answer the question and print answer, thoughts and time."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    arguments = parse_arguments(argv)
    row = row_asked(arguments.question, arguments.image)
    model, processor = load_checkpoint(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype, device=join_processes().device
    )
    limit = arguments.max_new_tokens or recipe_of(arguments.model, arguments.revision).get("max_new_tokens")
    reader = StepReader.beside(arguments.model)
    asker = Asker(model, processor, max_new_tokens=limit or NEW_TOKENS, reader=reader)
    count = processor.num_latents if arguments.num_latents is None else arguments.num_latents
    asked = asker.ask(row, count)
    look = asker.look(asked, top_k=SHOWN_TOKENS) if count and model.config.thought_mode == "feedback" else None
    print("\n".join(lines_of(asked, look)))
