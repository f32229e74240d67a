"""Give each maze the thoughts that the model has about another maze, and see which colour it names.

    python benchmarks/transplant_mazes.py --model outputs/mazes_6_hops [--max_samples 500]

If a thought holds the cell that the way has come to, and the answer is read off the picture there, then with the
thoughts about another picture (same question) the answer must be the colour, in *this* picture, of the cell where the
way of the *other* picture ends. Both colours are known for certain, so the prediction can fail.
"""

import sys
from pathlib import Path

from mmcoconut.audit.interventions import Study, given, images_key, keep, other_rows, with_images_of
from mmcoconut.data import question_text
from mmcoconut.data.arrow_mazes import generate
from mmcoconut.evaluation.answering import Answerer, load_checkpoint
from mmcoconut.evaluation.asking import join_processes, parse_arguments, read_rows
from mmcoconut.provenance import provenance
from mmcoconut.records import markdown_table, write_json
from mmcoconut.statistics import Estimate, bootstrap_mean


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


def shares(answers: list[str], colors: dict[str, list[str]], telling: list[int]) -> dict:
    """How often the answer is each of the colours, over the rows that can tell them apart."""
    return {
        name: bootstrap_mean([answers[i] == column[i] for i in telling]).asdict() for name, column in colors.items()
    }


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    rows = list(read_rows(arguments))
    device = join_processes().device
    model, processor = load_checkpoint(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype, device=device
    )
    answerer = Answerer(model, processor, num_latents=arguments.num_latents, max_new_tokens=arguments.max_new_tokens)
    study = Study(answerer, rows, metric="exact_match", batch_size=arguments.batch_size, seed=arguments.seed)
    partners = other_rows([images_key(row) for row in rows], study.seed, groups=[question_text(row) for row in rows])
    donors = [with_images_of(row, rows[partner]) for row, partner in zip(rows, partners)]
    thoughts = study.run(lambda indices: keep, donors=donors).thoughts
    transplanted = study.run(given(thoughts)).texts

    here, there = end_colors(arguments, partners)
    gold = [row["answers"][0] for row in rows]
    colors = {"this picture, the other way's end": here, "the other picture's answer": there, "own answer": gold}
    telling = [i for i in range(len(rows)) if len({here[i], there[i], gold[i]}) == 3]
    record = {
        "model": arguments.model,
        "n": len(rows),
        "n_with_three_different_colours": len(telling),
        "own thoughts": shares(study.untouched.texts, colors, telling),
        "thoughts about the other picture": shares(transplanted, colors, telling),
        **provenance(model.device),
    }
    if arguments.output_dir is not None:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(arguments.output_dir, "transplant_mazes.json"), record)
    header = [f"the answer is the colour of ({len(telling)} of {len(rows)} rows, where all three differ)", *colors]
    table = [
        [whose, *(str(Estimate(**share)) for share in record[whose].values())]
        for whose in ("own thoughts", "thoughts about the other picture")
    ]
    print(markdown_table(header, table))


if __name__ == "__main__":
    main()
