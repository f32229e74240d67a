"""The four dataclasses that a recipe becomes, with the defaults and help of every key."""

import dataclasses
from typing import get_type_hints

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from mmcoconut.arguments.choices import JOINED_IN_A_VLM, NEW_MODEL


@dataclasses.dataclass
class ModelArguments:
    """What the model starts from and how its parts are joined.

    Of the fields in NEW_MODEL, here and in CurriculumArguments, None is what the checkpoint `model` has.
    """

    model: str | None = HfArg(default=None, help="Folder or Hub id of an mmcoconut checkpoint to start from.")
    vlm: str | None = HfArg(default=None, help="Folder or Hub id of a pretrained vision-language model to start from.")
    composed: bool = HfArg(default=False, help="Take the vlm, InternVL or LLaVA, apart: image features can be cached.")
    check_vlm: bool = HfArg(default=True, help="Compare thoughts of the vlm with their definition before training.")
    image_options: dict | None = HfArg(default=None, help="Of the vlm's own image processor: {max_pixels: 501760}.")
    vision_model: str | None = HfArg(default=None, help="Folder or Hub id of the pretrained vision tower.")
    text_model: str | None = HfArg(default=None, help="Folder or Hub id of the pretrained language model.")
    gguf_file: str | None = HfArg(default=None, help="The file of text_model with weights and tokenizer as GGUF.")
    vision_config: dict | None = HfArg(default=None, help="Vision tower from scratch: {model_type: ..., ...}.")
    text_config: dict | None = HfArg(default=None, help="Language model from scratch: {model_type: gpt2, ...}.")
    vlm_model_type: str | None = HfArg(default=None, help="Architecture of vlm, for a smoke test.")
    vision_model_type: str | None = HfArg(default=None, help="Architecture of vision_model, for a smoke test.")
    text_model_type: str | None = HfArg(default=None, help="Architecture of text_model, for a smoke test.")
    tokenizer: str | None = HfArg(default=None, help="Folder, Hub id or `train`; default: text_model's.")
    chat_template: str | None = HfArg(
        default=None, help="`plain`: ours; `own`: the tokenizer's; default: its own, where it has one."
    )
    tokenizer_vocab_size: int = HfArg(default=1000, help="Entries of a tokenizer trained on the training texts.")
    image_fusion: str | None = HfArg(default=None, help="How image features reach the decoder.")
    projector_type: str | None = HfArg(default=None, help="What maps image features to the decoder's width.")
    projector_num_heads: int | None = HfArg(
        default=None, help="Heads of the `transformer` and `attention_prefix` projectors."
    )
    num_visual_tokens: int | None = HfArg(default=None, help="Visual tokens an image of a `_prefix` projector.")
    image_pooling: str | None = HfArg(default=None, help="How a `_prefix` projector makes one vector of an image.")
    alignment_adapter: bool | None = HfArg(default=None, help="That vector goes through a linear layer.")
    vision_feature_layer: int | list[int] | None = HfArg(
        default=None, help="Hidden layer, or layers, of the vision tower."
    )
    vision_last_norm: bool | None = HfArg(default=None, help="Layer -1 is read behind the tower's last norm.")
    vision_feature_select_strategy: str | None = HfArg(default=None, help="`default` leaves out the class token.")
    image_size: int | None = HfArg(default=None, help="Side of a composed vlm's tiles; default: its own.")
    min_tiles: int | None = HfArg(default=None, help="Least tiles of an image for the vlm; default: its own.")
    max_tiles: int | None = HfArg(default=None, help="Most tiles of an image for the vlm; default: its own.")
    use_thumbnail: bool | None = HfArg(
        default=None, help="Several tiles of an image are followed by the whole picture."
    )
    thought_norm: str | None = HfArg(default=None, help="What is done to a thought before it is fed back.")
    thought_schedule: str | None = HfArg(default=None, help="`jacobi` updates all thoughts together.")
    jacobi_iterations: int | None = HfArg(default=None, help="How often `jacobi` updates them.")
    answer_sees: str | None = HfArg(
        default=None, help="What stands behind the last thought sees: `no_image`, or only `thoughts` of the prompt."
    )
    stop_head: bool | None = HfArg(default=None, help="A head that ends thinking early, row by row; see objective.")
    bptt_thoughts: int | None = HfArg(default=None, help="Thoughts, from the last, that gradients link; default: all.")
    markers: str | None = HfArg(default=None, help="Which of <|start-latent|> and <|end-latent|> frame the thoughts.")
    freeze: list[str] = HfArg(default_factory=list, help="Sub-modules that are not trained, such as vision_tower.")
    lora: dict | None = HfArg(default=None, help="Train adapters: fields of peft.LoraConfig; {} for the defaults.")
    new_token_init: str | None = HfArg(default=None, help="Token that new embeddings copy; default: their mean.")
    attn_implementation: str | None = HfArg(default=None, help="Attention function; default: sdpa or latent.")
    checkpointed_passes: str = HfArg(default="all", help="What gradient_checkpointing recomputes: `all` or `first`.")
    defer_weight_gradients: bool | None = HfArg(
        default=None, help="Form them once for all passes; default: if wide, on a CPU."
    )


@dataclasses.dataclass
class DataArguments:
    """What is learnt from and what is evaluated."""

    dataset: str = HfArg(default="arrow_mazes", help="A name in mmcoconut.data.DATASETS.")
    dataset_options: dict = HfArg(default_factory=dict, help="Passed to the data set, such as {file: ...}.")
    max_train_samples: int | None = HfArg(default=None, help="Use only so many training examples.")
    max_eval_samples: int | None = HfArg(default=None, help="Use only so many evaluation examples.")
    unreadable_images: str = HfArg(default="error", help="`skip` leaves out examples whose image cannot be read.")
    metric: str | None = HfArg(default=None, help="A folder of metrics/; default: the data set's.")
    precompute_image_features: bool = HfArg(default=False, help="Run the frozen vision tower once a picture, on disk.")
    image_features_cache: str | None = HfArg(default=None, help="Folder for that; default: beside datasets' cache.")
    max_length: int | None = HfArg(default=None, help="Most tokens of a row, images and thoughts included.")
    long_rows: str = HfArg(default="error", help="`cut` leaves out the last turns of longer conversations.")
    max_new_tokens: int = HfArg(default=64, help="Longest text generated in evaluation, in tokens.")
    num_beams: int = HfArg(default=1, help="Beams of the search that evaluation generates by; 1 is greedy.")
    eval_split: str = HfArg(default="validation", help="Split that is evaluated at the end of every stage.")
    test_split: str | None = HfArg(default=None, help="Split that is evaluated once, after training.")


@dataclasses.dataclass
class CurriculumArguments:
    """The stages of Coconut, its controls, and what is minimised."""

    objective: str = HfArg(default="supervised", help="`grpo`, `rloo`: rewards; `distill_stops`: when to stop.")
    rewards: dict | None = HfArg(default=None, help="What answers are worth, {name: weight}; default: the metric.")
    rl: dict = HfArg(default_factory=dict, help="Fields of trl's GRPOConfig or RLOOConfig, {num_generations: 16}.")
    thought_noise: float = HfArg(default=0.0, help="Noise on sampled thoughts, in units of their root mean square.")
    mode: str | None = HfArg(default=None, help="Latent reasoning, or one of its controls.")
    c_thought: int | None = HfArg(default=None, help="Latent tokens for each replaced step.")
    max_latent_stage: int | None = HfArg(default=None, help="Last stage that replaces one more step.")
    epochs_per_stage: int | list[int] = HfArg(default=1, help="A stage's epochs; of a list the last entry repeats.")
    uniform_prob: float = HfArg(default=0.0, help="Probability that an example takes a stage at random.")
    pad_latent_to_max: bool = HfArg(default=True, help="As many latents for rows with fewer steps than the stage.")
    thoughts_per_turn: int | None = HfArg(
        default=None, help="Latent tokens before each answer of a conversation; no stages."
    )
    reset_optimizer: bool = HfArg(default=False, help="Forget the optimizer's state at each stage.")
    start_epoch: int = HfArg(default=0, help="Epochs trained elsewhere: the first epoch here counts as this one.")
    align_weight: float = HfArg(default=0.0, help="Of the alignment of images with texts in the loss; 0: none.")
    ce_weight: float = HfArg(default=1.0, help="Of the answer's cross-entropy, where there is an alignment.")
    align_warmup_epochs: int = HfArg(default=0, help="First epochs, of alignment alone.")
    alignment_target: list[str] = HfArg(
        default_factory=lambda: ["question", "answer"], help="What images are aligned with, by priority."
    )


@dataclasses.dataclass(repr=False)  # the inherited __repr__ hides tokens
class RunArguments(TrainingArguments):
    """transformers.TrainingArguments with the defaults that this project needs."""

    smoke_test: bool = HfArg(default=False, help="Tiny model and made-up data: does the recipe run at all?")
    ddp_find_unused_parameters: bool | None = HfArg(
        default=True, help="Leave true: a vision tower's last norm gets no gradient."
    )
    learning_rates: dict[str, float] | None = HfArg(
        default=None, help="Of parts of the model: {vision_tower: 3.0e-4}; the others have learning_rate."
    )
    overwrite: bool = HfArg(default=False, help="Delete the run in output_dir when the new one begins to train.")
    do_train: bool = HfArg(default=True, help="Train; false only evaluates.")
    license: str | None = HfArg(default=None, help="Of the weights, in the model card: an id such as mit.")
    remove_unused_columns: bool = HfArg(default=False, help="Always false: the collator needs the images.")
    resume_from_checkpoint: bool | str | None = HfArg(default=None, help="Folder, or true: the newest whole one.")
    compare: str | list[str] | None = HfArg(default=None, help="Modes to train and compare: cot,no_cot,coconut ...")
    seeds: int = HfArg(default=1, help="Runs of each compared mode, with the seeds seed, seed + 1, ...")


CLASSES = (ModelArguments, DataArguments, CurriculumArguments, RunArguments)
NAMES = [[field.name for field in dataclasses.fields(cls) if field.init] for cls in CLASSES]
TYPES = {name: get_type_hints(cls)[name] for cls, names in zip(CLASSES, NAMES, strict=True) for name in names}


def default_of(key: str):
    """Return what a recipe without this key stands for; also for keys that are younger than a saved recipe."""
    fields = {field.name: field for cls in CLASSES for field in dataclasses.fields(cls)}
    if key in NEW_MODEL:
        return NEW_MODEL[key]
    if key not in fields:
        return None
    factory = fields[key].default_factory
    return fields[key].default if factory is dataclasses.MISSING else factory()


DEFAULTS = {name: default_of(name) for names in NAMES for name in names}


def completed_for_a_new_model(values: dict) -> dict:
    """Return the values with NEW_MODEL's where they say nothing; those that a checkpoint or a `vlm` decides stay open.

    A smoke test makes a new model in any case.
    """
    starts = values.get("model") is not None
    if starts and not values.get("smoke_test"):
        return values
    of_a_vlm = values.get("vlm") is not None or (starts and values.get("vlm_model_type") is not None)
    left_open = JOINED_IN_A_VLM if of_a_vlm else ()
    if not (of_a_vlm and values.get("composed")):
        left_open += ("use_thumbnail",)
    said = {key: value for key, value in values.items() if value is not None or key not in NEW_MODEL}
    return {key: value for key, value in NEW_MODEL.items() if key not in left_open} | said


def compared_modes(compare: str | list[str] | None) -> list[str]:
    """The modes that `compare` names, each once and in order.

    >>> compared_modes("cot, coconut,cot"), compared_modes(["cot", "no_cot"]), compared_modes(None)
    (['cot', 'coconut'], ['cot', 'no_cot'], [])
    """
    names = compare.split(",") if isinstance(compare, str) else compare or []
    return list(dict.fromkeys(name.strip() for name in names))
