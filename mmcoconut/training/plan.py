"""Print the plan of a run as a table before its first update, and the remaining time after ten updates."""

import logging
import math
import time
from collections.abc import Mapping, Sized

from transformers import TrainerCallback

from mmcoconut.arguments.choices import STAGED_MODES
from mmcoconut.progress import duration
from mmcoconut.records import markdown_table
from mmcoconut.training.results import count_parameters


logger = logging.getLogger("mmcoconut")

TIMED_UPDATES = 10


def stage_lines(curriculum, num_epochs: float) -> list[list[str]]:
    """Return for each stage of a run: its number, its epochs counted from 1, its latents per answer."""
    epochs_of: dict[int, list[int]] = {}
    for epoch in range(math.ceil(num_epochs)):
        epochs_of.setdefault(curriculum.stage_at(epoch), []).append(epoch + 1)
    return [
        [str(stage), "–".join(map(str, dict.fromkeys([epochs[0], epochs[-1]]))), str(curriculum.num_latents(stage))]
        for stage, epochs in epochs_of.items()
    ]


def step_counts(rows) -> tuple[int, int]:
    """Return the fewest and the most written steps of a row."""
    counts = [len(steps) for steps in rows["steps"]]
    return min(counts), max(counts)


def warn_of_idle_stages(curriculum, most_steps: int) -> None:
    """Log a warning if stages come after the last one that replaces a step of any training row."""
    last = curriculum.max_latent_stage
    if curriculum.mode not in STAGED_MODES or curriculum.thoughts_per_turn or last <= most_steps:
        return
    stages = f"stage {last}" if last == most_steps + 1 else f"stages {most_steps + 1} to {last}"
    logger.warning(
        "max_latent_stage is %d, and no training row has more than %d steps: %s replace%s no further step%s. Set "
        "max_latent_stage to %d, unless that is what you want.",
        *(last, most_steps, stages, "s" if last == most_steps + 1 else ""),
        *(
            (" and only adds latents" if last == most_steps + 1 else " and only add latents")
            if curriculum.pad_latent_to_max
            else "",
            most_steps,
        ),
    )


def plan_text(curriculum, splits: Mapping[str, Sized], *, args, max_steps: int, updates_per_epoch: int, counts) -> str:
    """Return the table of a run.

    Args:
        splits: rows by `train`, `eval` and `test`, with the column `steps` of `train`.
        args: of the run.
        max_steps: number of updates.
        counts: result of `count_parameters`.
    """
    rows = ", ".join(f"{name} {len(some):,}" for name, some in splits.items())
    answers = getattr(args, "num_generations", 1)  # per row, of trl's GRPO and RLOO, whose batches count answers
    per_update = args.train_batch_size * args.gradient_accumulation_steps * args.world_size / answers
    each = f"{per_update:,g} rows each" + (f", {answers} answers per row" if answers > 1 else "")
    trained, of_all = counts["trainable_parameters"], counts["parameters"]
    lines = [
        ["rows", rows],
        ["updates", f"{max_steps:,}, {updates_per_epoch:,} per epoch, {each}"],
        ["parameters", f"{of_all:,}, of which {trained:,} are trained ({100 * trained / max(of_all, 1):.3g} %)"],
    ]
    if "train" in splits:
        fewest, most = step_counts(splits["train"])
        lines.insert(1, ["steps", f"{fewest if fewest == most else f'{fewest} to {most}'} per training row"])
    if "objective_parameters" in counts:
        lines.append(["of objectives", f"{counts['objective_parameters']:,} parameters, in addition to the model's"])
    stages = stage_lines(curriculum, max_steps / updates_per_epoch)
    tables = markdown_table(["mode", curriculum.mode], lines), markdown_table(["stage", "epochs", "latents"], stages)
    return "\n\n".join(tables)


class PlanCallback(TrainerCallback):
    """Print the table of a run when it begins, and the remaining time after ten updates.

    Args:
        trainer: the run's.
        splits: rows by `train`, `eval` and `test`.
    """

    def __init__(self, trainer, splits: Mapping[str, Sized]):
        self.trainer, self.splits = trainer, splits
        self.first_update, self.began = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_update = state.global_step
        if state.is_world_process_zero:
            plan = plan_text(
                self.trainer.curriculum_collator.curriculum,
                self.splits,
                args=args,
                max_steps=state.max_steps,
                updates_per_epoch=self.trainer.curriculum_callback.updates_per_epoch,
                counts=count_parameters(self.trainer.model),
            )
            logger.info("\n%s\n", plan)
            warn_of_idle_stages(self.trainer.curriculum_collator.curriculum, step_counts(self.splits["train"])[1])

    def on_step_end(self, args, state, control, **kwargs):
        """Estimate from the second update on, because the first one compiles and allocates."""
        done = state.global_step - self.first_update
        if done == 1:
            self.began = time.perf_counter()
        elif done == TIMED_UPDATES and state.is_world_process_zero and state.global_step < state.max_steps:
            seconds = (time.perf_counter() - self.began) / (TIMED_UPDATES - 1)
            left = duration(seconds * (state.max_steps - state.global_step))
            logger.info(
                "%d of %d updates done, %.2g s each: about %s left without evaluations. Stages with more latents "
                "take longer.",
                *(state.global_step, state.max_steps, seconds, left),
            )
