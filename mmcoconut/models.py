"""Which of the two public classes a recipe or a checkpoint is, and loading one completely or not at all."""

from mmcoconut.configuration_mmcoconut import MMCoconutConfig
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.seq2seq_mmcoconut import MMCoconutForSeq2SeqLM


def model_class(image_fusion: str) -> type[MMCoconutForConditionalGeneration]:
    """The class of a fusion: with `encoder` the language model has an encoder, otherwise it is a decoder alone."""
    return MMCoconutForSeq2SeqLM if image_fusion == "encoder" else MMCoconutForConditionalGeneration


def load_model(name: str, *, dtype="auto", revision: str | None = None, new_parts=(), **config_fields):
    """The model of a folder or Hub id; no code from the checkpoint is run.

    Args:
        new_parts: names of sub-modules that the checkpoint may lack, and that are then new.
        config_fields: of MMCoconutConfig, in the place of the checkpoint's.

    Raises:
        ValueError: a checkpoint without some of the weights, which the library would draw at random.
    """
    options = {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    config = MMCoconutConfig.from_pretrained(name, **options)
    model, info = model_class(config.image_fusion).from_pretrained(
        name, dtype=dtype, output_loading_info=True, **options, **config_fields
    )
    missing = sorted(key for key in info["missing_keys"] if not {*key.split(".")} & {*new_parts})
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}: give a whole checkpoint.")
    return model
