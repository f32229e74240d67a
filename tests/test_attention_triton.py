"""Triton kernels of latent attention: equal to the definition and its gradients, and blind to what is not theirs.

Without a GPU they run in Triton's interpreter. It is chosen when a kernel is defined, and whatever another test module
imported before, in the same process, was defined without it: so these tests load a copy of the module for themselves.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import TEXT_CONFIGS, assert_same_gradients, loss_and_gradients, max_difference, ragged_batch, tiny_model

from mmcoconut.kernels import latent, triton_kernels
from mmcoconut.kernels.latent import PYTORCH, Kernels, Split, Step, kernels_for, latent_attention_reference


triton = pytest.importorskip("triton", reason="Triton's kernels need triton, which is made for Linux")
tl = triton.language
interpreter = importlib.import_module("triton.runtime.interpreter")

FILE = Path(__file__).resolve().parent.parent / "mmcoconut" / "kernels" / "triton_kernels.py"
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: compiled kernels cannot run")


def interpret_library(monkeypatch):
    """`tl.max` and others are kernels as well, which whoever imported triton first defined without the interpreter."""
    importlib.import_module("triton.experimental.gluon")  # a launch imports it, and it takes nothing interpreted
    for name, function in list(vars(tl.standard).items()):
        if isinstance(function, triton.JITFunction):
            interpreted = interpreter.InterpretedFunction(function.fn)
            for module in (tl.standard, tl):
                if getattr(module, name, None) is function:
                    monkeypatch.setattr(module, name, interpreted)


def mend_bfloat16(monkeypatch):
    """The interpreter holds bfloat16 as its bits: it truncates to it, and multiplies matrices of the bits as such."""
    builder = interpreter.InterpreterBuilder
    cast_impl, create_dot = builder.cast_impl, builder.create_dot

    def cast(self, source, dtype):
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast_impl(self, source, dtype)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    def dot(self, left, right, *others):
        if left.dtype.scalar == tl.bfloat16:
            left, right = (cast_impl(self, factor, tl.float32) for factor in (left, right))
        return create_dot(self, left, right, *others)

    monkeypatch.setattr(builder, "cast_impl", cast)
    monkeypatch.setattr(builder, "create_dot", dot)


def copy_of_the_module():
    spec = importlib.util.spec_from_file_location("copy_of_triton_kernels", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted_module():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        return copy_of_the_module()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request):
    return request.param


@pytest.fixture
def kernels(device, interpreted_module, monkeypatch):
    if device == "cuda":
        return triton_kernels
    interpret_library(monkeypatch)
    mend_bfloat16(monkeypatch)
    return interpreted_module


class Results(NamedTuple):
    """Of one call of each of the three functions."""

    output: torch.Tensor
    grad_query: torch.Tensor
    grad_prefix_key: torch.Tensor
    grad_prefix_value: torch.Tensor
    grad_tail_key: torch.Tensor
    grad_tail_value: torch.Tensor


def random_tensors(device, *, heads, kv_heads, queries, prefix, tail, head_dim, dtype=torch.float32) -> list:
    """Query, prefix keys and values, tail keys and values, and the output's gradient, of two rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, queries), *[(kv_heads, prefix)] * 2, *[(kv_heads, tail)] * 2, (heads, queries)]
    return [
        torch.randn(2, number, length, head_dim, generator=generator).to(device=device, dtype=dtype)
        for number, length in shapes
    ]


def left_padded_mask(device, queries, prefix, tail) -> torch.Tensor:
    """Row 0 sees all that is before it, row 1 not the first half of its prefix."""
    causal = torch.ones(queries, prefix + tail, device=device).tril(prefix + tail - queries).bool()
    mask = causal.expand(2, 1, -1, -1).clone()
    mask[1, :, :, : (prefix + 1) // 2] = False
    return mask


def split_states(tensors) -> tuple[Split, Split]:
    """Keys and values, from prefix keys and values, and tail keys and values."""
    prefix_key, prefix_value, tail_key, tail_value = tensors
    return Split(prefix_key, tail_key), Split(prefix_value, tail_value)


def key_gradients(kernels, steps: list, key, value, columns: slice) -> tuple:
    """By the kernel, from steps with their grad_output, logsumexp and delta, of the keys in these columns."""
    of_steps, *rows = zip(*steps)
    joined = latent.joined_steps(of_steps, columns)
    return kernels.key_backward(joined, key, value, *(torch.cat(parts, dim=2) for parts in rows))


def by_kernels(kernels, tensors, mask) -> Results:
    query, *states, grad_output = tensors
    key, value = split_states(states)
    prefix, total = key.prefix.shape[2], key.prefix.shape[2] + key.tail.shape[2]
    step = Step(query, query.shape[3] ** -0.5, mask)
    output, logsumexp = kernels.attention_forward(step, key, value)
    grad_query, delta = kernels.query_backward(step, key, value, grad_output, output, logsumexp)
    steps = [(step, grad_output, logsumexp, delta)]
    of_prefix = key_gradients(kernels, steps, key.prefix, value.prefix, slice(0, prefix))
    of_tail = key_gradients(kernels, steps, key.tail, value.tail, slice(prefix, total))
    return Results(output, grad_query, *of_prefix, *of_tail)


def by_definition(tensors, mask, dtype=torch.float64) -> Results:
    *inputs, grad_output = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors)
    query, *states = inputs
    output = latent_attention_reference(Step(query, query.shape[-1] ** -0.5, mask), *split_states(states))
    return Results(output, *torch.autograd.grad(output, inputs, grad_output))


SHAPES = [  # heads, kv_heads, queries, prefix, tail, head_dim
    (2, 2, 1, 7, 1, 32),
    (4, 2, 3, 65, 5, 40),
    (7, 1, 1, 129, 3, 64),
    (3, 1, 16, 70, 20, 32),  # more rows than a block holds
    (4, 1, 2, 33, 2, 80),
    (1, 1, 1, 1, 1, 96),
    (2, 1, 1, 64, 1, 128),
    (2, 1, 2, 35, 3, 256),
]


def named(shape) -> dict:
    return dict(zip(("heads", "kv_heads", "queries", "prefix", "tail", "head_dim"), shape, strict=True))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tolerance", [5e-6])
def test_output_and_five_gradients_equal_the_definition(kernels, device, shape, masked, tolerance):
    shape = named(shape)
    tensors = random_tensors(device, **shape)
    mask = left_padded_mask(device, shape["queries"], shape["prefix"], shape["tail"]) if masked else None
    found, expected = by_kernels(kernels, tensors, mask), by_definition(tensors, mask)
    for name, tensor in found._asdict().items():
        assert max_difference(tensor, getattr(expected, name)) <= tolerance, name
    assert found.output.abs().max() > 0.1


@pytest.mark.parametrize("tolerance", [2e-6])
def test_logsumexp_and_delta_are_what_they_are_named(kernels, device, tolerance):
    query, *states, grad_output = random_tensors(device, heads=2, kv_heads=2, queries=3, prefix=5, tail=3, head_dim=32)
    mask = left_padded_mask(device, 3, 5, 3)
    key, value = split_states(states)
    step = Step(query, 0.3, mask)
    output, logsumexp = kernels.attention_forward(step, key, value)
    _, delta = kernels.query_backward(step, key, value, grad_output, output, logsumexp)
    scores = query @ key.joined().transpose(-1, -2) * 0.3
    expected = scores.masked_fill(~mask, float("-inf")).logsumexp(dim=-1)
    assert max_difference(logsumexp, expected) <= tolerance
    assert max_difference(delta, (grad_output * output).sum(dim=-1)) <= tolerance * 10


@pytest.mark.parametrize("tolerance", [5e-6])
def test_gradients_of_steps_with_a_growing_tail_add_up_to_those_of_the_definition(kernels, device, tolerance):
    shape = {"heads": 4, "kv_heads": 2, "prefix": 37, "head_dim": 32}
    tensors = random_tensors(device, **shape, queries=6, tail=6)
    query, *states, grad_output = tensors
    key, value = split_states(states)
    mask = left_padded_mask(device, 6, 37, 6)
    *leaves, grad_outputs = (tensor.double().requires_grad_() for tensor in tensors)
    exact_key, exact_value = split_states(leaves[1:])
    exact, outputs, grad_query, steps = [], [], [], []
    cuts = [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 6)]  # two queries: a stride of pause tokens
    for now in cuts:

        def seen(split, end=now.stop):
            return Split(split.prefix, split.tail[:, :, :end])

        step = Step(query[:, :, now], 0.3, mask[:, :, now, : 37 + now.stop])
        grads, parts = grad_output[:, :, now], (seen(key), seen(value))
        output, logsumexp = kernels.attention_forward(step, *parts)
        of_query, delta = kernels.query_backward(step, *parts, grads, output, logsumexp)
        grad_query.append(of_query)
        outputs.append(output)
        steps.append((step, grads, logsumexp, delta))
        exact_step = step._replace(query=leaves[0][:, :, now])
        exact.append(latent_attention_reference(exact_step, seen(exact_key), seen(exact_value)))
    grad_prefix = key_gradients(kernels, steps, key.prefix, value.prefix, slice(0, 37))
    grad_tail = []
    for number, now in enumerate(cuts):  # each pass's keys, from the steps that read them
        parts, columns = (key.tail[:, :, now], value.tail[:, :, now]), slice(37 + now.start, 37 + now.stop)
        grad_tail.append(key_gradients(kernels, steps[number:], *parts, columns))
    grad_tail = [torch.cat(parts, dim=2) for parts in zip(*grad_tail)]
    found = Results(torch.cat(outputs, dim=2), torch.cat(grad_query, dim=2), *grad_prefix, *grad_tail)
    exact = torch.cat(exact, dim=2)
    expected = Results(exact, *torch.autograd.grad(exact, leaves, grad_outputs))
    for name, tensor in found._asdict().items():
        assert max_difference(tensor, getattr(expected, name)) <= tolerance, name


@pytest.mark.parametrize("dtype, factor", [(torch.bfloat16, 2), (torch.float16, 2)])
def test_error_at_low_precision_is_within_twice_that_of_the_definition(kernels, device, dtype, factor):
    shape = {"heads": 4, "kv_heads": 2, "queries": 1, "prefix": 129, "tail": 4, "head_dim": 64}
    low = random_tensors(device, **shape, dtype=dtype)
    found, expected = by_kernels(kernels, low, None), by_definition(low, None)
    own = by_definition(low, None, dtype=dtype)
    for name, tensor in found._asdict().items():
        exact = getattr(expected, name)
        assert max_difference(tensor.double(), exact) <= factor * max_difference(getattr(own, name).double(), exact)
        assert tensor.dtype == dtype


def in_a_sea_of_nan(tensor: torch.Tensor) -> torch.Tensor:
    """Equal numbers with NaN before and behind each of heads, positions and dimensions."""
    batch, heads, length, head_dim = tensor.shape
    sea = tensor.new_full((batch + 2, heads + 2, length + 2, head_dim + 16), float("nan"))
    view = sea[1:-1, 1:-1, 1:-1, 8:-8]
    return view.copy_(tensor)


@pytest.mark.parametrize("shape", [(4, 2, 3, 37, 5, 40), (3, 1, 16, 9, 1, 32)])
def test_nothing_around_the_tensors_and_no_fresh_memory_reaches_a_result(kernels, device, shape):
    shape = named(shape)
    tensors = random_tensors(device, **shape)
    mask = left_padded_mask(device, shape["queries"], shape["prefix"], shape["tail"])
    expected = by_kernels(kernels, tensors, mask)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        assert torch.empty(1, device=device).isnan()
        found = by_kernels(kernels, [in_a_sea_of_nan(tensor) for tensor in tensors], mask)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in found._asdict().items():
        assert torch.equal(tensor, getattr(expected, name)), name


def test_heads_may_lie_inside_of_positions_and_masks_be_expanded(kernels, device):
    tensors = random_tensors(device, heads=4, kv_heads=2, queries=2, prefix=9, tail=3, head_dim=32)
    mask = torch.rand(2, 1, 1, 12, device=device) > 0.3
    expected = by_kernels(kernels, tensors, mask.expand(-1, -1, 2, -1).contiguous())
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    turned[-1] = tensors[-1].transpose(-1, -2).contiguous().transpose(-1, -2)  # as autograd may give it
    found = by_kernels(kernels, turned, mask.expand(-1, -1, 2, -1))
    for name, tensor in found._asdict().items():
        assert torch.equal(tensor, getattr(expected, name)), name
    assert found.grad_prefix_key.stride() == turned[1].stride()


def test_a_query_that_may_look_nowhere_gives_zeros_and_takes_no_gradient(kernels, device):
    tensors = random_tensors(device, heads=2, kv_heads=1, queries=2, prefix=5, tail=2, head_dim=32)
    mask = left_padded_mask(device, 2, 5, 2)
    mask[0, :, 0] = False
    found = by_kernels(kernels, tensors, mask)
    assert not found.output[0, :, 0].any() and not found.grad_query[0, :, 0].any()
    tensors[-1][0, :, 0] = 0  # what the definition makes of that query does not reach the others
    expected = by_definition(tensors, mask)
    for name, tensor in found._asdict().items():
        if name != "output":
            assert max_difference(tensor, getattr(expected, name)) <= 5e-6, name


def test_two_calls_are_equal_to_the_bit(kernels, device):
    tensors = random_tensors(device, heads=4, kv_heads=2, queries=1, prefix=129, tail=2, head_dim=32)
    once, again = (by_kernels(kernels, tensors, None) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


@pytest.mark.parametrize("programs, num_splits", [(1, 1), (8, 2), (1000, 5)])
@pytest.mark.parametrize("tolerance", [5e-6])
def test_number_of_splits_changes_no_more_than_rounding(kernels, device, monkeypatch, programs, num_splits, tolerance):
    tensors = random_tensors(device, heads=4, kv_heads=2, queries=1, prefix=300, tail=2, head_dim=32)
    monkeypatch.setattr(kernels, "FULL_GRID", programs)
    assert kernels.plan_of(*tensors[:2]).num_splits == num_splits
    mask = left_padded_mask(device, 1, 300, 2)
    found, expected = by_kernels(kernels, tensors, mask), by_definition(tensors, mask)
    for name in ("output", "grad_query"):
        assert max_difference(getattr(found, name), getattr(expected, name)) <= tolerance, name


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 65, 300, 3300, 10**6])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_splits_cover_the_prefix_and_none_is_empty(kernels, batch, prefix):
    query, key = (torch.empty(batch, heads, length, 64, device="meta") for heads, length in ((8, 1), (2, prefix)))
    plan = kernels.plan_of(query, key)
    assert plan.num_splits <= kernels.MAX_SPLITS and plan.split_length % plan.blocks["KEYS"] == 0
    assert plan.num_splits * plan.split_length >= prefix
    assert prefix == 0 or (plan.num_splits - 1) * plan.split_length < prefix


def test_a_prefix_of_no_keys_leaves_the_tail(kernels, device):
    tensors = random_tensors(device, heads=2, kv_heads=1, queries=1, prefix=0, tail=3, head_dim=32)
    found, expected = by_kernels(kernels, tensors, None), by_definition(tensors, None)
    assert max_difference(found.output, expected.output) <= 5e-6
    assert max_difference(found.grad_tail_key, expected.grad_tail_key) <= 5e-6


def inputs_of(device="cpu", dtype=torch.float32, head_dim=32):
    shape = {"heads": 2, "kv_heads": 1, "queries": 1, "prefix": 3, "tail": 1, "head_dim": head_dim}
    return random_tensors(device, **shape, dtype=dtype)[:-1]


def test_reason_against_names_what_is_in_the_way(kernels, device):
    reason_against = kernels.reason_against
    assert reason_against(*inputs_of(device)) is None
    assert "float64" in reason_against(*inputs_of(device, torch.float64))
    assert "320" in reason_against(*inputs_of(device, head_dim=320))
    query, *others = inputs_of(device)
    assert "float16" in reason_against(query.half(), *others)
    *others, tail_value = inputs_of(device)
    assert "16" in reason_against(*others, tail_value[..., :16])


def test_reason_against_names_a_triton_that_is_too_old(interpreted_module, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert "3.2.0" in interpreted_module.reason_against(*inputs_of())


def test_interpreted_kernels_leave_bfloat16_to_the_definition(interpreted_module):
    assert "bfloat16" in interpreted_module.reason_against(*inputs_of(dtype=torch.bfloat16))


def test_compiled_kernels_leave_tensors_on_the_cpu_to_the_definition():
    assert "on cpu" in triton_kernels.reason_against(*inputs_of())


def test_without_triton_the_module_is_imported_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert copy_of_the_module().reason_against(*inputs_of()) == "triton is not installed"


@pytest.mark.parametrize("text, num_layers, tolerance", [("gpt2", 1, 1e-5), ("qwen2", 2, 1e-5)])
def test_training_loop_over_these_kernels_equals_the_one_over_pytorch(
    kernels, device, monkeypatch, text, num_layers, tolerance
):
    config = TEXT_CONFIGS[text]()
    config.num_hidden_layers = num_layers
    model = tiny_model(config).train().to(device)
    model.get_decoder().set_attn_implementation("latent")
    batch = {name: value.to(device) for name, value in ragged_batch(model).items()}
    found, served = [], []
    of_triton = Kernels(kernels.attention_forward, kernels.query_backward, kernels.key_backward)
    for chosen in (PYTORCH, of_triton):
        monkeypatch.setattr(latent, "kernels_for", lambda *_, chosen=chosen, **__: served.append(1) or chosen)
        found.append(loss_and_gradients(model, batch))
    assert len(served) > 5 * num_layers
    assert found[1][0] == pytest.approx(found[0][0], abs=tolerance)
    assert_same_gradients(found[1][1], found[0][1], tolerance)


def test_what_these_kernels_cannot_serve_goes_to_pytorch_with_the_reason(monkeypatch):
    said = []
    monkeypatch.setattr(latent.logger, "warning_once", said.append)
    tensors = [torch.empty(1, 2, 3, 8, device="meta")] * 5
    assert kernels_for(*tensors) is PYTORCH
    assert kernels_for(*tensors, has_dropout=True) is PYTORCH
    assert "on meta, not on a GPU" in said[0] and "dropout" in said[1]
    assert kernels_for(*[torch.empty(1, 2, 3, 8)] * 5) is PYTORCH
    assert len(said) == 2  # on a CPU nothing is amiss
