"""train_hf.py whose policy answers what is written here: `fixed_answers.py '[["recipe.yaml", "--key", "value"], …]'`.

Sampled answers differ from process to process; with these, runs in two processes can be compared with one.
"""

import sys
from collections import Counter

from several_runs import run_all

from mmcoconut.rl import policy_trainer
from mmcoconut.rl.policy import Rollout
from mmcoconut.training.collator import encode_target


ANSWERS = ("red", "green", "blue", "yellow")


def answer(model, processor, prompts, sampling):
    """Of each prompt, its first answer red after no thought, its second green after one, …"""
    seen, answers, rollouts = Counter(), [], []
    for prompt in prompts:
        number, count = seen[id(prompt)], prompt.ids.count(processor.latent_token_id)
        answers.append(encode_target(processor, [], ANSWERS[number % len(ANSWERS)]))
        rollouts.append(Rollout(prompt, [place < number % (count + 1) for place in range(count)]))
        seen[id(prompt)] += 1
    return answers, rollouts


if __name__ == "__main__":
    policy_trainer.sample = answer
    run_all(sys.argv[1])
