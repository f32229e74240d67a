"""Shapes of the pretrained models that recipes name, for what they cost; nothing here is loaded or downloaded.

Each is the model's config.json on the Hub under its name, as far as it decides shapes. Fields that are left out have
the value of transformers' own configuration class: all of them for GPT-2, CLIP ViT-B/32 and ViT-B/16. Sizes of the
vision-language models add up to TOTALS. The Hub could not be reached when this was written: shapes come from copies of
the files in public repositories, and totals and what no copy was found of (SmolVLM2's head, InternVL3's) from memory.
"""

SHAPES = {
    "openai-community/gpt2": {"model_type": "gpt2"},
    "openai/clip-vit-base-patch32": {"model_type": "clip_vision_model"},
    "google/vit-base-patch16-224-in21k": {"model_type": "vit"},
    "facebook/dinov2-base": {"model_type": "dinov2", "patch_size": 14, "image_size": 518},
    "facebook/bart-base": {
        "model_type": "bart",
        "vocab_size": 50265,
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
    },
    "weights/smollm2": {  # SmolLM2-135M-Instruct, of the package that examples/real_weights.py reads
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "OpenGVLab/InternVL3-1B-hf": {
        "model_type": "internvl",
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 151674,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        },
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": {
        "model_type": "smolvlm",
        "scale_factor": 3,
        "image_token_id": 49190,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "pad_token_id": 2,
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-VL-4B-Instruct": {
        "model_type": "qwen3_vl",
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
        },
        "tie_word_embeddings": False,
    },
}

# Billions of parameters, as published; to be compared with the models' pages where the Hub can be reached.
TOTALS = {
    "OpenGVLab/InternVL3-1B-hf": 0.94,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2.25,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
}
