"""Give each maze the thoughts that the model has about another maze, and see which colour it names.

    python benchmarks/transplant_mazes.py --model outputs/mazes_6_hops [--max_samples 500]

If a thought holds the cell that the way has come to, and the answer is read off the picture there, then with the
thoughts about another picture (same question) the answer must be the colour, in *this* picture, of the cell where the
way of the *other* picture ends. Both colours are known for certain, so the prediction can fail.
"""

import json
import sys
from pathlib import Path

from mmcoconut.answering import Answerer, load_checkpoint
from mmcoconut.audit import AuditArguments
from mmcoconut.data import question_text
from mmcoconut.data.arrow_mazes import generate
from mmcoconut.evaluation import join_processes, parse_arguments, read_rows
from mmcoconut.interventions import Study, given, images_key, keep, other_rows, with_images_of
from mmcoconut.provenance import provenance
from mmcoconut.statistics import bootstrap_mean


def end_colors(arguments, partners: list[int]) -> tuple[list[str], list[str]]:
    """For each row: the colour in its own picture, and in the other one, of the cell where the other's way ends."""
    options = {name: value for name, value in arguments.dataset_options.items() if name != "cell_size"}
    puzzles = list(generate(arguments.split, **options))
    here, there = [], []
    for (maze, hops), partner in zip(puzzles, partners):
        other = puzzles[partner][0]
        end = other.path(hops)[-1]
        here.append(maze.color_at(end))
        there.append(other.color_at(end))
    return here, there


def main() -> None:
    arguments = parse_arguments(sys.argv[1:], AuditArguments)
    rows = list(read_rows(arguments))
    model, processor = load_checkpoint(arguments.model, dtype=arguments.dtype, device=join_processes().device)
    answerer = Answerer(model, processor, max_new_tokens=arguments.max_new_tokens)
    study = Study(answerer, rows, metric="exact_match", batch_size=arguments.batch_size, seed=arguments.seed)
    partners = other_rows([images_key(row) for row in rows], study.seed, groups=[question_text(row) for row in rows])
    donors = [with_images_of(row, rows[partner]) for row, partner in zip(rows, partners)]
    thoughts = study.run(lambda indices: keep, donors=donors).thoughts
    answers = study.run(given(thoughts)).texts

    here, there = end_colors(arguments, partners)
    gold = [row["answers"][0] for row in rows]
    telling = [i for i in range(len(rows)) if len({here[i], there[i], gold[i]}) == 3]
    share = {
        "this picture, the other way's end": bootstrap_mean([answers[i] == here[i] for i in telling]),
        "the other picture's own answer": bootstrap_mean([answers[i] == there[i] for i in telling]),
        "this picture's own answer": bootstrap_mean([answers[i] == gold[i] for i in telling]),
    }
    record = {
        "model": arguments.model,
        "n": len(rows),
        "n_with_three_different_colours": len(telling),
        "answers": {name: estimate.asdict() for name, estimate in share.items()},
        "untouched_accuracy": bootstrap_mean(study.untouched.scores).asdict(),
        **provenance(model.device),
    }
    if arguments.output_dir is not None:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        Path(arguments.output_dir, "transplant_mazes.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{len(telling)} of {len(rows)} rows, those in which the three colours differ; the answer is the colour of")
    for name, estimate in share.items():
        print(f"  {name}: {estimate}")


if __name__ == "__main__":
    main()
