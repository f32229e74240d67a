"""What the answer may see: columns before a row's last latent that the columns behind it do not attend to.

    <image> q q <start> L L <end> a a        all         the answer sees every column before it
       ·    q q <start> L L <end> a a        no_image    … but the image
       ·    · ·    ·    L L <end> a a        thoughts    … but everything that is not a latent

The latents themselves, and what stands between and before them, see everything. Positions stay what they are. So a row
gives what it would give if the hidden columns were taken out of the key-value cache behind its last latent.

What a decoder reads by cross-attention is hidden too: image features among encoder states by their mask; where nothing
would be left, the decoder runs without encoder states.

Shapes: B batch, T tokens of a call, t of a piece, E encoder states, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from .compat_mmcoconut import CACHE


TOKEN, IMAGE, LATENT = range(3)  # what stands in a column
ENCODER_INPUTS = ("encoder_hidden_states", "encoder_attention_mask")


@dataclass
class Hiding:
    """Hold what the columns behind a row's last latent do not attend to.

    answer_sees: `no_image` or `thoughts`. kinds (B, past + T): TOKEN, IMAGE or LATENT in each column.
    beside (B, E): which encoder states are of images; None: all of them. reads_nothing: whether all rows are behind
    their last latent, and nothing is left for them to read by cross-attention.
    """

    answer_sees: str
    kinds: torch.Tensor
    beside: torch.Tensor | None = None
    reads_nothing: bool = False

    @classmethod
    def of_call(cls, answer_sees: str, latents, left_out, image_mask, beside, known, past_length: int) -> "Hiding":
        """Return what a call hides, with latents and images (B, T), over a cache of past_length columns.

        left_out (B, T): latents at which nothing is read. known: the Hiding that was kept in the cache, or None.

        Raises:
            ValueError: text between the latents of a row; a cache that was filled without taking note of its columns.
        """
        check_one_turn(latents, left_out, answer_sees)
        kinds = latents.byte() * LATENT
        if image_mask is not None:
            kinds = kinds.masked_fill(image_mask, IMAGE)
        if past_length and known is None:
            raise ValueError(
                f"past_key_values hold {past_length} columns of which nobody noted where images and thoughts stand, "
                f"and answer_sees={answer_sees!r} has to hide some: fill the cache by this model with the same "
                "answer_sees, or set answer_sees='all'."
            )
        if past_length:
            before = known.kinds[:, :past_length]
            steps = kinds.new_full((len(kinds), past_length - before.shape[1]), TOKEN)  # that noted nothing
            kinds = torch.cat([before, steps, kinds], dim=1)
        return cls(answer_sees, kinds, beside if known is None or beside is not None else known.beside)

    @property
    def last(self) -> torch.Tensor:
        """Return the column (B,) of each row's last latent; -1 of rows without latents."""
        columns = torch.arange(self.kinds.shape[1], device=self.kinds.device)
        return torch.where(self.kinds == LATENT, columns, -1).amax(dim=1)

    @property
    def hidden(self) -> torch.Tensor:
        """Return the columns (B, past + T) that are hidden behind the last latent."""
        columns = torch.arange(self.kinds.shape[1], device=self.kinds.device)
        may_hide = self.kinds == IMAGE if self.answer_sees == "no_image" else self.kinds != LATENT
        return may_hide & (columns < self.last[:, None])

    def hidden_to(self, length: int) -> torch.Tensor:
        """Return the hidden columns of the first so many, (B, length), of which the last may not be known yet."""
        return nn.functional.pad(self.hidden, (0, max(0, length - self.kinds.shape[1])))[:, :length]

    @property
    def hides_all_beside(self) -> bool:
        return self.answer_sees == "thoughts" or self.beside is None

    def is_behind(self, start: int, end: int) -> torch.Tensor:
        """Return which of columns start … end - 1, counted with those of the past, are behind: (B, end - start)."""
        columns, last = torch.arange(start, end, device=self.kinds.device), self.last[:, None]
        return (last >= 0) & (columns > last)

    def cuts(self, num_columns: int, reads_beside: bool) -> torch.Tensor:
        """Return which of the last num_columns columns, (B, T), follow a row's last latent and begin to see less."""
        past_length = self.kinds.shape[1] - num_columns
        behind = self.is_behind(past_length, past_length + num_columns)  # (B, T)
        begins = behind & ~nn.functional.pad(behind, (1, -1), value=True)  # not in the first, where a pass begins
        return begins if reads_beside else begins & self.hidden.any(dim=1, keepdim=True)

    def mask_of(self, attention_mask: torch.Tensor | None, start: int, end: int) -> torch.Tensor:
        """Return the mask (B, end) of a pass over columns start … end - 1, of which a row has all behind, or none.

        attention_mask (B, end) or longer; None: of ones.
        """
        hidden = self.hidden[:, :end] & self.is_behind(start, start + 1)  # (B, end)
        mask = torch.ones_like(hidden, dtype=torch.long) if attention_mask is None else attention_mask[:, :end]
        return mask.masked_fill(hidden, 0)

    def prepared_mask(self, mask: torch.Tensor | None, start: int, end: int, offset: int, num_keys: int):
        """Return the mask (B, 1 or H, t, num_keys) of columns start … end - 1 over keys from offset on.

        None is causal. Its values are True or 0 where a query sees a key.
        """
        queries = torch.arange(start, end, device=self.kinds.device)[:, None]  # (t, 1)
        keys = torch.arange(offset, offset + num_keys, device=self.kinds.device)  # (keys,)
        if mask is None:
            mask = (keys <= queries)[None, None]  # (1, 1, t, keys)
        known = self.hidden_to(offset + num_keys)[:, offset:]  # (B, keys)
        hidden = (self.is_behind(start, end)[:, :, None] & known[:, None])[:, None]  # (B, 1, t, keys)
        if mask.dtype == torch.bool:
            return mask & ~hidden
        return mask.expand(len(hidden), -1, -1, -1).masked_fill(hidden, torch.finfo(mask.dtype).min)

    def encoder_inputs(self, inputs: dict, start: int) -> dict:
        """Return what replaces a call's encoder states and mask in a pass from column start on.

        Raises:
            ValueError: rows of which only some are behind, where nothing would be left for them to read.
        """
        states, mask = (inputs.get(name) for name in ENCODER_INPUTS)  # (B, E, D), (B, E)
        if states is None:
            return {}
        behind = self.is_behind(start, start + 1)  # (B, 1)
        if self.hides_all_beside:
            if not behind.any():
                return {}
            if not behind.all():
                raise ValueError(
                    f"answer_sees={self.answer_sees!r} leaves nothing to read by cross-attention behind a row's last "
                    "latent, and a pass reads it for all rows or for none: batch rows whose last latents stand in the "
                    "same column, or pass them one at a time."
                )
            return dict.fromkeys(ENCODER_INPUTS)
        mask = torch.ones_like(self.beside, dtype=torch.long) if mask is None else mask
        return {"encoder_attention_mask": mask.masked_fill(self.beside & behind, 0)}

    def noted(self, reads_beside: bool) -> "Hiding":
        """Return what a cache keeps of it for later calls."""
        end = self.kinds.shape[1]
        nothing = reads_beside and self.hides_all_beside and bool(self.is_behind(end, end + 1).all())
        return replace(self, reads_nothing=nothing)

    def cropped(self, length: int) -> "Hiding":
        """Return what a cache that was cut to so many columns keeps."""
        return replace(self, kinds=self.kinds[:, :length])

    def of_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "Hiding":
        """Return what a cache of other rows, `pick` of each tensor's, keeps."""
        return replace(self, kinds=pick(self.kinds), beside=None if self.beside is None else pick(self.beside))


def hidden_in_step(inputs: dict, hiding: Hiding | None) -> dict:
    """Return the arguments of a decoder's step without thoughts, over a cache that keeps this.

    A mask that was made for a single pass, 4-D, stays as it is: it was made of one that hides.
    """
    if hiding is None:
        return inputs
    mask, changed = inputs.get("attention_mask"), {}
    if mask is None:
        read = next(inputs[name] for name in ("inputs_embeds", "input_ids") if inputs.get(name) is not None)
        mask = hiding.kinds.new_ones(len(read), int(inputs[CACHE].get_seq_length()) + read.shape[1]).long()
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        changed["attention_mask"] = mask.masked_fill(hiding.hidden_to(mask.shape[1]), 0)
    states, of_states = (inputs.get(name) for name in ENCODER_INPUTS)
    if states is not None and hiding.reads_nothing:
        changed |= dict.fromkeys(ENCODER_INPUTS)
    elif states is not None and not hiding.hides_all_beside:
        changed["encoder_attention_mask"] = of_states.masked_fill(hiding.beside & (hiding.last >= 0)[:, None], 0)
    return {**inputs, **changed}


def check_one_turn(latents: torch.Tensor, left_out: torch.Tensor, answer_sees: str) -> None:
    """Raise for text between the latents (B, T) of a row; left_out (B, T) are others, at which nothing is read."""
    ahead, before = latents.flip(1).cumsum(1).flip(1) > 0, latents.cumsum(1) > 0  # (B, T)
    several = (ahead & before & ~latents & ~left_out).any(dim=1)  # (B,)
    if several.any():
        raise ValueError(
            f"Row {several.nonzero()[0].item()} of the batch has text between its latents, and with "
            f"answer_sees={answer_sees!r} only what stands behind a row's last latent sees less, which an answer "
            "between them does not: pass one turn a call over past_key_values, or set answer_sees='all'."
        )


def check_can_hide(decoder: nn.Module, answer_sees: str) -> None:
    """Raise for a decoder that carries what it read past its attention mask, or reads more than places off it."""
    layers = DynamicCache(config=decoder.config).layers
    reasons = {
        "its recurrent layers keep what they read": any(isinstance(one, LinearAttentionLayer) for one in layers),
        "it reads its images in layers of their own": "cross_attention_states" in decoder.own_arguments,
        "it counts distances by its attention mask (ALiBi)": hasattr(decoder, "build_alibi_tensor")
        or bool(getattr(decoder.config, "alibi", False)),
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    if reason is not None:
        raise ValueError(
            f"answer_sees={answer_sees!r} cannot hide columns from a {type(decoder).__name__}, as {reason}: set "
            "answer_sees='all', or take another language model."
        )


def numbers_by_mask(decoder: nn.Module) -> bool:
    """Return True for a decoder that counts positions by its attention mask where it is given none (OPT)."""
    return hasattr(decoder, "embed_positions") and not decoder.counts_columns
