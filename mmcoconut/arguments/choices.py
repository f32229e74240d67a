"""Choices of recipe keys, and keys that are refused."""

import math

from mmcoconut.build.processors import CHAT_TEMPLATES
from mmcoconut.chat_template_mmcoconut import MARKERS
from mmcoconut.configuration_mmcoconut import CHOICES as CONFIG_CHOICES
from mmcoconut.data import DATASETS
from mmcoconut.data.conversations import LONG_ROWS
from mmcoconut.data.scoring import REFERENCES
from mmcoconut.thinking_mmcoconut import CHECKPOINTED_PASSES


# Modes without a curriculum stay at stage 0; modes that do not think have no latents, unmarked modes no markers.
STAGED_MODES = ("coconut", "pause", "markers", "no_thoughts", "icot")
THINKING_MODES = ("coconut", "pause")
MARKED_MODES = (*THINKING_MODES, "markers")
MODES = ("coconut", "cot", "no_cot", "no_thoughts", "markers", "pause", "icot")

CHOICES = {key: CONFIG_CHOICES[key] for key in ("image_fusion", "projector_type", "thought_norm", "thought_schedule")}
CHOICES["answer_sees"] = CONFIG_CHOICES["answer_sees"]
CHOICES |= {"vision_feature_select_strategy": CONFIG_CHOICES["vision_feature_select_strategy"], "markers": MARKERS}
CHOICES |= {"dataset": tuple(DATASETS), "unreadable_images": ("error", "skip"), "mode": MODES}
CHOICES |= {"long_rows": LONG_ROWS, "chat_template": CHAT_TEMPLATES}
REWARDED = ("grpo", "rloo")  # objectives of trl's trainers
CHOICES |= {"objective": ("supervised", *REWARDED, "distill_stops")}
# Values that users often look for, and why they are missing.
NOT_THERE = {("objective", "ppo"): "trl 1.16 has no PPO: set grpo or rloo, which need no value model"}
CHOICES |= {"checkpointed_passes": CHECKPOINTED_PASSES}
CHOICES |= {"metric": tuple(REFERENCES), "image_pooling": CONFIG_CHOICES["image_pooling"]}
# Without transformers' `batch_rebalance`, which uses one length per row; and a misspelt value would mean `random`.
CHOICES |= {"train_sampling_strategy": ("random", "sequential", "group_by_length")}
AT_LEAST_0 = ("c_thought", "max_latent_stage", "start_epoch", "num_train_epochs", "dataloader_num_workers")
AT_LEAST_0 += ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "num_latents")
AT_LEAST_0 += ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "eval_delay", "num_shown")
AT_LEAST_0 += ("align_weight", "ce_weight", "align_warmup_epochs", "bptt_thoughts", "shown_row")
AT_LEAST_0 += ("thoughts_per_turn", "thought_noise")
AT_LEAST_1 = ("epochs_per_stage", "max_train_samples", "max_eval_samples", "max_new_tokens", "tokenizer_vocab_size")
AT_LEAST_1 += ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
AT_LEAST_1 += ("max_length",)
AT_LEAST_1 += ("num_visual_tokens", "projector_num_heads", "num_beams", "jacobi_iterations")
AT_LEAST_1 += ("max_samples", "batch_size", "seeds", "jobs", "top_k", "image_size", "min_tiles", "max_tiles")
FRACTIONS = ("uniform_prob", "margin", "stop_threshold", "adam_beta1", "adam_beta2", "label_smoothing_factor")
LIMITS = (
    dict.fromkeys(AT_LEAST_0, (0, math.inf))
    | dict.fromkeys(AT_LEAST_1, (1, math.inf))
    | dict.fromkeys(FRACTIONS, (0, 1))
    | dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1))  # limits of numpy
    | {"max_steps": (-1, math.inf)}
)
REFUSED = {
    "remove_unused_columns": "the Trainer would drop the images before collation: remove this key",
    "load_best_model_at_end": "stages do not compare, and stages/ keeps the best of each: remove this key",
    "fsdp": "it depends on the machine: use accelerate launch --config_file recipes/accelerate/fsdp2_8gpu.yaml",
    "prediction_loss_only": "evaluation always generates answers: remove this key",
    "batch_eval_metrics": "metrics need the whole split: remove this key",
    "do_predict": "`test_split` evaluates a split after training: set that, and remove this key",
    "length_column_name": "lengths change with the stage, so rows have no such column: remove this key",
    "dataloader_persistent_workers": "persistent workers keep stage 0 for the whole run: remove this key",
}
# Keys that a comparison handles itself, or with which its runs would affect each other.
NOT_COMPARED = {
    "resume_from_checkpoint": "a comparison resumes by itself when it is called again: remove this key",
    "push_to_hub": "the runs would overwrite each other on the Hub: remove this key, and push one run afterwards",
}
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
# Keys of rewards, and keys that mean something else or nothing with them.
OF_REWARDS = ("rewards", "rl", "thought_noise")
NOT_REWARDED = {
    "start_epoch": "the stage is the last one in every epoch: remove this key",
    "align_weight": "there is no alignment with rewards: set it to 0",
    "uniform_prob": "the stage is the last one for all rows: remove this key",
    "label_smoothing_factor": "rewards use no labels: remove this key",
    "reset_optimizer": "there is one stage: remove this key",
}
OF_STAGES = ("c_thought", "max_latent_stage", "epochs_per_stage", "uniform_prob", "pad_latent_to_max", "start_epoch")
OF_STAGES += ("reset_optimizer",)
IN_A_VLM = ("vision_model", "vision_config", "text_model", "text_config", "gguf_file", "tokenizer", "chat_template")
IN_A_CHECKPOINT = ("vlm", *IN_A_VLM)
# Keys that a vision-language model's weights define, and keys of its processor only.
JOINED_IN_A_VLM = ("image_fusion", "projector_type", "vision_feature_layer", "vision_last_norm")
JOINED_IN_A_VLM += ("vision_feature_select_strategy", "projector_num_heads", "num_visual_tokens", "image_pooling")
JOINED_IN_A_VLM += ("alignment_adapter",)
OF_A_VLM = ("image_size", "min_tiles", "max_tiles", "use_thumbnail", "image_options")
OF_A_COMPOSED_VLM = ("image_size", "use_thumbnail")
# Keys that default to the checkpoint that a recipe starts from, and their values in a new model.
NEW_MODEL = {
    "image_fusion": "replace",
    "projector_type": "linear",
    "projector_num_heads": 8,
    "num_visual_tokens": 8,
    "image_pooling": "mean",
    "alignment_adapter": True,
    "vision_feature_layer": -1,
    "vision_last_norm": False,
    "vision_feature_select_strategy": "default",
    "use_thumbnail": True,
    "thought_norm": "none",
    "thought_schedule": "sequential",
    "answer_sees": "all",
    "stop_head": False,
    "markers": "both",
    "mode": "coconut",
    "c_thought": 1,
    "max_latent_stage": 3,
    "thoughts_per_turn": 0,
}
FOLDERS = ("model", "vlm", "vision_model", "text_model", "tokenizer", "resume_from_checkpoint")
DATA_PATHS = ("file", "folder", "image_root")
