"""Where a decoder's positions end, and a check of that before `generate` begins.

GPT-2, OPT and BART look positions up in a table, which ends; rotary positions are computed and do not.

Shapes: B batch, P tokens of the prompts.
"""

import torch
from torch import nn


def position_limit(decoder: nn.Module) -> int | None:
    """Return how many positions a decoder's table of positions has; None where there is no such table.

    A table is an embedding, not that of the tokens, with a row for each of `max_position_embeddings`; OPT and BART
    keep a few rows more.
    """
    limit = getattr(decoder.config, "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = decoder.get_input_embeddings()
    tables = (module for module in decoder.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return limit if any(limit <= table.num_embeddings <= limit + 2 for table in tables) else None


def check_new_positions(limit: int | None, attention_mask: torch.Tensor | None, *, num_columns: int, num_new: int):
    """Raise before `generate` would read a position behind the last one.

    Args:
        limit: of `position_limit`.
        attention_mask (B, P): of the prompts, where padding takes no positions; None where it does.
        num_columns: P.
        num_new: the most tokens that may be generated; the last of them is not read and needs no position.

    Raises:
        ValueError: with the length of the longest prompt, max_new_tokens, the limit and what to change.
    """
    length = num_columns if attention_mask is None else int(attention_mask.sum(dim=-1).max())
    if limit is None or length + num_new - 1 <= limit:
        return
    room = limit - length + 1
    remedy = f"lower max_new_tokens to at most {room}, or " if room > 0 else ""
    raise ValueError(
        f"The longest prompt has {length} tokens, images and latents included, and max_new_tokens={num_new} may "
        f"follow, but the language model has {limit} positions: {remedy}shorten the question, leave out earlier "
        "turns, or take a language model with more positions."
    )
