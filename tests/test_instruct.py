"""Instruct language models in from_backbones: their chat template with thoughts, and the token that ends a turn."""

import pytest
import torch
from test_conversations import PER_TURN, TURNS, collator, messages_of, real_ids, rows_of
from test_train import TINY
from tiny import HIDDEN_SIZE, TEXT_CONFIGS, VISION_CONFIGS, padded, tiny_image, tiny_processor, tiny_tokenizer
from transformers import AutoModelForCausalLM

import train_hf
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.audit import command as audit
from mmcoconut.build import from_backbones
from mmcoconut.build.processors import CHAT_TEMPLATE, settle_template
from mmcoconut.build.tokens import add_special_tokens, turn_end_of
from mmcoconut.chat_template_mmcoconut import user_message
from mmcoconut.data.conversations import further_turn
from mmcoconut.errors import RecipeError
from mmcoconut.evaluation import evaluate as evaluation
from mmcoconut.evaluation.answering import Answerer
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.training.collator import IGNORED, encode_answer


# Layouts of instruct models, written anew and shortened: of Qwen2.5 and SmolLM2 (a system prompt of its own), Llama 3
# (the bos token, white space cut off), Gemma (roles must alternate, other names of them), Qwen3 (the last answer gets
# an empty reasoning), Mistral (spaces, and eos itself), and one that ends no turn.
CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (message['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
REASONING = CHATML.replace(
    "message['role'] + '\n' +",
    "message['role'] + '\n' + ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' and loop.last else '') +",
)
SPACED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
ENDLESS = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
ENDLESS += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
LLAMA3_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
# By name: template, added tokens, its turn's end, and what stands around the user's text and before an answer.
KINDS = {
    "chatml": (
        CHATML,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        f"<s>{LLAMA3_HEADER.format('user')}{{}}<|eot_id|>{LLAMA3_HEADER.format('assistant')}",
    ),
    "alternating": (
        ALTERNATING,
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        "<s><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    ),
    "reasoning": (
        REASONING,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "spaced": (SPACED, ("[INST]", "[/INST]"), "<|endoftext|>", "<s>[INST] {} [/INST]"),
    "endless": (ENDLESS, (), "<|endoftext|>", "user: {}\nassistant: "),
}
THOUGHTS = "<|start-latent|><|latent|><|latent|><|end-latent|>"


def instruct_tokenizer(kind: str):
    """A byte-level BPE whose end of a text is not what its template ends a turn with."""
    template, added, _, _ = KINDS[kind]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "extra_special_tokens": list(added)})
    tokenizer.chat_template = template
    return tokenizer


def instruct_pair(kind: str, *, chat_template=None, **options):
    """Model and processor of a tokenizer of this kind."""
    torch.manual_seed(0)
    parts = {"vision_config": VISION_CONFIGS["clip"](), "text_config": TEXT_CONFIGS["qwen2"]()}
    model = from_backbones(**parts, tokenizer=instruct_tokenizer(kind), initializer_range=0.15)
    return model, tiny_processor(
        model, tokenizer=instruct_tokenizer(kind), chat_template=chat_template, num_latents=PER_TURN, **options
    )


@pytest.mark.parametrize("markers, ending", [("both", ("start", "end")), ("start", ("start",)), ("none", ())])
@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_markers_stand_in_prompts_without_latents(kind, markers, ending):
    own = "chatml" if kind == "plain" else kind
    _, processor = instruct_pair(own, chat_template="plain" if kind == "plain" else None, markers=markers)
    ids = processor.encode_prompt("What?", num_latents=0)
    wanted = processor.tokenizer.convert_tokens_to_ids([f"<|{side}-latent|>" for side in ending])
    assert ids[len(ids) - len(wanted) :] == wanted and processor.latent_token_id not in ids
    both = {*processor.tokenizer.convert_tokens_to_ids(["<|start-latent|>", "<|end-latent|>"])}
    assert len([token for token in ids if token in both]) == len(ending)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("num_images", [0, 2])
def test_prompt_is_the_template_with_images_and_thoughts(kind, num_images):
    model, processor = instruct_pair(kind)
    ids = processor(images=[[tiny_image()] * num_images], text=["What?"], rendered=False)["input_ids"][0]
    asked = "<image>" * (model.config.image_seq_length * num_images) + "What?"
    assert processor.tokenizer.decode(ids) == KINDS[kind][3].format(asked) + THOUGHTS
    plain = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}],
        chat_template=KINDS[kind][0],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert KINDS[kind][3].format(asked) == plain


def test_answers_end_as_the_turns_of_the_template(kind):
    model, processor = instruct_pair(kind)
    end = processor.tokenizer.convert_tokens_to_ids(KINDS[kind][2])
    assert processor.tokenizer.eos_token_id == end == encode_answer(processor, "a")[-1]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert end in ends and tiny_tokenizer().eos_token_id in ends


@pytest.mark.parametrize("num_images", [0, 1])
@pytest.mark.parametrize("num_turns", [1, 3])
def test_row_of_training_is_the_chat_and_learns_answers_and_their_ends(kind, num_turns, num_images):
    _, processor = instruct_pair(kind)
    (row,) = rows_of(num_turns, num_images=num_images)
    batch = collator(processor, max_length=None)([row])
    options = {"tokenize": True, "return_dict": True, "num_latents": PER_TURN}
    prompt = processor.apply_chat_template(messages_of(row)[:-1], add_generation_prompt=True, **options)
    last = TURNS[num_turns - 1][1]
    assert real_ids(batch, 0) == [*prompt["input_ids"][0], *encode_answer(processor, last)]
    labels = batch["labels"][0]
    learnt = processor.tokenizer.decode(labels[labels != IGNORED])
    end = "" if kind == "endless" else KINDS[kind][2]  # whose earlier answers go on in the next line
    earlier = "".join(f"### {answer}{end}" for _, answer in TURNS[: num_turns - 1])
    assert learnt == f"{earlier}### {last}{KINDS[kind][2]}"
    assert (batch["input_ids"] == processor.latent_token_id).sum() == num_turns * PER_TURN


def test_assistant_mask_covers_answers_and_their_ends():
    _, processor = instruct_pair("llama3")
    (row,) = rows_of(2)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    chat = processor.apply_chat_template(messages_of(row), **options)
    ids = torch.tensor(chat["input_ids"])[torch.tensor(chat["assistant_masks"]).bool()]
    assert processor.tokenizer.decode(ids) == "### red<|eot_id|>### a cube<|eot_id|>"


def test_system_message_takes_the_place_of_the_template_s():
    _, processor = instruct_pair("chatml")
    chat = [{"role": "system", "content": "Be short."}, user_message("What?", 1)]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    head = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\n"
    assert text == head + THOUGHTS
    with pytest.raises(Exception, match="No system role"):
        instruct_pair("alternating")[1].apply_chat_template(chat)


def test_user_text_cannot_write_the_template_s_tokens(kind):
    _, processor = instruct_pair(kind)
    text = "".join(processor.tokenizer.all_special_tokens) + "?"
    plain, attacked = (processor.encode_prompt(question, num_images=1) for question in ("?", text))
    special = {*processor.tokenizer.all_special_ids}
    assert [token for token in attacked if token in special] == [token for token in plain if token in special]
    assert text in processor.tokenizer.decode(attacked)


def test_processor_and_ends_survive_saving(kind, tmp_path):
    model, processor = instruct_pair(kind)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    loaded = MMCoconutProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.eos_token == KINDS[kind][2]
    assert loaded.encode_prompt("What?", history=[("Q", "A")]) == processor.encode_prompt(
        "What?", history=[("Q", "A")]
    )
    prompt = processor.apply_chat_template([user_message("What?")], add_generation_prompt=True)
    rendered = (processor(text=text, rendered=None)["input_ids"] for text in (prompt, str(prompt)))
    assert [*rendered] == [[processor.encode_prompt("What?", num_images=0)]] * 2


def test_evaluation_stops_at_the_end_of_the_turn():
    model, processor = instruct_pair("chatml")
    rows = rows_of(3, 1)
    answerer = Answerer(model, processor, max_new_tokens=4)
    prompts = collator(processor).prompts(rows)
    assert torch.equal(answerer.inputs(rows)["input_ids"], prompts["input_ids"])
    model.lm_head = torch.nn.Linear(HIDDEN_SIZE, len(processor.tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.constant_(model.lm_head.bias[processor.tokenizer.convert_tokens_to_ids("<|im_end|>")], 100.0)
    assert [line["generated_tokens"] for line in answerer.answer(rows)] == [1, 1]


@pytest.mark.parametrize("ending", ["<|im_end|>", "<|endoftext|>"])
def test_chat_goes_on_behind_either_end(ending):
    _, processor = instruct_pair("chatml")
    images = [[tiny_image()], []]
    prompts = processor(images=images, text=["Which?", "What shape?"], return_tensors="pt", rendered=False)
    tokenizer, answers = processor.tokenizer, ["red", "a cube"]
    ids = [[*encode_answer(processor, answer)[:-1], tokenizer.convert_tokens_to_ids(ending)] for answer in answers]
    written = padded(ids, padding="right", pad_token_id=tokenizer.pad_token_id)["input_ids"]
    sequences = torch.cat([prompts["input_ids"], written], dim=1)
    further = further_turn(processor, sequences, prompts["attention_mask"], ["Why?", "And?"])
    for row, (first, answer, then) in enumerate(zip(["Which?", "What shape?"], answers, ["Why?", "And?"])):
        whole = processor.encode_prompt(then, num_images=1 - row, history=[(first, answer)])
        found = real_ids(further, row)
        if ending == "<|endoftext|>":  # stays where the model wrote it
            found.remove(tokenizer.convert_tokens_to_ids(ending))
        assert found == whole


def test_plain_layout_and_templates_of_callers():
    model, plain = instruct_pair("chatml", chat_template="plain")
    assert plain.chat_template == CHAT_TEMPLATE.replace("BOS", "''")
    assert plain.tokenizer.eos_token == "<|endoftext|>"
    assert plain.tokenizer.decode(plain.encode_prompt("Q", num_images=0)) == f"Q\n{THOUGHTS}"
    assert instruct_pair("chatml", chat_template="own")[1].chat_template == instruct_pair("chatml")[1].chat_template
    template = "{{ messages[0]['content'][0]['text'] }}{{ '<|latent|>' * num_latents }}"
    assert instruct_pair("chatml", chat_template=template)[1].chat_template == template
    assert tiny_processor(model, tokenizer=plain.tokenizer).tokenizer.eos_token == "<|im_end|>"


def test_own_template_must_exist():
    tokenizer = tiny_tokenizer()
    add_special_tokens(tokenizer)
    assert settle_template(None, tokenizer) == settle_template("plain", tokenizer)
    with pytest.raises(ValueError, match="chat_template='own', but the tokenizer has none: give 'plain'"):
        settle_template("own", tokenizer)


@pytest.mark.parametrize(
    "template, problem",
    [
        (CHATML.replace("in messages %}", "in messages[-1:] %}"), "1 times thoughts in a chat of two turns"),
        (CHATML.replace("message['content']", "(message['content'] | upper)"), "writes <image> 0 times per image"),
        (CHATML.replace("message['content']", "message['content'][:-1]"), "an earlier answer without"),
        ("{{ raise_exception('Only tools here') }}", r"refuses an ordinary chat \(Only tools here\)"),
        ("{% for message in messages %}{{ message['content'] * 2 }}{% endfor %}", "writes <image> 2 times"),
    ],
)
def test_template_that_does_not_write_a_chat_is_refused(template, problem):
    tokenizer = instruct_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"{problem}.*: give (a )?chat_template="):
        settle_template(None, tokenizer)


def test_model_of_a_template_that_refuses_chats_says_how_to_leave_it_out():
    tokenizer = instruct_tokenizer("chatml")
    tokenizer.chat_template = "{{ raise_exception('Only tools here') }}"
    parts = {"vision_config": VISION_CONFIGS["clip"](), "text_config": TEXT_CONFIGS["qwen2"]()}
    with pytest.raises(ValueError, match=r"an ordinary chat \(Only tools here\): set tokenizer.chat_template ="):
        from_backbones(**parts, tokenizer=tokenizer)
    tokenizer.chat_template = None
    assert from_backbones(**parts, tokenizer=tokenizer).generation_config.eos_token_id == tokenizer.eos_token_id


def test_tokenizer_of_a_checkpoint_has_its_thoughts_already(kind, tmp_path):
    model, processor = instruct_pair(kind)
    plain = tiny_processor(model, tokenizer=instruct_tokenizer(kind), chat_template="plain")
    for made in (processor, plain):
        made.save_pretrained(tmp_path)
        loaded = MMCoconutProcessor.from_pretrained(tmp_path).tokenizer
        again = tiny_processor(model, tokenizer=loaded)
        assert (again.chat_template, again.tokenizer.eos_token) == (made.chat_template, made.tokenizer.eos_token)


def test_several_templates_of_one_tokenizer(tmp_path):
    tokenizer = instruct_tokenizer("chatml")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    assert turn_end_of(tokenizer) == "<|im_end|>"
    model, _ = instruct_pair("chatml")
    processor = tiny_processor(model, tokenizer=tokenizer)
    assert processor.chat_template.count(CHATML) == 1
    processor.save_pretrained(tmp_path)
    assert MMCoconutProcessor.from_pretrained(tmp_path).chat_template == processor.chat_template


def test_ends_of_pretrained_weights_are_kept(tmp_path):
    """As in Qwen2.5-Instruct, whose generation stops at two tokens."""
    tokenizer = instruct_tokenizer("chatml")
    causal_lm = AutoModelForCausalLM.from_config(TEXT_CONFIGS["qwen2"](vocab_size=len(tokenizer)))
    causal_lm.generation_config.eos_token_id = [7, 0]
    for part in (causal_lm, tokenizer):
        part.save_pretrained(tmp_path)
    model = from_backbones(vision_config=VISION_CONFIGS["clip"](), text=str(tmp_path))
    assert model.generation_config.eos_token_id == [7, 0, tokenizer.convert_tokens_to_ids("<|im_end|>")]


# Recipes


@pytest.fixture
def recipe(tmp_path):
    """TINY with the tokenizer of an instruct model."""
    instruct_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "r.yaml"
    text = TINY.replace("tokenizer: train", f"tokenizer: {tmp_path / 'tokenizer'}")
    path.write_text(text.replace("max_position_embeddings: 64", "max_position_embeddings: 256"))
    return str(path)


@pytest.mark.parametrize("chat_template, end", [(None, "<|im_end|>"), ("plain", "<|endoftext|>")])
def test_recipe_trains_on_the_template(recipe, chat_template, end, tmp_path):
    words = [] if chat_template is None else ["--chat_template", chat_template]
    run = str(tmp_path / "run")
    results = train_hf.main([recipe, "--output_dir", run, "--max_train_samples", "8", *words])
    assert results["stages"][-1]["n"] == 8
    processor = MMCoconutProcessor.from_pretrained(run)
    assert processor.tokenizer.eos_token == end
    assert ("<|im_start|>" in processor.chat_template) == (chat_template is None)
    options = ["--model", run, "--split", "validation", "--output_dir"]
    evaluated = evaluation.main([*options, str(tmp_path / "evaluation")])
    assert evaluated["n"] == 8
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    audit.main([*options, str(tmp_path / "audit"), "--max_samples", "4"])
    assert (tmp_path / "audit" / "report.html").is_file()


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_answers_in_the_template_are_rewarded(recipe, objective, tmp_path):
    pytest.importorskip("trl")
    words = ["--objective", objective, "--rl", "{num_generations: 2}", "--rewards", "{exact_match: 1.0}"]
    run = str(tmp_path / "run")
    results = train_hf.main([recipe, "--output_dir", run, *words, "--max_steps", "2", "--max_train_samples", "8"])
    assert results["train_steps"] == 2


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--tokenizer", "train", "--chat_template", "own"], "a new tokenizer has none"),
        (["--chat_template", "chatml"], "choose one of own, plain"),
        (["--model", "somewhere", "--chat_template", "plain"], "the checkpoint `model` has its own"),
    ],
)
def test_recipe_says_which_template_it_cannot_have(recipe, words, problem):
    with pytest.raises(RecipeError, match=problem):
        parse_recipe([recipe, *words])
