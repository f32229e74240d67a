"""Where the time of a training run's updates goes: `train_hf.py recipe.yaml --profile true`.

    data │ vision tower │ projector │ prefix pass │ latent steps │ answer pass │ head and loss │ backward │ optimizer

Wall clock, read whenever a part begins or ends, so that the parts and `other` are the whole of an update. The
decoder's first pass in a forward pass is the prefix's, the last one the answer's, those between them latent steps;
without thoughts the first is all. `data` is what training waits for the next batch, not what workers do meanwhile.
What lies between updates (evaluating, saving, logging) is not counted, nor is the first update, which makes buffers
and moments.

Not torch.profiler: it records every operation, and a latent step is many short ones, so that its shares are those of a
slower run. On a GPU each part waits for the device at its end; a run without --profile does not.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_utils import unwrap_model

from mmcoconut.provenance import provenance
from mmcoconut.records import markdown_table, write_json
from mmcoconut.statistics import percent
from mmcoconut.trainer import CurriculumTrainer


PASSES = ("prefix pass", "latent steps", "answer pass")
PARTS = ("data", "vision tower", "projector", "text encoder", *PASSES)
PARTS += ("head and loss", "backward", "optimizer", "other")
WARM_UP_UPDATES = 1
PROFILE_FILE = "profile.json"


def device_waiter(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all that it was given; on a CPU that is always so."""
    return (lambda: None) if device.type == "cpu" else lambda: torch.accelerator.synchronize(device)


class Clock:
    """Seconds by part; the time of a part inside of another is the inner one's. Stopped, it notes nothing."""

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait = wait
        self.seconds: dict[str, float] = {}
        self.inside: list[str] = []
        self.since = 0.0

    def lap(self) -> None:
        """Give the time since the last call to the part that runs."""
        self.wait()
        now = time.perf_counter()
        if self.inside:
            self.seconds[self.inside[-1]] = self.seconds.get(self.inside[-1], 0.0) + now - self.since
        self.since = now

    def start(self) -> None:
        self.lap()
        self.inside = ["other"]

    def stop(self) -> None:
        self.lap()
        self.inside = []

    def enter(self, part: str) -> None:
        if self.inside:
            self.lap()
            self.inside.append(part)

    def leave(self, part: str) -> None:
        """End the part, if it is the one that runs."""
        if self.inside and self.inside[-1] == part:
            self.lap()
            self.inside.pop()


def name_passes(seconds: dict[str, float], passes: list[str]) -> None:
    """Move the time of one forward pass's decoder calls to the parts that they are."""
    last = len(passes) - 1
    for number, key in enumerate(passes):
        part = PASSES[0] if number == 0 else PASSES[2] if number == last else PASSES[1]
        seconds[part] = seconds.get(part, 0.0) + seconds.pop(key, 0.0)


class Profile(TrainerCallback):
    """The clock of a training run, and the hooks on the model that tell it which part runs; see the file's head.

    `seconds` by part, and `updates`, are of the updates behind the first.
    """

    def __init__(self, device: torch.device):
        self.clock = Clock(device_waiter(device))
        self.hooks: list = []
        self.passes: list[str] = []
        self.updates = -WARM_UP_UPDATES

    @property
    def seconds(self) -> dict[str, float]:
        return {part: self.clock.seconds.get(part, 0.0) for part in PARTS}

    def shares(self) -> dict[str, float]:
        """Of the time of all updates, by part; their sum is 1."""
        total = sum(self.seconds.values())
        return {part: seconds / total for part, seconds in self.seconds.items()}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Hook the model, as it is when sharded.

        Raises:
            ValueError: too few updates to leave one out; several devices in one process.
        """
        if args.n_gpu > 1:
            raise ValueError(
                f"profile follows one device a process, and this one has {args.n_gpu}: start train_hf.py with "
                "accelerate launch."
            )
        updates = state.max_steps - state.global_step
        if updates <= WARM_UP_UPDATES:
            raise ValueError(
                f"profile leaves out the first {WARM_UP_UPDATES} of a run's updates, and {updates} are to come: set "
                "max_steps or num_train_epochs to more."
            )
        self.detach()
        self.attach(unwrap_model(model))

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.stop()
        self.updates += 1
        if self.updates == 0:
            self.clock.seconds = {}

    def attach(self, model) -> None:
        """Hook the parts of a model; `detach` takes the hooks away."""
        base, decoder = model.model, model.get_decoder()
        self.follow(base.vision_tower, "vision tower")
        self.follow(base.multi_modal_projector, "projector")
        if base.is_seq2seq:
            self.follow(base.get_encoder(), "text encoder")
        self.before(decoder, self.begin_pass)
        self.behind(decoder, lambda *_: self.clock.leave(self.passes[-1]) if self.passes else None)
        self.behind(base, lambda *_: self.clock.enter("head and loss"))
        self.behind(model, self.end_forward)

    def before(self, module: nn.Module, call) -> None:
        self.hooks.append(module.register_forward_pre_hook(call))

    def behind(self, module: nn.Module, call) -> None:
        self.hooks.append(module.register_forward_hook(call))

    def follow(self, module: nn.Module, part: str) -> None:
        self.before(module, lambda *_: self.clock.enter(part))
        self.behind(module, lambda *_: self.clock.leave(part))

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.passes = [], []

    def begin_pass(self, *_) -> None:
        if self.clock.inside:
            self.passes.append(f"pass {len(self.passes)}")
            self.clock.enter(self.passes[-1])

    def end_forward(self, *_) -> None:
        self.clock.leave("head and loss")
        name_passes(self.clock.seconds, self.passes)
        self.passes = []

    def wait_for(self, batches: Iterable) -> Iterator:
        """The batches; the time until each is there is data's."""
        batches = iter(batches)
        while True:
            self.clock.enter("data")
            batch = next(batches, None)
            self.clock.leave("data")
            if batch is None:
                return
            yield batch

    def record(self) -> dict:
        """What profile.json holds."""
        shares = {part: round(share, 4) for part, share in self.shares().items()}
        return {"updates": self.updates, "seconds": round(sum(self.seconds.values()), 3), "shares": shares}


class ProfiledTrainer(CurriculumTrainer):
    """A CurriculumTrainer that notes in `profile` where the time of its updates goes; its results are the same."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.profile = Profile(self.args.device)
        self.add_callback(self.profile)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.profile.detach()

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        """An update begins here."""
        self.profile.clock.start()
        return super().get_batch_samples(self.profile.wait_for(epoch_iterator), *args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        found = super().compute_loss(*args, **kwargs)
        self.profile.clock.enter("backward")
        return found

    def training_step(self, *args, **kwargs):
        """What follows the last of an update's steps, clipping included, is the optimizer's."""
        loss = super().training_step(*args, **kwargs)
        self.profile.clock.leave("backward")
        if self.accelerator.sync_gradients:
            self.profile.clock.enter("optimizer")
        return loss


def profile_table(profile: Profile) -> str:
    """A line a part that took time."""
    rows = [(part, percent(share)) for part, share in profile.shares().items() if share > 0]
    return markdown_table(["part of an update", "share of its time"], rows)


def save_profile(trainer: ProfiledTrainer) -> None:
    """The main process's profile: printed, and written beside the results."""
    if trainer.is_world_process_zero():
        record = {**trainer.profile.record(), **provenance(trainer.args.device)}
        write_json(Path(trainer.args.output_dir, PROFILE_FILE), record)
        print(f"{trainer.profile.updates} updates\n{profile_table(trainer.profile)}")
