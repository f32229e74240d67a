"""Callbacks of the trainer: stages, and sharded models."""

import logging

from transformers import TrainerCallback

from mmcoconut.errors import UsageError
from mmcoconut.training.collator import CurriculumCollator


logger = logging.getLogger(__name__)


class CurriculumCallback(TrainerCallback):
    """Moves the collator through the stages, and evaluates and saves at the end of each.

    Epochs are counted as the Trainer counts them, from the updates that are done and `updates_per_epoch`, which the
    trainer sets, so a resumed run is at the right stage. It is set before the epoch's data loader starts its workers;
    persistent workers would keep the first stage, and are refused.

    Args:
        collator: the trainer's.
        reset_optimizer: forget the optimizer's moments when a stage begins.
    """

    def __init__(self, collator: CurriculumCollator, *, reset_optimizer: bool = False):
        self.collator, self.reset_optimizer = collator, reset_optimizer
        self.updates_per_epoch: int | None = None
        self.next_epoch = self.first_update = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if args.dataloader_persistent_workers:
            raise UsageError("dataloader_persistent_workers keeps the workers at the first stage: set it to false.")
        alignment = self.collator.alignment
        if alignment is not None and alignment.warms_up(state.num_train_epochs - 1):
            raise UsageError(
                f"All {state.max_steps} updates of this run lie in the {alignment.warmup_epochs} epochs of "
                "align_warmup_epochs, so that the answer is never learnt: set max_steps to more, or that to less."
            )
        if state.is_world_process_zero and not args.smoke_test:  # which always stops early
            self.announce_last_stage(state.num_train_epochs)
        self.check_resumed(state)
        self.first_update = state.global_step
        self.next_epoch = state.global_step // self.updates_per_epoch
        # A finished run that is resumed has no epoch left to begin.
        self.enter(min(self.next_epoch, state.num_train_epochs - 1))

    def check_resumed(self, state) -> None:
        """Refuse a checkpoint that counted other epochs, as it would go on in the wrong stage.

        Raises:
            ValueError: names the checkpoint's epoch and the one that its updates are in this run.
        """
        saved, present = state.epoch or 0.0, state.global_step / self.updates_per_epoch
        if int(saved + 1e-6) != int(present) or abs(saved - present) > 1 / self.updates_per_epoch:
            raise UsageError(
                f"The checkpoint was saved after {state.global_step} updates, in its run {saved:.4g} epochs, and with "
                f"this run's {self.updates_per_epoch} updates per epoch {present:.4g} epochs: take the rows, batch "
                "size, gradient_accumulation_steps and number of processes that it was trained with."
            )

    def announce_last_stage(self, num_epochs: int) -> None:
        """Log the stage that a run of so many epochs ends in, as a warning where it is not the last one."""
        curriculum = self.collator.curriculum
        stage, last = curriculum.stage_at(num_epochs - 1), curriculum.last_stage
        if stage < last:
            needed = curriculum.epochs_before_last_stage + 1 - curriculum.start_epoch
            logger.warning(
                "The run ends in stage %d of %d, with %d of %d latents: the %d epochs of num_train_epochs, or of "
                "max_steps, end before the later stages. Train for %d epochs or more, or shorten epochs_per_stage.",
                *(stage, last, curriculum.num_latents(stage), curriculum.num_latents(last), num_epochs, needed),
            )
        elif last > 0:
            logger.info("The run ends in stage %d of %d.", stage, last)

    def enter(self, epoch: int) -> None:
        """Set the collator's epoch, and the latents that a checkpoint's processor is saved with."""
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
                logger.info("epoch %d: stage %d begins, %d latents (%s)", epoch, stage, num_latents, curriculum.mode)
            if self.reset_optimizer and epoch > 0:
                getattr(optimizer, "optimizer", optimizer).state.clear()

    def on_epoch_end(self, args, state, control, **kwargs):
        """The stage's last epoch: evaluate and save, whatever the run's own strategy."""
        next_epoch = self.collator.epoch + 1
        ends = self.collator.curriculum.stage_at(next_epoch) != self.collator.stage
        if ends or state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        return control


class ShardingCallback(TrainerCallback):
    """Gives parameters that a sharded model did not use in a step a gradient of zero.

    Processes must reduce the same gradients, and one of them may have a batch without images; and an optimizer is not
    restored without a state of every parameter.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.set_reduce_scatter_unused_params(True)
