"""A view of the thoughts of a call, for objectives and audits.

    view = model(**inputs, output_view=True).view
    loss = (1 - cosine_similarity(view.before, targets, dim=-1))[view.mask].mean()

Shapes: B batch, T tokens of the call, N latents of the row with most, P image features, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .passes_mmcoconut import columns_of, gather_thoughts, states_before, take_columns
from .thinking_mmcoconut import Thoughts


@dataclass
class ThoughtView:
    """The thoughts of a call, with their gradients; each row's packed to the left, then zeros.

    before (B, N, D): the state one column before each latent, from which the thought is made.
    thoughts (B, N, D): what the latent read. after (B, N, D): the state at the latent.
    mask (B, N): True at real latents, not padding. columns (B, N): their columns among the T of the call.
    read (B, T, D): the decoder's inputs, image features included. states (B, T, D): its last hidden states.
    image_mask (B, T): True at image features among the inputs; None if images are not read there.
    hidden_states: (B, T, D) before the first layer and after each, with output_hidden_states=True.
    head: last hidden states (…, D) → logits (…, V); None for a model without one.

    Set by a trainer, which knows the rows:
        step (B, N): the written step that a latent replaces, from 0; -1 for none. place (B, N): the latent's index
            among those of its step, from 0.
        answer_column (B,): of the token before the answer's text.
    """

    before: torch.Tensor
    thoughts: torch.Tensor
    after: torch.Tensor
    mask: torch.Tensor
    columns: torch.Tensor
    read: torch.Tensor
    states: torch.Tensor
    image_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    step: torch.Tensor | None = None
    place: torch.Tensor | None = None
    answer_column: torch.Tensor | None = None

    @classmethod
    def of(cls, thoughts: Thoughts) -> "ThoughtView":
        """Return the view of a finished call."""
        latents, states = thoughts.thought_mask, thoughts.states  # (B, T), (B, T, D)
        columns, mask = columns_of(latents)  # (B, N) each
        before = states_before(states, thoughts.state_before)  # (B, T, D)
        packed = (
            take_columns(values, columns) * mask[..., None] for values in (before, thoughts.inputs_embeds, states)
        )
        return cls(*packed, mask, columns, thoughts.inputs_embeds, states, thoughts.image_mask)

    def image_features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's image features as the decoder read them, in reading order, (B, P, D), and a mask (B, P).

        Raises:
            ValueError: the model does not read its images among the text columns.
        """
        if self.image_mask is None:
            raise ValueError(
                "This model reads its images by cross-attention or in an encoder, so there are "
                "no image features among its columns: set image_fusion to 'replace' or 'add'."
            )
        return gather_thoughts(self.read, self.image_mask)

    def answer_states(self) -> torch.Tensor:
        """Return the embedding and each layer's output at answer_column, before the answer: (B, L + 1, D)."""
        rows = torch.arange(len(self.answer_column), device=self.answer_column.device)  # (B,)
        return torch.stack([layer[rows, self.answer_column] for layer in self.hidden_states], dim=1)
