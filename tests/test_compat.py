"""Names of transformers and torch that are private or moved: each test fails by name when one of them moves again."""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import checkpoint_activations, ragged_batch, tiny_model, tiny_seq2seq
from transformers import GPT2Config, GPT2Model
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from mmcoconut import compat_mmcoconut as compat
from mmcoconut.kernels import private


ROOT = Path(__file__).resolve().parent.parent
OWNERS = (PreTrainedModel, GenerationMixin, ProcessorMixin)
SHIPPED = sorted(ROOT.glob("*_mmcoconut.py"))


@pytest.mark.parametrize("name", compat.OVERRIDDEN_METHODS)
def test_a_private_method_that_is_overridden_is_there(name):
    """`_get_num_multimodal_tokens` is looked up on the classes of processors, not on ProcessorMixin."""
    from transformers import LlavaProcessor

    assert any(hasattr(owner, name) for owner in (*OWNERS, LlavaProcessor)), f"transformers has no {name} any more"


@pytest.mark.parametrize("name", compat.CLASS_ATTRIBUTES)
def test_an_attribute_that_tells_transformers_of_a_class_is_there(name):
    assert hasattr(PreTrainedModel, name), f"PreTrainedModel has no {name} any more"


def test_the_cache_has_one_of_two_names():
    model = GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9))
    output = model(**{compat.CACHE: DynamicCache()}, input_ids=torch.tensor([[1, 2]]), use_cache=True)
    assert output[compat.CACHE].get_seq_length() == 2, f"decoders do not take their cache as {compat.CACHE}"


def test_a_configuration_says_its_attention():
    model = tiny_model()
    model.set_attn_implementation("eager")
    assert private.attention_of(model.get_decoder().config) == "eager", "config._attn_implementation moved"


def test_layers_keep_their_cache_in_checkpoints_on_demand():
    assert GradientCheckpointingLayer._can_checkpoint_with_cache is False, "_can_checkpoint_with_cache moved"
    layer = tiny_model().get_decoder().h[0]
    compat.keep_cache_in_checkpoints(layer, True)
    assert layer._can_checkpoint_with_cache


def test_a_condition_is_asserted_on_the_device():
    compat.assert_without_waiting(torch.tensor(True), "right")
    with pytest.raises(RuntimeError, match="wrong"):
        compat.assert_without_waiting(torch.tensor(False), "wrong")


def test_backward_passes_are_told_apart():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(private.current_backward_pass())
            return gradient

    for _ in range(2):
        value = torch.ones(1, requires_grad=True)
        (Probe.apply(value) + Probe.apply(value)).backward()
    first, again, second, _ = seen
    assert first == again != second, "torch._C._current_graph_task_id does not tell backward passes apart"


@pytest.mark.parametrize(
    "kept", [0, 2, torch.tensor([0, 2]), torch.tensor([[0], [2]]), torch.eye(2, 3).bool()], ids=str
)
def test_columns_are_kept_as_transformers_documents(kept):
    states = torch.arange(12.0).view(2, 3, 2)
    found = compat.slice_columns(states, kept)
    if isinstance(kept, int):
        assert torch.equal(found, states[:, 3 - kept :] if kept else states)
    elif kept.ndim == 1:
        assert torch.equal(found, states[:, [0, 2]])
    elif kept.dtype == torch.bool:
        assert torch.equal(found, torch.stack([states[0, 0], states[1, 1]]))
    else:
        assert torch.equal(found, torch.stack([states[0, :1], states[1, 2:]]))


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if path.name != "compat_mmcoconut.py"], ids=lambda p: p.name
)
def test_shipped_files_use_no_private_name_of_transformers_or_torch(path):
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    own |= {"_replace"}  # of named tuples, in Python's own documentation
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    allowed = {*compat.OVERRIDDEN_METHODS, *compat.CLASS_ATTRIBUTES}
    assert private - own <= allowed, f"{path.name} uses {private - own - allowed}: put it in compat_mmcoconut.py"
    overridden = {name for name in own - allowed if name.startswith("_") and any(hasattr(o, name) for o in OWNERS)}
    assert not {name for name in overridden if not name.startswith("__")}


def test_private_methods_of_models_that_are_overridden_are_still_called(monkeypatch):
    """One that is there and that nothing calls any more would be as bad as one that is gone."""
    called, model = [], tiny_model()
    for name in ("_set_gradient_checkpointing", "_prepare_cache_for_generation", "_init_weights"):
        own = getattr(type(model), name)

        def record(*args, own=own, name=name, **kwargs):
            called.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(type(model), name, record)
    checkpoint_activations(model)
    assert called == ["_set_gradient_checkpointing"]
    model.generate(**ragged_batch(model), max_new_tokens=1)
    assert called[1:] == ["_prepare_cache_for_generation"]
    type(model)(model.config)
    assert set(called[2:]) == {"_init_weights"}


def test_checkpointing_is_seen_whatever_its_property_is_called():
    model = tiny_model().train()
    found = [compat.is_checkpointing(model)]
    for enable in (True, False):
        checkpoint_activations(model, enable=enable)
        found.append(compat.is_checkpointing(model))
    assert found == [False, True, False]


@pytest.mark.parametrize("layers", [-1, [0, -1]])
def test_a_tower_is_asked_for_what_is_read_and_what_is_wanted(layers):
    named = [layers] if isinstance(layers, int) else layers
    expected = [*named, 1] if compat.RELEASE >= (5, 23) else True
    assert compat.hidden_states_to_return(layers, 1) == expected
    assert compat.hidden_states_to_return(layers, True) is True


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_what_shipped_files_import_from_transformers_is_there(path):
    """On the release that runs, of which the oldest supported one is another."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            module, names = importlib.import_module(node.module), [alias.name for alias in node.names]
            gone = [n for n in names if not (hasattr(module, n) or find_spec(f"{node.module}.{n}"))]
            assert not gone, f"{path.name}:{node.lineno}: {node.module} has no {gone} any more"


@pytest.mark.parametrize("make", [tiny_model, tiny_seq2seq])
@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_the_cache_is_passed_and_read_under_either_name(make, name):
    model = make()
    ids = torch.tensor([[5, 6, 7, 8]])
    names = ("decoder_input_ids", "input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    given = dict.fromkeys(names, ids)
    first = model(**given, use_cache=True)
    cache = getattr(first, name)
    assert cache is not None and cache is getattr(first, compat.CACHE_NAMES[0]) and cache is first[compat.CACHE]
    given[names[0]] = ids[:, :1]
    with torch.no_grad():
        for part in (model, model.model):
            found = part(**given, **{name: part(**dict.fromkeys(names, ids), use_cache=True)[compat.CACHE]})[0]
            whole = part(**{**given, names[0]: torch.cat([ids, ids[:, :1]], dim=1)})[0][:, -1:]
            assert (found - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_generate_takes_the_cache_under_either_name(name):
    model = tiny_model("qwen2")
    batch = ragged_batch(model)
    expected = model.generate(**batch, max_new_tokens=4)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, **{name: DynamicCache()}), expected)


def test_two_caches_are_refused():
    caches = dict.fromkeys(compat.CACHE_NAMES, DynamicCache())
    with pytest.raises(ValueError, match="two names of one argument"):
        tiny_model()(torch.tensor([[5, 6]]), **caches)
    with pytest.raises(ValueError, match="two names of one argument"):
        tiny_model().generate(torch.tensor([[5, 6]]), max_new_tokens=1, **caches)


def test_the_name_of_the_cache_is_a_field_of_transformers_outputs():
    assert compat.CACHE in BaseModelOutputWithPast.__dataclass_fields__
