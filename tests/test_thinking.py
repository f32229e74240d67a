"""The thinking decoder alone: the plain class without latents, its definition with them, what its cache remembers."""

import copy
import pickle

import pytest
import torch
from tiny import CROSS_DECODERS, TEXT_CONFIGS, batch_of, max_difference, mistral_config, tiny_model, words
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from mmcoconut.caches_mmcoconut import ThoughtState
from mmcoconut.compat_mmcoconut import CACHE
from mmcoconut.passes_mmcoconut import column_lists
from mmcoconut.thinking_mmcoconut import ThinkingDecoder, Thoughts, give_thoughts, think_uncached, thinking


DECODERS = ("gpt2", "qwen2", "llama", "mistral", "marian", "bart")
VOCABULARY = 100


def config_of(name: str):
    if name == "mistral":
        return mistral_config()
    padding = {"pad_token_id": 0} if name in CROSS_DECODERS else {}
    return TEXT_CONFIGS[name](vocab_size=VOCABULARY, **padding)


def plain_decoder(name: str):
    """A decoder of random weights as transformers makes it; of an encoder-decoder its decoder."""
    config = config_of(name)
    if name in CROSS_DECODERS:
        config.num_hidden_layers = config.decoder_layers
        return AutoModelForCausalLM.from_config(config).get_decoder().eval()
    return AutoModel.from_config(config).eval()


def inputs_of(decoder, num_columns: int = 9) -> dict:
    """Embeddings of two rows, and their latents, which stand in different columns."""
    ids = torch.randint(1, decoder.config.vocab_size, (2, num_columns))
    latents = torch.zeros(2, num_columns, dtype=torch.bool)
    latents[0, [2, 3]] = latents[1, [3, num_columns - 1]] = True
    return {"ids": ids, "embeds": decoder.get_input_embeddings()(ids).detach(), "latents": latents}


def located(latents: torch.Tensor, **options) -> Thoughts:
    """Thoughts whose columns are known, as the definition wants them."""
    return Thoughts(latents, feed=lambda state: state, columns=column_lists(latents)[0], **options)


@pytest.mark.parametrize("name", DECODERS)
def test_outside_of_thinking_it_is_the_decoders_own_forward(name):
    plain = plain_decoder(name)
    decoder, given = give_thoughts(copy.deepcopy(plain)), inputs_of(plain)
    assert isinstance(decoder, ThinkingDecoder) and isinstance(decoder, type(plain))
    assert str(type(decoder)) == str(type(plain)) and decoder.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for inputs in ({"input_ids": given["ids"]}, {"inputs_embeds": given["embeds"]}):
            outputs = decoder(**inputs, output_hidden_states=True, use_cache=True)
            expected = plain(**inputs, output_hidden_states=True, use_cache=True)
            assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
            assert len(outputs.hidden_states) == len(expected.hidden_states) > 1
            assert outputs.get(CACHE).get_seq_length() == expected.get(CACHE).get_seq_length()
        assert isinstance(decoder(given["ids"], return_dict=False), tuple)


WAYS = [(name, by) for name in DECODERS for by in ("ids", "embeddings")]
WAYS += [(name, "embeddings and encoder states") for name in CROSS_DECODERS]


@pytest.mark.parametrize("name, by", WAYS)
@pytest.mark.parametrize("tolerance", [1e-5])
def test_values_and_gradients_equal_the_definition(name, by, tolerance):
    decoder = give_thoughts(plain_decoder(name))
    given, found = inputs_of(decoder), []
    read = {"encoder_hidden_states": torch.randn(2, 5, decoder.config.hidden_size)} if "states" in by else {}
    for cached in (True, False):
        decoder.zero_grad()
        if cached:
            inputs = {"input_ids": given["ids"]} if by == "ids" else {"inputs_embeds": given["embeds"]}
            with thinking(Thoughts(given["latents"], feed=lambda state: state)):
                states = decoder(**inputs, **read).last_hidden_state
        else:
            states, _ = think_uncached(decoder, given["embeds"], located(given["latents"]), **read)
        states.square().sum().backward()
        gradients = {key: weight.grad.clone() for key, weight in decoder.named_parameters() if weight.grad is not None}
        found.append((states.detach(), gradients))
    (states, gradients), (expected, of_definition) = found
    assert max_difference(states, expected) <= tolerance
    shared = gradients.keys() & of_definition.keys()
    assert len(shared) > 5
    assert max(max_difference(gradients[key], of_definition[key]) for key in shared if "embed" not in key) <= 1e-3
    with torch.no_grad():
        untouched = decoder(inputs_embeds=given["embeds"], **read).last_hidden_state
    assert max_difference(expected, untouched) > 100 * tolerance  # or thoughts would change nothing


@pytest.mark.parametrize("name", ["gpt2", "marian"])
def test_it_can_be_pickled_and_copied_and_thinks_on(name):
    decoder = give_thoughts(plain_decoder(name))
    given = inputs_of(decoder)
    results = []
    for each in (decoder, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        with torch.no_grad(), thinking(Thoughts(given["latents"], feed=lambda state: state)):
            results.append(each(inputs_embeds=given["embeds"]).last_hidden_state)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def filled_cache(decoder, given: dict):
    with torch.no_grad(), thinking(Thoughts(given["latents"], feed=lambda state: state)):
        outputs = decoder(inputs_embeds=given["embeds"], use_cache=True)
    return outputs.get(CACHE), outputs.last_hidden_state[:, -1]


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_what_a_cache_remembers_goes_where_its_rows_go(name):
    decoder = give_thoughts(plain_decoder(name))
    cache, state = filled_cache(decoder, inputs_of(decoder, num_columns=8 if name == "gpt2" else 5))
    assert isinstance(cache, DynamicCache) and len(cache) == decoder.config.num_hidden_layers

    def known(of):
        return ThoughtState.of(of).state_after(of)

    assert torch.equal(known(cache), state)
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(known(copied), state.flip(0)) and torch.equal(known(cache), state)
    copied.batch_repeat_interleave(2)
    assert torch.equal(known(copied), state.flip(0).repeat_interleave(2, dim=0))
    copied.batch_select_indices(torch.tensor([0]))
    assert torch.equal(known(copied), state[1:])
    cropped = pickle.loads(pickle.dumps(cache))
    assert torch.equal(known(cropped), state)
    cropped.crop(-1)
    assert known(cropped) is None
    cache.reset()
    assert known(cache) is None


def test_reading_what_a_cache_remembers_changes_nothing():
    fresh = DynamicCache()
    kind = type(fresh)
    assert ThoughtState.of(fresh).state_after(fresh) is None and ThoughtState.of(None).attention_mask is None
    assert type(fresh) is kind and not fresh.layers
    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert ThoughtState.of(pair).encoder_inputs == {} and type(pair) is EncoderDecoderCache


def test_a_new_schedule_needs_no_line_in_the_loop():
    """One that reads every latent's own embedding twice as large, and feeds nothing back."""
    decoder = give_thoughts(plain_decoder("gpt2"))
    given = inputs_of(decoder)

    def doubled(passes, thoughts):
        embeds = passes.inputs["inputs_embeds"]
        passes.run(torch.where(thoughts.latents[..., None], 2 * embeds, embeds), 0)

    with torch.no_grad():
        with thinking(Thoughts(given["latents"], feed=None, schedule=doubled)):
            found = decoder(inputs_embeds=given["embeds"]).last_hidden_state
        embeds = torch.where(given["latents"][..., None], 2 * given["embeds"], given["embeds"])
        assert torch.equal(found, decoder(inputs_embeds=embeds).last_hidden_state)


def test_threads_do_not_read_each_others_latents():
    """What `thinking` says is known in the thread that says it."""
    import threading

    decoder = give_thoughts(plain_decoder("gpt2"))
    given, results = inputs_of(decoder), {}

    def run():
        with torch.no_grad():
            results["other"] = decoder(inputs_embeds=given["embeds"]).last_hidden_state

    with torch.no_grad():
        plain = decoder(inputs_embeds=given["embeds"]).last_hidden_state
    with thinking(Thoughts(given["latents"], feed=lambda state: state)):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert torch.equal(results["other"], plain)


def test_a_cropped_mask_does_not_hide_what_is_written_later():
    """A latent that was left out is cropped away, and tokens stand in its column afterwards."""
    model = tiny_model("gpt2")
    latent, start = model.config.latent_token_id, model.config.start_latent_token_id
    first = torch.tensor([[*words(5, 1), start, latent, latent, *words(2, 2)]])
    mask = torch.ones_like(first)
    mask[0, 7] = 0
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=first, attention_mask=mask, **{CACHE: cache})
        cache.crop(5 - first.shape[1])
        middle, last = torch.tensor([words(6, 3)]), torch.tensor([words(3, 4)])
        model(input_ids=middle, attention_mask=torch.ones(1, 11), **{CACHE: cache})
        found = model(input_ids=last, attention_mask=torch.ones(1, 14), **{CACHE: cache}).logits
        whole = model(input_ids=torch.cat([first[:, :5], middle, last], dim=1), use_cache=False).logits
    assert max_difference(found, whole[:, -3:]) <= 1e-5


def test_arguments_of_the_base_model_may_be_given_by_position():
    model = tiny_model("gpt2")
    ids, mask = torch.tensor([words(5, 1)]), torch.ones(1, 5, dtype=torch.long)
    positions = torch.arange(5)[None] + 2
    with torch.no_grad():
        found = model(ids, None, mask, positions).logits
        assert torch.equal(found, model(input_ids=ids, attention_mask=mask, position_ids=positions).logits)


def test_placeholders_without_images_are_refused_in_a_later_turn_too():
    model = tiny_model("bart")
    image = model.config.image_token_id
    pixels = batch_of(model, [[image, *words(3, 1)]])["pixel_values"]
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[image, *words(3, 1)]]), pixel_values=pixels, use_cache=True)
        with pytest.raises(ValueError, match="1 <image> placeholders .* 0 image features"):
            model(input_ids=torch.tensor([[*words(2, 2), image, *words(1, 3)]]), **{CACHE: first.get(CACHE)})


def test_a_call_without_inputs_is_refused_by_the_decoder_itself():
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        give_thoughts(plain_decoder("llama"))()
