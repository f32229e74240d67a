"""Train a vision-language model to think in latent space: `accelerate launch train_hf.py recipe.yaml [--key value …]`.

Read the recipe and the data, build model and processor, train through the curriculum, save, push, report.
"""

import logging
import math
import sys
import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, set_seed

from mmcoconut.arguments.choices import MARKED_MODES, REWARDED, THINKING_MODES
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.arguments.smoke import smoke_arguments
from mmcoconut.build import (
    check_image_options,
    composed_from_vlm,
    composed_processor_from_vlm,
    from_backbones,
    from_vlm,
    processor_from_backbones,
    processor_from_vlm,
    set_image_options,
    set_tiles,
)
from mmcoconut.build.gguf import load_tokenizer
from mmcoconut.data import drop_unreadable, history_of, load_examples, question_text, without_pictures
from mmcoconut.data.conversations import fit_rows
from mmcoconut.data.image_features import DEFAULT_CACHE, precompute_image_features
from mmcoconut.data.images import open_images
from mmcoconut.data.scoring import REFERENCES, default_metric, figures_of, references_of, score
from mmcoconut.data.tokenizer import train_tokenizer
from mmcoconut.errors import UsageError, run_command
from mmcoconut.evaluation.compare import compare
from mmcoconut.explanations import message_of_worker
from mmcoconut.hub.uploads import quiet_requests
from mmcoconut.images_mmcoconut import UnreadableImageError, makes_tiles
from mmcoconut.kernels import choose_attention
from mmcoconut.models import load_model, load_processor
from mmcoconut.objectives.alignment import Alignment
from mmcoconut.objectives.attach import attach, attached_to
from mmcoconut.objectives.registry import make_objectives
from mmcoconut.passes_mmcoconut import position_limit
from mmcoconut.records import write_json
from mmcoconut.rl.stop_distillation import StopDistiller
from mmcoconut.rl.stops import check_can_stop
from mmcoconut.tables import stage_rows, stage_table
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.deferred import defer_weight_gradients
from mmcoconut.training.layout import CONFIG_FIELDS, HOW_THOUGHTS_ARE_FED_BACK, settle, stages_with
from mmcoconut.training.lora import add_lora, describe_adapters
from mmcoconut.training.losses import name_of_term
from mmcoconut.training.parts import nearest_part, parameters_named, paths_named
from mmcoconut.training.plan import PlanCallback
from mmcoconut.training.results import report, save_results
from mmcoconut.training.resuming import check_course, check_output, check_tokenizer, course_of, prepare_output
from mmcoconut.training.row_checks import check_alignment_texts, check_answers, check_lengths, check_objectives, timed
from mmcoconut.training.trainer import CurriculumTrainer
from mmcoconut.vlm_mmcoconut import ThinkingVLM


logger = logging.getLogger("mmcoconut")


def read_split(data_args, split: str, max_rows: int | None):
    """Return one split, and messages about rows dropped by `unreadable_images: skip`."""
    examples = load_examples(data_args.dataset, split=split, **data_args.dataset_options)
    if max_rows is not None:
        examples = examples.select(range(min(max_rows, len(examples))))
    skipped = []
    if data_args.unreadable_images == "skip":
        examples, skipped = drop_unreadable(examples)
    for message in skipped:
        logger.warning("left out: %s", message)
    return examples, skipped


def read(data_args, run_args):
    """Return the splits that this run needs, by `train`, `eval` and `test`, and what was dropped."""
    splits = {"eval": (data_args.eval_split, data_args.max_eval_samples)}
    if run_args.do_train:
        splits["train"] = ("train", data_args.max_train_samples)
    if run_args.do_train and data_args.test_split is not None:
        splits["test"] = (data_args.test_split, data_args.max_eval_samples)
    with run_args.main_process_first(desc="reading the data"):
        read_splits = {name: read_split(data_args, *which) for name, which in splits.items()}
    skipped = [message for _, messages in read_splits.values() for message in messages]
    return {name: rows for name, (rows, _) in read_splits.items()}, skipped


def build_tokenizer(model_args, train_set, checkpoint: Path | None = None):
    """Return the recipe's tokenizer; a new one is trained once, and afterwards taken from the checkpoint."""
    if model_args.tokenizer != "train":
        if model_args.tokenizer is not None:
            return AutoTokenizer.from_pretrained(model_args.tokenizer)
        return load_tokenizer(model_args.text_model, model_args.gguf_file)
    if checkpoint is not None:
        return load_processor(str(checkpoint)).tokenizer
    texts = [
        "".join(f"{question}\n### {answer}\n" for question, answer in history_of(row))
        + f"{question_text(row)}\n"
        + "".join(f"{step}\n" for step in row["steps"])
        + f"### {row['answers'][0]}"
        for row in train_set.select_columns(["question", "choices", "steps", "answers", "history"])
    ]
    return train_tokenizer(texts, vocab_size=model_args.tokenizer_vocab_size)


def build_image_processor(model_args, vision_config):
    """Return the tower's own processor; a new tower's resizes pictures to its size and scales them to [-1, 1]."""
    if model_args.vision_config is None:
        return None
    side = {"height": vision_config.image_size, "width": vision_config.image_size}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(size=side, do_center_crop=False, image_mean=half, image_std=half)


def config_of(values: dict | None):
    return None if values is None else AutoConfig.for_model(**values)


def build_from_backbones(model_args, train_set, checkpoint: Path | None = None):
    tokenizer = build_tokenizer(model_args, train_set, checkpoint)
    if model_args.chat_template == "plain":
        tokenizer.chat_template = None
    model = from_backbones(
        model_args.vision_model,
        model_args.text_model,
        gguf_file=model_args.gguf_file,
        tokenizer=tokenizer,
        vision_config=config_of(model_args.vision_config),
        text_config=config_of(model_args.text_config),
        new_token_init=model_args.new_token_init,
        **{field: getattr(model_args, field) for field in CONFIG_FIELDS},
    )
    processor = processor_from_backbones(
        model_args.vision_model,
        config=model.config,
        tokenizer=tokenizer,
        image_processor=build_image_processor(model_args, model.config.vision_config),
        chat_template=model_args.chat_template,
        markers=model_args.markers,
    )
    return model, processor


def build_from_vlm(model_args):
    """Build model and processor of a pretrained vision-language model, with its own tokenizer and image processor."""
    fields = {field: getattr(model_args, field) for field in HOW_THOUGHTS_ARE_FED_BACK}
    fields["new_token_init"] = model_args.new_token_init
    options = {"min_tiles": model_args.min_tiles, "max_tiles": model_args.max_tiles, "markers": model_args.markers}
    if not model_args.composed:
        check_image_options(model_args.vlm, model_args.image_options)  # before large weights are loaded
        model = from_vlm(model_args.vlm, check=model_args.check_vlm, **fields)
        options["image_options"] = model_args.image_options
        return model, processor_from_vlm(model_args.vlm, config=model.config, **options)
    model = composed_from_vlm(model_args.vlm, image_size=model_args.image_size, **fields)
    options["use_thumbnail"] = model_args.use_thumbnail
    processor = composed_processor_from_vlm(model_args.vlm, config=model.config, **options)
    if not model_args.use_thumbnail and not makes_tiles(processor.image_processor):
        raise ValueError(
            f"use_thumbnail: false has no effect, because {type(processor.image_processor).__name__} of "
            f"{model_args.vlm} cuts no tiles: remove this key."
        )
    return model, processor


def build_from_checkpoint(model_args):
    """Load model and processor of an earlier run, with the layout that `settle` completed."""
    name = model_args.model
    fed_back = {key: getattr(model_args, key) for key in HOW_THOUGHTS_ARE_FED_BACK}
    model = load_model(name, new_parts=("stop_head",) if model_args.stop_head else (), **fed_back)
    processor = load_processor(name)
    tiles = {"min_tiles": model_args.min_tiles, "max_tiles": model_args.max_tiles}
    if tiles != dict.fromkeys(tiles) or (
        model_args.use_thumbnail is not None and makes_tiles(processor.image_processor)
    ):
        set_tiles(processor.image_processor, image_size=None, **tiles)
    if model_args.use_thumbnail is not None:
        processor.use_thumbnail = model_args.use_thumbnail
    if model_args.image_options is not None:
        if not hasattr(processor, "image_options"):
            raise ValueError(f"image_options need a vlm's own processor, and {name} has another. Remove this key.")
        set_image_options(processor, model_args.image_options)
    return model, processor


def freeze(model, names: list[str]) -> None:
    """Freeze parts named by the end of their path or by their role, such as vision_tower."""
    for name in names:
        if not paths_named(model, name):
            raise UsageError(f"freeze: the model has no sub-module {name!r}: {nearest_part(model, name)}")
        for parameter in parameters_named(model, name).values():
            parameter.requires_grad_(False)


def build(model_args, curriculum_args, train_set, checkpoint: Path | None = None):
    """Build model and processor from a checkpoint, a vision-language model or backbones, and set this run's mode.

    checkpoint: the checkpoint to resume from; its weights are loaded when training begins.
    """
    if model_args.model is not None:
        model, processor = build_from_checkpoint(model_args)
    elif model_args.vlm is not None:
        model, processor = build_from_vlm(model_args)
    else:
        model, processor = build_from_backbones(model_args, train_set, checkpoint)
    if model.config.stop_head and isinstance(model, ThinkingVLM):
        check_can_stop(model, processor)
    model.config.thought_mode = "pause" if curriculum_args.mode == "pause" else "feedback"
    model.bptt_thoughts = model_args.bptt_thoughts
    processor.markers = model_args.markers if curriculum_args.mode in MARKED_MODES else "none"
    if model_args.attn_implementation is None:
        choose_attention(model)
    else:
        model.set_attn_implementation(model_args.attn_implementation)
    model.checkpointed_passes = model_args.checkpointed_passes
    defer_weight_gradients(model, model_args.defer_weight_gradients)
    freeze(model, model_args.freeze)
    if curriculum_args.align_weight and any(weight.requires_grad for weight in model.get_encoder().parameters()):
        logger.warning("images are aligned with a text encoder that is trained too: freeze language_model.encoder")
    if model_args.lora is not None:
        add_lora(model, model_args.lora)
        if PartialState().is_main_process:
            logger.info(describe_adapters(model))
    if checkpoint is not None:
        check_tokenizer(checkpoint, processor.tokenizer)
    return model, processor


def objectives_of(curriculum_args) -> list:
    """Return the objectives of a run; none for a mode without latents, because matched controls share a recipe."""
    return make_objectives(curriculum_args.objectives) if curriculum_args.mode in THINKING_MODES else []


def check_best_metric(run_args, metric: str, rows, collator: CurriculumCollator) -> None:
    """Check that evaluation computes `metric_for_best_model` at every stage; or the run fails at a stage's end."""
    wanted = (run_args.metric_for_best_model or "accuracy").removeprefix("eval_")
    terms = ["ce_loss"] * bool(collator.alignment or collator.objectives) + ["align_loss"] * bool(collator.alignment)
    terms += [
        name_of_term(objective.name)
        for objective in collator.objectives
        if all(objective.name in collator.weights(stage) for stage in collator.stages)
    ]
    known = {"accuracy", "loss", "generated_tokens", *terms}
    if wanted not in known:
        row = without_pictures(rows)[0]
        known |= figures_of(score(metric, [row["answers"][0]], [row["answers"][0]], rows=[row])).keys()
    if wanted not in known:
        raise ValueError(f"metric_for_best_model is {wanted!r}. Choose one of {', '.join(sorted(known))}.")


def max_length_of(model, max_length: int | None) -> int | None:
    """Return the maximum tokens per row: `max_length`, or fewer if the language model has fewer positions."""
    positions = position_limit(model.get_decoder())
    if None not in (positions, max_length) and max_length > positions:
        logger.warning(
            "max_length is %d, and the language model has %d positions: the lower one counts", max_length, positions
        )
    return min((limit for limit in (max_length, positions) if limit is not None), default=None)


def build_collator(model, processor, *, data_args, curriculum_args, run_args) -> CurriculumCollator:
    fields = asdict(curriculum_args)
    lengths = fields.pop("epochs_per_stage")
    for field in (
        "objective",
        "objectives",
        "log_gradient_cosine",
        "rewards",
        "rl",
        "thought_noise",
        "reset_optimizer",
    ):
        del fields[field]
    alignment = Alignment(
        align_weight=fields.pop("align_weight"),
        ce_weight=fields.pop("ce_weight"),
        warmup_epochs=max(0, fields.pop("align_warmup_epochs") - curriculum_args.start_epoch),
        targets=tuple(fields.pop("alignment_target")),
    )
    curriculum = Curriculum(
        **fields,
        epochs_per_stage=tuple(lengths) if isinstance(lengths, list) else lengths,
        seed=run_args.seed,
    )
    if curriculum_args.objective != "supervised":  # the curriculum is over
        curriculum = replace(curriculum, start_epoch=curriculum.epochs_before_last_stage)
    return CurriculumCollator(
        curriculum,
        processor,
        max_length=max_length_of(model, data_args.max_length),
        max_new_tokens=data_args.max_new_tokens,
        alignment=alignment if alignment.align_weight else None,
        num_epochs=math.ceil(run_args.num_train_epochs) if run_args.do_train and run_args.max_steps <= 0 else None,
        objectives=[*(attached_to(model) or {}).values()],
    )


def fit(splits: dict, collator: CurriculumCollator, *, data_args, curriculum_args, run_args) -> tuple[dict, dict]:
    """Return the splits after `long_rows: cut`, and how much was cut; check that every row can be laid out.

    Raises:
        ValueError: a row that is too long at a stage; `long_rows: cut` without a maximum length.
    """
    only_learnt = ("train",) if curriculum_args.objective == "supervised" else ()  # others generate from it, too
    rooms = {name: 0 if name in only_learnt else collator.max_new_tokens for name in splits}
    for name, rows in splits.items():
        check_alignment_texts(rows, collator)
        if data_args.long_rows == "error":
            check_lengths(rows, collator, room=rooms[name])
    if data_args.long_rows == "error":
        return splits, {}
    if collator.max_length is None:
        raise ValueError(
            "long_rows: cut has no effect, because the language model has no maximum length. Set max_length."
        )
    fitted = {
        name: fit_rows(rows, partial(collator.longest, room=rooms[name]), collator.max_length)
        for name, rows in splits.items()
    }
    for name, (_, cut) in fitted.items() if run_args.process_index == 0 else ():
        logger.info("%s: %s", name, cut)
    return {name: rows for name, (rows, _) in fitted.items()}, {
        name: cut.asdict() for name, (_, cut) in fitted.items()
    }


def rewarded_trainer(curriculum_args, metric: str, train_set) -> tuple:
    """Return the trainer of an objective with rewards, and its additional arguments."""
    from mmcoconut.objectives.rewards import reward_functions
    from mmcoconut.rl.policy_trainer import POLICY_TRAINERS  # here, because it imports trl

    rewards = curriculum_args.rewards or {metric: 1.0}
    for name in rewards.keys() & {*REFERENCES, "multiple_choice"}:  # fails now, not in an update
        references_of("aokvqa_mc" if name == "multiple_choice" else name, without_pictures(train_set))
    functions, _ = reward_functions(rewards)
    options = {"reward_funcs": functions, "thought_noise": curriculum_args.thought_noise}
    return POLICY_TRAINERS[curriculum_args.objective], options


def build_trainer(model, collator, *, splits, data_args, curriculum_args, run_args):
    metric = data_args.metric or default_metric(data_args.dataset, splits["eval"][0])
    with timed("Scoring every row's own answer"):
        for rows in splits.values():
            check_answers(rows, metric)
    with timed("Checking what objectives need of each row"):
        for rows in splits.values():
            check_objectives(rows, collator.objectives, collator.processor)
    check_best_metric(run_args, metric, splits["eval"], collator)
    trainer_class, options = CurriculumTrainer, {}
    if curriculum_args.objective in REWARDED and run_args.do_train:
        trainer_class, options = rewarded_trainer(curriculum_args, metric, splits["train"])
    elif curriculum_args.objective == "distill_stops":
        trainer_class = StopDistiller
    elif collator.objectives:
        options = {"log_gradient_cosine": curriculum_args.log_gradient_cosine}
    return trainer_class(
        **options,
        model=model,
        args=run_args,
        data_collator=collator,
        train_dataset=splits.get("train"),
        eval_dataset=splits["eval"],
        metric=metric,
        num_beams=data_args.num_beams,
        reset_optimizer=curriculum_args.reset_optimizer or collator.curriculum.resets_optimizer,
    )


def train(trainer, checkpoint: Path | None) -> float:
    """Train, or resume from a checkpoint; return the seconds it took."""
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return time.perf_counter() - began


def tested(trainer, rows) -> dict:
    """Return the figures of the test split, or none without one.

    Raises:
        UsageError: a row that cannot be read; says that the model is saved.
    """
    try:
        return {} if rows is None else trainer.evaluate(rows, metric_key_prefix="test")
    except (UsageError, UnreadableImageError) as error:
        folder, said = trainer.args.output_dir, message_of_worker(error) or error
        raise UsageError(
            f"{said}\nThis is a row of the test split. The model is trained and saved in {folder}; only its results "
            f"are missing. Correct the row, then run: mmcoconut eval {folder} --split test"
        ) from error


def fix_stage(collator: CurriculumCollator) -> None:
    """Set the collator to the stage of the checkpoint.

    Raises:
        ValueError: no stage of the recipe has the checkpoint's number of latents.
    """
    stages = stages_with(collator.curriculum, collator.processor.num_latents)
    if not stages:
        raise ValueError(
            f"The model has {collator.processor.num_latents} latents, and no stage of this recipe has as many. "
            "Name a checkpoint, `model`, or remove `thoughts_per_turn`."
        )
    collator.fixed_stage = stages[0]


def evaluate(trainer, data_args) -> dict:
    """Evaluate a checkpoint without training, at the fixed stage, and write the metrics."""
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"eval_{data_args.eval_split}.json", metrics)
        print(stage_table(stage_rows(trainer.state.log_history)))
    return metrics


def check_reload(folder: str, rows) -> None:
    """End a smoke test: check that the saved model loads completely and answers a question."""
    model = load_model(folder)
    processor = load_processor(folder)
    images = open_images(rows[0])
    inputs = processor(
        images=[images] if images else None, text=[question_text(rows[0])], rendered=False, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=2)
    prompt_length = inputs[processor.prompt_names[0]].shape[1]
    logger.info("reloaded, and it answers: %r", processor.tokenizer.decode(tokens[0, prompt_length:]))


def main(argv: list[str] | None = None) -> dict:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    quiet_requests()
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator is found")
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_recipe(argv)
    if arguments[-1].smoke_test:
        arguments = smoke_arguments(*arguments)
        logger.info("smoke test: a tiny model and made-up rows; files of the recipe's data are not read")
    arguments = settle(arguments, recipe=argv[0])
    if arguments[-1].compare is not None:
        return compare(*arguments, script=__file__, argv=argv)
    model_args, data_args, curriculum_args, run_args = arguments
    checkpoint = check_output(arguments) if run_args.do_train and not run_args.smoke_test else None
    set_seed(run_args.seed)

    splits, skipped = read(data_args, run_args)
    course = course_of(arguments, splits) if run_args.do_train else {}
    if checkpoint is not None:
        check_course(checkpoint, course)
    model, processor = build(model_args, curriculum_args, splits.get("train"), checkpoint)
    objectives = objectives_of(curriculum_args) if run_args.do_train else []
    if objectives:
        attach(model, objectives, processor)
    run = {"data_args": data_args, "curriculum_args": curriculum_args, "run_args": run_args}
    collator = build_collator(model, processor, **run)
    if not run_args.do_train:
        fix_stage(collator)
    with timed("Measuring the rows of all splits"):
        splits, cut = fit(splits, collator, **run)
    trainer = build_trainer(model, collator, splits=splits, **run)
    trainer.course = course
    if data_args.precompute_image_features:
        cache = data_args.image_features_cache or DEFAULT_CACHE
        trainer.curriculum_collator.image_features = precompute_image_features(trainer, [*splits.values()], cache)
    if not run_args.do_train:
        return evaluate(trainer, data_args)
    trainer.add_callback(PlanCallback(trainer, splits))
    prepare_output(arguments)
    train_seconds = train(trainer, checkpoint)
    trainer.save_model()
    test = tested(trainer, splits.get("test"))
    left_out = {"skipped": skipped, "cut": cut}
    results = save_results(trainer, arguments=arguments, test=test, train_seconds=train_seconds, **left_out)
    if trainer.is_world_process_zero():
        trainer.create_model_card(results=results)
        if run_args.smoke_test:
            check_reload(run_args.output_dir, splits["eval"])
        report(results)
    if run_args.push_to_hub:
        trainer.push_to_hub(results=results)
    # Without this, processes that exit at different moments abort each other.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return results


if __name__ == "__main__":
    run_command(main, name="train")
