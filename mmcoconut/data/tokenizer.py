"""Train a byte-level BPE on a data set's own texts, for language models with random weights."""

import re
from collections.abc import Iterable, Iterator

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmcoconut.configuration_mmcoconut import PAD_TOKEN, SPECIAL_TOKENS


EOS_TOKEN = "<|endoftext|>"
SPECIAL_STRING = re.compile("|".join(map(re.escape, (EOS_TOKEN, PAD_TOKEN, *SPECIAL_TOKENS))))
# A word with the space before it and the line end after it, so a one-word step is one token, as a thought is one.
WORD = r" ?[^\s]+\n?|\s+"


class TokenizersBackend(transformers.TokenizersBackend):
    """transformers' tokenizer; `save_pretrained` also writes the BPE's vocab.json and merges.txt for
    programs that read only these.

    It keeps the class name, by which AutoTokenizer loads it from tokenizer_config.json.
    """

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return (*file_names, *self.backend_tokenizer.model.save(str(save_directory), filename_prefix))


def without_special_strings(texts: Iterable[str]) -> Iterator[str]:
    """Yield the text between the strings of special tokens, so that no merge can build one of them.

    Such a vocabulary entry would be the special token itself, and plain text would be read as latents or as an end.

    >>> list(without_special_strings(["Go <image> on", "<|latent|>"]))
    ['Go ', ' on', '', '']
    """
    for text in texts:
        yield from SPECIAL_STRING.split(text)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> TokenizersBackend:
    """Train a tokenizer on texts; it encodes and decodes any string without loss.

    The strings of special tokens (`<image>`, `<|latent|>`, …) in the texts are skipped: they stay ordinary text.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[EOS_TOKEN], show_progress=False
    )
    tokenizer.train_from_iterator(without_special_strings(texts), trainer)
    return TokenizersBackend(tokenizer_object=tokenizer, eos_token=EOS_TOKEN)
