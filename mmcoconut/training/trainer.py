"""transformers' Trainer with a curriculum: batches of the current stage, and evaluation by generating answers."""

import math
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from mmcoconut.chat_template_mmcoconut import parse_answer
from mmcoconut.data import without_pictures
from mmcoconut.data.scoring import figures_of, score
from mmcoconut.errors import UsageError
from mmcoconut.objectives.attach import (
    LOSSES,
    NAME,
    attached_to,
    load_weights,
    own_weights,
    save_weights,
    without_objectives,
)
from mmcoconut.records import ADAPTER_FOLDER, OBJECTIVES_FOLDER, write_json
from mmcoconut.training.callbacks import CurriculumCallback, ShardingCallback
from mmcoconut.training.checkpoints import ASIDE, describe, put_in_place, rotate, start_aside
from mmcoconut.training.collator import IGNORED, CurriculumCollator
from mmcoconut.training.generating import count_generated, generate_and_count
from mmcoconut.training.gradient_cosines import GradientCosines
from mmcoconut.training.grouping import StageGroupedSampler
from mmcoconut.training.learning_rates import set_learning_rates
from mmcoconut.training.lora import check_whole_model, has_lora, load_adapter, merged_model, save_adapter
from mmcoconut.training.losses import Terms, loss_per_token, mean_losses, name_of_term
from mmcoconut.training.saving import ordinary_model
from mmcoconut.training.sharing import check_not_replicated, check_sharded_objectives, check_sharding
from mmcoconut.training.tracking import TrackingCallback, is_tracked
from mmcoconut.training.uploading import STAGE_FILE, UploadsSaves


ALIGNED_TEXTS = ("alignment_input_ids", "alignment_attention_mask")


def with_index(dataset):
    """Add each row's number as `index`, which metrics and `uniform_prob` use."""
    return dataset if "index" in dataset.column_names else dataset.add_column("index", list(range(len(dataset))))


class CurriculumTrainer(UploadsSaves, Trainer):
    """Trainer whose `evaluate` generates, and which keeps the best checkpoint of every stage.

    Metrics: `accuracy` (mean score of `metric`), the other figures of `metric` under their own names (such as
    `yes_no_accuracy`, `bleu4`), `generated_tokens` (mean new tokens per answer, its eos included), `loss` (mean over
    all labelled tokens of the split, independent of batches), `stage`, `num_latents`, `n`, and for a model with a stop
    head `num_thoughts` (mean). With an alignment `loss` is the weighted sum of that mean, `ce_loss`, and of
    `align_loss`, the mean over pictures; both are logged too. With objectives their weighted terms are a part of it,
    each logged as `<name>_loss`, the mean over rows. The best model of stage s
    by `metric_for_best_model`, by default accuracy, is kept in <output_dir>/stages/stage-s; epochs of alignment alone
    are ignored.

    Args:
        metric: a name in mmcoconut.data.scoring.REFERENCES.
        num_beams: beams of generation in evaluation.
        reset_optimizer: see CurriculumCallback.
        log_gradient_cosine: log `cosine_<name>` of objectives in training, see GradientCosines.
        data_collator: a CurriculumCollator, with processor and schedule.
        kwargs: arguments of transformers' Trainer.
    """

    course: Mapping = {}  # how the run was trained; saved in checkpoints, see mmcoconut.training.resuming
    aside: Path | None = None  # folder of the checkpoint being written
    seconds_aside: float = 0.0  # spent on evaluations and checkpoints within training

    def __init__(
        self,
        *,
        data_collator: CurriculumCollator,
        metric: str = "exact_match",
        num_beams: int = 1,
        reset_optimizer: bool = False,
        log_gradient_cosine: bool = False,
        **kwargs,
    ):
        kwargs.setdefault("processing_class", data_collator.processor)
        if kwargs.get("train_dataset") is not None:
            kwargs["train_dataset"] = with_index(kwargs["train_dataset"])
        super().__init__(data_collator=data_collator, **kwargs)
        self.model_class = type(self.model)  # before sharding changes it
        if self.is_fsdp_enabled:
            check_sharding(self.accelerator.state.fsdp_plugin, adapted=has_lora(self.model))
            check_sharded_objectives(attached_to(self.model), compares_gradients=log_gradient_cosine)
            self.add_callback(ShardingCallback())
        self.compute_metrics = self.score_answers
        self.curriculum_collator, self.metric, self.num_beams = data_collator, metric, num_beams
        self.alignment = data_collator.alignment
        self.objectives = attached_to(self.model)
        check_not_replicated(self.objectives, self.args.n_gpu)
        self.terms = Terms(["ce_loss", "align_loss", *(name_of_term(each.name) for each in data_collator.objectives)])
        self.has_terms = self.alignment is not None or self.objectives is not None
        self.gradient_cosines: GradientCosines | None = None
        if self.objectives is not None:
            self.objectives.autocast = self.accelerator.autocast
            self.gradient_cosines = GradientCosines(own_weights(self.model)) if log_gradient_cosine else None
        self.curriculum_callback = CurriculumCallback(data_collator, reset_optimizer=reset_optimizer)
        self.add_callback(self.curriculum_callback)
        if is_tracked(self.args):
            self.add_callback(TrackingCallback(self))

    def create_optimizer(self, *args, **kwargs):
        """Create the optimizer with the rates of `learning_rates` for the parts that it names."""
        created = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.learning_rates and not created:
            set_learning_rates(optimizer, self.model, self.args.learning_rates)
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss plus weighted terms of objectives and alignment; in the warm-up the alignment alone."""
        if not self.has_terms:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        ce_loss, steps = None, 1
        if "labels" in inputs:
            ce_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        else:
            outputs = model(**inputs)
        if num_items_in_batch is not None:  # then the labels' loss is already divided by all batches of an update
            steps = self.current_gradient_accumulation_steps
        terms = {name: rows.mean() for name, rows in (outputs.get(LOSSES) or {}).items()}
        align_loss = outputs.get("alignment_loss")
        self.terms.add(
            ce_loss=None if ce_loss is None else ce_loss * steps,
            align_loss=align_loss,
            **{name_of_term(name): term for name, term in terms.items()},
        )
        loss = ce_loss
        if self.alignment is not None:
            loss = self.alignment.total(ce_loss, None if align_loss is None else align_loss / steps)
        if terms and self.compares_gradients:
            self.gradient_cosines.add(self.state.global_step, ce_loss, terms)
        weights = self.curriculum_collator.weights()
        loss = sum((weights[name] * term / steps for name, term in terms.items()), loss)
        return (loss, outputs) if return_outputs else loss

    @property
    def compares_gradients(self) -> bool:
        """True in an update that will be logged, if the run compares gradients."""
        args, update = self.args, self.state.global_step + 1
        if self.gradient_cosines is None or not self.model.training:
            return False
        if args.logging_strategy == IntervalStrategy.EPOCH:
            return update % self.curriculum_callback.updates_per_epoch == 0
        by_steps = args.logging_strategy == IntervalStrategy.STEPS and update % self.state.logging_steps == 0
        return by_steps or (args.logging_first_step and update == 1)

    def set_initial_training_values(self, *args, **kwargs):
        """Set the callback's number of updates per epoch as transformers counts them."""
        values = super().set_initial_training_values(*args, **kwargs)
        self.curriculum_callback.updates_per_epoch = values[1]
        return values

    def _get_train_sampler(self, train_dataset=None):
        """Return transformers' sampler; `group_by_length` groups by the cost of rows at the current stage."""
        args, rows = self.args, train_dataset or self.train_dataset
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return StageGroupedSampler(batch_size, rows, self.curriculum_collator, seed=seed)

    def _get_eval_sampler(self, eval_dataset):
        """Evaluate rows in order, independent of the training sampler."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def prompt_dataloader(self, make, dataset):
        """Return a transformers data loader that collates with `prompts`, which never contain the answer."""
        self.evaluated = with_index(dataset)
        collator, self.data_collator = self.data_collator, self.curriculum_collator.prompts
        try:
            return make(self.evaluated)
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, eval_dataset=None):
        return self.prompt_dataloader(super().get_eval_dataloader, eval_dataset or self.eval_dataset)

    def get_test_dataloader(self, test_dataset):
        return self.prompt_dataloader(super().get_test_dataloader, test_dataset)

    def row_losses(self, model, supervised: dict, pixels: dict, num_images: torch.Tensor | None) -> torch.Tensor:
        """Return per row (B, 4 + objectives): sum of its token losses, number of tokens, the same for its pictures,
        then the losses of this stage's objectives.

        num_images (B,): images per row, if pictures are aligned with texts.
        """
        texts = {name: supervised.pop(name) for name in ALIGNED_TEXTS if name in supervised}
        own_model = self.accelerator.unwrap_model(model)
        with loss_per_token(own_model):
            outputs = model(**supervised, **pixels, logits_to_keep=1)
        labels = supervised["labels"] if self.model.config.is_encoder_decoder else supervised["labels"][:, 1:]
        rows = (labels != IGNORED).nonzero()[:, 0]  # (n,), the row of each labelled token
        sums = torch.zeros(len(labels), 4, device=labels.device)
        sums[:, 0].index_add_(0, rows, outputs.loss)
        sums[:, 1] = rows.bincount(minlength=len(labels))
        if texts:
            described = own_model.get_text_features(*(texts[name] for name in ALIGNED_TEXTS), return_dict=True)
            vectors = described.pooler_output  # (I, D)
            distances = 1 - nn.functional.cosine_similarity(outputs.image_embeds, vectors, dim=-1)  # (I,)
            rows = torch.arange(len(labels), device=labels.device).repeat_interleave(num_images)  # (I,)
            sums[:, 2].index_add_(0, rows, distances.float())
            sums[:, 3] = num_images
        return torch.cat([sums, *(rows[:, None].float() for rows in (outputs.get(LOSSES) or {}).values())], dim=1)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return no loss, new tokens (B, up to max_new_tokens), and per row its index and thoughts (B, 2) and the sums
        of `row_losses`, so that the loss does not depend on how rows are batched."""
        inputs = self._prepare_input(inputs)
        index, supervised, num_images = inputs.pop("index"), inputs.pop("supervised"), inputs.pop("num_images", None)
        processor = self.processing_class
        of_text = {"input_ids", "attention_mask", *processor.prompt_names, *processor.column_names}
        pixels = {name: value for name, value in inputs.items() if name not in of_text}
        with self.compute_loss_context_manager():
            sums = self.row_losses(model, supervised, pixels, num_images)
            model = self.accelerator.unwrap_model(model)
            tokens, num_thoughts = generate_and_count(
                model,
                processor,
                inputs,
                stop_threshold=None if self.is_fsdp_enabled else 0.5,  # all processes must run equally many passes
                max_new_tokens=self.curriculum_collator.max_new_tokens,
                do_sample=False,
                num_beams=self.num_beams,
                use_cache=True,
                # A process that is done keeps calling the shards that other processes still need.
                synced_gpus=self.is_fsdp_enabled or None,
            )
        counted = torch.stack([index, num_thoughts.to(index)], dim=1)  # (B, 2)
        return None, tokens[:, inputs[self.processing_class.prompt_names[0]].shape[1] :], (counted, sums)

    def score_answers(self, prediction) -> dict[str, float]:
        """Return the metrics of generated ids (n, new tokens) padded with -100, with each row's index into the data
        and number of thoughts (n, 2), and the sums (n, 4 + objectives) of its losses."""
        processor, collator = self.processing_class, self.curriculum_collator
        tokens = torch.as_tensor(prediction.predictions)
        eos = self.model.generation_config.eos_token_id
        rows_of_tokens = [[token for token in row if token != IGNORED] for row in tokens.tolist()]
        counts = [count_generated(row, eos if isinstance(eos, list) else [eos]) for row in rows_of_tokens]
        written = [row[:count] for row, count in zip(rows_of_tokens, counts)]
        texts = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        counted, sums = prediction.label_ids
        indices, num_thoughts = counted.T.tolist()
        weights = collator.weights()
        terms = mean_losses(sums, [*weights])
        loss = terms["ce_loss"]
        if self.alignment is not None:
            loss = self.alignment.total(loss, terms.get("align_loss"))
        loss += sum(weight * terms[name_of_term(name)] for name, weight in weights.items())
        rows = without_pictures(self.evaluated).select(indices)
        results = score(self.metric, texts, [parse_answer(text) for text in texts], rows=list(rows))
        scores = results["scores"]
        return {
            **figures_of(results),
            **(terms if self.has_terms else {}),
            "loss": loss,
            "accuracy": sum(scores) / len(scores),
            "generated_tokens": sum(counts) / len(counts),
            "n": len(scores),
            "stage": collator.stage,
            "num_latents": collator.curriculum.num_latents(collator.stage),
            **({"num_thoughts": sum(num_thoughts) / len(scores)} if self.model.config.stop_head else {}),
        }

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """Evaluate as transformers does; within training also save the stage's best model so far."""
        with self.aside_of_updates():
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
            if self.is_in_train:
                self.keep_best_of_stage(metrics)
        return metrics

    def seconds_per_update(self, train_seconds: float) -> float | None:
        """Return the seconds per update in `train`, without evaluations and checkpoints within it.

        None without updates, as when a finished run is resumed.
        """
        updates = self.state.global_step - self.curriculum_callback.first_update
        return round((train_seconds - self.seconds_aside) / updates, 6) if updates else None

    @contextmanager
    def aside_of_updates(self):
        """Exclude the seconds within this context from the time of updates."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_aside += (time.perf_counter() - began) * self.is_in_train

    def warmed_up(self, record: dict) -> bool:
        """Return True if the epoch of an evaluation trained the answer."""
        return self.alignment is None or not self.alignment.warms_up(math.ceil(record["epoch"] - 1e-6) - 1)

    def keep_best_of_stage(self, metrics: dict) -> None:
        """Save the model if no evaluation of this stage was better; the log history is restored on resuming.

        Raises:
            ValueError: evaluation does not compute `metric_for_best_model`.
        """
        name = f"eval_{(self.args.metric_for_best_model or 'accuracy').removeprefix('eval_')}"
        if name not in metrics:
            raise UsageError(f"metric_for_best_model is {name}: choose one of {', '.join(sorted(metrics))}.")
        sign = 1 if self.args.metric_for_best_model is None or self.args.greater_is_better else -1
        records = [record for record in self.state.log_history if record.get("eval_stage") == metrics["eval_stage"]]
        *earlier, latest = [(self.warmed_up(record), sign * record[name]) for record in records]
        if not latest[0] or any(record >= latest for record in earlier):
            return
        self.save_stage(Path(self.args.output_dir, "stages", f"stage-{metrics['eval_stage']}"), metrics)

    def save_stage(self, folder: Path, metrics: dict) -> None:
        """Save the model and its evaluation, completely or not at all."""
        written = self.start_aside() / folder.name
        self.save_model(str(written))
        if self.args.should_save:
            write_json(written / STAGE_FILE, {**metrics, "global_step": self.state.global_step})
            put_in_place(written, folder)
        if self.uploads_saves:
            self.add_best_of_stage(folder)

    def start_aside(self) -> Path:
        """Return an empty folder for an incomplete checkpoint; all processes write there."""
        folder = Path(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        aside = start_aside(folder) if self.args.should_save else folder / ASIDE
        self.accelerator.wait_for_everyone()
        return aside

    def _get_output_dir(self, trial):
        """Return the output folder, or the temporary folder while a checkpoint is being written."""
        return super()._get_output_dir(trial) if self.aside is None else str(self.aside)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """Write a checkpoint to a temporary folder, move it to its place when complete, and then upload and rotate."""
        with self.aside_of_updates():
            self.write_checkpoint(*args, **kwargs)

    def write_checkpoint(self, *args, **kwargs) -> None:
        """Save a checkpoint as `_save_checkpoint` does, untimed."""
        self.aside = self.start_aside()
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            written, self.aside = self.aside / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", None
        checkpoint = Path(self.args.output_dir, written.name)
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            describe(written, self.course)
            put_in_place(written, checkpoint)
            best = self.state.best_model_checkpoint
            rotate(checkpoint.parent, self.args.save_total_limit, keep={checkpoint, *([Path(best)] if best else [])})
        self.accelerator.wait_for_everyone()
        if self.uploads_saves:
            self.upload_checkpoint(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save an ordinary model: the merged model of one with an adapter, and the adapter in a subfolder; the
        gathered weights of a sharded model, in its own class and with the model code.

        Only checkpoint-n of a run with an adapter, which resuming reads, holds the adapter alone. Objectives are never
        part of the model: a checkpoint saves their weights separately, and the run's folder has one file for each.
        """
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is not None:
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith(f"{NAME}.")}
        with without_objectives(self.model) as objectives:
            self.save_without_objectives(folder, state_dict)
        if objectives is None or not self.args.should_save:
            return
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            save_weights(objectives, folder)
        elif folder == Path(self.args.output_dir):
            for objective in objectives.values():
                objective.save(folder / OBJECTIVES_FOLDER)

    def save_without_objectives(self, folder: Path, state_dict: dict | None) -> None:
        """Save as `_save` does a model that has no objectives."""
        trained = self.model
        adapted, sharded = has_lora(trained), type(trained) is not self.model_class
        resumed_from = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if not self.args.should_save or not (sharded or adapted):
            return super()._save(str(folder), state_dict)
        if adapted and resumed_from:
            save_adapter(trained, folder)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
            return
        if adapted:
            save_adapter(trained, folder / ADAPTER_FOLDER)
            self.model = merged_model(trained)
        else:
            self.model = ordinary_model(self.model_class, trained, state_dict)
        try:
            super()._save(str(folder))
        finally:
            self.model = trained

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with without_objectives(self.model):
            if has_lora(self.model):
                load_adapter(self.model, resume_from_checkpoint)
            else:
                check_whole_model(resume_from_checkpoint)
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.objectives is not None:
            load_weights(self.objectives, Path(resume_from_checkpoint))
        if self.curriculum_collator.image_features is not None:
            self.curriculum_collator.image_features.check_tower(self.model)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the stage to every record, so that trackers show where it changed, and the parts of the loss."""
        if "loss" in logs and self.has_terms:
            logs = {**logs, **self.terms.means(self.accelerator)}
        if "loss" in logs and self.gradient_cosines is not None:
            cosines = self.gradient_cosines.cosines(self.accelerator)
            logs |= {f"cosine_{name}": cosine for name, cosine in cosines.items()}
        super().log({**logs, "stage": self.curriculum_collator.stage}, *args, **kwargs)
