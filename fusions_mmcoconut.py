"""How image features reach the decoder: one function a family, all with one signature.

    fuse(inputs_embeds (B, T, D), image_features (F, D), image_mask (B, T), attention_mask (B, T)) → dict

`image_mask` is True at the F `<image>` placeholders, `image_features` has a row for each of them in reading order, and
the dict is what the decoder is called with. For cross-attention an image is one placeholder, whose row holds all its
features, (F, P · D). No other code asks which family it is: where a fusion returns
`encoder_hidden_states` (B, E, D), the decoder reads them by cross-attention.

Shapes: B batch, T tokens, F placeholders, P features an image, E features and states that a row reads, D hidden of the
decoder.
"""

import torch


def check_one_source(**sources) -> None:
    """The batch's images must not be given twice."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both hold the images of the batch: pass one of them.")


def check_num_tiles(num_tiles: torch.Tensor | None, **images: torch.Tensor | None) -> None:
    """The tiles of all images (images,) must be as many as the pixels or the features (I, …), given by their name."""
    for name, tensor in images.items():
        if num_tiles is not None and tensor is not None and int(num_tiles.sum()) != tensor.shape[0]:
            raise ValueError(
                f"num_tiles counts {int(num_tiles.sum())} tiles ({num_tiles.tolist()} an image), but {name} holds "
                f"{tensor.shape[0]}: pass both as MMCoconutProcessor returns them."
            )


def replace_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Image features take the place of the placeholders' embeddings, as in LLaVA."""
    mask = image_mask[..., None].expand_as(inputs_embeds)  # (B, T, D)
    return {"inputs_embeds": inputs_embeds.masked_scatter(mask, image_features)}


def add_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Image features are added to the placeholders' embeddings."""
    mask = image_mask[..., None].expand_as(inputs_embeds)  # (B, T, D)
    added = torch.zeros_like(inputs_embeds).masked_scatter(mask, image_features)  # (B, T, D)
    return {"inputs_embeds": inputs_embeds + added}


def features_by_row(image_features, image_mask, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (F, P · D) of each row's images as (B, E, D), zeros behind them, and the mask (B, E) of real ones."""
    counts = image_mask.sum(dim=1)  # (B,)
    visible = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]  # (B, images)
    features = image_features.new_zeros(*visible.shape, image_features.shape[-1])  # (B, images, P · D)
    features = features.masked_scatter(visible[..., None], image_features)  # (B, images, P · D)
    num_features = image_features.shape[-1] // hidden_size
    features = features.reshape(counts.shape[0], visible.shape[1] * num_features, hidden_size)  # (B, E, D)
    return features, visible.repeat_interleave(num_features, dim=1)


def cross_attention_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Image features are what the decoder's cross-attention reads; it does not see in which order the images stand.

    A row without images reads one feature of zeros, whatever the other rows of its batch have.
    """
    features, visible = features_by_row(image_features, image_mask, inputs_embeds.shape[-1])  # (B, E, D), (B, E)
    if features.shape[1] == 0:
        features = features.new_zeros(features.shape[0], 1, features.shape[-1])  # (B, 1, D)
        visible = visible.new_zeros(features.shape[:2])  # (B, 1)
    visible = torch.cat([visible[:, :1] | ~visible.any(dim=1, keepdim=True), visible[:, 1:]], dim=1)  # (B, E)
    return {
        "inputs_embeds": inputs_embeds,
        "encoder_hidden_states": features,
        "encoder_attention_mask": visible.long(),
    }


def encoder_fusion(inputs_embeds, image_features, image_mask, attention_mask=None) -> dict:
    """Image features in front of the text encoder's states (`inputs_embeds`) are what cross-attention reads."""
    features, visible = features_by_row(image_features, image_mask, inputs_embeds.shape[-1])  # (B, E - T, D)
    attention_mask = torch.ones_like(image_mask) if attention_mask is None else attention_mask.bool()  # (B, T)
    return {
        "encoder_hidden_states": torch.cat([features, inputs_embeds], dim=1),  # (B, E, D)
        "encoder_attention_mask": torch.cat([visible, attention_mask & ~image_mask], dim=1).long(),  # (B, E)
    }


IMAGE_FUSIONS = {
    "replace": replace_fusion,
    "add": add_fusion,
    "cross_attention": cross_attention_fusion,
    "encoder": encoder_fusion,
}
