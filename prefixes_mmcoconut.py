"""The beginning that several prompts share, an image or a long text, kept so that it goes through the model once.

    prefix              keys and values of P tokens, one row
    prompts behind it   [prefix | padding | question] in every row: padding stands in the middle, not in front, because
                        a cache holds the prefix in the same columns of every row; positions skip it

`PromptPrefix` is made by `model.prefill` and read by `model.generate(…, prefix=…)`. It is only ever copied from.

Shapes: B batch, P tokens of the prefix, T of the whole prompts, H heads, K head dim, D hidden, I images or tiles.
"""

from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from .passes_mmcoconut import ThoughtState, text_cache, with_cross_attention


# Features of the same picture, computed in another batch, differ by rounding; those of another picture by far more.
SAME_FEATURES = 1e-2
SAMPLED = 16  # first values of each parameter, by which weights are known again
# Of a configuration, what says how it was saved or what calls return, and changes no keys and values.
NOT_COMPARED = ("architectures", "auto_map", "dtype", "transformers_version", "mmcoconut_version", "use_cache")
NOT_COMPARED += ("output_attentions", "output_hidden_states", "return_dict")


def prompts_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The rows of (B, T) without their padding."""
    if attention_mask is None:
        return list(input_ids)
    return [row[mask.bool()] for row, mask in zip(input_ids, attention_mask)]


def common_length(one: torch.Tensor, other: torch.Tensor) -> int:
    """With how many equal tokens two prompts begin."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).long().cumprod(0).sum())


def shared_length(prompts: list[torch.Tensor], num_tokens: int | None, *, ends_before: int | None = None) -> int:
    """How many tokens the prompts' prefix has: those that all begin with, or num_tokens of them.

    Of several prompts each keeps a token behind the prefix, for the next pass of the model to read.
    ends_before: a token that stands in no prefix.

    Raises:
        ValueError: no such token; fewer than num_tokens.
    """
    shared = min(common_length(prompts[0], prompt) for prompt in prompts)
    if len(prompts) > 1:
        shared = min(shared, min(map(len, prompts)) - 1)
    if ends_before is not None:
        shared = min([shared, *(prompts[0] == ends_before).nonzero().flatten().tolist()])
    if shared < 1 or (num_tokens is not None and not 1 <= num_tokens <= shared):
        wanted = "at least one" if num_tokens is None else num_tokens
        raise ValueError(
            f"The prompts begin with {shared} common tokens that a token follows in each, and the prefix is to have "
            f"{wanted}: give prompts with the same beginning and their attention_mask, or 1 <= num_tokens <= {shared}."
        )
    return shared if num_tokens is None else num_tokens


def tiles_by_row(num_tiles: list[int], tiles_of_rows: list[int]) -> list[list[int]]:
    """The tiles of each image, row by row; the rows have so many tiles in all."""
    rest, rows = list(num_tiles), []
    for num_of_row in tiles_of_rows:
        row = []
        while sum(row) < num_of_row:
            row.append(rest.pop(0))
        rows.append(row)
    return rows


def same_images(name: str, one: torch.Tensor, other: torch.Tensor) -> bool:
    if name == "pixel_values" or one.shape != other.shape:
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= SAME_FEATURES * other.abs().max())


def _flat(fields: dict, path: str = "") -> dict:
    """The compared fields of a configuration, nested ones as `text_config.rope_theta`."""
    flat = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}{name}.")
        elif name not in NOT_COMPARED and not str(name).startswith("_"):
            flat[f"{path}{name}"] = value
    return flat


@dataclass(frozen=True)
class Maker:
    """The model that made a prefix: its name, its configuration, and the first values of its parameters."""

    name: str
    fields: dict
    weights: torch.Tensor

    @classmethod
    def of(cls, model) -> "Maker":
        loaded = (weight.detach() for weight in model.parameters() if not weight.is_meta)
        sampled = [weight.flatten()[:SAMPLED].float().cpu() for weight in loaded]
        name = model.name_or_path or f"a {type(model).__name__} that was not loaded"
        return cls(name, _flat(model.config.to_dict()), torch.cat(sampled))

    def check_reads(self, reader: "Maker") -> None:
        """Raise ValueError if the model that reads a prefix is not the one that made it."""
        fields = self.fields | reader.fields
        differing = [name for name in fields if self.fields.get(name) != reader.fields.get(name)]
        if differing:
            name = differing[0]
            difference = f"{name} is {reader.fields.get(name)!r}, not {self.fields.get(name)!r}"
        elif not torch.equal(self.weights, reader.weights):
            difference = "weights are others"
        else:
            return
        raise ValueError(
            f"The prefix was made by {self.name}, and is read by {reader.name}, whose {difference}: make the prefix "
            "with the model that reads it, and again after training."
        )


@dataclass
class PromptPrefix:
    """What the model keeps of a prompt's first P tokens.

    input_ids (P,).
    maker: the model that computed it, and that alone may read it.
    layers: keys and values (1, H, P, K) of each layer.
    last_hidden_state (1, D): of the last token; a question that begins with a latent reads it.
    images: the pixel_values or image_features (I, …) in it, by that name; num_tiles: the tiles of each image, or None.
    encoder_inputs, cross_layers: what the decoder reads by cross-attention, one row, and its keys and values.
    """

    input_ids: torch.Tensor
    maker: Maker
    images: dict[str, torch.Tensor] = field(default_factory=dict)
    num_tiles: torch.Tensor | None = None
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    last_hidden_state: torch.Tensor | None = None
    encoder_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    cross_layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    def keep(self, past_key_values: Cache) -> "PromptPrefix":
        """Keep what the model wrote into this cache, which must hold all columns of every layer."""
        state = ThoughtState.of(past_key_values)
        self.layers = [(layer.keys, layer.values) for layer in text_cache(past_key_values).layers]
        self.last_hidden_state, self.encoder_inputs = state.last_state, state.encoder_inputs
        if isinstance(past_key_values, EncoderDecoderCache):
            of_images = past_key_values.cross_attention_cache
            self.cross_layers = [(layer.keys, layer.values) for layer in of_images.layers]
        return self

    def copied_into(self, past_key_values: Cache, num_rows: int) -> Cache:
        """Return an empty cache of any kind with these keys and values in each of its rows."""

        def of_rows(states: torch.Tensor) -> torch.Tensor:
            return states.expand(num_rows, *states.shape[1:])

        for index, states in enumerate(self.layers):
            text_cache(past_key_values).update(*map(of_rows, states), index)
        if self.encoder_inputs:
            past_key_values = with_cross_attention(past_key_values)
            for index, states in enumerate(self.cross_layers):
                past_key_values.cross_attention_cache.update(*map(of_rows, states), index)
                past_key_values.is_updated[index] = True
        state = ThoughtState.within(past_key_values)
        state.remember(of_rows(self.last_hidden_state), past_key_values)
        state.encoder_inputs = {name: of_rows(value) for name, value in self.encoder_inputs.items()}
        return past_key_values

    def check_begins(self, prompts: list[torch.Tensor], latent_token_id: int) -> None:
        """Every prompt must begin with the prefix and go on behind it.

        Raises:
            ValueError: with the token at which a prompt leaves it; a latent that would stand behind padding.
        """
        longest = max(map(len, prompts))
        for row, prompt in enumerate(prompts):
            common = common_length(prompt, self.input_ids)
            if common == len(self) == len(prompt):
                raise ValueError(
                    f"Row {row} has {len(prompt)} tokens, all of them in the prefix, and the model must read one "
                    f"more: make a shorter prefix, prefill(…, num_tokens={len(self) - 1})."
                )
            if common < len(self):
                found = f"id {prompt[common].item()}" if common < len(prompt) else "its end"
                remedy = (
                    f"prefill(…, num_tokens={common}) makes a prefix of what they share"
                    if common
                    else ("pass whole prompts, prefix included, and their attention_mask where they are padded")
                )
                raise ValueError(
                    f"Row {row} leaves the prefix of {len(self)} tokens at its token {common}: {found} where the "
                    f"prefix has id {self.input_ids[common].item()}. It must begin with all of it: {remedy}."
                )
            if len(prompt) < longest and prompt[len(self)] == latent_token_id:
                raise ValueError(
                    f"Row {row} is shorter than others and has a latent directly behind the {len(self)} tokens of the "
                    "prefix, where its padding would stand: let the prefix end a token earlier, "
                    f"prefill(…, num_tokens={len(self) - 1}), or pass the row alone."
                )

    def in_front(self, prompts: list[torch.Tensor], num_columns: int, *, pad_token_id: int) -> tuple:
        """input_ids and attention_mask (B, num_columns) of [prefix | padding | rest of the prompt]."""
        ids = self.input_ids.new_full((len(prompts), num_columns), pad_token_id)  # (B, T)
        ids[:, : len(self)] = self.input_ids
        mask = torch.zeros_like(ids)  # (B, T)
        mask[:, : len(self)] = 1
        for row, prompt in enumerate(prompts):
            rest = prompt[len(self) :]
            ids[row, num_columns - len(rest) :] = rest
            mask[row, num_columns - len(rest) :] = 1
        return ids, mask

    def without_images(self, tiles_of_rows: list[int], num_tiles: torch.Tensor | None, **images) -> dict:
        """The given images less those of the prefix, which stand first in every row.

        tiles_of_rows: the tiles (without num_tiles: images) of each whole prompt. Images that are as many as those
        behind the prefix are taken for these.

        Raises:
            ValueError: neither number; other images than the prefix has; pixels where it has features, or these there.
        """
        given = {name: tensor for name, tensor in images.items() if tensor is not None}
        if not given or not self.images:
            return {**given, **({} if num_tiles is None else {"num_tiles": num_tiles})}
        ((name, tensor),) = given.items()
        ((known_name, known),) = self.images.items()
        num_behind = sum(tiles_of_rows) - len(tiles_of_rows) * len(known)
        if len(tensor) == num_behind:
            return {name: tensor, **({} if num_tiles is None else {"num_tiles": num_tiles})}
        if len(tensor) != sum(tiles_of_rows):
            raise ValueError(
                f"{name} holds {len(tensor)} images or tiles, but the prompts have {sum(tiles_of_rows)}, or "
                f"{num_behind} behind the prefix: pass one of these numbers."
            )
        if name != known_name:
            raise ValueError(
                f"The prefix was made of {known_name}, and {name} cannot be compared with them: pass {known_name} of "
                f"the whole prompts, or the {name} behind the prefix alone, or make the prefix of {name}."
            )
        rows = tensor.split(tiles_of_rows)
        of_rows = [None] * len(rows) if num_tiles is None else tiles_by_row(num_tiles.tolist(), tiles_of_rows)
        for index, (row, tiles) in enumerate(zip(rows, of_rows)):
            first = None if tiles is None or self.num_tiles is None else tiles[: len(self.num_tiles)]
            other_tiles = first is not None and first != self.num_tiles.tolist()
            if other_tiles or not same_images(name, row[: len(known)], known.to(row)):
                raise ValueError(
                    f"Row {index} has other {name} than the prefix where the prefix has its {len(known)}: make a "
                    "prefix for each picture, or pass only the images behind it."
                )
        if num_behind == 0:
            return {}
        behind = {name: torch.cat([row[len(known) :] for row in rows])}
        if num_tiles is not None:
            kept = [tiles[len(self.num_tiles) :] for tiles in of_rows]
            behind["num_tiles"] = num_tiles.new_tensor(sum(kept, []))
        return behind
