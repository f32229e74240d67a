"""--profile: every second of an update is one part's, a slow part shows, and the run itself does not change."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from test_family_runs import FAMILIES
from test_train import TINY, losses
from tiny import ragged_batch, tiny_model

import train_hf
from mmcoconut import profiling
from mmcoconut.arguments import RecipeError
from mmcoconut.curriculum import CurriculumCollator
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.profiling import PARTS, Clock, Profile, ProfiledTrainer


HOOKS = "_forward%s_hooks"
PAUSE = 0.05  # seconds, of updates that take a few hundredths
FAMILIES = {"replace": "", **FAMILIES}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def profile_of(recipe, tmp_path):
    """Train one stage with --profile and options; what was written."""

    def train(*options: str) -> dict:
        folder = tmp_path / "run"
        short = ["--num_train_epochs", "1", "--start_epoch", "2", "--max_steps", "5", "--profile", "true"]
        train_hf.main([recipe, "--output_dir", str(folder), "--overwrite", "true", *short, *options])
        return json.loads((folder / "profile.json").read_text())

    return train


@pytest.fixture
def run(profile_of):
    return lambda *options: profile_of(*options)["shares"]


def slow(function):
    def slowly(*args, **kwargs):
        time.sleep(PAUSE)
        return function(*args, **kwargs)

    return slowly


def hooks_of_ours(model) -> list:
    """The library hooks a tower itself, to read its layers."""
    kept = [getattr(part, HOOKS % kind) for part in model.modules() for kind in ("", "_pre")]
    hooks = [hook for hooks in kept for hook in hooks.values()]
    return [hook for hook in hooks if hook.__module__.startswith("mmcoconut")]


@pytest.fixture
def ticking(monkeypatch):
    """A clock that a test sets."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now.time)
    return now


def test_time_inside_of_a_part_is_the_inner_parts(ticking):
    clock = Clock()
    steps = [clock.start, lambda: clock.enter("a"), lambda: clock.enter("b"), lambda: clock.leave("b")]
    steps += [lambda: clock.leave("a"), clock.stop, lambda: clock.enter("a"), lambda: clock.leave("a")]
    for seconds, step in enumerate(steps):
        ticking.time += seconds
        step()
    assert clock.seconds == {"other": 1 + 5, "a": 2 + 4, "b": 3}


@pytest.mark.parametrize(
    ("num_latents", "parts"),
    [(0, {"prefix pass": 1}), (1, {"prefix pass": 1, "answer pass": 2}), (4, {"latent steps": 9, "answer pass": 5})],
)
def test_decoder_passes_are_named_by_their_order(ticking, monkeypatch, num_latents, parts):
    """The n-th pass takes n seconds."""
    model = tiny_model().train()
    decoder, calls = model.get_decoder(), []
    forward = decoder.forward

    def timed(*args, **kwargs):
        calls.append(None)
        ticking.time += len(calls)
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoder, "forward", timed)
    profile = Profile(torch.device("cpu"))
    profile.attach(model)
    profile.clock.start()
    latents = [model.config.latent_token_id] * num_latents
    ids = torch.tensor([[5, 6, 7, *latents, 8, 9]])
    model(input_ids=ids, labels=ids)
    profile.clock.stop()
    found = {part: seconds for part, seconds in profile.seconds.items() if seconds}
    assert found == {"prefix pass": 1, **parts}


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_every_family_are_the_whole_of_its_updates(family, recipe, tmp_path):
    (tmp_path / "family.yaml").write_text(f"base: tiny.yaml\n{FAMILIES[family]}")
    options = ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"]
    train_hf.main(
        [str(tmp_path / "family.yaml"), "--output_dir", str(tmp_path / "run"), "--profile", "true", *options]
    )
    record = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert (*record["shares"],) == PARTS and record["updates"] == 17
    assert sum(record["shares"].values()) == pytest.approx(1, abs=1e-3)
    absent = {part for part, share in record["shares"].items() if share == 0}
    assert absent == (set() if family == "encoder" else {"text encoder"})


@pytest.mark.parametrize(
    "options",
    [["--activation_checkpointing", "true"], ["--precompute_image_features", "true", "--freeze", "vision_tower"]],
)
def test_shares_are_the_whole_of_updates_however_they_are_made(options, run, tmp_path):
    shares = run(*options, "--image_features_cache", str(tmp_path)) if len(options) > 2 else run(*options)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert (shares["vision tower"] == 0) == (len(options) > 2)
    assert min(shares[part] for part in ("prefix pass", "latent steps", "answer pass", "backward")) > 0


@pytest.mark.slow
def test_a_slow_part_shows_in_its_own_row(run, monkeypatch):
    def parts_of(model) -> dict:
        return {"vision tower": model.vision_tower, "projector": model.model.multi_modal_projector}

    build = train_hf.build
    for part in ("vision tower", "projector", "prefix pass", "head and loss"):

        def built(*args, part=part):
            model, processor = build(*args)
            if part in parts_of(model):
                module = parts_of(model)[part]
                module.forward = slow(module.forward)
            elif part == "head and loss":
                model.lm_head.forward = slow(model.lm_head.forward)
            else:
                decoder, forward = model.get_decoder(), model.get_decoder().forward
                slowly = slow(forward)
                decoder.forward = lambda *a, **k: (slowly if k["inputs_embeds"].shape[1] > 9 else forward)(*a, **k)
            return model, processor

        monkeypatch.setattr(train_hf, "build", built)
        shares = run()
        assert max(shares, key=shares.get) == part, shares


@pytest.mark.slow
def test_a_slow_collator_optimizer_or_backward_pass_shows_in_its_own_row(run, monkeypatch):
    slowed = [("data", CurriculumCollator, "__call__"), ("optimizer", torch.optim.AdamW, "step")]
    slowed += [("backward", torch.Tensor, "backward"), ("optimizer", ProfiledTrainer, "_clip_grad_norm")]
    for part, owner, name in slowed:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, slow(getattr(owner, name)))
            shares = run()
        assert max(shares, key=shares.get) == part, shares


def test_evaluating_and_saving_between_updates_are_not_counted(profile_of, monkeypatch):
    monkeypatch.setattr(ProfiledTrainer, "evaluate", slow(slow(slow(ProfiledTrainer.evaluate))))
    generate = MMCoconutForConditionalGeneration.generate
    monkeypatch.setattr(MMCoconutForConditionalGeneration, "generate", slow(slow(generate)))
    began = time.perf_counter()
    record = profile_of("--eval_strategy", "steps", "--eval_steps", "1")
    assert record["seconds"] < time.perf_counter() - began - 4 * 5 * PAUSE


def test_a_profiled_run_learns_the_same_and_leaves_no_hook(recipe, tmp_path, monkeypatch):
    trainers = []
    init = ProfiledTrainer.__init__
    monkeypatch.setattr(
        ProfiledTrainer, "__init__", lambda self, **kwargs: (trainers.append(self), init(self, **kwargs))[1]
    )
    options = ["--uniform_prob", "0.3", "--gradient_accumulation_steps", "2", "--text_config.resid_pdrop", "0.1"]
    results = [
        train_hf.main([recipe, "--output_dir", str(tmp_path / name), *options, *more])
        for name, more in (("plain", []), ("profiled", ["--profile", "true"]))
    ]
    assert losses(tmp_path / "plain") == losses(tmp_path / "profiled")
    assert results[0]["stages"] == results[1]["stages"]
    assert len(trainers) == 1 and not hooks_of_ours(trainers[0].model)
    assert not (tmp_path / "plain" / "profile.json").exists()


def test_hooks_are_gone_after_a_run_that_fails(recipe, tmp_path, monkeypatch):
    models = []
    build = train_hf.build
    monkeypatch.setattr(train_hf, "build", lambda *args: (models.append(build(*args)), models[-1])[1])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--profile", "true"])
    assert not hooks_of_ours(models[0][0])


def test_lora_is_profiled_like_the_model_it_adapts(run):
    pytest.importorskip("peft")
    shares = run("--lora", "{r: 2, target_modules: [c_attn]}")
    assert min(shares[part] for part in ("vision tower", "prefix pass", "latent steps", "head and loss")) > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--max_steps", "1"], ValueError, "first 1 of a run's updates, and 1 are to come: set max_steps"),
        (["--compare", "cot"], RecipeError, "compared runs share a machine"),
        (["--do_train", "false"], RecipeError, "there is no update to profile"),
    ],
)
def test_a_profile_of_nothing_is_refused(recipe, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--profile", "true", *options])


def test_several_devices_in_one_process_are_refused():
    arguments = SimpleNamespace(n_gpu=2)
    with pytest.raises(ValueError, match="this one has 2: start train_hf.py with accelerate launch"):
        Profile(torch.device("cpu")).on_train_begin(arguments, None, None)


def test_a_model_that_is_called_outside_of_an_update_is_not_timed():
    model = tiny_model().train()
    profile = Profile(torch.device("cpu"))
    profile.attach(model)
    assert hooks_of_ours(model)
    model(**ragged_batch(model))
    assert not profile.clock.seconds and not profile.passes
    profile.detach()
    assert not hooks_of_ours(model)
