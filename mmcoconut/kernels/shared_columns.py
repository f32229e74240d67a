"""Lay out rows with latents in different columns so that the k-th latents of all rows share one column.

Shapes: B batch, T tokens, T' columns of the new layout, S pieces, N latents, D hidden, H heads, K head dim.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mmcoconut.caches_mmcoconut import ChosenCache, PassCache, text_cache
from mmcoconut.hiding_mmcoconut import TOKEN
from mmcoconut.passes_mmcoconut import COLUMN_AXES, Passes, is_two_dimensional, join_columns, take_columns
from mmcoconut.thinking_mmcoconut import CHOOSE_SCHEDULE, Thoughts, think


# A latent step costs about as much as this many columns of a long pass (benchmarks/LOG.md, n = 0 and 8).
COLUMNS_OF_A_PASS = 6


@dataclass
class Layout:
    """The new column of each token in a layout where latents share columns.

        t L t L t t t         ·  ·  t L t L t         would take 1 + 4 passes, and as      t · · | L t | L t t t
        t t t L t t L                                                                     t t t | L t | L · · ·

    they take 1 + 2: a row is cut before each of its latents, and the k-th pieces of all rows are padded to one length.
    The padding is inside rows, where the attention mask hides it; positions move with the tokens. Results at columns
    of padding are meaningless.

    target (B, T): the new column of each token, 0 for padding; source (B, T'): the old column, 0 for padding.
    real (B, T'): False in padding. starts: the first new column of each piece. ends: of each piece, the column (B,) in
    it of every row's last token.
    """

    target: torch.Tensor
    source: torch.Tensor
    real: torch.Tensor
    starts: list[int]
    ends: list[torch.Tensor]

    def move(self, values: torch.Tensor) -> torch.Tensor:
        """Return (B, T, …) in the new layout, (B, T', …)."""
        return take_columns(values, self.source)

    def move_back(self, values: torch.Tensor) -> torch.Tensor:
        """Return (B, T', …) in the old layout, (B, T, …)."""
        return take_columns(values, self.target)


def layout_of(latents: torch.Tensor, attention_mask: torch.Tensor | None, *, apart: bool = False) -> Layout:
    """Return the layout with as many pieces as the row with the most latents has; both masks (B, T).

    What follows a row's last latent goes into the last piece, so that the answers run together; `apart` from that
    latent, in a piece of their own, where they see less than it.
    """
    num_columns = latents.shape[1]
    real = torch.ones_like(latents) if attention_mask is None else attention_mask.bool()  # (B, T)
    piece = latents.long().cumsum(dim=1)  # (B, T)
    counts = piece[:, -1:]  # (B, 1)
    most = counts.max()
    is_answer = (piece == counts) & ~latents & (counts > 0)
    piece = torch.where(is_answer, most + apart, piece)
    in_piece = nn.functional.one_hot(piece, int(most) + 1 + apart) * real[..., None]  # (B, T, S)
    place = in_piece.cumsum(dim=1).gather(2, piece[..., None])[..., 0] - 1  # (B, T)
    lengths = in_piece.sum(dim=1)  # (B, S)
    *starts, length = accumulate(lengths.amax(dim=0).tolist(), initial=0)
    target = torch.tensor(starts, device=piece.device)[piece] + place  # (B, T)
    columns = torch.arange(num_columns, device=piece.device).expand_as(target)
    source = piece.new_full((target.shape[0], length + 1), -1)
    source = source.scatter(1, torch.where(real, target, length), columns)[:, :length]  # (B, T')
    return Layout(
        target=torch.where(real, target, 0),
        source=source.clamp(min=0),
        real=source >= 0,
        starts=starts,
        ends=list((lengths - 1).clamp(min=0).unbind(dim=1)),
    )


def can_move_keys(past_key_values: Cache) -> bool:
    """Return True if the keys of a cache can be put back into the old columns: it is fresh and grows, or not kept."""
    keys = text_cache(past_key_values)
    if isinstance(keys, PassCache):
        return True
    if isinstance(keys, ChosenCache):
        return keys.get_seq_length() == 0
    is_growing = isinstance(keys, DynamicCache) and all(type(layer) is DynamicLayer for layer in keys.layers)
    return is_growing and not keys.offloading and keys.get_seq_length() == 0


@dataclass
class ShareColumns:
    """`think` with a pass for each of the most latents that a row has, however many columns they stand in.

    most_columns: that a decoder which counts positions by column has; None: any number.
    """

    most_columns: int | None = None

    def __call__(self, passes: Passes, thoughts: Thoughts) -> None:
        """Think in the layout in which latents share columns, where that is possible and saves passes."""
        layout = self.layout_for(passes, thoughts)
        if layout is None:
            return think(passes, thoughts)
        moved = moved_passes(passes, layout)
        think(moved, moved_thoughts(thoughts, layout, apart=bool(thoughts.cuts)))
        passes.cache = moved.cache
        if passes.keeps_cache:
            move_back_keys(passes.cache, layout)
        passes.outputs = [moved_back(moved.joined(), layout)]
        passes.embeds_run = [layout.move_back(join_columns(moved.embeds_run))]  # (B, T, D)

    def layout_for(self, passes: Passes, thoughts: Thoughts) -> Layout | None:
        """Return the layout of a call; None where it stays as it is."""
        columns, latents, mask = thoughts.columns, thoughts.latents, passes.inputs.get("attention_mask")
        is_whole = mask is None or (is_two_dimensional(mask) and mask.shape == latents.shape)
        if len(columns) < 2 or not is_whole or not passes.may_move or not can_move_keys(passes.cache):
            return None
        if len(columns) <= int(latents.sum(dim=1).max()) or (thoughts.cuts and thoughts.is_given is not None):
            return None
        layout = layout_of(latents, mask, apart=bool(thoughts.cuts))
        num_passes = len({0, *columns, *thoughts.cuts})
        return layout if self.is_worth(layout, latents.shape[1], num_passes) else None

    def is_worth(self, layout: Layout, num_columns: int, num_passes: int) -> bool:
        """Return True if a layout of T' columns saves more in passes than it costs in columns, and fits the decoder.

        num_columns, num_passes: without it.
        """
        length = layout.real.shape[1]
        fits = self.most_columns is None or length <= self.most_columns
        return fits and length - num_columns <= COLUMNS_OF_A_PASS * (num_passes - len(layout.starts))


def moved_passes(passes: Passes, layout: Layout) -> Passes:
    """Return the passes of a call in another layout."""
    inputs, embeds = dict(passes.inputs), passes.inputs["inputs_embeds"]  # (B, T, D)
    if inputs.get("position_ids") is None:
        inputs["position_ids"] = torch.arange(passes.length, device=embeds.device)[None]
    for name in COLUMN_AXES.keys() & {name for name, value in inputs.items() if value is not None}:
        inputs[name] = moved_argument(name, inputs[name], layout, len(embeds))
    inputs["attention_mask"] = layout.real.long()  # (B, T')
    moved = Passes(passes.call_decoder, passes.cache, inputs, keeps_cache=passes.keeps_cache)
    moved.ends = layout.ends
    if passes.hiding is not None:
        kinds = layout.move(passes.hiding.kinds).masked_fill(~layout.real, TOKEN)  # (B, T')
        moved.hiding = replace(passes.hiding, kinds=kinds)
    return moved


def moved_argument(name: str, value: torch.Tensor, layout: Layout, num_rows: int) -> torch.Tensor:
    """Return an argument with one entry per token in another layout: (B or 1, T, …) → (B, T', …).

    Positions of several planes are (planes, B, T). Rows of features that belong to the True of a mask keep their
    order, as columns of a row do.
    """
    if name == "position_ids" and value.ndim == 3:
        return torch.stack([layout.move(plane.expand(num_rows, -1)) for plane in value])
    moved = layout.move(value.expand(num_rows, *value.shape[1:]))
    return moved & layout.real if value.dtype == torch.bool else moved


def moved_thoughts(thoughts: Thoughts, layout: Layout, *, apart: bool) -> Thoughts:
    """Return the thoughts of a call in another layout, whose last piece begins at none if the answers are apart."""
    end = len(layout.starts) - apart
    return replace(
        thoughts,
        columns=layout.starts[1:end],
        cuts=layout.starts[end:],
        latents=layout.move(thoughts.latents) & layout.real,
        linked=None if thoughts.linked is None else layout.move(thoughts.linked),
        noise=None if thoughts.noise is None else layout.move(thoughts.noise),
    )


def moved_back(output, layout: Layout):
    """Return a decoder's output with its columns in the old layout."""
    output.last_hidden_state = layout.move_back(output.last_hidden_state)  # (B, T, D)
    if output.get("hidden_states") is not None:
        states = output.hidden_states
        output.hidden_states = tuple(None if layer is None else layout.move_back(layer) for layer in states)
    return output


def move_back_keys(past_key_values: Cache, layout: Layout) -> None:
    """Put a cache's keys and values (B, H, T', K) into the old columns, (B, H, T, K)."""

    def move(states: torch.Tensor) -> torch.Tensor:
        return layout.move_back(states.transpose(1, 2)).transpose(1, 2).contiguous()

    keys = text_cache(past_key_values)
    if isinstance(keys, ChosenCache):
        return keys.move(move)
    for layer in keys.layers:
        layer.keys, layer.values = move(layer.keys), move(layer.values)


def share_columns(decoder) -> ShareColumns:
    """Return the schedule for a thinking decoder."""
    return ShareColumns(decoder.config.max_position_embeddings if decoder.counts_columns else None)


CHOOSE_SCHEDULE.append(share_columns)
