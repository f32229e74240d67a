"""trl's collator for vision-language models makes the batches of this processor, and labels what the model writes."""

import pytest
from tiny import tiny_image, tiny_model, tiny_processor

from mmcoconut.training.collator import encode_target


sft_trainer = pytest.importorskip("trl.trainer.sft_trainer", reason="needs pip install mmcoconut[rl]")
NUM_LATENTS = 2


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_model(), num_latents=NUM_LATENTS)


def example(answer: str, kind: str) -> dict:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}
    written = {"role": "assistant", "content": [{"type": "text", "text": f"### {answer}"}]}
    chat = {"messages": [asked, written]} if kind == "messages" else {"prompt": [asked], "completion": [written]}
    return {"images": [tiny_image()], **chat}


@pytest.mark.parametrize(
    "kind, loss", [("messages", {"assistant_only_loss": True}), ("completion", {"completion_only_loss": True})]
)
def test_labels_are_the_answer_and_its_end_behind_the_thoughts(processor, kind, loss):
    answers = ["red", "blue or green"]
    collator = sft_trainer.DataCollatorForVisionLanguageModeling(processor, **loss)
    batch = collator([example(answer, kind) for answer in answers])
    for answer, ids, labels, real in zip(answers, batch["input_ids"], batch["labels"], batch["attention_mask"]):
        target = encode_target(processor, [], answer)
        assert labels[labels != -100].tolist() == target
        assert ids[real.bool()].tolist() == processor.encode_prompt("Which colour?", num_latents=NUM_LATENTS) + target
