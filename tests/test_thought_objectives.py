"""Each objective against a case worked by hand or a definition of a few lines, and where its gradients go.

Shapes: B rows, N latents, D hidden, P image features, S steps, C latents of a step, K tokens.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import error_of
from test_vlm_calls import thinking_pair
from tiny import HIDDEN_SIZE, tiny_image, tiny_model, tiny_processor, tiny_seq2seq
from torch import nn

from mmcoconut.data import load_examples, open_images
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.data.image_grids import FeatureLayout, View, features_under, tiles
from mmcoconut.data.targets import IGNORED, answer_columns, encode_step, encode_target, predicted
from mmcoconut.objectives.attach import INPUTS, attach
from mmcoconut.objectives.base import Run
from mmcoconut.objectives.image_alignment import ImageAlignment, in_groups, stacked_weights
from mmcoconut.objectives.registry import OBJECTIVES, make_objectives, objective_problems
from mmcoconut.objectives.self_distillation import SelfDistillation, distance
from mmcoconut.objectives.step_decoder import END, StepDecoder
from mmcoconut.objectives.step_tokens import StepTokens
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.views_mmcoconut import ThoughtView


VOCAB = 7
# Of two rows: two steps of two latents each; one step of one latent, then padding.
STEPS = torch.tensor([[0, 0, 1, 1], [0, -1, -1, -1]])
PLACES = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])


def view_of(**parts) -> ThoughtView:
    names = ("before", "thoughts", "after", "mask", "columns", "read", "states")
    view = ThoughtView(*[parts.pop(name, None) for name in names])
    for name, value in parts.items():
        setattr(view, name, value)
    return view


def random(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mazes(num_rows: int = 4, **options) -> list[dict]:
    rows = load_examples("arrow_mazes", split="train", num_rows=num_rows, min_hops=1, max_hops=3, **options)
    return [{**row, "index": index} for index, row in enumerate(rows)]


def batch_of(model, objectives, rows, *, stage: int = 2, processor=None, **curriculum) -> dict:
    """A training batch of rows at a stage, with what the objectives, built for the model, read."""
    processor = processor or tiny_processor(model)
    for objective in objectives:
        objective.build(model)
    made = CurriculumCollator(Curriculum(max_latent_stage=3, **curriculum), processor, objectives=objectives)
    made.fixed_stage = stage
    return made(rows)


def run_of(model, batch: dict) -> tuple[ThoughtView, Run]:
    """The view of a batch's own forward as the hooks complete it, and what an objective may ask."""
    inputs = dict(batch)
    given = inputs.pop(INPUTS)
    view = model(**inputs, output_view=True, output_hidden_states=True).view
    view.step, view.place, view.answer_column = (given[name] for name in ("steps", "places", "answer_column"))
    images = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    return view, Run(model, model.forward, images)


# --- tokens of steps -------------------------------------------------------------------------------------------------
def test_each_latent_has_the_token_that_the_model_would_have_written():
    """With two latents a step the i-th has the i-th id of its step's own line; further ids have none."""
    model, rows = tiny_model(), mazes()
    batch = batch_of(model, [StepTokens()], rows, c_thought=2)
    targets = batch[INPUTS]["step_tokens"]["targets"]  # (B, 4, 1)
    processor = tiny_processor(model)
    for row, of_row in zip(rows, targets):
        written = encode_target(processor, row["steps"], row["answers"][0])
        first, second = (encode_step(processor, step) for step in row["steps"][:2])
        assert written[: len(first) + len(second)] == [*first, *second]
        assert of_row[:, 0].tolist() == [first[0], first[1], second[0], second[1]]


def test_a_bag_holds_every_token_of_a_step_once():
    model, rows = tiny_model(), mazes()
    targets = batch_of(model, [StepTokens(tokens="bag")], rows)[INPUTS]["step_tokens"]["targets"]  # (B, 2, K)
    for row, of_row in zip(rows, targets.tolist()):
        for step, ids in zip(row["steps"], of_row):
            known = [token for token in ids if token != IGNORED]
            assert sorted(known) == sorted({*encode_step(tiny_processor(model), step)})


def test_latents_behind_a_rows_last_step_have_no_token():
    rows = [row for row in mazes(12) if len(row["steps"]) == 2]
    targets = batch_of(tiny_model(), [StepTokens()], rows, stage=3)[INPUTS]["step_tokens"]["targets"]
    assert (targets[:, 2] == IGNORED).all() and (targets[:, :2] != IGNORED).all()


def test_step_tokens_is_the_mean_of_what_the_head_says():
    """By hand: logits (ln 3, 0) give the first token 3/4, (0, 0) a half; a bag of (ln 3, 0) is the mean of both."""
    after = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]], [[math.log(3), 0.0], [5.0, 5.0]]])
    targets = torch.tensor([[[0, IGNORED], [1, IGNORED]], [[0, 1], [IGNORED, IGNORED]]])
    view = view_of(after=after, head=lambda states: states)
    expected = [(math.log(4 / 3) + math.log(2)) / 2, (math.log(4 / 3) + math.log(4)) / 2]
    assert StepTokens().loss(view, {"targets": targets}, None).tolist() == pytest.approx(expected)


def test_step_tokens_reach_the_head_and_the_supervised_states_alone():
    head, after = nn.Linear(3, VOCAB), random(2, 2, 3).requires_grad_()
    targets = torch.tensor([[[1], [IGNORED]], [[IGNORED], [2]]])
    StepTokens().loss(view_of(after=after, head=head), {"targets": targets}, None).sum().backward()
    assert (after.grad.abs().sum(dim=-1) > 0).tolist() == [[True, False], [False, True]]
    assert head.weight.grad.abs().sum() > 0


def test_nothing_to_supervise_is_a_loss_of_zero():
    view = view_of(after=torch.zeros(2, 0, 3), head=nn.Linear(3, VOCAB))
    assert StepTokens().loss(view, {"targets": torch.zeros(2, 0, 0, dtype=torch.long)}, None).tolist() == [0, 0]


# --- the decoder of steps --------------------------------------------------------------------------------------------
def small_decoder(**options) -> StepDecoder:
    return StepDecoder(layers=1, width=16, heads=2, **options).make(hidden_size=5, vocab_size=VOCAB)


TEXTS = torch.tensor([[[3, 5, END], [4, END, IGNORED]], [[1, 2, 6], [IGNORED] * 3]])  # (B, S, K); the third is cut


def alone(decoder: StepDecoder, thoughts: torch.Tensor, ids: list[int]) -> list[float]:
    """The definition: a step's thoughts (C, D), then its ids, and what each id costs behind all that is before it."""
    ids = [decoder.end_id if token == END else token for token in ids]
    costs = []
    for number, token in enumerate(ids):
        before = decoder.decoder.embed_tokens(torch.tensor(ids[:number], dtype=torch.long))
        embeds = torch.cat([decoder.reader(thoughts), before])[None]
        state = decoder.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
        costs.append(-(decoder.decoder.embed_tokens.weight @ state).log_softmax(dim=0)[token].item())
    return costs


def test_a_step_is_written_out_of_its_own_thoughts_alone():
    decoder, thoughts = small_decoder(), random(2, 4, 5)
    view = view_of(thoughts=thoughts, step=STEPS, place=PLACES)
    first = alone(decoder, thoughts[0, :2], [3, 5, END]) + alone(decoder, thoughts[0, 2:], [4, END])
    second = alone(decoder, thoughts[1, :1], [1, 2, 6])
    expected = [sum(costs) / len(costs) for costs in (first, second)]
    assert decoder.loss(view, {"targets": TEXTS}, None).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_decoder_of_steps_teaches_thoughts_and_itself():
    decoder, thoughts = small_decoder(), random(2, 4, 5).requires_grad_()
    view = view_of(thoughts=thoughts, step=STEPS, place=PLACES)
    decoder.loss(view, {"targets": TEXTS}, None).sum().backward()
    assert (thoughts.grad.abs().sum(dim=-1) > 0).tolist() == (STEPS >= 0).tolist()
    assert all(weight.grad is not None for weight in decoder.parameters())


def test_a_batch_without_latents_still_has_gradients_of_zero():
    """DDP waits for the gradients of all weights in every process."""
    decoder = small_decoder()
    view = view_of(thoughts=torch.zeros(2, 0, 5), step=STEPS[:, :0], place=PLACES[:, :0])
    loss = decoder.loss(view, {"targets": torch.zeros(2, 0, 0, dtype=torch.long)}, None)
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and all(not weight.grad.any() for weight in decoder.parameters())


def test_its_weights_are_the_same_each_time_and_draw_nothing():
    state = torch.get_rng_state()
    first, second = small_decoder(), small_decoder()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_it_is_made_for_a_model_and_a_step_that_is_too_long_has_no_end():
    model, rows = tiny_model(), mazes()
    long, short = StepDecoder(), StepDecoder(max_tokens=1)
    targets = batch_of(model, [long], rows)[INPUTS]["step_decoder"]["targets"]  # (B, 2, K)
    ids = encode_step(tiny_processor(model), rows[0]["steps"][1])
    assert targets[0, 1].tolist()[: len(ids) + 1] == [*ids, END]
    assert batch_of(model, [short], rows)[INPUTS]["step_decoder"]["targets"].tolist()[0][1] == [ids[0]]
    assert (long.width, long.reader.in_features) == (HIDDEN_SIZE, HIDDEN_SIZE)
    assert long.end_id == model.get_input_embeddings().num_embeddings


def test_it_reads_what_it_has_learnt_also_from_its_folder(tmp_path):
    """Three thoughts of two latents each, three texts; the longest text without an end stops at max_tokens."""
    tokenizer = tiny_processor(tiny_model()).tokenizer
    texts = ["left", "red blue", "a cube"]
    ids = [tokenizer.encode(f"{text}\n") for text in texts]
    decoder = StepDecoder(layers=1, width=32, heads=2).make(hidden_size=5, vocab_size=len(tokenizer))
    thoughts = random(3, 2, 5)
    targets = torch.full((3, 1, max(map(len, ids)) + 1), IGNORED)
    for row, each in enumerate(ids):
        targets[row, 0, : len(each) + 1] = torch.tensor([*each, END])
    view = view_of(thoughts=thoughts, step=torch.zeros(3, 2).long(), place=torch.tensor([[0, 1]] * 3))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        decoder.loss(view, {"targets": targets}, None).sum().backward()
        optimizer.step()
    assert decoder.read(thoughts, tokenizer) == texts
    decoder.save(tmp_path / "objectives")
    loaded = StepDecoder.load(tmp_path / "objectives")
    assert loaded.read(thoughts[[2, 0]], tokenizer) == ["a cube", "left"]
    loaded.max_tokens = 1
    assert loaded.read(thoughts, tokenizer) == [tokenizer.decode(each[:1]).strip() for each in ids]


@pytest.mark.parametrize(
    "options, found",
    [
        ({"layers": 0}, "layers=0"),
        ({"layers": 1.5}, "layers=1.5"),
        ({"heads": "two"}, "heads='two'"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"width": 0}, "width=0"),
        ({"width": 12, "heads": 4}, "width=12"),
    ],
)
def test_a_decoder_that_cannot_be_made_is_refused(options, found):
    error_of(lambda: StepDecoder(**options), f"objectives.step_decoder.{found}")


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan, True])
def test_a_weight_of_the_written_row_is_a_finite_number(weight):
    error_of(lambda: SelfDistillation(teacher_weight=weight), f"self_distillation.teacher_weight={weight} must be")


# --- the written row -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq])
def test_answer_columns_are_those_before_the_answers_text(make):
    model, rows = make(), mazes()
    processor = tiny_processor(model)
    made = CurriculumCollator(Curriculum(max_latent_stage=3), processor)
    made.fixed_stage = 1
    batch = made(rows)
    targets = predicted(batch["labels"], processor)
    columns = answer_columns(rows, targets, processor)
    for row, of_row, column in zip(rows, targets, columns.tolist()):
        said = of_row[column:][of_row[column:] != IGNORED]
        assert processor.tokenizer.decode(said, skip_special_tokens=True).strip() == row["answers"][0]
        assert processor.tokenizer.decode(of_row[column - 1 : column]) == "###"


def test_the_distance_of_states_by_hand():
    """Layer 1: |1 - 0|, |3 - 4| over std(0, 4) = √8; layer 2 is equal: (1 / √8 + 0) / 2."""
    student, teacher = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]), torch.tensor([[[0.0, 4.0], [5.0, 7.0]]])
    assert distance(student, teacher).tolist() == pytest.approx([0.5 / math.sqrt(8)])


def written_alone(model, processor, row) -> tuple[torch.Tensor, float]:
    """The definition: the states (L, D) at the marker of the written row, and its mean cost, of the row alone."""
    made = CurriculumCollator(Curriculum(mode="cot"), processor)
    batch = made([row])
    outputs = model(**batch, output_hidden_states=True)
    targets = predicted(batch["labels"], processor)
    answer = processor.encode_text(f"### {row['answers'][0]}")
    column = int((targets[0] != IGNORED).nonzero()[-1]) - (len(answer) - 1)  # of the marker, of one token
    states = [layer[0, column] for layer in (outputs.get("decoder_hidden_states") or outputs.hidden_states)[1:]]
    return torch.stack(states), outputs.loss.item()


@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq])
def test_self_distillation_is_the_written_rows_loss_and_the_distance_from_its_states(make):
    model, rows, objective = make(), mazes(), SelfDistillation(teacher_weight=0.5)
    batch = batch_of(model, [objective], rows)
    view, run = run_of(model, batch)
    losses = objective.loss(view, batch[INPUTS]["self_distillation"], run)
    processor = tiny_processor(model)
    for index, row in enumerate(rows):
        teacher, cost = written_alone(model, processor, row)
        student = torch.stack([layer[index, view.answer_column[index]] for layer in view.hidden_states[1:]])
        drawn = ((student - teacher).abs().mean(dim=1) / teacher.std(dim=1)).mean()
        assert losses[index].item() == pytest.approx(0.5 * cost + drawn.item(), rel=1e-4)


def test_the_teachers_states_have_no_gradients():
    """Without the written row's own loss the gradients are those of a distance from constants."""
    model, rows, objective = tiny_model(), mazes(), SelfDistillation(teacher_weight=0.0)
    batch = batch_of(model, [objective], rows)
    view, run = run_of(model, batch)
    inputs, weights = batch[INPUTS]["self_distillation"], [*model.get_decoder().parameters()]
    loss = objective.loss(view, inputs, run).sum()
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        asked = {"output_view": True, "output_hidden_states": True}
        teacher = run({**inputs["written"], **asked}).view
        teacher.answer_column = inputs["answer_column"]
    constants = distance(view.answer_states()[:, 1:], teacher.answer_states()[:, 1:]).sum()
    expected = torch.autograd.grad(constants, weights, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.allclose(one, other, atol=1e-6))


def test_written_rows_have_no_teacher_and_take_no_second_forward():
    model, objective = tiny_model(), SelfDistillation()
    batch = batch_of(model, [objective], mazes(), stage=0)
    view, _ = run_of(model, batch)
    assert objective.loss(view, batch[INPUTS]["self_distillation"], None).tolist() == [0.0] * 4


# --- features of what is looked at -----------------------------------------------------------------------------------
def test_features_under_boxes_of_mazes():
    """Cells of 16 of 48 pixels over 2 × 2 features: a corner is under one, the middle under all to equal parts."""
    model, objective = tiny_model(), ImageAlignment()
    row = {**mazes(1)[0], "steps": ["A1", "B2", "B1"], "boxes": [[0, 0, 16, 16], [16, 16, 32, 32], [16, 0, 32, 16]]}
    [weights] = batch_of(model, [objective], [row], stage=3)[INPUTS]["image_alignment"]["weights"]
    expected = [[1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]]
    assert torch.allclose(weights, torch.tensor(expected))


def test_the_loss_of_boxes_is_the_distance_from_weighted_means():
    before, read = random(1, 2, 3), random(1, 5, 3, seed=1)
    view = view_of(before=before, mask=torch.tensor([[True, True]]), read=read)
    view.image_mask = torch.tensor([[False, True, True, False, False]])
    weights = torch.tensor([[[0.25, 0.75], [0.0, 0.0]]])  # the second latent has no box
    target = 0.25 * read[0, 1] + 0.75 * read[0, 2]
    cosine = before[0, 0] @ target / (before[0, 0].norm() * target.norm())
    loss = {name: ImageAlignment(distance=name).loss(view, {"weights": weights}, None) for name in ("cosine", "mse")}
    assert loss["cosine"].item() == pytest.approx(1 - cosine.item(), abs=1e-6)
    assert loss["mse"].item() == pytest.approx((before[0, 0] - target).square().mean().item())


def test_features_teach_states_and_learn_nothing():
    before, read = random(1, 2, 3).requires_grad_(), random(1, 3, 3, seed=1).requires_grad_()
    view = view_of(before=before, mask=torch.tensor([[True, True]]), read=read)
    view.image_mask = torch.tensor([[True, True, False]])
    weights = torch.tensor([[[0.5, 0.5], [0.0, 0.0]]])
    ImageAlignment().loss(view, {"weights": weights}, None).sum().backward()
    assert read.grad is None
    assert (before.grad.abs().sum(dim=-1) > 0).tolist() == [[True, False]]


def test_latents_without_a_box_and_rows_without_a_picture_are_left_alone():
    model, objective = tiny_model(), ImageAlignment()
    with_box, without, text = mazes(3)
    without = {**without, "boxes": []}
    text = {**text, "images": [], "boxes": []}
    with_box = {**with_box, "boxes": [None, *with_box["boxes"][1:]]}
    batch = batch_of(model, [objective], [with_box, without, text])
    assert batch[INPUTS]["image_alignment"]["weights"].any(dim=-1).tolist() == [
        [False, True],
        [False] * 2,
        [False] * 2,
    ]
    view, run = run_of(model, batch)
    losses = objective.loss(view, batch[INPUTS]["image_alignment"], run)
    assert losses[0] > 0 and losses[1:].tolist() == [0, 0]


def test_a_helper_images_features_are_those_of_the_models_own_tower_in_groups():
    model, rows, objective = tiny_model(), mazes(2, helper_image=True), ImageAlignment(target="helper_image")
    rows[1]["helper_image"] = None
    batch = batch_of(model, [objective], rows)
    inputs = batch[INPUTS]["image_alignment"]
    processor = tiny_processor(model)
    view, run = run_of(model, batch)
    losses = objective.loss(view, inputs, run)
    picture = {"images": [rows[0]["helper_image"]], "row_id": "r"}
    pixels, _ = processor.encode_images([open_images(picture)], return_tensors="pt")
    [features] = model.get_image_features(**pixels).pooler_output  # (4, D)
    groups = features[:2].mean(dim=0), features[2:].mean(dim=0)
    expected = sum(1 - nn.functional.cosine_similarity(view.before[0, j], groups[j], dim=0) for j in (0, 1)) / 2
    assert losses.tolist() == pytest.approx([expected.item(), 0.0], abs=1e-5)
    assert not inputs["features"].requires_grad


def test_groups_of_features_in_reading_order():
    assert in_groups(5, 2).tolist() == [[1 / 3] * 3 + [0] * 2, [0] * 3 + [0.5] * 2]
    assert in_groups(1, 2).sum(axis=1).tolist() == [1, 0]
    assert stacked_weights([in_groups(2, 1), in_groups(0, 2)], 2).tolist() == [[[0.5, 0.5], [0, 0]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("target", ["boxes", "helper_image"])
def test_latents_read_their_targets_in_training_and_states_otherwise(target):
    model, rows = tiny_model(), mazes(3, helper_image=True)
    objective = ImageAlignment(target=target, latents_read="target")
    rows[1] = {**rows[1], "boxes": [], "helper_image": None}
    batch = batch_of(model, [objective], rows)
    attach(model, [objective], tiny_processor(model))
    seen = []
    objective.loss, loss = lambda view, *rest: seen.append(view) or loss(view, *rest), objective.loss
    for training in (True, False):
        model.train(training)
        model(**batch)
    taught, free = seen
    weights = batch[INPUTS]["image_alignment"]["weights"]
    features = batch[INPUTS]["image_alignment"].get("features")
    features = taught.image_features()[0] if features is None else features
    assert torch.allclose(taught.thoughts[[0, 2]], (weights @ features)[[0, 2]], atol=1e-6)
    assert torch.equal(taught.thoughts[1], taught.before[1])  # of the row that has none
    assert torch.equal(free.thoughts, free.before)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "internvl", "smolvlm", "llava_next", "gemma3"])
def test_any_vision_language_models_features_of_a_picture_are_what_its_decoder_reads(model_type):
    model, processor = thinking_pair(model_type)
    batch = dict(processor(images=[[tiny_image()]], text=["What?"], num_latents=1, return_tensors="pt"))
    images, [[ids]] = processor.encode_images([[tiny_image()]], return_tensors="pt")
    with torch.no_grad():
        read = model(**batch, output_view=True).view.image_features()[0][0]  # (P, D)
        found = Run(model, model.forward, {}).image_features(images)  # (F, D)
    assert len(found) == [*processor.image_ids(ids)].count(model.config.image_token_id)
    assert torch.allclose(found, read, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "internvl", "smolvlm"])
def test_a_box_lies_on_the_features_that_change_with_it(model_type):
    """A picture whose right half changes: the features under a box there change, on average, much more."""
    model, processor = thinking_pair(model_type)
    objective = ImageAlignment()
    objective.build(model)
    pixels = np.full((60, 120, 3), 120, dtype=np.uint8)
    changed = pixels.copy()
    changed[10:50, 70:110] = [255, 0, 40]
    read = []
    for each in (pixels, changed):
        images, _ = processor.encode_images([[Image.fromarray(each)]], return_tensors="pt")
        read.append(Run(model, model.forward, {}).image_features(images))
    change = (read[1] - read[0]).norm(dim=-1).double().numpy()  # (P,)
    row = {"images": [{"bytes": png_bytes(Image.fromarray(pixels)), "path": None}], "row_id": "r"}
    row["boxes"] = [[10, 10, 50, 50], [70, 10, 110, 50]]
    left, right = objective._under_boxes(row, [0, 1], processor) @ change
    assert right > 2 * left


def test_tiles_and_their_thumbnail_share_a_box():
    """Two tiles of 2 × 2 features beside each other and a thumbnail: the left half is the first tile, and the left of
    the thumbnail."""
    views = [*tiles(0, (1, 2), 2, 4), *tiles(8, (1, 1), 2, 4)]
    found = features_under((0, 0, 50, 50), views, (100, 50))
    assert found.tolist() == pytest.approx([1 / 8] * 4 + [0] * 4 + [1 / 4, 0, 1 / 4, 0])
    assert not features_under((0, 0, 10, 10), [View(0, 2, 2, 2, left=0.5, width=0.5)], (100, 100)).any()


@pytest.mark.parametrize(
    "options, found", [({"target": "box"}, "target='box'"), ({"distance": "l2"}, "distance='l2'")]
)
def test_unknown_options_of_an_alignment_are_refused(options, found):
    error_of(lambda: ImageAlignment(**options), f"objectives.image_alignment.{found}", "is not one of")


def test_features_that_lie_nowhere_have_no_boxes():
    model = tiny_model(projector_type="pooled_prefix", num_visual_tokens=2)
    error_of(
        lambda: ImageAlignment().build(model), "pooled_prefix computes features of the whole picture", "'helper_image'"
    )
    ImageAlignment(target="helper_image").build(model)


def test_a_box_beside_the_picture_is_refused_before_training():
    row = {**mazes(1)[0], "boxes": [[0, 0, 16, 16], [40, 0, 50, 16]]}
    model, objective = tiny_model(), ImageAlignment()
    objective.build(model)
    processor = tiny_processor(model)
    named = (row["row_id"], "'boxes'", "[40, 0, 50, 16]", "48 x 48", "step 1")
    error_of(lambda: objective.check(row, processor), *named)
    objective.check(mazes(1)[0], processor)
    error_of(lambda: objective.check({**row, "images": []}, processor), row["row_id"], "no picture")


def test_a_picture_whose_features_lie_nobody_knows_where_is_refused_before_training():
    [row], model, objective = mazes(1), tiny_model(), ImageAlignment()
    objective.layout = FeatureLayout(model.config.image_token_id, nowhere="3 image features make no square")
    processor = tiny_processor(model)
    objective.check({**row, "boxes": [None] * len(row["boxes"])}, processor)
    named = (
        row["row_id"],
        "'boxes'",
        "48 x 48 pixels it is unknown",
        "as 3 image features make no square: set objectives",
    )
    error_of(lambda: objective.check(row, processor), *named)


def test_a_helper_image_that_cannot_be_read_is_refused_before_training():
    [row], objective = mazes(1, helper_image=True), ImageAlignment(target="helper_image")
    objective.check(row, None)
    objective.check({**row, "helper_image": None}, None)
    row["helper_image"] = {"bytes": b"no picture", "path": None}
    error_of(lambda: objective.check(row, None), row["row_id"], "'helper_image'", "replace the file")


def test_no_helper_image_is_opened_where_there_are_no_latents():
    model, rows = tiny_model(), mazes(2, helper_image=True)
    rows[0]["helper_image"] = {"bytes": b"no picture", "path": None}
    objective = ImageAlignment(target="helper_image", latents_read="target")
    batch = batch_of(model, [objective], rows, stage=0)
    attach(model, [objective], tiny_processor(model))
    assert model.train()(**batch).objective_losses["image_alignment"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="'helper_image'"):
        batch_of(model, [objective], rows, stage=1)


def test_a_model_that_gives_no_features_of_further_images_learns_from_no_helpers():
    model, _ = thinking_pair("mllama")
    error_of(
        lambda: ImageAlignment(target="helper_image").build(model),
        "MllamaFor",
        "has no get_image_features: set it to 'boxes'",
    )


# --- all of them -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_rows_loss_is_the_same_alone_and_in_any_batch(name):
    """So that the mean over rows adds up over processes, accumulation and evaluation."""
    model, rows = tiny_model(), mazes(4)
    rows = [*rows[:3], {**rows[3], "steps": rows[3]["steps"][:2], "boxes": rows[3]["boxes"][:2]}]
    objective = OBJECTIVES[name]()

    def losses(some) -> list[float]:
        batch = batch_of(model, [objective], some, stage=3)
        view, run = run_of(model, batch)
        return objective.loss(view, batch[INPUTS][name], run).tolist()

    assert losses(rows) == pytest.approx([loss for row in rows for loss in losses([row])], abs=1e-4)
    assert all(loss > 0 for loss in losses(rows))


@pytest.mark.whole_on_the_first("dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "seq2seq", "qwen2_5_vl"])
def test_every_objective_trains_every_family_in_every_precision(family, dtype):
    if family == "qwen2_5_vl":
        model, processor = thinking_pair(family)
    else:
        model = tiny_seq2seq() if family == "seq2seq" else tiny_model(family)
        processor = tiny_processor(model)
    model = model.to(dtype).train()
    chosen = [OBJECTIVES[name]() for name in OBJECTIVES if family != "seq2seq" or name != "image_alignment"]
    batch = batch_of(model, chosen, mazes(2), stage=2, processor=processor)
    attached = attach(model, chosen, processor)
    pixels = {name: value.to(dtype) for name, value in batch.items() if name == "pixel_values"}
    losses = model(**{**batch, **pixels}).objective_losses
    assert losses.keys() == {objective.name for objective in chosen}
    for name, loss in losses.items():
        assert loss.shape == (2,) and (loss > 0).all() and loss.isfinite().all(), name
    sum(losses.values()).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in attached.parameters())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_objective_says_what_it_is(name):
    objective = OBJECTIVES[name]
    assert objective.name == name and objective.paper.startswith("https://arxiv.org/abs/")
    assert objective().fields and objective.paper in objective.__doc__


# --- a user's own ----------------------------------------------------------------------------------------------------
OWN = """
import torch
from mmcoconut.objectives.base import Objective


class Small(Objective):
    name = "small"

    def loss(self, view, inputs, run):
        return view.thoughts.square().mean(dim=(1, 2))


class Tokens(Small):
    name = "step_tokens"


class Nameless(Objective):
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_objectives.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_recipe_names_a_class_of_ones_own(own):
    [objective] = make_objectives({"my_objectives:Small": {"weight": [0, 2]}})
    assert (objective.name, objective.weights) == ("small", [0, 2])
    assert not [*objective_problems({"my_objectives:Small": 0.5, "step_tokens": 1.0})]


@pytest.mark.parametrize(
    "objectives, key, remedy",
    [
        ({"my_objectives:Smal": 1.0}, "objectives.my_objectives:Smal", "cannot be imported"),
        ({"no_such_module:Small": 1.0}, "objectives.no_such_module:Small", "PYTHONPATH"),
        ({"my_objectives:Nameless": 1.0}, "objectives.my_objectives:Nameless", "with a `name`"),
        ({"my_objectives:torch": 1.0}, "objectives.my_objectives:torch", "no subclass of"),
        ({"my_objectives:Small": {"size": 1}}, "objectives.my_objectives:Small.size", "no such option"),
        ({"step_tokens": 1.0, "my_objectives:Tokens": 1.0}, "objectives.my_objectives:Tokens", "name of step_tokens"),
        ({"step_token": 1.0}, "objectives.step_token", "package.module:Class"),
        ({1: 1.0}, "objectives.1", "no such objective"),
    ],
)
def test_a_class_that_is_no_objective_is_refused(objectives, key, remedy, own):
    [(found, value, said)] = objective_problems(objectives)
    assert found == key and remedy in said
