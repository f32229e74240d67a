"""Rows whose latents stand in different columns, laid out so that the k-th latents of all rows share one.

The loop runs the decoder once a column in which any row has a latent. Three rows whose two latents stand apart,

    t L t L t t t         ·  ·  t L t L t         would take 1 + 4 passes, and as      t · · | L t | L t t t
    t t t L t t L                                                                     t t t | L t | L · · ·

they take 1 + 2: a row is cut before each of its latents, and the k-th pieces of all rows are padded to one length. The
padding stands inside of rows, where the attention mask hides it; positions go with the tokens. What results hold at
columns of padding has no meaning.

Shapes: B batch, T tokens, T' columns of the new layout, S pieces, D hidden, H heads, K head dim.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .attention_mmcoconut import SplitCache, SplitLayer
from .caches_mmcoconut import ReplayCache, text_cache
from .latent_mmcoconut import ThinkOutput, take_columns, think


# A latent step costs what about so many columns of a long pass cost (benchmarks/LOG.md, n = 0 and 8).
COLUMNS_OF_A_PASS = 6


@dataclass
class Layout:
    """Where each token goes.

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
        """(B, T, …) in the new layout, (B, T', …)."""
        return take_columns(values, self.source)

    def move_back(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T', …) in the old layout, (B, T, …)."""
        return take_columns(values, self.target)


def layout_of(latent_mask: torch.Tensor, attention_mask: torch.Tensor | None) -> Layout:
    """The layout with as many pieces as the row with the most latents has; both masks (B, T).

    What follows a row's last latent goes into the last piece, so that the answers run together.
    """
    num_columns = latent_mask.shape[1]
    real = torch.ones_like(latent_mask) if attention_mask is None else attention_mask.bool()  # (B, T)
    piece = latent_mask.long().cumsum(dim=1)  # (B, T)
    counts = piece[:, -1:]  # (B, 1)
    most = counts.max()
    is_answer = (piece == counts) & ~latent_mask & (counts > 0)
    piece = torch.where(is_answer, most, piece)
    in_piece = nn.functional.one_hot(piece, int(most) + 1) * real[..., None]  # (B, T, S)
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


def can_regroup(past_key_values: Cache) -> bool:
    """Whether the keys of a cache can be put back into the old columns: nothing is kept, or a fresh one that grows."""
    keys = text_cache(past_key_values)
    if isinstance(keys, ReplayCache):
        return True
    if isinstance(keys, SplitCache):
        return keys.get_seq_length() == 0
    is_growing = isinstance(keys, DynamicCache) and all(type(layer) is DynamicLayer for layer in keys.layers)
    return is_growing and not keys.offloading and keys.get_seq_length() == 0


def is_worth(layout: Layout, num_columns: int, num_passes: int, most_columns: int | None) -> bool:
    """Whether a layout of T' columns saves more in passes than it costs in columns, and fits the decoder.

    num_columns, num_passes: without it. most_columns: that a decoder which counts positions by column has.
    """
    length = layout.real.shape[1]
    fits = most_columns is None or length <= most_columns
    return fits and length - num_columns <= COLUMNS_OF_A_PASS * (num_passes - len(layout.starts))


def move_back_keys(past_key_values: Cache, layout: Layout) -> None:
    """The cache's keys and values (B, H, T', K) in the old columns, (B, H, T, K)."""
    for layer in text_cache(past_key_values).layers:
        is_split = isinstance(layer, SplitLayer)
        held = layer.joined() if is_split else (layer.keys, layer.values)
        moved = [layout.move_back(states.transpose(1, 2)).transpose(1, 2).contiguous() for states in held]
        if is_split:
            layer.open(*moved)
        else:
            layer.keys, layer.values = moved


def think_regrouped(
    decoder,
    inputs_embeds: torch.Tensor,
    latent_mask: torch.Tensor,
    *,
    columns: list[int],
    layout: Layout,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    linked: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    past_key_values: Cache,
    keeps_cache: bool,
    **kwargs,
) -> ThinkOutput:
    """`think` with a pass for each of the most latents that a row has, however many columns they stand in.

    Arguments and results are those of `think`, in the columns of the call; attention maps cannot be asked for.
    layout: of the rows, from `layout_of`.
    """
    if position_ids is None:
        position_ids = torch.arange(latent_mask.shape[1], device=latent_mask.device)[None]
    outputs = think(
        decoder,
        layout.move(inputs_embeds),
        layout.move(latent_mask) & layout.real,
        columns=layout.starts[1:],
        ends=layout.ends,
        attention_mask=layout.real.long(),
        position_ids=layout.move(position_ids.expand_as(latent_mask)),
        linked=None if linked is None else layout.move(linked),
        noise=None if noise is None else layout.move(noise),
        past_key_values=past_key_values,
        **kwargs,
    )
    if keeps_cache:
        move_back_keys(outputs.past_key_values, layout)
    outputs.last_hidden_state = layout.move_back(outputs.last_hidden_state)  # (B, T, D)
    outputs.inputs_embeds = layout.move_back(outputs.inputs_embeds)  # (B, T, D)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(
            None if states is None else layout.move_back(states) for states in outputs.hidden_states
        )
    return outputs
