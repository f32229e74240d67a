"""Callbacks of the trainer: stages of the curriculum, and sharded models."""

import logging

from transformers import TrainerCallback

from mmcoconut.errors import UsageError
from mmcoconut.training.collator import CurriculumCollator


logger = logging.getLogger(__name__)


class CurriculumCallback(TrainerCallback):
    """Move the collator through the stages; evaluate and save at the end of each stage.

    Epochs are counted as the Trainer counts them, from the completed updates and `updates_per_epoch` (set by the
    trainer), so a resumed run continues at the right stage. The epoch is set before its data loader starts workers;
    persistent workers would keep the first stage and are refused.

    Args:
        collator: the trainer's.
        reset_optimizer: reset the optimizer's moments at the start of each stage.
    """

    def __init__(self, collator: CurriculumCollator, *, reset_optimizer: bool = False):
        self.collator, self.reset_optimizer = collator, reset_optimizer
        self.updates_per_epoch: int | None = None
        self.next_epoch = self.first_update = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if args.dataloader_persistent_workers:
            raise UsageError("dataloader_persistent_workers keeps the workers at the first stage. Set it to false.")
        alignment = self.collator.alignment
        if alignment is not None and alignment.warms_up(state.num_train_epochs - 1):
            raise UsageError(
                f"All {state.max_steps} updates of this run lie in the {alignment.warmup_epochs} epochs of "
                "align_warmup_epochs, so the answer is never learnt. Raise max_steps or lower align_warmup_epochs."
            )
        if state.is_world_process_zero and not args.smoke_test:  # which always stops early
            self.announce_last_stage(state.num_train_epochs)
        self.check_resumed(state)
        self.first_update = state.global_step
        self.next_epoch = state.global_step // self.updates_per_epoch
        # A finished run that is resumed has no epoch left to begin.
        self.enter(min(self.next_epoch, state.num_train_epochs - 1))

    def check_resumed(self, state) -> None:
        """Refuse a checkpoint that counted other epochs, because the run would continue at the wrong stage.

        Raises:
            ValueError: names the checkpoint's epoch and the epoch of the same updates in this run.
        """
        saved, present = state.epoch or 0.0, state.global_step / self.updates_per_epoch
        if int(saved + 1e-6) != int(present) or abs(saved - present) > 1 / self.updates_per_epoch:
            raise UsageError(
                f"The checkpoint was saved after {state.global_step} updates. These are {saved:.4g} epochs in its run "
                f"and {present:.4g} epochs here ({self.updates_per_epoch} updates per epoch). Use the rows, batch "
                "size, gradient_accumulation_steps and number of processes of the original run."
            )

    def announce_last_stage(self, num_epochs: int) -> None:
        """Log the stage that a run of num_epochs ends in; warn if thoughts are missing there."""
        curriculum = self.collator.curriculum
        stage, last = curriculum.stage_at(num_epochs - 1), curriculum.last_stage
        if stage == last - 1 == curriculum.max_latent_stage:
            logger.info(
                "The run ends in stage %d of %d. The last one would only drop written steps after the first %d.",
                *(stage, last, stage),
            )
        elif stage < last:
            needed = curriculum.epochs_before_last_stage + 1 - curriculum.start_epoch
            logger.warning(
                "The run ends in stage %d of %d, with %d of %d latents: the %d epochs of num_train_epochs, or of "
                "max_steps, end before the later stages. Train for %d epochs or more, or shorten epochs_per_stage.",
                *(stage, last, curriculum.num_latents(stage), curriculum.num_latents(last), num_epochs, needed),
            )
        elif last > 0:
            logger.info("The run ends in stage %d of %d.", stage, last)

    def enter(self, epoch: int) -> None:
        """Set the collator's epoch, and the number of latents that is saved with a checkpoint's processor."""
        self.collator.epoch = epoch
        self.collator.processor.num_latents = self.collator.curriculum.num_latents(self.collator.stage)

    def on_epoch_begin(self, args, state, control, optimizer=None, **kwargs):
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        self.enter(epoch)
        curriculum, stage = self.collator.curriculum, self.collator.stage
        begins = epoch == 0 or curriculum.stage_at(epoch - 1) != stage
        resumed_inside = state.global_step > epoch * self.updates_per_epoch
        if begins and not resumed_inside:
            if state.is_world_process_zero:
                num_latents = curriculum.num_latents(stage)
                logger.info("epoch %d: stage %d begins, latents: %d (%s)", epoch, stage, num_latents, curriculum.mode)
            if self.reset_optimizer and epoch > 0:
                getattr(optimizer, "optimizer", optimizer).state.clear()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Evaluate and save after the stage's last epoch, whatever the run's own strategy."""
        next_epoch = self.collator.epoch + 1
        ends = self.collator.curriculum.stage_at(next_epoch) != self.collator.stage
        if ends or state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        return control


class ShardingCallback(TrainerCallback):
    """Set zero gradients for parameters that a sharded model did not use in a step.

    All processes must reduce the same gradients, and a process may have a batch without images. In addition, an
    optimizer can only be restored if every parameter has a state.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.set_reduce_scatter_unused_params(True)
