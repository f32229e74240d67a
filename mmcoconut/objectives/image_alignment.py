"""Align the state before a latent with the image features of its step (Mirage, LVR, Monet's first stage).

Shapes: B rows, N latents, P features of a row's images, F of all helper images, D hidden.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from mmcoconut.data.image_grids import FeatureLayout, features_under, views_of_sizes
from mmcoconut.data.images import image_sizes, open_helper_image
from mmcoconut.errors import UsageError
from mmcoconut.objectives.base import Objective, RowsOfBatch, Run, features_reader, mean_by_row
from mmcoconut.passes_mmcoconut import gather_thoughts


TARGETS = ("boxes", "helper_image")
DISTANCES = {
    "cosine": lambda states, targets: 1 - nn.functional.cosine_similarity(states, targets, dim=-1),
    "mse": lambda states, targets: (states - targets).square().mean(dim=-1),
}
READS = ("state", "target")


def in_groups(num_features: int, num_groups: int) -> np.ndarray:
    """Return the weights (N, P) of means over N equal groups of P features in their order.

    With more groups than features, a group without features has weights of 0.

    >>> in_groups(4, 2).tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    group = np.arange(num_features) * num_groups // max(num_features, 1)  # (P,)
    members = (np.arange(num_groups)[:, None] == group).astype(float)  # (N, P)
    return members / members.sum(axis=1, keepdims=True).clip(min=1)


def stacked_weights(weights: list[np.ndarray], num_latents: int) -> torch.Tensor:
    """Return each row's weights (N, P), of different sizes, as zero-padded (B, N, P)."""
    most = max((each.shape[1] for each in weights), default=0)
    found = torch.zeros(len(weights), num_latents, most)
    for row, each in enumerate(weights):
        found[row, : each.shape[0], : each.shape[1]] = torch.from_numpy(each)
    return found


class ImageAlignment(Objective):
    """Distance of the state before latent j from the pooled image features f_j of its step.

        L = mean over latents j:  1 - cos(before[j], sg(f_j))       distance cosine
                                  mean (before[j] - sg(f_j))²       distance mse

    sg stops the gradient: states learn from features, not features from states. With `boxes`, f_j is the mean of the
    row's own image features as the decoder read them, weighted by each feature's overlap with the step's box. With
    `helper_image`, the helper image goes through the model's own tower and projector, its features are split into as
    many groups, in reading order, as the row has latents, and f_j is the mean of group j.

    Args:
        target: `boxes` | `helper_image`, the row's field with its steps' image regions.
        distance: `cosine` | `mse`.
        latents_read: `state`: latents read the previous state, as usual. `target`: in training they read f_j, if there
            is one, so all thoughts take one pass; evaluation and inference read states.

    Raises:
        ValueError: an option has another value; with boxes, the model's features have no location on a picture; with
            helper images, the model has no method for image features.

    Source: Mirage, https://arxiv.org/abs/2506.17218 (helper images, cosine); LVR, https://arxiv.org/abs/2509.24251
    (regions, MSE, targets read); Monet, https://arxiv.org/abs/2511.21395.

    >>> from mmcoconut.views_mmcoconut import ThoughtView
    >>> read = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # two image features, and the latent's column
    >>> view = ThoughtView(None, None, None, torch.tensor([[True]]), None, read, None)
    >>> view.before, view.image_mask = torch.tensor([[[3.0, 3.0]]]), torch.tensor([[True, True, False]])
    >>> weights = {"weights": torch.tensor([[[1.0, 0.0]]])}  # the first feature
    >>> ImageAlignment().loss(view, weights, None), ImageAlignment(distance="mse").loss(view, weights, None)
    (tensor([0.2929]), tensor([6.5000]))
    """

    name: ClassVar[str] = "image_alignment"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.17218"
    default_weight: ClassVar[float] = 0.1
    needs_images: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("target", "distance", "latents_read")

    def __init__(self, weight=None, *, target: str = "boxes", distance: str = "cosine", latents_read: str = "state"):
        super().__init__(weight)
        given, choices = (target, distance, latents_read), (TARGETS, DISTANCES, READS)
        for option, value, known in zip(self.options, given, choices):
            if value not in known:
                raise UsageError(f"objectives.image_alignment.{option}={value!r} is not one of {', '.join(known)}.")
        self.target, self.distance, self.latents_read = target, distance, latents_read
        self.fields = (target,)
        self.layout: FeatureLayout | None = None
        self.knows_grid = False

    @property
    def gives_thoughts(self) -> bool:
        return self.latents_read == "target"

    @property
    def settings(self) -> dict:
        return {name: getattr(self, name) for name in self.options}

    def build(self, model: nn.Module) -> None:
        self.layout = FeatureLayout.of(model)
        if self.target == "boxes" and self.layout.nowhere is not None:
            raise UsageError(
                f"objectives.image_alignment.target='boxes' needs to know which features lie under a box, but for "
                f"this model {self.layout.nowhere}: set it to 'helper_image', or use another projector."
            )
        if self.target == "helper_image" and features_reader(model) is None:
            raise UsageError(
                f"objectives.image_alignment.target='helper_image' needs features of other images, but "
                f"{type(model).__name__} has no get_image_features: set it to 'boxes', or use another model."
            )

    def check(self, row: Mapping, processor) -> None:
        if self.target == "helper_image" and row.get("helper_image"):
            open_helper_image(row)
        if self.target == "boxes" and row.get("boxes"):
            self._check_boxes(row, processor)

    def _check_boxes(self, row: Mapping, processor) -> None:
        """Check that boxes lie on the first picture and, for the first row only, which features they cover.

        The latter runs the image processor, and depends far more on the model than on a picture's size.
        """
        if not row["images"]:
            raise UsageError(f"{row['row_id']}, field 'boxes': found {len(row['boxes'])}, but the row has no picture.")
        width, height = image_sizes(row)[0]
        for number, box in enumerate(row["boxes"]):
            if box is not None and (box[2] > width or box[3] > height):
                raise UsageError(
                    f"{row['row_id']}, field 'boxes': found {[*box]} for step {number}, but the picture has {width} x "
                    f"{height} pixels: write [left, top, right, bottom] in pixels of the first picture."
                )
        if not self.knows_grid:
            self._under_boxes(row, range(len(row["boxes"])), processor)
            self.knows_grid = any(row["boxes"])

    def encode(self, batch: RowsOfBatch) -> dict:
        num_latents = batch.steps.shape[1]
        if self.target == "helper_image":
            return self._encode_helpers(batch, num_latents)
        weights = [
            self._under_boxes(row, steps, batch.processor) for row, steps in zip(batch.rows, batch.steps.tolist())
        ]
        return {"weights": stacked_weights(weights, num_latents)}

    def _under_boxes(self, row: Mapping, steps: Sequence[int], processor) -> np.ndarray:
        """Return the weights (N, P) of the features under the box of each latent's step."""
        boxes = row.get("boxes") or []
        wanted = [boxes[step] if 0 <= step < len(boxes) else None for step in steps]
        if not any(wanted):
            return np.zeros((len(steps), 0))
        sizes = image_sizes(row)
        views = views_of_sizes(self.layout, processor, sizes)[0]
        if isinstance(views, str):
            raise UsageError(
                f"{row['row_id']}, field 'boxes': on its picture of {sizes[0][0]} x {sizes[0][1]} pixels it is "
                f"unknown which features lie under a box, as {views}: set objectives.image_alignment.target to "
                "'helper_image', use another model, or leave the row's boxes out."
            )
        found = [None if box is None else features_under(box, views, sizes[0]) for box in wanted]
        nothing = np.zeros(max(len(each) for each in found if each is not None))
        return np.stack([nothing if each is None else each for each in found])

    def _encode_helpers(self, batch: RowsOfBatch, num_latents: int) -> dict:
        """Return the helper images' tensors, the number of their features per row (B,), and weights.

        Without latents, as at stage 0, no picture is opened.
        """
        if num_latents == 0:
            return {"weights": torch.zeros(len(batch.rows), 0, 0)}
        helpers = [[open_helper_image(row)] if row.get("helper_image") else [] for row in batch.rows]
        images, handles = batch.processor.encode_images(helpers, return_tensors="pt")
        counts = [
            sum([*batch.processor.image_ids(handle)].count(self.layout.image_token_id) for handle in row)
            for row in handles
        ]
        weights = [in_groups(*sizes) for sizes in zip(counts, batch.counts.tolist())]
        return {"weights": stacked_weights(weights, num_latents), "counts": torch.tensor(counts), "images": images}

    def _helper_features(self, inputs: dict, run: Run) -> torch.Tensor:
        """Return the features (B, P, D) of each row's helper image, computed once per batch."""
        if "features" not in inputs:
            features = run.image_features(inputs["images"])  # (F, D)
            inputs["features"] = pad_sequence(features.split(inputs["counts"].tolist()), batch_first=True)
        return inputs["features"]

    def _pooled(self, features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the detached means (B, N, D) of features (B, P, D) under weights (B, N, ≤ P)."""
        features = features[:, : weights.shape[2]].detach()
        return weights[:, :, : features.shape[1]].to(features.dtype) @ features

    def given(self, inputs: dict, run: Run):
        if self.latents_read == "state":
            return None
        where = inputs["weights"].any(dim=-1)  # (B, N)

        def pooled_targets(read: torch.Tensor, image_mask: torch.Tensor | None):
            if self.target == "helper_image":
                features = self._helper_features(inputs, run) if where.any() else read[:, :0]
            else:
                features = gather_thoughts(read, image_mask)[0]  # (B, P, D)
            return self._pooled(features, inputs["weights"]), where

        return pooled_targets

    def loss(self, view, inputs, run) -> torch.Tensor:
        weights = inputs["weights"]  # (B, N, P)
        known = view.mask & weights.any(dim=-1)  # (B, N)
        if not known.any():
            return torch.zeros(len(known), device=known.device)
        helped = self.target == "helper_image"
        features = self._helper_features(inputs, run) if helped else view.image_features()[0]  # (B, P, D)
        targets = self._pooled(features, weights)  # (B, N, D)
        return mean_by_row(DISTANCES[self.distance](view.before.float(), targets.float()), known)
