"""Store a tiny checkpoint of this version and what it answers: `PYTHONPATH=.:tests python tests/checkpoints/store.py`.

Once a version, before its release; tests/test_versions.py then loads it with the code of every later one.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_image, tiny_model, tiny_processor, tiny_seq2seq

from mmcoconut.configuration_mmcoconut import VERSION


QUESTION = "What colour is the left square?"
MODELS = {
    "decoder": lambda: tiny_model("gpt2", thought_norm="projection"),
    "seq2seq": lambda: tiny_seq2seq(),
}


def expected_of(model, processor) -> dict[str, torch.Tensor]:
    """What a checkpoint must go on to give: the prompt, the logits (1, V) behind it, ten tokens."""
    inputs = processor(images=tiny_image(), text=QUESTION, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    return {**inputs, "logits": logits, "tokens": model.generate(**inputs, max_new_tokens=10, do_sample=False)}


def main():
    for name, build in MODELS.items():
        folder = Path(__file__).parent / VERSION / name
        model = build()
        processor = tiny_processor(model)
        processor.num_latents = 3
        for part in (model, processor):
            part.save_pretrained(folder)
        for code in folder.glob("*.py"):  # the code to load with is always the present one
            code.unlink()
        save_file(expected_of(model, processor), folder / "expected.safetensors")


if __name__ == "__main__":
    main()
