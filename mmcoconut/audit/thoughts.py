"""Analyse thoughts: geometry, logit lens, attention to images, linear probes.

Shapes: n rows, N thoughts per row, D hidden, L layers, V vocabulary, T tokens, P image features of a row, K targets.
Nothing here changes a thought; all numbers come from ordinary forward passes. Positions count from 0.
Sources: effective rank, Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality; logit lens,
nostalgebraist 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens.
"""

import importlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import nn

from mmcoconut.models import is_composed
from mmcoconut.passes_mmcoconut import take_columns
from mmcoconut.progress import progress


# Above this mean cosine between the thoughts of different rows, a position is nearly the same for all rows.
COLLAPSED_COSINE = 0.99

MAX_CLASSES = 64
MIN_ROWS = 20  # in each half; with fewer, an accuracy is uncertain by ±20 points or more
NUM_SHUFFLES = 3
REGULARISATION = 1.0  # scikit-learn's C: the inverse strength of the L2 penalty, on standardised features
MAX_ITERATIONS = 1000
NORMAL_QUANTILE = 1.959964  # of a two-sided 95 % interval


def load_extra(name: str, extra: str = "audit") -> ModuleType:
    """Import a module of an optional package that one extra of mmcoconut needs.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"The {extra} needs {name.partition('.')[0]}: pip install mmcoconut[{extra}]") from error


def check_finite(thoughts: torch.Tensor) -> None:
    broken = int((~thoughts.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{broken} of the {thoughts.numel()} numbers in the thoughts are not finite: load the model in float32 or "
            "bfloat16, where hidden states do not overflow."
        )


def mean_pairwise_cosine(vectors: torch.Tensor) -> float:
    """Return the mean cosine over all pairs of different rows of (n, D), in O(nD).

    With unit vectors u:  Σ_{a≠b} u_a·u_b = ‖Σ u‖² − Σ ‖u‖². A zero vector has cosine 0 with all.
    """
    units = nn.functional.normalize(vectors, dim=-1)  # (n, D)
    pairs = units.sum(dim=0).square().sum() - units.square().sum()
    return (pairs / (len(units) * (len(units) - 1))).item()


def effective_rank(vectors: torch.Tensor) -> float:
    """Return exp(−Σ p log p), p = s² / Σ s², s the singular values of the centred (n, D); 0 if all rows are equal.

    1 means that the rows differ along one direction only, min(n − 1, D) that they differ equally along all. The source
    uses p = s / Σ s; with squares, p is the share of variance.
    """
    singular_values = torch.linalg.svdvals(vectors - vectors.mean(dim=0))
    rounding = torch.finfo(vectors.dtype).eps * max(vectors.shape) * vectors.norm()
    if singular_values[0] <= rounding:
        return 0.0
    shares = singular_values.square() / singular_values.square().sum()
    return torch.special.entr(shares).sum().exp().item()


def geometry(thoughts: torch.Tensor, embeddings: torch.Tensor) -> dict:
    """Measure norm, similarity and spread of thoughts (n, N, D), relative to token embeddings (V, D); in float64.

    Returns lists by position, as floats for JSON: `norm_mean` and `norm_std` (over rows, population), `norm_ratio` to
    the mean norm of the embeddings, `cosine_to_next` (N − 1, mean over rows), `cosine_across_rows` (mean over all
    pairs of different rows), `effective_rank`; the numbers `embedding_norm_mean` and `embedding_norm_std`; and
    `collapsed`, the positions whose cosine across rows is above COLLAPSED_COSINE.

    Raises:
        ValueError: there are fewer than two rows; a thought is not finite.
    """
    if len(thoughts) < 2:
        raise ValueError(f"The geometry compares rows, but got {len(thoughts)}: give the thoughts of at least two.")
    check_finite(thoughts)
    thoughts = thoughts.detach().cpu().double()  # (n, N, D)
    norms = thoughts.norm(dim=-1)  # (n, N)
    embedding_norms = torch.linalg.vector_norm(embeddings.detach().cpu(), dim=-1, dtype=torch.float64)  # (V,)
    to_next = nn.functional.cosine_similarity(thoughts[:, :-1], thoughts[:, 1:], dim=-1)  # (n, N − 1)
    across = [mean_pairwise_cosine(position) for position in thoughts.unbind(dim=1)]
    return {
        "norm_mean": norms.mean(dim=0).tolist(),
        "norm_std": norms.std(dim=0, correction=0).tolist(),
        "norm_ratio": (norms.mean(dim=0) / embedding_norms.mean()).tolist(),
        "embedding_norm_mean": embedding_norms.mean().item(),
        "embedding_norm_std": embedding_norms.std(correction=0).item(),
        "cosine_to_next": to_next.mean(dim=0).tolist(),
        "cosine_across_rows": across,
        "effective_rank": [effective_rank(position) for position in thoughts.unbind(dim=1)],
        "collapsed": [position for position, cosine in enumerate(across) if cosine > COLLAPSED_COSINE],
    }


@contextmanager
def eager_attention(decoder) -> Iterator[None]:
    """Use eager attention, which returns attention weights, inside this context; restore it afterwards."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def modules_outside_the_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield all submodules except those in a ModuleList, where a decoder keeps its layers."""
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield child
            yield from modules_outside_the_layers(child)


@contextmanager
def decoder_outputs(model) -> Iterator[list]:
    """Append every output of the decoder to the list: a vision-language model may drop parts of it."""
    outputs = []
    hook = model.get_decoder().register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def some_text(model, rows: int, columns: int) -> dict:
    """Return the inputs of a text (rows, columns) without images and thoughts, for a vision-language model."""
    ids = torch.full((rows, columns), model.config.start_latent_token_id, device=model.device)
    return {"input_ids": ids, "use_cache": False}


@torch.no_grad()
def final_norm(decoder, around=None) -> nn.Module:
    """Return the decoder's final norm: the first module whose output is the last hidden state.

    It is found by running one random state or, if the decoder needs more inputs, one token through the outer model.
    Post-norm decoders normalise inside their layers, so the identity is returned.
    """
    outputs = []
    modules = list(modules_outside_the_layers(decoder))
    hooks = [
        module.register_forward_hook(lambda module, _, output: outputs.append((module, output))) for module in modules
    ]
    state = torch.randn(1, 1, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    try:
        if around is None:
            last = decoder(inputs_embeds=state.to(decoder.device, decoder.dtype)).last_hidden_state  # (1, 1, D)
        else:
            with decoder_outputs(around) as whole:
                around(**some_text(around, 1, 1))
            last = whole[0].last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    made = [module for module, output in outputs if isinstance(output, torch.Tensor) and torch.equal(output, last)]
    return made[0] if made else nn.Identity()


@dataclass
class Readings:
    """Measurements of the N thoughts of n prompts in one forward pass; all tensors on the CPU.

    thoughts (n, N, D): the vectors that the latents read.
    tokens, probabilities (n, N + 1, L + 1, k): the k most likely tokens by the logit lens, best first. Index j < N of
        the second axis is the state that becomes thought j, index N the state at the prompt's last column, which
        predicts the first token. Layer 0 is the input of the decoder's first layer, layer L the model's own output.
    image_attention: per row (L, N, P), the attention of the latent column of thought j to each image feature, mean
        over heads; P = 0 for a row without images. L counts the layers with attention maps; with cross-attention to
        images, only the cross-attention layers. None if it was not requested.
    """

    thoughts: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor
    image_attention: list[torch.Tensor] | None

    def image_map(self, row: int) -> torch.Tensor:
        """Return (N, P), the attention to each image feature, mean over layers and heads."""
        return self.image_attention[row].mean(dim=0)

    def image_share(self, row: int) -> torch.Tensor:
        """Return (N,), the share of all attention that goes to the row's images, in [0, 1]."""
        return self.image_map(row).sum(dim=-1)


def columns_of_latents(latent_mask: torch.Tensor) -> torch.Tensor:
    """Return the columns (n, N) of the True entries of (n, T), in reading order.

    Raises:
        ValueError: the rows have different numbers of latents.
    """
    counts = latent_mask.sum(dim=1)  # (n,)
    if counts.unique().numel() != 1:
        raise ValueError(
            f"The rows have {counts.tolist()} latents, but readings need the same number in each: give the processor "
            "one num_latents for all."
        )
    return latent_mask.nonzero()[:, 1].view(len(latent_mask), -1)


def thought_text(model, inputs: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (n, T) of the text with the thoughts; for an encoder-decoder, the decoder's."""
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    ids, mask = inputs[f"{prefix}input_ids"], inputs.get(f"{prefix}attention_mask")
    return ids, torch.ones_like(ids) if mask is None else mask


def read_columns(mask: torch.Tensor, latent_columns: torch.Tensor) -> torch.Tensor:
    """Return (n, N + 1): the column before each latent, which makes the thought, and the last real one of (n, T)."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1, keepdim=True)  # (n, 1)
    return torch.cat([latent_columns - 1, last], dim=1)


def logits_of(states: torch.Tensor, model) -> torch.Tensor:
    """Return the logits (n, M, V) of last hidden states (n, M, D) of a model's decoder.

    A vision-language model may cap or scale logits in its own forward, which is therefore run on as many text tokens,
    with the decoder's states replaced by these.
    """
    if is_composed(model.config):
        return model.get_output_embeddings()(states)

    def put_states(decoder, _, output):
        return type(output)(**{**output, "last_hidden_state": states})

    hook = model.get_decoder().register_forward_hook(put_states)
    try:
        return model(**some_text(model, *states.shape[:2])).logits
    finally:
        hook.remove()


def logit_lens(states: Sequence[torch.Tensor], model, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and probabilities (n, M, layers, k) of states (n, M, D) per layer: softmax(logits(norm(h))).

    The last layer's states are already normed. Runs layer by layer, because all logits at once are large.
    """
    norm = final_norm(model.get_decoder(), None if is_composed(model.config) else model)
    normed = [*map(norm, states[:-1]), states[-1]]
    best = [logits_of(layer, model).float().softmax(dim=-1).topk(top_k) for layer in normed]  # (n, M, k) each
    tokens = torch.stack([layer.indices for layer in best], dim=2)  # (n, M, layers, k)
    probabilities = torch.stack([layer.values for layer in best], dim=2)  # (n, M, layers, k)
    return tokens.cpu(), probabilities.cpu()


def attention_to_images(attentions, latent_columns: torch.Tensor, *, image_mask: torch.Tensor) -> list[torch.Tensor]:
    """Return maps (n, H, T, keys) per layer as (L, N, P) per row: from its latents to the keys of its images."""
    if not attentions:
        raise ValueError(
            "The language model gave no attention maps under eager attention: call read_thoughts with attention=False."
        )
    layers = [take_columns(layer.mean(dim=1), latent_columns) for layer in attentions]  # (n, N, T) each
    maps = torch.stack(layers, dim=1).float().cpu()  # (n, L, N, T)
    return [row[..., mask] for row, mask in zip(maps, image_mask.cpu())]


def image_maps(model, inputs: Mapping, outputs) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    """Return the attention (n, H, T, keys) of each layer that sees images, and (n, keys), True at a row's images.

    Images are among the text columns, or first among the encoder states. outputs: of the model or its decoder.
    """
    image_mask = inputs["input_ids"] == model.config.image_token_id  # (n, T)
    beside = getattr(model.get_decoder().config, "cross_attention_layers", ())
    if beside and "cross_attention_mask" in inputs:  # (n, T, images, tiles); all images have equally many features
        maps = [outputs.attentions[layer] for layer in beside]
        num_features = maps[0].shape[-1] // inputs["cross_attention_mask"].shape[2]
    elif outputs.get("cross_attentions"):
        maps, hidden_size = outputs.cross_attentions, outputs.last_hidden_state.shape[-1]
        num_features = outputs.image_hidden_states[0].shape[-1] // hidden_size if outputs.image_hidden_states else 0
    else:
        return outputs.attentions, image_mask
    keys = torch.arange(maps[0].shape[-1], device=image_mask.device)
    return maps, keys < num_features * image_mask.sum(dim=1, keepdim=True)


def read_decoder(model, inputs: Mapping, **asked) -> tuple:
    """Return the decoder's output for prompts with the requested fields, and their thoughts (n, N, D)."""
    if is_composed(model.config):
        outputs = model.base_model(**inputs, **asked)
        return outputs, outputs.thoughts
    kept = {"logits_to_keep": 1} if model.keeps_logits else {}  # logits of all columns are large
    with decoder_outputs(model) as outputs:
        thoughts = model(**inputs, **asked, **kept).thoughts
    return outputs[0], thoughts


@torch.no_grad()
def read_thoughts(model, inputs: Mapping, *, top_k: int = 5, attention: bool = True) -> Readings:
    """Run prompts once and read their thoughts, see `Readings`.

    A thought is the state of the column before its latent, so that column is decoded, by the model's final norm and
    head, at every layer ("logit lens", nostalgebraist 2020). Attention is that of the latent column itself, which
    reads the thought.

    Args:
        model: a model with thoughts in eval mode, on the device of the inputs.
        inputs: from the processor: input_ids, attention_mask (n, T), the tensors of all rows' images, and for an
            encoder-decoder the decoder's ids and mask.
        attention: also return image_attention; runs the language model under eager attention for this call.

    Raises:
        ValueError: the model is in training mode; the rows have different numbers of latents.
    """
    if model.training:
        raise ValueError("The model is in training mode, where dropout changes thoughts: call model.eval().")
    input_ids, mask = thought_text(model, inputs)  # (n, T)
    latent_columns = columns_of_latents(input_ids == model.config.latent_token_id)  # (n, N)
    asked = {"output_hidden_states": True, "output_attentions": attention, "output_thoughts": True}
    with eager_attention(model.get_decoder()) if attention else nullcontext():
        outputs, thoughts = read_decoder(model, inputs, **asked)
    columns = read_columns(mask, latent_columns)  # (n, N + 1)
    hidden_states = outputs.decoder_hidden_states if model.config.is_encoder_decoder else outputs.hidden_states
    # Gemma 3n's layers have several states per column, which no head reads.
    layers = [*(layer for layer in hidden_states[:-1] if layer.ndim == 3), outputs.last_hidden_state]  # (n, T, D) each
    tokens, probabilities = logit_lens([take_columns(layer, columns) for layer in layers], model, top_k=top_k)
    image_attention = None
    if attention:
        maps, image_mask = image_maps(model, inputs, outputs)
        image_attention = attention_to_images(maps, latent_columns, image_mask=image_mask)
    return Readings(thoughts.cpu(), tokens, probabilities, image_attention)


def visible(text: str) -> str:
    """Return a token's text, stripped; if it is only white space, its repr."""
    return repr(text.strip() or text)[1:-1]


def lens_text(readings: Readings, tokenizer, row: int) -> list[str]:
    """Return N + 1 texts such as `"B 71 %"`: the last layer's top token of a row's N thoughts and of its prompt."""
    tokens, probabilities = readings.tokens[row, :, -1, 0].tolist(), readings.probabilities[row, :, -1, 0].tolist()
    texts = [visible(tokenizer.decode([token])) for token in tokens]
    return [f"{text} {100 * probability:.0f} %" for text, probability in zip(texts, probabilities)]


def probe_targets(rows: Iterable[Mapping]) -> tuple[list[str], list[list[str | None]]]:
    """Return names and targets of `linear_probe` for rows of `mmcoconut.data`: each written step, None if a row has
    fewer, and the first accepted answer."""
    rows = list(rows)
    num_steps = max((len(row["steps"]) for row in rows), default=0)
    names = [*(f"step {number}" for number in range(1, num_steps + 1)), "answer"]
    return names, [[*row["steps"], *[None] * (num_steps - len(row["steps"])), row["answers"][0]] for row in rows]


def held_out_half(groups: Sequence[Hashable], seed: int) -> np.ndarray:
    """Return (n,), True for the rows of a random half of the groups."""
    names = np.array([str(group) for group in groups])
    unique = np.random.default_rng(seed).permutation(np.unique(names))
    return np.isin(names, unique[: len(unique) // 2])


def reason_against(labels: np.ndarray, held_out: np.ndarray) -> str | None:
    """Return why an accuracy on these labels (rows,) would be meaningless; None if it is meaningful."""
    num_classes, num_test, num_train = len(set(labels)), int(held_out.sum()), int((~held_out).sum())
    if num_classes > MAX_CLASSES:
        return f"{num_classes} classes, more than {MAX_CLASSES}"
    if num_test < MIN_ROWS:
        return f"{num_test} held-out rows, fewer than {MIN_ROWS}"
    if num_train < MIN_ROWS:
        return f"{num_train} training rows, fewer than {MIN_ROWS}"
    if len(set(labels[~held_out])) == 1:
        return "only one class in the training rows"
    return None


def probe_accuracy(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> float:
    """Return the held-out accuracy of a linear classifier trained on the other rows; features (rows, D).

    Multinomial logistic regression on features with mean 0 and variance 1 over the training rows.
    """
    linear_model, preprocessing = load_extra("sklearn.linear_model"), load_extra("sklearn.preprocessing")
    scaler = preprocessing.StandardScaler().fit(features[~held_out])
    classifier = linear_model.LogisticRegression(C=REGULARISATION, max_iter=MAX_ITERATIONS)
    classifier.fit(scaler.transform(features[~held_out]), labels[~held_out])
    return float((classifier.predict(scaler.transform(features[held_out])) == labels[held_out]).mean())


def shuffled_accuracy(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, *, seed: int) -> float:
    """Return the mean accuracy of NUM_SHUFFLES classifiers trained on shuffled labels: the chance level."""
    generator, accuracies = np.random.default_rng(seed), []
    for _ in range(NUM_SHUFFLES):
        shuffled = labels.copy()
        shuffled[~held_out] = generator.permutation(labels[~held_out])
        accuracies.append(probe_accuracy(features, shuffled, held_out))
    return float(np.mean(accuracies))


def wilson_interval(share: float, count: int) -> list[float]:
    """Return the 95 % interval [low, high] of a binomial share of `count` trials (Wilson 1927)."""
    z = NORMAL_QUANTILE
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = np.clip([middle - reach, middle + reach], 0, 1).tolist()
    return [min(share, low), max(share, high)]  # rounding could leave a share of 0 or 1 just outside


def probe_target(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, *, seed: int) -> dict:
    """Return one target's column of `linear_probe`'s result; features (rows, N, D) of the rows that have it."""
    reason, num_test = reason_against(labels, held_out), int(held_out.sum())
    column = {"n_train": len(labels) - num_test, "n_test": num_test, "n_classes": len(set(labels)), "reasons": reason}
    if reason is not None:
        nothing = [None] * features.shape[1]
        return {**column, "majority": None, "accuracy": nothing, "interval": nothing, "shuffled": nothing}
    positions = features.transpose(1, 0, 2)  # (N, rows, D)
    accuracy = [probe_accuracy(position, labels, held_out) for position in positions]
    return {
        **column,
        "majority": float(np.unique(labels[held_out], return_counts=True)[1].max() / num_test),
        "accuracy": accuracy,
        "interval": [wilson_interval(share, num_test) for share in accuracy],
        "shuffled": [shuffled_accuracy(position, labels, held_out, seed=seed) for position in positions],
    }


def check_lengths(thoughts: torch.Tensor, targets, *, names, groups) -> int:
    """Return the number of targets, K.

    Raises:
        ValueError: there is not one list of targets and one group per row, or the K of rows and names differ.
    """
    if not len(thoughts) == len(targets) == len(groups):
        raise ValueError(
            f"{len(thoughts)} rows of thoughts, {len(targets)} of targets and {len(groups)} groups: give one of each "
            "per row."
        )
    lengths = {len(row) for row in targets} | ({len(names)} if names is not None else set())
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"Rows and names have {sorted(lengths)} targets: give each the same number, at least one, with None for "
            "a target that a row does not have."
        )
    return lengths.pop()


def linear_probe(
    thoughts: torch.Tensor,
    targets: Sequence[Sequence[str | None]],
    *,
    names: Sequence[str] | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict:
    """Train a linear classifier to predict target k from thought j on one half of the rows, and score it on the
    other half.

    A decodable target is not necessarily used by the model. Rows of a group are not independent, so with large groups
    the intervals are too narrow.

    Args:
        thoughts (n, N, D).
        targets: K texts per row; None if the row lacks the target, which leaves it out of that column.
        names: of the K targets.
        groups: per row, a key such as a hash of its picture; a group is never split between the halves. Default: each
            row is a group, so equal rows would leak.

    Returns:
        A dictionary for JSON: `targets` (K names); matrices [j][k] `accuracy`, `interval` ([low, high], 95 %, Wilson)
        and `shuffled` (trained on shuffled labels); lists [k] `majority` (share of the commonest class among the
        held-out rows), `n_train`, `n_test`, `n_classes`, and `reasons`, why a column holds only None, or None.

    Raises:
        ValueError: the lengths do not match; a thought is not finite.
        ImportError: scikit-learn is not installed.
    """
    groups = range(len(thoughts)) if groups is None else groups
    num_targets = check_lengths(thoughts, targets, names=names, groups=groups)
    check_finite(thoughts)
    features = thoughts.detach().cpu().double().numpy()  # (n, N, D)
    held_out = held_out_half(groups, seed)  # (n,)
    columns = []
    by_target = [np.array(column, dtype=object) for column in zip(*targets)]
    for labels in progress(by_target, desc="probes", unit="targets"):
        known = np.array([label is not None for label in labels])  # (n,)
        columns.append(probe_target(features[known], labels[known].astype(str), held_out[known], seed=seed))
    result = {key: [column[key] for column in columns] for key in columns[0]}
    for matrix in ("accuracy", "interval", "shuffled"):
        result[matrix] = [list(position) for position in zip(*result[matrix])]  # [k][j] → [j][k]
    return {"targets": list(names or (f"target {number}" for number in range(1, num_targets + 1))), **result}
