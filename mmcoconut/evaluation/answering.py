"""Answer rows of `mmcoconut.data` in batches with a checkpoint: generate, or choose the most likely choice.

Shapes: B rows of a batch, T tokens, D hidden, V vocabulary.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcoconut.chat_template_mmcoconut import parse_answer
from mmcoconut.data import history_of, question_text
from mmcoconut.data.images import open_images
from mmcoconut.errors import UsageError
from mmcoconut.models import load_model, load_processor
from mmcoconut.passes_mmcoconut import position_limit
from mmcoconut.training.collator import align_rows, encode_target
from mmcoconut.training.generating import count_generated, generate_and_count


def image_key(image: Mapping) -> str:
    """Return an identifier of a picture: the start of the SHA-256 of its bytes or, without bytes, its path."""
    if image["bytes"] is None:
        return image["path"]
    return f"sha256:{hashlib.sha256(image['bytes']).hexdigest()[:16]}"


def image_name(image: Mapping) -> str:
    """Return the path of a picture, or, where it has none, its key."""
    return image["path"] or image_key(image)


def load_checkpoint(name: str, *, revision: str | None = None, dtype: str = "auto", device="cpu"):
    """Return model (eval, on `device`) and processor of a folder or Hub id; no code from the checkpoint is run."""
    model = load_model(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype), revision=revision)
    return model.to(device).eval(), load_processor(name, revision=revision)


class Answerer:
    """A checkpoint that answers rows of `mmcoconut.data` in batches.

    Args:
        model, processor: as returned by `load_checkpoint`.
        num_latents: thoughts per question; None uses the checkpoint's.
        max_new_tokens: maximum tokens per answer.
        num_beams: number of beams; 1 is greedy.
        stop_threshold: for a model with a stop head, see its `generate`; None disables stopping.
        begin_with: text that every answer begins with, such as "###" for an answer without written steps.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        num_latents: int | None = None,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        stop_threshold: float | None = 0.5,
        begin_with: str = "",
    ):
        self.model, self.processor = model, processor
        self.stop_threshold = stop_threshold
        self.num_latents = processor.num_latents if num_latents is None else num_latents
        self.max_new_tokens, self.num_beams, self.begin_with = max_new_tokens, num_beams, begin_with

    def with_count(self, num_latents: int, *, begin_with: str = "") -> "Answerer":
        """Return the same checkpoint with another number of thoughts, exactly so many."""
        return Answerer(
            self.model,
            self.processor,
            num_latents=num_latents,
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            stop_threshold=None,
            begin_with=begin_with,
        )

    def inputs(self, rows: Sequence[Mapping], *, room: int | None = None):
        """Return the model inputs of rows: input_ids, attention_mask (B, T), the tensors of images, such as
        pixel_values (I, channels, height, width), and for an encoder-decoder also the decoder's prompt.

        Raises:
            UsageError: a prompt that leaves fewer than `room` positions (default: `max_new_tokens`) in the language
                model's position table.
        """
        room = self.max_new_tokens if room is None else room
        images = [open_images(row) for row in rows]
        batch = self.processor(
            images=images if any(images) else None,
            text=[question_text(row) for row in rows],
            history=[history_of(row) for row in rows],
            num_latents=self.num_latents,
            return_tensors="pt",
            padding=True,
        )
        begun = torch.tensor([self.processor.encode_text(self.begin_with)] * len(rows), dtype=torch.long)
        ids, mask = self.processor.prompt_names
        batch[ids] = torch.cat([batch[ids], begun], dim=1)  # (B, T)
        batch[mask] = torch.cat([batch[mask], torch.ones_like(begun)], dim=1)  # (B, T)
        said = torch.zeros_like(batch[ids], dtype=torch.bool)  # (B, T)
        said[:, said.shape[1] - begun.shape[1] :] = True
        batch.update(self.processor.column_inputs(batch[ids], batch[mask], batch, said))
        limit = position_limit(self.model.get_decoder())
        lengths = batch[mask].sum(dim=1)  # (B,)
        length, longest = int(lengths.max()), int(lengths.argmax())
        if limit is not None and length + room > limit:
            raise UsageError(
                f"{rows[longest]['row_id']}: the prompt takes {length} tokens, images and {self.num_latents} latents "
                f"included, and {room} more may follow. The language model has {limit} positions. Lower "
                "max_new_tokens or num_latents, or shorten the question."
            )
        return batch.to(self.model.device, dtype=self.model.dtype)

    def prompt_length(self, row: Mapping) -> int:
        """Return the tokens of a row's prompt; for an encoder-decoder those of the side with the thoughts."""
        _, [num_tiles] = self.processor.encode_images([open_images(row)], return_tensors="pt")
        layout = {"num_tiles": num_tiles, "num_latents": self.num_latents}
        prompt = self.processor.encode_prompt(question_text(row), history=history_of(row), **layout)
        return len(self.processor.split_prompt(prompt)[1])

    def decoder_passes(self, row: Mapping, generated_tokens: int, num_thoughts: int) -> int:
        """Return the number of sequential decoder passes for a row's answer: one per token and per thought, including
        the thoughts of earlier turns. Parallel thoughts take one pass per update and one for the text before them. One
        pass is added for the tokens after the last thought if their attention is restricted."""
        config, fed_back = self.model.config, num_thoughts
        if config.thought_mode != "feedback":
            fed_back = 0
        elif config.thought_schedule == "jacobi" and fed_back > 1:
            fed_back = 1 + min(config.jacobi_iterations, fed_back)
        hides = config.answer_sees == "thoughts" or (config.answer_sees == "no_image" and len(row["images"]) > 0)
        is_behind = generated_tokens == 0 or self.processor.markers == "both" or self.begin_with != ""
        return fed_back + max(1, generated_tokens) + (hides and is_behind and num_thoughts > 0)

    @torch.no_grad()
    def answer(self, rows: Sequence[Mapping]) -> list[dict]:
        """Return `output`, `answer`, `generated_tokens`, `num_thoughts`, `decoder_passes` per row, in one batch."""
        inputs = self.inputs(rows)
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": self.num_beams}
        tokens, num_thoughts = generate_and_count(
            self.model, self.processor, inputs, stop_threshold=self.stop_threshold, **options
        )
        prompt_length = inputs[self.processor.prompt_names[0]].shape[1]
        new_tokens = tokens[:, prompt_length:].tolist()  # (B, up to max_new_tokens)
        eos = self.model.generation_config.eos_token_id
        counts = [count_generated(row, eos if isinstance(eos, list) else [eos]) for row in new_tokens]
        texts = self.processor.tokenizer.batch_decode(
            [row[:count] for row, count in zip(new_tokens, counts)], skip_special_tokens=True
        )
        texts = [self.begin_with + text for text in texts]
        return [
            {
                "output": text,
                "answer": parse_answer(text),
                "generated_tokens": count,
                "num_thoughts": thoughts,
                "decoder_passes": self.decoder_passes(row, count, thoughts),
            }
            for row, text, count, thoughts in zip(rows, texts, counts, num_thoughts.tolist())
        ]

    @torch.no_grad()
    def choice_log_probs(self, row: Mapping) -> list[tuple[float, int]]:
        """Return per choice the log-probability of `### choice <eos>` after the thoughts, and its number of tokens.

        Raises:
            ValueError: a row without choices.
        """
        if not row["choices"]:
            raise UsageError(f"{row['row_id']} has no choices to score by likelihood. Use --score_by generation.")
        targets = [encode_target(self.processor, [], choice) for choice in row["choices"]]
        # One copy of the row per choice, as each processor batches its images; only the prompts get longer.
        inputs = self.inputs([row] * len(targets), room=max(map(len, targets)))
        ids, mask = self.processor.prompt_names
        prompt = inputs[ids][0].tolist()
        pad_id, latent_id = self.processor.tokenizer.pad_token_id, self.processor.latent_token_id
        batch = align_rows([[(prompt, target)] for target in targets], pad_id=pad_id, latent_id=latent_id)
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        columns = self.processor.column_inputs(
            batch["input_ids"], batch["attention_mask"], inputs, batch["labels"] != -100
        )
        inputs.update({ids: batch["input_ids"], mask: batch["attention_mask"], **columns})
        labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]  # (B, T)
        labelled = labels != -100  # (B, T)
        columns = labelled.any(dim=0).nonzero()[:, 0]  # (kept,)
        if getattr(self.model, "keeps_logits", True):
            logits = self.model(**inputs, logits_to_keep=columns).logits  # (B, kept, V)
        else:  # a vision-language model that always computes all
            logits = self.model(**inputs).logits[:, columns]
        log_probs = logits[labelled[:, columns]].float().log_softmax(dim=-1)  # (labelled, V)
        of_labels = torch.zeros(labels.shape, device=log_probs.device)
        of_labels[labelled] = log_probs.gather(1, labels[labelled][:, None])[:, 0]
        return list(zip(of_labels.sum(dim=1).tolist(), labelled.sum(dim=1).tolist()))

    def choose(self, rows: Sequence[Mapping], per_token: bool) -> list[dict]:
        """Answer like `answer` with the most likely choice of each row; `log_probs` holds the compared values."""
        answers = []
        for row in rows:
            scores = [total / (count if per_token else 1) for total, count in self.choice_log_probs(row)]
            if not all(map(math.isfinite, scores)):
                raise UsageError(f"{row['row_id']}: log-probabilities {scores} are not finite. Set --dtype float32.")
            best = row["choices"][scores.index(max(scores))]
            answers.append(
                {
                    "output": f"### {best}",
                    "answer": best,
                    "generated_tokens": 0,
                    "num_thoughts": (num_thoughts := self.num_latents * (1 + len(history_of(row)))),
                    "decoder_passes": self.decoder_passes(row, 0, num_thoughts),
                    "log_probs": scores,
                }
            )
        return answers
