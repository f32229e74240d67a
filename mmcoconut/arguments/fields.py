"""The four dataclasses of a recipe, with the default and help of every key."""

import dataclasses
from typing import get_type_hints

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from mmcoconut.arguments.choices import JOINED_IN_A_VLM, NEW_MODEL


@dataclasses.dataclass
class ModelArguments:
    """The model to start from and its architecture.

    For the fields in NEW_MODEL, here and in CurriculumArguments, None means the value of the checkpoint `model`.
    """

    model: str | None = HfArg(default=None, help="Folder or Hub id of an mmcoconut checkpoint to start from.")
    vlm: str | None = HfArg(default=None, help="Folder or Hub id of a pretrained vision-language model to start from.")
    composed: bool = HfArg(
        default=False, help="Load an InternVL or LLaVA vlm as separate parts: image features can be cached."
    )
    check_vlm: bool = HfArg(default=True, help="Check before training that the vlm computes thoughts exactly.")
    image_options: dict | None = HfArg(
        default=None, help="Options of the vlm's image processor: {max_pixels: 501760}."
    )
    vision_model: str | None = HfArg(default=None, help="Folder or Hub id of the pretrained vision tower.")
    text_model: str | None = HfArg(default=None, help="Folder or Hub id of the pretrained language model.")
    gguf_file: str | None = HfArg(default=None, help="GGUF file in text_model with weights and tokenizer.")
    vision_config: dict | None = HfArg(default=None, help="Vision tower from scratch: {model_type: ..., ...}.")
    text_config: dict | None = HfArg(default=None, help="Language model from scratch: {model_type: gpt2, ...}.")
    vlm_model_type: str | None = HfArg(default=None, help="Architecture of vlm, for a smoke test.")
    vision_model_type: str | None = HfArg(default=None, help="Architecture of vision_model, for a smoke test.")
    text_model_type: str | None = HfArg(default=None, help="Architecture of text_model, for a smoke test.")
    tokenizer: str | None = HfArg(default=None, help="Folder, Hub id, or `train` to train one; default: text_model's.")
    chat_template: str | None = HfArg(
        default=None, help="`own`: the tokenizer's; `plain`: ours; default: the tokenizer's if it has one."
    )
    tokenizer_vocab_size: int = HfArg(
        default=1000, help="Vocabulary size of a tokenizer trained on the training texts."
    )
    image_fusion: str | None = HfArg(default=None, help="How image features enter the decoder.")
    projector_type: str | None = HfArg(default=None, help="Projector from image features to the decoder's width.")
    projector_num_heads: int | None = HfArg(
        default=None, help="Attention heads of a `transformer` or `attention_prefix` projector."
    )
    num_visual_tokens: int | None = HfArg(default=None, help="Visual tokens per image of a `_prefix` projector.")
    image_pooling: str | None = HfArg(default=None, help="How a `_prefix` projector pools an image to one vector.")
    alignment_adapter: bool | None = HfArg(
        default=None, help="Pass the pooled vector through a linear layer before alignment."
    )
    vision_feature_layer: int | list[int] | None = HfArg(
        default=None, help="Hidden layer, or layers, of the vision tower to read."
    )
    vision_last_norm: bool | None = HfArg(default=None, help="Read layer -1 after the tower's last norm.")
    vision_feature_select_strategy: str | None = HfArg(
        default=None, help="`default` drops the class token; `full` keeps it."
    )
    image_size: int | None = HfArg(default=None, help="Side of a composed vlm's tiles, in pixels; default: the vlm's.")
    min_tiles: int | None = HfArg(default=None, help="Minimum tiles per image of the vlm; default: the vlm's.")
    max_tiles: int | None = HfArg(default=None, help="Maximum tiles per image of the vlm; default: the vlm's.")
    use_thumbnail: bool | None = HfArg(default=None, help="Add the whole image after its tiles, if there are several.")
    thought_norm: str | None = HfArg(default=None, help="Normalization of a thought before it is fed back.")
    thought_schedule: str | None = HfArg(
        default=None, help="`sequential`, or `jacobi`: update all thoughts in parallel."
    )
    jacobi_iterations: int | None = HfArg(
        default=None, help="Number of parallel updates with `thought_schedule: jacobi`."
    )
    answer_sees: str | None = HfArg(
        default=None, help="What the answer attends to: `all`, `no_image` or only the `thoughts`."
    )
    stop_head: bool | None = HfArg(
        default=None, help="Add a head that ends thinking early, row by row; see objective."
    )
    bptt_thoughts: int | None = HfArg(
        default=None, help="Back-propagate through this many last thoughts; default: all."
    )
    markers: str | None = HfArg(
        default=None, help="Which of <|start-latent|> and <|end-latent|> surround the thoughts."
    )
    freeze: list[str] = HfArg(default_factory=list, help="Sub-modules to freeze, such as vision_tower.")
    lora: dict | None = HfArg(default=None, help="Train adapters: fields of peft.LoraConfig; {} for the defaults.")
    new_token_init: str | None = HfArg(
        default=None, help="Token whose embedding new tokens copy; default: the mean embedding."
    )
    attn_implementation: str | None = HfArg(default=None, help="Attention implementation; default: sdpa or latent.")
    checkpointed_passes: str = HfArg(default="all", help="What gradient_checkpointing recomputes: `all` or `first`.")
    defer_weight_gradients: bool | None = HfArg(
        default=None, help="Compute weight gradients once for all passes; default: in wide decoders on a CPU."
    )


@dataclasses.dataclass
class DataArguments:
    """The data to train on and to evaluate."""

    dataset: str = HfArg(default="arrow_mazes", help="Name of the data set, from mmcoconut.data.DATASETS.")
    dataset_options: dict = HfArg(default_factory=dict, help="Options of the data set, such as {file: ...}.")
    max_train_samples: int | None = HfArg(default=None, help="Maximum number of training examples.")
    max_eval_samples: int | None = HfArg(default=None, help="Maximum number of evaluation examples.")
    unreadable_images: str = HfArg(default="error", help="`error`, or `skip` to drop examples with unreadable images.")
    metric: str | None = HfArg(default=None, help="Name of the metric, a folder in metrics/; default: the data set's.")
    precompute_image_features: bool = HfArg(
        default=False, help="Run the frozen vision tower once per image and cache its features on disk."
    )
    image_features_cache: str | None = HfArg(
        default=None, help="Folder of that cache; default: in the cache of datasets."
    )
    max_length: int | None = HfArg(default=None, help="Maximum tokens of a row, images and thoughts included.")
    long_rows: str = HfArg(
        default="error", help="`error`, or `cut` to drop the last turns of conversations above max_length."
    )
    max_new_tokens: int = HfArg(default=64, help="Maximum tokens generated per answer in evaluation.")
    num_beams: int = HfArg(default=1, help="Number of beams in evaluation; 1 is greedy.")
    eval_split: str = HfArg(default="validation", help="Split to evaluate at the end of every stage.")
    test_split: str | None = HfArg(default=None, help="Split to evaluate once, after training.")


@dataclasses.dataclass
class CurriculumArguments:
    """The curriculum of Coconut, its controls, and the objective."""

    objective: str = HfArg(
        default="supervised", help="`supervised`; `grpo` or `rloo`: rewards; `distill_stops`: train the stop head."
    )
    rewards: dict | None = HfArg(
        default=None, help="Rewards of answers, {name: weight}; default: the metric with weight 1."
    )
    objectives: dict | None = HfArg(
        default=None, help="Losses on thoughts: {name: weight, weights by stage or {weight: ..., ...}}."
    )
    log_gradient_cosine: bool = HfArg(
        default=False, help="Log the cosine between gradients of objectives and answer loss."
    )
    rl: dict = HfArg(default_factory=dict, help="Fields of trl's GRPOConfig or RLOOConfig, {num_generations: 16}.")
    thought_noise: float = HfArg(default=0.0, help="Noise on sampled thoughts, relative to their root mean square.")
    mode: str | None = HfArg(default=None, help="`coconut`, or one of its controls.")
    c_thought: int | None = HfArg(default=None, help="Latent tokens per replaced step.")
    max_latent_stage: int | None = HfArg(default=None, help="Last stage that replaces a step by latents.")
    epochs_per_stage: int | list[int] = HfArg(default=1, help="Epochs per stage; the last entry of a list repeats.")
    uniform_prob: float = HfArg(default=0.0, help="Probability that an example trains at a random stage.")
    pad_latent_to_max: bool = HfArg(default=True, help="Give rows with fewer steps than the stage all its latents.")
    thoughts_per_turn: int | None = HfArg(
        default=None, help="Latent tokens before each answer of a conversation; disables stages."
    )
    reset_optimizer: bool = HfArg(default=False, help="Reset the optimizer's state at each new stage.")
    start_epoch: int = HfArg(default=0, help="Number of the first epoch, if earlier epochs were trained elsewhere.")
    align_weight: float = HfArg(default=0.0, help="Weight of the image–text alignment loss; 0 disables it.")
    ce_weight: float = HfArg(default=1.0, help="Weight of the answer's cross-entropy next to an alignment loss.")
    align_warmup_epochs: int = HfArg(default=0, help="Number of first epochs with the alignment loss alone.")
    alignment_target: list[str] = HfArg(
        default_factory=lambda: ["question", "answer"], help="Texts to align images with, in order of priority."
    )


@dataclasses.dataclass(repr=False)  # the inherited __repr__ hides tokens
class RunArguments(TrainingArguments):
    """transformers.TrainingArguments with our defaults."""

    smoke_test: bool = HfArg(default=False, help="Test that the recipe runs, with a tiny model and made-up data.")
    ddp_find_unused_parameters: bool | None = HfArg(
        default=True, help="Keep true: a vision tower's last norm gets no gradient."
    )
    learning_rates: dict[str, float] | None = HfArg(
        default=None, help="Learning rates of parts: {vision_tower: 3.0e-4}; the rest uses learning_rate."
    )
    overwrite: bool = HfArg(default=False, help="Delete the run in output_dir when the new run starts to train.")
    do_train: bool = HfArg(default=True, help="Train; false only evaluates a checkpoint.")
    license: str | None = HfArg(default=None, help="License of the weights in the model card, such as mit.")
    remove_unused_columns: bool = HfArg(default=False, help="Always false: the collator needs the images.")
    resume_from_checkpoint: bool | str | None = HfArg(
        default=None, help="Checkpoint folder, or true for the newest complete one."
    )
    compare: str | list[str] | None = HfArg(
        default=None, help="Variants to train and compare, mode[+objective]: cot,coconut,coconut+step_tokens."
    )
    seeds: int = HfArg(default=1, help="Seeds per compared variant: seed, seed + 1, ...")
    jobs: int = HfArg(default=1, help="Runs of a comparison in parallel; they share the CPU cores.")


CLASSES = (ModelArguments, DataArguments, CurriculumArguments, RunArguments)
NAMES = [[field.name for field in dataclasses.fields(cls) if field.init] for cls in CLASSES]
TYPES = {name: get_type_hints(cls)[name] for cls, names in zip(CLASSES, NAMES, strict=True) for name in names}


def default_of(key: str):
    """Return the default of a key; also for keys that a recipe saved by an earlier version lacks."""
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
