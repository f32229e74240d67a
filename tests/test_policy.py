"""The policy of reinforcement learning: what it samples, how likely it says that was, and what its trainers learn."""

import copy
import inspect
import json
import pickle
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from fixed_answers import answer as fixed_answers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_conversations import rows_of
from test_from_vlm import thinking_pair
from test_train import ROOT, TINY, launch, losses
from tiny import HIDDEN_SIZE, max_difference, tiny_model, tiny_processor, tiny_seq2seq, uncached

import train_hf
from mmcoconut.arguments import conflicts
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.errors import RecipeError
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.models import load_model
from mmcoconut.objectives.rewards import REWARDS
from mmcoconut.rl import stop_distillation
from mmcoconut.rl.policy import Rollout, Sampling, joined, likelihood, read_prompts, sample, stop_loss
from mmcoconut.rl.stop_distillation import fewest_right
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.lora import add_lora


pytest.importorskip("trl")

from trl import GRPOTrainer, RLOOTrainer  # noqa: E402

from mmcoconut.rl import policy_trainer  # noqa: E402  (it needs trl)


NUM_LATENTS = 3
WRITE = {"max_new_tokens": 5, "do_sample": True}


def pair_of(family: str, **config):
    """Model and processor of a family, with tiny random weights."""
    if family == "internvl":
        return thinking_pair(config=config)
    if family == "encoder":
        model = tiny_seq2seq(**config)
    elif family == "add":
        model = tiny_model("gpt2", image_fusion="add", projector_type="transformer", **config)
    else:
        model = tiny_model(family, **config)
    return model, tiny_processor(model)


def collator_of(processor, **options) -> CurriculumCollator:
    options = {"max_length": 120, "max_new_tokens": 5, **options}
    collator = CurriculumCollator(Curriculum(max_latent_stage=NUM_LATENTS), processor, **options)
    collator.fixed_stage = NUM_LATENTS
    return collator


def rows(count: int = 3) -> list[dict]:
    """Rows of one turn, each with its picture, the first of them twice."""
    made = rows_of(*[1] * (count - 1))
    return [made[0], *made]


def sampled(family: str, *, noise: float = 0.0, greedy: bool = False, **config):
    model, processor = pair_of(family, **config)
    prompts = read_prompts(collator_of(processor), rows())
    answers, rollouts = sample(model, processor, prompts, Sampling(noise, {**WRITE, "do_sample": not greedy}))
    return model, processor, answers, rollouts


def batch_of(processor, rollouts: list[Rollout], answers: list[list[int]]) -> dict:
    """ids and mask (B, P + C) as trl joins them: prompts padded in front, answers behind."""
    pad = processor.tokenizer.pad_token_id
    longest, length = max(len(r.prompt.begun) for r in rollouts), max(map(len, answers))
    ids, mask = [], []
    for rollout, answer in zip(rollouts, answers):
        front, behind = longest - len(rollout.prompt.begun), length - len(answer)
        ids.append([*[pad] * front, *rollout.prompt.begun, *answer, *[pad] * behind])
        mask.append([*[0] * front, *[1] * (len(rollout.prompt.begun) + len(answer)), *[0] * behind])
    return {"ids": torch.tensor(ids), "mask": torch.tensor(mask), "num_written": length}


def plain_log_probs(model, processor, rollout: Rollout, answer: list[int], temperature=1.0) -> torch.Tensor:
    """log P (V,) before each token of an answer: a forward pass of this row alone, with the thoughts that it took."""
    ids_name, mask_name = processor.prompt_names
    thought = iter(rollout.thought)
    kept = [token for token in rollout.prompt.begun if token != processor.latent_token_id or next(thought)]
    ids = torch.tensor([[*kept, *answer]])
    mask = torch.ones_like(ids)
    read = joined([rollout.prompt], processor, ids=ids, mask=mask, num_written=len(answer))
    inputs = {**read, ids_name: ids, mask_name: mask}
    if rollout.noise is not None:
        inputs["thought_noise"] = rollout.noise[: len(rollout.thought)][rollout.thought][None]
    with torch.no_grad():
        return (model(**inputs).logits[0, len(kept) - 1 : -1] / temperature).log_softmax(dim=-1)


FAMILIES = ["gpt2", "add", "qwen2", "marian", "encoder", "internvl"]


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_a_plain_forward_pass(family, noise):
    model, processor, answers, rollouts = sampled(family, noise=noise)
    with torch.no_grad():
        found = likelihood(model, processor, rollouts, temperature=0.7, **batch_of(processor, rollouts, answers))
    for row, (rollout, answer) in enumerate(zip(rollouts, answers)):
        expected = plain_log_probs(model, processor, rollout, answer, temperature=0.7)
        tokens = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert max_difference(found.log_probs[row, : len(answer)], tokens) <= 2e-5
        entropies = -(expected.exp() * expected).sum(dim=-1)
        assert max_difference(found.entropies[row, : len(answer)], entropies) <= 2e-5


@pytest.mark.parametrize("family", ["gpt2", "marian", "encoder"])
def test_log_probabilities_of_rows_that_stopped_equal_those_of_fewer_latents(family):
    model, processor, _, rollouts = sampled(family, noise=0.5, stop_head=True)
    torch.nn.init.constant_(model.model.stop_head.bias, 0.0)  # every thought is the last with probability 1/2
    prompts = [rollout.prompt for rollout in rollouts] * 3
    answers, rollouts = sample(model, processor, prompts, Sampling(0.5, WRITE))
    counts = [rollout.num_thoughts for rollout in rollouts]
    assert len({*counts}) > 1
    with torch.no_grad():
        found = likelihood(model, processor, rollouts, **batch_of(processor, rollouts, answers))
    for row, (rollout, answer) in enumerate(zip(rollouts, answers)):
        expected = plain_log_probs(model, processor, rollout, answer).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert max_difference(found.log_probs[row, : len(answer)], expected) <= 2e-5
    halves = [0.5 ** (count + (count < NUM_LATENTS)) for count in counts]
    assert found.stop_log_probs.exp().tolist() == pytest.approx(halves, rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "marian", "encoder"])
def test_the_policy_that_answers_is_the_one_whose_likelihood_is_formed(family):
    """Greedy answers are the likeliest with the thoughts and noise that the likelihood, as above, is formed with."""
    model, processor, answers, rollouts = sampled(family, noise=4.0, greedy=True)
    allowed = torch.ones(model.config.text_config.vocab_size, dtype=torch.bool)
    allowed[model.generation_config.suppress_tokens] = False
    for rollout, answer in zip(rollouts, answers):
        expected = plain_log_probs(model, processor, rollout, answer).masked_fill(~allowed, -torch.inf)
        assert expected.argmax(dim=-1).tolist() == answer
    assert answers[0] != answers[1], "the same row with other noise"
    assert not torch.equal(rollouts[0].noise, rollouts[1].noise)


@pytest.mark.parametrize("family", ["gpt2", "marian"])
def test_gradients_of_the_likelihood_go_through_the_thoughts(family):
    model, processor, answers, rollouts = sampled(family, noise=0.5)
    batch = batch_of(processor, rollouts, answers)

    def gradients() -> dict:
        model.zero_grad(set_to_none=True)
        likelihood(model, processor, rollouts, **batch).log_probs.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    with uncached(model):
        ids_name, mask_name = processor.prompt_names
        inputs = joined([r.prompt for r in rollouts], processor, **batch)
        inputs |= {
            ids_name: batch["ids"],
            mask_name: batch["mask"],
            "thought_noise": torch.stack([r.noise for r in rollouts]),
        }
        model.zero_grad(set_to_none=True)
        logits = model(**inputs, use_cache=False).logits[:, -batch["num_written"] - 1 : -1]
        tokens = batch["ids"][:, -batch["num_written"] :, None]
        (logits.log_softmax(-1).gather(2, tokens)).sum().backward()
        defined = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == defined.keys()
    assert max(max_difference(found[name], defined[name]) for name in found) <= 1e-4
    handle = model.model.thought_feed.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    cut = gradients()
    handle.remove()
    assert max(max_difference(found[name], cut[name]) for name in found) > 1e-2


def test_a_row_that_recurs_is_read_once_and_a_long_one_is_refused():
    _, processor = pair_of("gpt2")
    prompts = read_prompts(collator_of(processor), rows())
    assert prompts[0] is prompts[1] and prompts[2] is not prompts[1]
    with pytest.raises(ValueError, match="talk row 0: the prompt with max_new_tokens takes"):
        read_prompts(collator_of(processor, max_length=8), rows())


def rollouts_of(processor) -> policy_trainer.Rollouts:
    """Rollouts over two rows whose index is not their position."""
    rows = Dataset.from_list([{**row, "index": 10 + row["index"]} for row in rows_of(1, 1)])
    return policy_trainer.Rollouts(rows, collator_of(processor), Sampling(0.5, {**WRITE, "temperature": 0.7}))


def rolled_out(rollouts: policy_trainer.Rollouts, model) -> tuple[list[Rollout], list, dict]:
    """Its rollouts of the second row and twice the first, their answers, and the batch that trl makes of them."""
    prompts = [row["prompt"] for row in policy_trainer.questions_of([rollouts.rows[place] for place in (1, 0, 0)])]
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer = SimpleNamespace(accelerator=accelerator, model=model, compute_loss_context_manager=nullcontext)
    output, kept = rollouts(copy.deepcopy(prompts), trainer), [*rollouts.kept.values()]
    shown = [replace(rollout.prompt, begun=ids) for rollout, ids in zip(kept, output["prompt_ids"])]
    answers = output["completion_ids"]
    return kept, answers, batch_of(rollouts.collator.processor, [Rollout(prompt, []) for prompt in shown], answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_are_found_by_their_number_in_whatever_order(family):
    model, processor = pair_of(family)
    rollouts = rollouts_of(processor)
    kept, answers, batch = rolled_out(rollouts, model)
    assert kept[1].prompt is kept[2].prompt is not kept[0].prompt
    assert [answer.num_thoughts for answer in answers] == [rollout.num_thoughts for rollout in kept]
    order = torch.tensor([2, 0, 1])
    ids, mask, num_written = batch["ids"][order], batch["mask"][order], batch["num_written"]
    assert rollouts.of(ids[:, :-num_written]) == [kept[place] for place in order]
    with torch.no_grad():
        expected = likelihood(model, processor, kept, temperature=0.7, **batch_of(processor, kept, answers))
        found = rollouts.likelihood(model, ids, mask, num_written, 2)
    assert max_difference(found.log_probs, expected.log_probs[order]) <= 2e-5
    assert max_difference(found.entropies, expected.entropies[order]) <= 2e-5


def test_rollouts_that_trl_should_have_forgotten_are_not_mistaken_for_others():
    model, processor = pair_of("gpt2")
    rollouts = rollouts_of(processor)
    _, _, batch = rolled_out(rollouts, model)
    rolled_out(rollouts, model)
    with pytest.raises(KeyError):
        rollouts.likelihood(model, batch["ids"], batch["mask"], batch["num_written"], 3)


def test_a_question_keeps_its_index_in_copies_and_between_processes():
    question = policy_trainer.Question("Which colour?", 7)
    for copied in (copy.deepcopy(question), pickle.loads(pickle.dumps(question))):
        assert copied == "Which colour?" and copied.index == 7


OWNERS = {"GRPO": GRPOTrainer, "RLOO": RLOOTrainer}


@pytest.mark.parametrize("name", policy_trainer.OVERRIDDEN_METHODS)
def test_a_private_method_of_trl_that_is_overridden_is_there(name):
    for owner in OWNERS.values():
        assert hasattr(owner, name), f"{owner.__name__} of trl has no {name} any more"


def test_no_other_private_method_of_trl_is_overridden():
    classes = (policy_trainer.ThinkingPolicy, policy_trainer.PolicyTrainer, policy_trainer.GRPO, policy_trainer.RLOO)
    own = {name for owner in classes for name in vars(owner) if name.startswith("_") and not name.startswith("__")}
    assert own - {"_tag_names"} == policy_trainer.OVERRIDDEN_METHODS.keys()


def test_trl_calls_a_rollout_func_for_grpo_and_has_none_for_rloo():
    grpo, rloo = (inspect.signature(owner.__init__).parameters for owner in OWNERS.values())
    assert "rollout_func" in grpo, "GRPOTrainer has no rollout_func any more"
    assert "rollout_func" not in rloo, "RLOOTrainer has a rollout_func now: its two overridden methods can go"


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_private_methods_of_trl_that_are_overridden_are_still_called(recipe, tmp_path, monkeypatch, objective):
    """One that is there and that nothing calls any more would be as bad as one that is gone."""
    called, trainer = set(), policy_trainer.POLICY_TRAINERS[objective]
    owners = [owner for owner in trainer.__mro__ if owner.__module__ == policy_trainer.__name__]
    names = {name for owner in owners for name in vars(owner)} & policy_trainer.OVERRIDDEN_METHODS.keys()

    def recording(name, own):
        return lambda *args, **kwargs: called.add(name) or own(*args, **kwargs)

    for name in names:
        monkeypatch.setattr(trainer, name, recording(name, getattr(trainer, name)))
    words = ["--objective", objective, "--rewards", "{low: 1.0}", "--max_steps", "1", "--dataloader_num_workers", "1"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *words])
    assert called == names and len(names) == {"grpo": 2, "rloo": len(policy_trainer.OVERRIDDEN_METHODS)}[objective]
    assert logged(tmp_path / "run", "num_thoughts") == [2.0]


def test_the_reference_of_an_adapter_is_the_model_without_it():
    model, processor, answers, rollouts = sampled("gpt2")
    batch = batch_of(processor, rollouts, answers)
    with torch.no_grad():
        before = likelihood(model, processor, rollouts, **batch).log_probs
        copied = policy_trainer.reference_of(model)
        add_lora(model, {"r": 4})
        reference = policy_trainer.reference_of(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        after = likelihood(model, processor, rollouts, **batch).log_probs
        assert max_difference(after, before) > 0.1
        assert max_difference(likelihood(reference, processor, rollouts, **batch).log_probs, before) == 0
        assert max_difference(likelihood(copied, processor, rollouts, **batch).log_probs, before) == 0
        assert max_difference(likelihood(model, processor, rollouts, **batch).log_probs, after) == 0
    assert any(parameter.requires_grad for parameter in model.parameters())


# -- runs of train_hf.py

REWARDED = f"""{TINY}
objective: grpo
rl: {{num_generations: 4}}
max_steps: 6
"""


@pytest.fixture(autouse=True)
def low(monkeypatch):
    """A reward that also a model of random weights earns more or less of: minus the mean id that it wrote."""

    def low_reward(completions, completion_ids, **columns) -> list[float]:
        return [-sum(ids) / len(ids) / 100 for ids in completion_ids]

    monkeypatch.setitem(REWARDS, "low", low_reward)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "rewarded.yaml"
    path.write_text(REWARDED)
    return str(path)


def logged(folder, key: str) -> list[float]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [record[key] for record in history if key in record]


def assert_same_weights(one, other, tolerance: float = 0.0) -> None:
    weights = [load_model(str(folder)).state_dict() for folder in (one, other)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=tolerance, rtol=0, msg=name)


def test_a_reward_is_learnt_and_the_run_is_one_of_the_library(recipe, tmp_path):
    run = tmp_path / "run"
    words = ["--rewards", "{low: 1.0}", "--max_steps", "30", "--learning_rate", "5e-2", "--rl.num_generations", "8"]
    results = train_hf.main([recipe, "--output_dir", str(run), *words])
    rewards = logged(run, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.4, rewards
    assert logged(run, "rewards/low_reward/mean") == rewards
    assert [(row["stage"], row["num_latents"]) for row in results["stages"]] == [(3, 2)]
    assert (run / "README.md").is_file() and (run / "stages" / "stage-3" / "config.json").is_file()
    assert "forward" not in vars(load_checkpoint(str(run))[0])
    saved = parse_recipe([str(run / "recipe.yaml")])
    assert saved[2].objective == "grpo" and saved[-1].num_generations == 8


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_a_cost_of_thoughts_is_learnt_by_the_stop_head(recipe, tmp_path, objective):
    run = tmp_path / "run"
    words = ["--rewards", "{thoughts: 1.0}", "--stop_head", "true", "--learning_rate", "3e-2", "--max_steps", "20"]
    results = train_hf.main([recipe, "--output_dir", str(run), "--objective", objective, *words])
    thoughts = logged(run, "num_thoughts")
    assert thoughts[0] > 1.5 and sum(thoughts[-3:]) / 3 < 0.5
    assert results["stages"][-1]["num_thoughts"] == 0


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_the_run_stays_near_its_reference(recipe, tmp_path, objective):
    words = ["--objective", objective, "--rl.beta", "0.1", "--rewards", "{low: 1.0}", "--thought_noise", "0.2"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *words, "--learning_rate", "1e-2"])
    kl = logged(tmp_path / "run", "kl")
    assert abs(kl[0]) < 1e-6 and max(kl) > 1e-3


def test_rewards_and_pictures_reach_the_tracker(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    words = ["--report_to", "tensorboard", "--rewards", "{low: 1.0}", "--rl.beta", "0.1", "--thought_noise", "0.1"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *words])
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    for tag in ("train/reward", "train/kl", "train/entropy", "train/rewards/low_reward/mean", "train/num_thoughts"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4, 5, 6], tag
    assert [event.step for event in events.Scalars("eval/accuracy")] == [6]
    assert [event.step for event in events.Images("samples/0")] == [6]


@pytest.mark.parametrize(
    "options", [[], ["--stop_head", "true", "--thought_noise", "0.1", "--rl.num_iterations", "2"]]
)
def test_a_run_that_was_stopped_goes_on_exactly(recipe, tmp_path, options):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = [*options, "--save_strategy", "steps", "--save_steps", "2", "--rewards", "{low: 1.0}"]
    train_hf.main([recipe, "--output_dir", str(whole), *options])
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    train_hf.main([recipe, "--output_dir", str(resumed), *options, "--resume_from_checkpoint", "true"])
    assert losses(resumed) == losses(whole)
    assert_same_weights(whole, resumed)


TWO = {"plain": ["--rl.beta", "0.1"], "stops": ["--stop_head", "true", "--rl.num_iterations", "2"]}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """A folder with the runs of two processes by name; in one launch, as starting processes takes longest."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "rewarded.yaml").write_text(REWARDED)
    half = ["--per_device_train_batch_size", "4", "--weight_decay", "0"]
    runs = [
        [str(folder / "rewarded.yaml"), "--output_dir", str(folder / name), *half, *own] for name, own in TWO.items()
    ]
    launch(json.dumps(runs), folder=folder, script=ROOT / "tests" / "fixed_answers.py")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_two_processes_equal_one_with_twice_the_batch(name, of_two, tmp_path, monkeypatch):
    monkeypatch.setattr(policy_trainer, "sample", fixed_answers)
    one, two = tmp_path / "one", of_two / name
    train_hf.main([str(of_two / "rewarded.yaml"), "--output_dir", str(one), "--weight_decay", "0", *TWO[name]])
    assert list(losses(one)) == list(losses(two)) == [1, 2, 3, 4, 5, 6]
    assert logged(two, "reward") == pytest.approx(logged(one, "reward"))
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-3)
    assert min(logged(one, "grad_norm")) > 0
    assert_same_weights(one, two, tolerance=1e-5)


def test_adapters_are_trained_by_rewards_and_a_whole_model_is_saved(recipe, tmp_path):
    pytest.importorskip("peft")
    run = tmp_path / "run"
    words = ["--lora", "{r: 4}", "--rl.beta", "0.1", "--rewards", "{low: 1.0}", "--learning_rate", "1e-2"]
    train_hf.main([recipe, "--output_dir", str(run), *words])
    assert (run / "adapter" / "adapter_config.json").is_file()
    assert max(logged(run, "kl")) > 1e-4
    load_model(str(run))  # complete


@pytest.mark.parametrize("family", ["cross_attention", "encoder", "add"])
def test_every_family_runs_with_rewards(family, tmp_path):
    from test_family_runs import FAMILIES as RECIPES

    (tmp_path / "tiny.yaml").write_text(TINY)
    text = RECIPES.get(family, "image_fusion: add\nprojector_type: transformer\nprojector_num_heads: 2\n")
    text = text.replace("align_weight: 0.5\n", "")
    (tmp_path / "run.yaml").write_text(f"base: tiny.yaml\n{text}")
    words = ["--objective", "grpo", "--rl.num_generations", "4", "--max_steps", "4", "--rewards", "{low: 1.0}"]
    words += ["--stop_head", "true", "--thought_noise", "0.1", "--rl.beta", "0.1"]
    train_hf.main([str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run"), *words])
    norms = logged(tmp_path / "run", "grad_norm")
    assert len(norms) == 4 and min(norms) > 0


@pytest.mark.parametrize("stops", [False, True])
def test_conversations_are_rewarded_for_their_last_answer(stops):
    model, processor = pair_of("gpt2", stop_head=stops)
    if stops:
        torch.nn.init.constant_(model.model.stop_head.bias, 0.0)
    collator = CurriculumCollator(Curriculum(thoughts_per_turn=2), processor, max_length=120, max_new_tokens=5)
    prompts = read_prompts(collator, rows_of(2, 1, 3))
    answers, rollouts = sample(model, processor, prompts, Sampling(0.3, WRITE))
    assert [len(rollout.thought) for rollout in rollouts] == [4, 2, 6]
    assert any(not all(rollout.thought) for rollout in rollouts) == stops
    with torch.no_grad():
        found = likelihood(model, processor, rollouts, **batch_of(processor, rollouts, answers)).log_probs
    for row, (rollout, answer) in enumerate(zip(rollouts, answers)):
        expected = plain_log_probs(model, processor, rollout, answer).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert max_difference(found[row, : len(answer)], expected) <= 2e-5
    with torch.no_grad():  # a part of the rows, which have fewer thoughts than all together
        part = batch_of(processor, rollouts[1:2], answers[1:2])
        alone = likelihood(model, processor, rollouts[1:2], **part).log_probs
    assert max_difference(alone[0], found[1, : len(answers[1])]) <= 2e-5


def test_noise_of_the_thoughts_has_the_asked_size():
    _, _, _, rollouts = sampled("gpt2", noise=0.25)
    noise = torch.stack([rollout.noise for rollout in rollouts])
    assert noise.shape == (3, NUM_LATENTS, HIDDEN_SIZE)
    assert noise.std().item() == pytest.approx(0.25, rel=0.15)


def distilled(recipe, tmp_path, *options: str) -> tuple:
    """Weights before and after a distillation of a model of few updates, and the run's results."""
    start, run = tmp_path / "start", tmp_path / "run"
    train_hf.main([recipe, "--objective", "supervised", "--rl", "{}", "--output_dir", str(start), "--max_steps", "2"])
    words = ["--objective", "distill_stops", "--stop_head", "true", "--rl", "{}", "--learning_rate", "0.3"]
    words += ["--model", str(start), "--vision_config", "null", "--text_config", "null", "--tokenizer", "null"]
    results = train_hf.main([recipe, *words, "--output_dir", str(run), "--max_steps", "20", *options])
    return load_model(str(start)).state_dict(), load_model(str(run)).state_dict(), results


def test_a_stop_head_of_a_model_that_is_never_right_learns_not_to_stop(recipe, tmp_path):
    before, after, results = distilled(recipe, tmp_path)
    assert results["stages"][-1]["num_thoughts"] == 2
    assert {name for name in after if name not in before} == {"model.stop_head.weight", "model.stop_head.bias"}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert after["model.stop_head.bias"].item() < -2.5


def test_a_stop_head_learns_the_fewest_thoughts_that_are_right(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(
        stop_distillation, "right_with", lambda answerer, rows, metric: [answerer.num_latents == 1] * len(rows)
    )
    _, _, results = distilled(recipe, tmp_path)
    assert results["stages"][-1]["num_thoughts"] == pytest.approx(1, abs=0.2)  # of the two that there are


def test_right_answers_count_only_where_they_come_at_once():
    rows = [{"answers": ["red"], "choices": [], "row_id": str(number)} for number in range(3)]
    answers = [("### red", "red"), ("B2\n### red", "red"), ("### blue", "blue")]

    class Fixed:
        def answer(self, rows):
            return [{"output": output, "answer": answer} for output, answer in answers]

    assert stop_distillation.right_with(Fixed(), rows, "exact_match") == [True, False, False]
    assert fewest_right([[True, False], [True, True], [False, True]]) == [0, 1]


@pytest.mark.parametrize("objective", ["distill_stops", "grpo"])
def test_accumulated_updates_equal_whole_ones(recipe, tmp_path, monkeypatch, objective):
    """With fixed answers, of which some earn more; the stop head has a part in both losses."""
    monkeypatch.setattr(policy_trainer, "sample", fixed_answers)
    monkeypatch.setattr(
        stop_distillation, "right_with", lambda answerer, rows, metric: [answerer.num_latents == 1] * len(rows)
    )
    norms = []
    for size, steps in ((8, 1), (4, 2)):
        sizes = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(steps)]
        if objective == "grpo":
            words = ["--stop_head", "true", "--rewards", "{low: 1.0}", "--rl.loss_type", "grpo", "--max_steps", "3"]
            train_hf.main([recipe, "--output_dir", str(tmp_path / f"run-{steps}"), *words, *sizes])
            folder = tmp_path / f"run-{steps}"
        else:
            folder = tmp_path / str(steps) / "run"
            (tmp_path / str(steps)).mkdir()
            distilled(recipe, tmp_path / str(steps), "--max_steps", "3", *sizes)
        norms.append(logged(folder, "grad_norm"))
    assert min(norms[0]) > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_the_stop_heads_loss_is_clipped_and_leaves_out_rows_that_are_masked():
    log_probs = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    rows = {"advantages": torch.tensor([1.0, 1.0, -1.0]), "counted": torch.tensor([1.0, 1.0, 0.0])}
    loss = stop_loss(log_probs, [-1.0, -1.0, -2.0], **rows, limits=(0.8, 1.2))
    assert loss.item() == pytest.approx(-(1.0 + 1.2) / 2)
    loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-0.5, 0.0, 0.0])
    assert stop_loss(log_probs, [None] * 3, **rows, limits=(0.8, 1.2)).item() == pytest.approx(-1.0)


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_the_stop_heads_loss_compares_with_the_policy_that_sampled(recipe, tmp_path, monkeypatch, objective):
    """Two updates learn from each generation: the first is by that policy itself, and the reference is another."""
    calls = []

    def recording(log_probs, kept, **options):
        calls.append((log_probs.tolist(), kept))
        return stop_loss(log_probs, kept, **options)

    monkeypatch.setattr(policy_trainer, "stop_loss", recording)
    words = ["--objective", objective, "--stop_head", "true", "--rewards", "{low: 1.0}", "--rl.beta", "0.1"]
    words += ["--rl.num_iterations", "2", "--learning_rate", "3e-2", "--max_steps", "4"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *words])
    for (first, kept), (second, kept_later) in (calls[:2], calls[2:]):
        assert kept == pytest.approx(first, abs=1e-5)
        assert sorted(kept) == sorted(kept_later)
        assert max(abs(new - old) for new, old in zip(second, kept_later)) > 1e-3


def test_all_dropout_is_switched_off():
    pairs = [pair_of("marian"), pair_of("qwen2")]
    for model, _ in pairs:
        for module in model.modules():
            for name in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.5)
    for model, processor in pairs:
        prompts = read_prompts(collator_of(processor), rows())
        answers, rollouts = sample(model, processor, prompts, Sampling(0.0, WRITE))
        batch = batch_of(processor, rollouts, answers)
        with torch.no_grad():
            expected = likelihood(model, processor, rollouts, **batch).log_probs
            model.train()
            assert max_difference(likelihood(model, processor, rollouts, **batch).log_probs, expected) > 1e-3
            policy_trainer.without_dropout(model)
            assert max_difference(likelihood(model, processor, rollouts, **batch).log_probs, expected) <= 1e-5


def test_an_entropy_bonus_has_gradients(recipe, tmp_path):
    norms = []
    for coefficient in ("0.0", "1000.0"):
        run = tmp_path / coefficient
        words = ["--rl.entropy_coef", coefficient, "--rewards", "{low: 1.0}", "--max_steps", "1"]
        train_hf.main([recipe, "--output_dir", str(run), *words])
        norms += logged(run, "grad_norm")
    assert abs(norms[1] - norms[0]) > 0.1


@pytest.mark.parametrize(
    "words, key, message",
    [
        (["--objective", "ppo"], "objective", "no PPO"),
        (["--objective", "gpro"], "objective", "did you mean `grpo`"),
        (["--rl.num_generation", "4"], "rl.num_generation", "did you mean `num_generations`"),
        (["--rl.use_vllm", "true"], "rl.use_vllm", "not passed to trl"),
        (["--rl.beta", "much"], "rl.beta", "expected"),
        (["--rl.num_generations", "3"], "per_device_train_batch_size", "8 answers, and `rl.num_generations` 3"),
        (["--rl.num_generations", "1"], "rl.num_generations", "must lie between 2"),
        (["--rl.beta", "-1"], "rl.beta", "must lie between 0"),
        (["--rl.top_p", "2"], "rl.top_p", "must lie between"),
        (["--rl.loss_type", "foo"], "rl.loss_type", "choose one of grpo"),
        (["--rewards", "{exact_match: 0}"], "rewards", "all weights are 0"),
        (["--rewards", "{recipes/judge: 1.0}"], "rewards.recipes/judge", "no such folder"),
        (["--label_smoothing_factor", "0.5"], "label_smoothing_factor", "rewards use no labels"),
        (["--ce_weight", "0.5"], "ce_weight", "no cross-entropy"),
        (["--rewards", "{exact_macht: 1.0}"], "rewards.exact_macht", "exact_match"),
        (["--rewards", "{}"], "rewards", "nothing to learn from"),
        (["--thought_noise", "-1"], "thought_noise", "must lie between"),
        (["--start_epoch", "2"], "start_epoch", "the stage is the last one"),
        (["--objective", "supervised"], "rl", "there are no rewards"),
        (["--objective", "distill_stops", "--rl", "{}"], "stop_head", "stop_head: true"),
        (["--stop_head", "true", "--mode", "pause"], "mode", "stop_head"),
        (["--objective", "supervised", "--rl", "{}", "--stop_head", "true"], "stop_head", "nothing trains it"),
        (["--objective", "distill_stops", "--rl", "{}", "--stop_head", "true"], "model", "needs a trained model"),
        (["--rewards", "{thoughts: 1.0}"], "rewards.thoughts", "stop_head: true"),
        (["--thought_noise", "0.1", "--mode", "cot"], "thought_noise", "feeds no thought back"),
        (["--rl.temperature", "0"], "rl.temperature", "must lie between"),
        (
            ["--rl.num_iterations", "2", "--save_strategy", "steps", "--save_steps", "3"],
            "TrainingArguments",
            "save_steps",
        ),
        (["--train_sampling_strategy", "group_by_length"], "train_sampling_strategy", "its own order"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(recipe, words, key, message):
    with pytest.raises(RecipeError) as error:
        parse_recipe([recipe, *words])
    assert any(found == key and message in remedy for found, _, remedy in error.value.problems), error.value


def test_rewards_without_trl_say_what_to_install(recipe, monkeypatch):
    monkeypatch.setattr(conflicts, "_is_package_available", lambda name: (False, None))
    with pytest.raises(RecipeError, match=r"pip install 'mmcoconut\[rl\]'"):
        parse_recipe([recipe])
