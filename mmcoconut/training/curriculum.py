"""The curriculum of Coconut: the stage of each epoch, and its effect on a row.

At stage s the first s reasoning steps of a row are replaced by c_thought · s latents:

    stage 0   question ⏎ <start> <end>                      step 1 ⏎ step 2 ⏎ step 3 ⏎ ### answer
    stage 1   question ⏎ <start> <latent> <end>             step 2 ⏎ step 3 ⏎ ### answer
    stage 3   question ⏎ <start> <latent>×3 <end>           ### answer

A conversation has no steps and no stages: each of its answers follows `thoughts_per_turn` latents, and all answers
are learnt.

Source: Hao et al. 2024, https://arxiv.org/abs/2412.06769, section 3, and its published configurations. `icot`: Deng et
al. 2024, https://arxiv.org/abs/2405.14838, section 3.
"""

import math
import random
from dataclasses import dataclass

from mmcoconut.arguments.choices import MODES, STAGED_MODES, THINKING_MODES
from mmcoconut.data.targets import RowPlan


# λ of the paper: in `icot`, a share exp(-λk) of the rows lose k steps or more beyond those of the stage.
REMOVAL_SMOOTHING = 4.0


@dataclass(frozen=True)
class Curriculum:
    """The schedule of a run; the same functions serve training, evaluation and inference.

    Args:
        mode: `coconut` and the matched controls `cot` (all steps written), `no_cot` (none), `no_thoughts` (curriculum,
            no latents), `markers` (as `no_thoughts`, with thought markers and nothing between them), `pause`
            (latents that feed nothing back); `icot` (implicit chain of thought: `no_thoughts` with removal smoothing,
            and the optimizer's moments are reset whenever more steps are removed).
        c_thought: latents per replaced step.
        max_latent_stage: last stage that adds latents; the stage after it removes every remaining step.
        epochs_per_stage: epochs per stage, or a list with one entry per stage, whose last entry repeats.
        uniform_prob: probability that a training row uses a stage drawn uniformly from 0 to its number of steps.
        pad_latent_to_max: give rows with fewer steps all latents of the stage; otherwise their steps cap the latents.
        thoughts_per_turn: if not 0, latents before every answer of a conversation; there are no stages then.
        start_epoch: epochs that were trained elsewhere and count as completed.
        seed: seed of the draws of `uniform_prob`.
    """

    mode: str = "coconut"
    c_thought: int = 1
    max_latent_stage: int = 3
    epochs_per_stage: int | tuple[int, ...] = 1
    uniform_prob: float = 0.0
    pad_latent_to_max: bool = True
    thoughts_per_turn: int = 0
    start_epoch: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not one of {', '.join(MODES)}: set mode to one of them.")
        lengths = self.stage_lengths
        if not lengths or min(lengths) < 1:
            raise ValueError(f"epochs_per_stage={self.epochs_per_stage} must hold numbers of at least 1.")

    @property
    def stage_lengths(self) -> tuple[int, ...]:
        """The epochs of the first stages; the last number repeats."""
        return (self.epochs_per_stage,) if isinstance(self.epochs_per_stage, int) else tuple(self.epochs_per_stage)

    @property
    def last_stage(self) -> int:
        """The stage after which nothing changes."""
        return self.max_latent_stage + 1 if self.mode in STAGED_MODES and not self.thoughts_per_turn else 0

    def stage_at(self, epoch: int) -> int:
        """Return the stage of an epoch, both from 0: epoch // epochs_per_stage if all stages are equally long."""
        epoch += self.start_epoch
        for stage in range(self.last_stage):
            epoch -= self.stage_lengths[min(stage, len(self.stage_lengths) - 1)]
            if epoch < 0:
                return stage
        return self.last_stage

    @property
    def resets_optimizer(self) -> bool:
        """True for a mode whose paper resets the optimizer whenever more steps are removed."""
        return self.mode == "icot"

    @property
    def epochs_before_last_stage(self) -> int:
        """The total epochs of all stages but the last."""
        lengths = self.stage_lengths
        return sum(lengths[min(stage, len(lengths) - 1)] for stage in range(self.last_stage))

    def plan(self, stage: int, num_steps: int | None) -> RowPlan:
        """Return the plan of a row with num_steps steps at a stage; num_steps is None if unknown, as at inference."""
        if self.mode == "no_cot":
            return RowPlan(skipped_steps=num_steps or 0, num_latents=0)
        if self.mode == "cot":
            return RowPlan(skipped_steps=0, num_latents=0)
        if self.thoughts_per_turn:
            return RowPlan(0, self.thoughts_per_turn if self.mode in THINKING_MODES else 0)
        groups = min(stage, self.max_latent_stage)
        if num_steps is not None and not self.pad_latent_to_max:
            groups = min(groups, num_steps)
        skipped = stage if stage <= self.max_latent_stage else num_steps
        num_latents = self.c_thought * groups if self.mode in THINKING_MODES else 0
        return RowPlan(skipped_steps=min(skipped or 0, num_steps or 0), num_latents=num_latents)

    def num_latents(self, stage: int) -> int:
        """Return the latents per prompt at this stage for evaluation and inference; independent of a row's steps."""
        return self.plan(stage, None).num_latents

    def training_stage(self, stage: int, *, num_steps: int, epoch: int, index: int) -> int:
        """Return the stage of a row in an epoch, equal in all workers: the epoch's, or a random one (`uniform_prob`).

        In `icot` a row may be at a later stage, by k or more with probability exp(-4 k), which smooths the next
        removal.
        """
        draw = random.Random(f"{self.seed} {epoch} {index}")
        if self.mode in STAGED_MODES and draw.random() < self.uniform_prob:
            return draw.randint(0, num_steps)
        if self.mode != "icot":
            return stage
        return min(stage + math.floor(-math.log(1 - draw.random()) / REMOVAL_SMOOTHING), max(stage, self.last_stage))
