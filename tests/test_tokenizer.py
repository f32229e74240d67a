"""A tokenizer trained on a data set's texts gives the same ids wherever it is loaded, also from its two BPE files."""

import json
import os
import pickle
import subprocess
import sys

import pytest
from tiny import tiny_model, tiny_processor
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, CLIPImageProcessorPil

from mmcoconut.build.processors import chat_template_for
from mmcoconut.build.tokens import add_special_tokens
from mmcoconut.configuration_mmcoconut import PAD_TOKEN, SPECIAL_TOKENS
from mmcoconut.data.tokenizer import EOS_TOKEN, WORD, train_tokenizer
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.training.collator import encode_target


CAPTIONS = [
    "What is the color?\nred\ngreen\n### red",
    "Two young guys with shaggy hair look at their hands .",
    "A man's dog runs , ## fast , on the grün beach .",
] * 2
# Seen and unseen words, runs of spaces and lines, bytes outside the alphabet, and the marker that merges start with.
TEXTS = [*CAPTIONS, "green\n### blue", "  two\n\n men\t run", "日本 naïve 🐕", EOS_TOKEN, f"red{EOS_TOKEN}", ""]
LOAD = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.load(sys.stdin)
ids = [tokenizer(text)["input_ids"] for text in texts]
print(json.dumps([ids, [tokenizer.decode(row) for row in ids], tokenizer.eos_token_id, "mmcoconut" in sys.modules]))
"""


@pytest.fixture
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=400)


def ids_of(tokenizer) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_one_word_step_with_its_line_end_is_one_token(tokenizer):
    assert [len(tokenizer(text)["input_ids"]) for text in ("red\n", "green\n", "red\ngreen\n### red")] == [1, 1, 4]


def test_any_text_is_encoded_without_loss(tokenizer):
    assert [tokenizer.decode(ids) for ids in ids_of(tokenizer)] == TEXTS


@pytest.mark.slow
def test_a_fresh_process_without_this_package_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [ids_of(tokenizer), TEXTS, tokenizer.eos_token_id, False]


def test_vocabulary_and_merges_rebuild_the_bpe(tokenizer, tmp_path):
    files = {os.path.basename(file) for file in tokenizer.save_pretrained(tmp_path)}
    assert {"tokenizer.json", "vocab.json", "merges.txt"} <= files
    assert json.loads((tmp_path / "vocab.json").read_text("utf-8")) == tokenizer.get_vocab()
    assert "# #\n" in (tmp_path / "merges.txt").read_text("utf-8")
    bpe = Tokenizer(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORD), "isolated"), bytes_of_words])
    bpe.add_special_tokens([EOS_TOKEN])
    assert [bpe.encode(text).ids for text in TEXTS] == ids_of(tokenizer)


def test_a_processor_saves_both_files_and_the_ids_of_its_special_tokens(tmp_path):
    model = tiny_model()
    processor = tiny_processor(model)
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert ids_of(loaded) == ids_of(processor.tokenizer)
    added = loaded.get_vocab().keys() - vocabulary.keys()  # after the BPE's own, as tokenizer.json has them
    assert {loaded.convert_ids_to_tokens(id) for id in range(len(vocabulary), len(loaded))} == added
    assert loaded.convert_tokens_to_ids("<|latent|>") == model.config.latent_token_id


SPECIAL_STRINGS = (*SPECIAL_TOKENS, PAD_TOKEN, EOS_TOKEN)


@pytest.fixture(scope="module")
def processor_of_marked_texts():
    """Of a tokenizer that was trained on texts which hold the strings of special tokens, often."""
    texts = [
        f"Go {token} on{token}{token}, {token}{other}\n" for token in SPECIAL_STRINGS for other in SPECIAL_STRINGS
    ]
    tokenizer = train_tokenizer(texts * 3, vocab_size=1000)
    add_special_tokens(tokenizer)
    return MMCoconutProcessor(CLIPImageProcessorPil(), tokenizer, 3, chat_template=chat_template_for(tokenizer))


@pytest.mark.parametrize("token", SPECIAL_STRINGS)
def test_the_string_of_a_special_token_in_a_text_stays_text(token, processor_of_marked_texts):
    processor = processor_of_marked_texts
    special = {*processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_STRINGS))}
    assert len(special) == len(SPECIAL_STRINGS)
    for text in (token, f"{token} Start{token}{token}", f"<{token}>"):
        step, answer = processor.encode_text(f"{text}\n"), encode_target(processor, [], text)[:-1]
        assert not special & {*step, *answer}
        assert (processor.tokenizer.decode(step), processor.tokenizer.decode(answer)) == (f"{text}\n", f"### {text}")
        prompt = processor.encode_prompt(text, num_images=1, num_latents=2, history=[(text, text)])
        assert prompt.count(processor.image_token_id) == processor.image_seq_length
        assert prompt.count(processor.latent_token_id) == 4


def test_a_trained_tokenizer_is_sent_to_other_processes(tokenizer):
    assert ids_of(pickle.loads(pickle.dumps(tokenizer))) == ids_of(tokenizer)
