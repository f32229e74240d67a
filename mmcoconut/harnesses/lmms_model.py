"""A checkpoint as a model of lmms-eval: `python -m lmms_eval --model mmcoconut --model_args pretrained=…`.

lmms-eval finds it by the entry point `lmms_eval.models` of this package, and passes it the chats of any of its tasks.
The thoughts come from the checkpoint's own chat template. Works with lmms-eval 0.7.3.
"""

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import ImageFile
from tqdm.auto import tqdm

from mmcoconut.chat_template_mmcoconut import parse_answer
from mmcoconut.errors import UsageError
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.harnesses.tasks import generation_options
from mmcoconut.training.generating import count_generated, generate_and_count


class MMCoconut(lmms):
    """An mmcoconut checkpoint that answers the tasks of lmms-eval.

    Args:
        pretrained: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        batch_size: chats per batch.
        device: of the model, such as `cuda`; None uses a GPU if there is one.
        dtype: of the weights; `auto` as they were saved.
        num_latents: thoughts per answer; None uses the checkpoint's.
        answer_only: True returns only the text after `###`, without written steps, if there is such an answer.
            A task's generation_kwargs may say otherwise, as ours for own rows do.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        num_latents: int | None = None,
        answer_only: bool = True,
        **kwargs,
    ):
        super().__init__()
        if kwargs:
            raise UsageError(f"model mmcoconut has no arguments {', '.join(sorted(kwargs))}: remove them")
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval fills truncated pictures, which would invalidate scores
        found = "cpu" if not torch.accelerator.is_available() else str(torch.accelerator.current_accelerator())
        self.model, self.processor = load_checkpoint(
            pretrained, revision=revision, dtype=dtype, device=device or found
        )
        self.num_latents, self.answer_only, self.batch_size = num_latents, answer_only, int(batch_size)

    def inputs(self, chats: Sequence[list[dict]]):
        """Return the model inputs for a batch of chats in lmms-eval's format, images included."""
        layout = {} if self.num_latents is None else {"num_latents": self.num_latents}
        inputs = self.processor.apply_chat_template(
            [ChatMessages(messages=chat).to_hf_messages() for chat in chats],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs={"return_tensors": "pt", "padding": True},
            **layout,
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    @torch.no_grad()
    def answers(self, chats: Sequence[list[dict]], task_options: dict) -> Iterator[GenerationResult]:
        """Generate an answer to each chat, all in one batch."""
        options, until = generation_options(task_options)
        inputs = self.inputs(chats)
        tokens, _ = generate_and_count(self.model, self.processor, inputs, stop_threshold=0.5, **options)
        eos = self.model.generation_config.eos_token_id
        for row in tokens[:, inputs[self.processor.prompt_names[0]].shape[1] :].tolist():
            count = count_generated(row, eos if isinstance(eos, list) else [eos])
            text = self.processor.tokenizer.decode(row[:count], skip_special_tokens=True)
            for end in until:
                text = text.split(end)[0]
            text = (parse_answer(text) or text) if task_options.get("answer_only", self.answer_only) else text
            yield GenerationResult(text=text, token_counts=TokenCounts(output_tokens=count))

    def chat(self, request: Instance) -> list[dict]:
        """Return the messages of a request, with their images."""
        _, to_messages, _, doc_id, task, split = request.args
        return to_messages(self.task_dict[task][split][doc_id])

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer the requests in order; each batch holds consecutive requests with the same options."""
        results, begin = [], 0
        with tqdm(total=len(requests), unit="row", desc="mmcoconut") as bar:
            while begin < len(requests):
                options = requests[begin].args[2]
                alike = takewhile(lambda request: request.args[2] == options, requests[begin:])  # noqa: B023
                batch = list(islice(alike, self.batch_size))
                results += self.answers([self.chat(request) for request in batch], options)
                begin += len(batch)
                bar.update(len(batch))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: chat tasks are generated; `mmcoconut.evaluation --score_by likelihood` compares choices."""
        raise NotImplementedError("no likelihoods here: use `python -m mmcoconut.evaluation --score_by likelihood`")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: tasks of several rounds are not supported."""
        raise NotImplementedError("tasks of several rounds are not supported: choose another task")


def manifest():
    """Return the entry point `lmms_eval.models`: the name `mmcoconut` and this class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mmcoconut", chat_class_path=f"{__name__}.{MMCoconut.__name__}")
