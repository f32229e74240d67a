"""Restrict what the answer attends to: hide columns before a row's last latent from the columns after it.

    <image> q q <start> L L <end> a a        all         the answer sees every column before it
       ·    q q <start> L L <end> a a        no_image    … except the image
       ·    · ·    ·    L L <end> a a        thoughts    … except everything that is not a latent

The latents, and the columns between and before them, see everything. Positions do not change. The output equals that
of removing the hidden columns from the key-value cache after the row's last latent.

Inputs of cross-attention are hidden too: image features among encoder states by their mask; if nothing would be left,
the decoder runs without encoder states.

Shapes: B batch, T tokens of a call, t of a piece, E encoder states, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from .compat_mmcoconut import CACHE


TOKEN, IMAGE, LATENT = range(3)  # kinds of columns
ENCODER_INPUTS = ("encoder_hidden_states", "encoder_attention_mask")


@dataclass
class Hiding:
    """The columns that those after a row's last latent do not attend to.

    answer_sees: `no_image` or `thoughts`. kinds (B, past + T): TOKEN, IMAGE or LATENT in each column.
    beside (B, E): True at encoder states of images; None: all of them. reads_nothing: True if all rows are past their
    last latent, and nothing is left for them to read by cross-attention.
    """

    answer_sees: str
    kinds: torch.Tensor
    beside: torch.Tensor | None = None
    reads_nothing: bool = False

    @classmethod
    def of_call(cls, answer_sees: str, latents, left_out, image_mask, beside, known, past_length: int) -> "Hiding":
        """Return the Hiding of a call with latents and images (B, T), over a cache of past_length columns.

        left_out (B, T): latents that read nothing. known: the Hiding kept in the cache, or None.

        Raises:
            ValueError: text between the latents of a row; a cache whose columns were not recorded.
        """
        check_one_turn(latents, left_out, answer_sees)
        kinds = latents.byte() * LATENT
        if image_mask is not None:
            kinds = kinds.masked_fill(image_mask, IMAGE)
        if past_length and known is None:
            raise ValueError(
                f"past_key_values hold {past_length} columns, and no record of which are images and thoughts, but "
                f"answer_sees={answer_sees!r} has to hide some: fill the cache by this model with the same "
                "answer_sees, or set answer_sees='all'."
            )
        if past_length:
            before = known.kinds[:, :past_length]
            steps = kinds.new_full((len(kinds), past_length - before.shape[1]), TOKEN)  # decoding steps record nothing
            kinds = torch.cat([before, steps, kinds], dim=1)
        return cls(answer_sees, kinds, beside if known is None or beside is not None else known.beside)

    @property
    def last(self) -> torch.Tensor:
        """Return the column (B,) of each row's last latent; -1 of rows without latents."""
        columns = torch.arange(self.kinds.shape[1], device=self.kinds.device)
        return torch.where(self.kinds == LATENT, columns, -1).amax(dim=1)

    @property
    def hidden(self) -> torch.Tensor:
        """Return the columns (B, past + T) that are hidden after the last latent."""
        columns = torch.arange(self.kinds.shape[1], device=self.kinds.device)
        may_hide = self.kinds == IMAGE if self.answer_sees == "no_image" else self.kinds != LATENT
        return may_hide & (columns < self.last[:, None])

    def hidden_to(self, length: int) -> torch.Tensor:
        """Return the hidden ones of the first `length` columns, (B, length); the last may not be recorded yet."""
        return nn.functional.pad(self.hidden, (0, max(0, length - self.kinds.shape[1])))[:, :length]

    @property
    def hides_all_beside(self) -> bool:
        return self.answer_sees == "thoughts" or self.beside is None

    def is_behind(self, start: int, end: int) -> torch.Tensor:
        """Return (B, end - start), True where a column start … end - 1, past included, follows the last latent."""
        columns, last = torch.arange(start, end, device=self.kinds.device), self.last[:, None]
        return (last >= 0) & (columns > last)

    def cuts(self, num_columns: int, reads_beside: bool) -> torch.Tensor:
        """Return (B, T), True in those of the last num_columns columns where a row begins to see less."""
        past_length = self.kinds.shape[1] - num_columns
        behind = self.is_behind(past_length, past_length + num_columns)  # (B, T)
        begins = behind & ~nn.functional.pad(behind, (1, -1), value=True)  # not in the first, where a pass begins
        return begins if reads_beside else begins & self.hidden.any(dim=1, keepdim=True)

    def mask_of(self, attention_mask: torch.Tensor | None, start: int, end: int) -> torch.Tensor:
        """Return the mask (B, end) of a pass over columns start … end - 1, all after a row's last latent or none.

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
        """Return the replacement of a call's encoder states and mask in a pass from column start on.

        Raises:
            ValueError: only some rows are past their last latent, and these would have nothing left to read.
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
                    f"answer_sees={self.answer_sees!r} leaves nothing to read by cross-attention after a row's last "
                    "latent, but a pass uses cross-attention for all rows or none: batch rows whose last latents are "
                    "in the same column, or pass one row at a time."
                )
            return dict.fromkeys(ENCODER_INPUTS)
        mask = torch.ones_like(self.beside, dtype=torch.long) if mask is None else mask
        return {"encoder_attention_mask": mask.masked_fill(self.beside & behind, 0)}

    def noted(self, reads_beside: bool) -> "Hiding":
        """Return the part that a cache keeps for later calls."""
        end = self.kinds.shape[1]
        nothing = reads_beside and self.hides_all_beside and bool(self.is_behind(end, end + 1).all())
        return replace(self, reads_nothing=nothing)

    def cropped(self, length: int) -> "Hiding":
        """Return the Hiding of a cache that was cropped to `length` columns."""
        return replace(self, kinds=self.kinds[:, :length])

    def of_rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> "Hiding":
        """Return the Hiding of a cache with other rows; `pick` selects them from each tensor."""
        return replace(self, kinds=pick(self.kinds), beside=None if self.beside is None else pick(self.beside))


def hidden_in_step(inputs: dict, hiding: Hiding | None) -> dict:
    """Return the arguments of a decoding step without thoughts, over a cache with this Hiding.

    A mask prepared for a single pass (4-D) does not change: it was made from a mask that hides.
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
    """Raise ValueError for text between a row's latents (B, T); left_out (B, T): latents that read nothing."""
    ahead, before = latents.flip(1).cumsum(1).flip(1) > 0, latents.cumsum(1) > 0  # (B, T)
    several = (ahead & before & ~latents & ~left_out).any(dim=1)  # (B,)
    if several.any():
        raise ValueError(
            f"Row {several.nonzero()[0].item()} of the batch has text between its latents, and with "
            f"answer_sees={answer_sees!r} only columns after a row's last latent see less, so an answer between "
            "latents would see everything: pass one turn per call over past_key_values, or set answer_sees='all'."
        )


def check_can_hide(decoder: nn.Module, answer_sees: str) -> None:
    """Raise ValueError for a decoder whose attention mask cannot hide columns, or means more than visibility."""
    layers = DynamicCache(config=decoder.config).layers
    reasons = {
        "its recurrent layers keep what they read": any(isinstance(one, LinearAttentionLayer) for one in layers),
        "it reads its images in separate cross-attention layers": "cross_attention_states" in decoder.own_arguments,
        "it counts distances by its attention mask (ALiBi)": hasattr(decoder, "build_alibi_tensor")
        or bool(getattr(decoder.config, "alibi", False)),
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    if reason is not None:
        raise ValueError(
            f"answer_sees={answer_sees!r} cannot hide columns from a {type(decoder).__name__}, as {reason}: set "
            "answer_sees='all', or use another language model."
        )


def numbers_by_mask(decoder: nn.Module) -> bool:
    """Return True for a decoder that counts positions by its attention mask by default (OPT)."""
    return hasattr(decoder, "embed_positions") and not decoder.counts_columns
