"""train_hf.py whose policy answers what is written here: `fixed_answers.py '[["recipe.yaml", "--key", "value"], …]'`.

Sampled answers differ from process to process; with these, runs in two processes can be compared with one.
"""

import json
import sys
from collections import Counter

from accelerate.state import PartialState

import train_hf
from mmcoconut import policy_trainer
from mmcoconut.policy import Rollout


ANSWERS = ("red", "green", "blue", "yellow")


def answer(model, processor, prompts, sampling):
    """Of each prompt, its first answer red, its second green, …"""
    seen, answers = Counter(), []
    for prompt in prompts:
        answers.append(processor.encode_answer(ANSWERS[seen[id(prompt)] % len(ANSWERS)]))
        seen[id(prompt)] += 1
    latents = [prompt.ids.count(processor.latent_token_id) for prompt in prompts]
    return answers, [Rollout(prompt, [True] * count) for prompt, count in zip(prompts, latents)]


if __name__ == "__main__":
    policy_trainer.sample = answer
    leave, PartialState.destroy_process_group = PartialState.destroy_process_group, lambda *args: None
    for words in json.loads(sys.argv[1]):
        train_hf.main(words)
    leave(PartialState())
