"""What objectives, modes and schedules cost: the time of an update at one stage, beside that of the first variant.

    python benchmarks/bench_objectives.py recipes/objectives_mazes.yaml --variants coconut,coconut+step_tokens

Every variant, named as in `train_hf.py --compare`, is built from the recipe as its run would be. They take turns, each
turn a number of updates on the same rows, and of each the fastest turn counts.
"""

import argparse
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

import torch
from measuring import add_output_options, fastest, write_results


sys.path.insert(0, str(Path(__file__).parent.parent))

import train_hf  # noqa: E402
from mmcoconut.arguments.recipes import parse_recipe  # noqa: E402
from mmcoconut.evaluation.matched_runs import Run, plan_runs  # noqa: E402
from mmcoconut.objectives.attach import attach  # noqa: E402


def trainer_of(run: Run):
    """Return the trainer of a run of a comparison, which has not begun."""
    run.recipe_file.write_text(run.recipe, encoding="utf-8")
    arguments = parse_recipe([str(run.recipe_file), "--use_cpu", str(not torch.cuda.is_available())])
    model_args, data_args, curriculum_args, run_args = arguments
    train_hf.set_seed(run_args.seed)
    splits, _ = train_hf.read(data_args, run_args)
    model, processor = train_hf.build(model_args, curriculum_args, splits["train"])
    if objectives := train_hf.objectives_of(curriculum_args):
        attach(model, objectives, processor)
    parts = {"data_args": data_args, "curriculum_args": curriculum_args, "run_args": run_args}
    collator = train_hf.build_collator(model, processor, **parts)
    return train_hf.build_trainer(model, collator, splits=splits, **parts)


def updates_of(trainer, *, stage: int, count: int):
    """Return a function that makes so many updates at a stage, of batches that are laid out beforehand."""
    collator = trainer.curriculum_collator
    collator.fixed_stage = min(stage, collator.curriculum.last_stage)
    batches = [trainer._prepare_inputs(batch) for batch in islice(cycle(trainer.get_train_dataloader()), count)]
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    def update() -> None:
        for batch in batches:
            trainer.training_step(trainer.model, dict(batch))
            optimizer.step()
            optimizer.zero_grad()

    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--variants", required=True, help="as of --compare; the first is what the others are told by")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5, help="of a turn")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    add_output_options(parser)
    arguments = parser.parse_args()
    arguments.gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        given = parse_recipe([arguments.recipe, "--compare", arguments.variants, "--output_dir", folder])
        trainers = {run.variant.name: trainer_of(run) for run in plan_runs(*given)}
        calls = {
            name: updates_of(trainer, stage=arguments.stage, count=arguments.updates)
            for name, trainer in trainers.items()
        }
        seconds = fastest(calls, repeats=arguments.repeats, device="cuda" if arguments.gpu else "cpu")
    first = next(iter(seconds.values()))
    rows = [
        {
            "recipe": Path(arguments.recipe).stem,
            "variant": name,
            "stage": arguments.stage,
            "ms_per_update": f"{1000 * taken / arguments.updates:.1f}",
            "ratio": f"{taken / first:.2f}",
        }
        for name, taken in seconds.items()
    ]
    print("\n".join(f"{row['variant']:36} {row['ms_per_update']:>8} ms {row['ratio']:>6}" for row in rows))
    file = write_results(rows, arguments, replaces="recipe", batch=next(iter(trainers.values())).args.train_batch_size)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
