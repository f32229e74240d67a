"""The values that keys of a recipe may have, and what does not go together."""

import math

from mmcoconut.build.processors import CHAT_TEMPLATES
from mmcoconut.chat_template_mmcoconut import MARKERS
from mmcoconut.configuration_mmcoconut import CHOICES as CONFIG_CHOICES
from mmcoconut.data import DATASETS
from mmcoconut.data.conversations import LONG_ROWS
from mmcoconut.data.scoring import REFERENCES
from mmcoconut.thinking_mmcoconut import CHECKPOINTED_PASSES


# Modes without a curriculum stay at stage 0; modes without thoughts have neither latents nor markers.
STAGED_MODES = ("coconut", "pause", "no_thoughts")
THINKING_MODES = ("coconut", "pause")
MODES = ("coconut", "cot", "no_cot", "no_thoughts", "pause")

CHOICES = {key: CONFIG_CHOICES[key] for key in ("image_fusion", "projector_type", "thought_norm", "thought_schedule")}
CHOICES["answer_sees"] = CONFIG_CHOICES["answer_sees"]
CHOICES |= {"vision_feature_select_strategy": CONFIG_CHOICES["vision_feature_select_strategy"], "markers": MARKERS}
CHOICES |= {"dataset": tuple(DATASETS), "unreadable_images": ("error", "skip"), "mode": MODES}
CHOICES |= {"long_rows": LONG_ROWS, "chat_template": CHAT_TEMPLATES}
REWARDED = ("grpo", "rloo")  # objectives that trl's trainers minimise
CHOICES |= {"objective": ("supervised", *REWARDED, "distill_stops")}
# What is often looked for, and why it is not there.
NOT_THERE = {("objective", "ppo"): "trl 1.16 has no PPO: set grpo, or rloo, which need no model of values"}
CHOICES |= {"checkpointed_passes": CHECKPOINTED_PASSES}
CHOICES |= {"metric": tuple(REFERENCES), "image_pooling": CONFIG_CHOICES["image_pooling"]}
# Without the library's `batch_rebalance`, which knows one length a row; and it takes a misspelt one for `random`.
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
AT_LEAST_1 += ("max_samples", "batch_size", "seeds", "top_k", "image_size", "min_tiles", "max_tiles")
FRACTIONS = ("uniform_prob", "margin", "stop_threshold", "adam_beta1", "adam_beta2", "label_smoothing_factor")
LIMITS = (
    dict.fromkeys(AT_LEAST_0, (0, math.inf))
    | dict.fromkeys(AT_LEAST_1, (1, math.inf))
    | dict.fromkeys(FRACTIONS, (0, 1))
    | dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1))  # what numpy takes
    | {"max_steps": (-1, math.inf)}
)
REFUSED = {
    "remove_unused_columns": "the Trainer would drop the images before the collator sees them: remove this key",
    "load_best_model_at_end": "accuracies of different stages do not compare; stages/ keeps the best of each",
    "fsdp": "it belongs to the machine: accelerate launch --config_file recipes/accelerate/fsdp2_8gpu.yaml",
    "prediction_loss_only": "evaluation always generates answers: remove this key",
    "batch_eval_metrics": "metrics need the whole split: remove this key",
    "do_predict": "a split is evaluated after training by `test_split`: set that, and remove this key",
    "length_column_name": "rows have no such column, their lengths change with the stage: remove this key",
    "dataloader_persistent_workers": "workers that persist keep stage 0 for the whole run: remove this key",
}
# What a comparison does by itself, or what its runs would do to each other.
NOT_COMPARED = {
    "resume_from_checkpoint": "a comparison goes on by itself when it is called again: remove this key",
    "push_to_hub": "the runs would overwrite each other on the Hub: remove this key, and push the run that you want",
}
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
# What belongs to rewards, and what means something else or nothing with them.
OF_REWARDS = ("rewards", "rl", "thought_noise")
NOT_REWARDED = {
    "start_epoch": "the stage is the last one, whatever the epoch: remove this key",
    "align_weight": "nothing is aligned while answers are rewarded: set it to 0",
    "uniform_prob": "the stage is the last one in all rows: remove this key",
    "label_smoothing_factor": "nothing is learnt from labels here: remove this key",
    "reset_optimizer": "there is one stage: remove this key",
}
OF_STAGES = ("c_thought", "max_latent_stage", "epochs_per_stage", "uniform_prob", "pad_latent_to_max", "start_epoch")
OF_STAGES += ("reset_optimizer",)
IN_A_VLM = ("vision_model", "vision_config", "text_model", "text_config", "gguf_file", "tokenizer", "chat_template")
IN_A_CHECKPOINT = ("vlm", *IN_A_VLM)
# What a vision-language model decides by its weights, and what only its processor can be told.
JOINED_IN_A_VLM = ("image_fusion", "projector_type", "vision_feature_layer", "vision_last_norm")
JOINED_IN_A_VLM += ("vision_feature_select_strategy", "projector_num_heads", "num_visual_tokens", "image_pooling")
JOINED_IN_A_VLM += ("alignment_adapter",)
OF_A_VLM = ("image_size", "min_tiles", "max_tiles", "use_thumbnail", "image_options")
OF_A_COMPOSED_VLM = ("image_size", "use_thumbnail")
# What a recipe that does not say is taken from the checkpoint that it starts from, and what a new model has there.
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
