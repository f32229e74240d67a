"""docs/api.md, made from the docstrings of the public names and the help texts of the commands.

    python docs/make_api.py

A name is shown with what users call of it: those of METHODS that this package's own classes define. What it inherits
from transformers is documented there, and what only this package calls is documented where it is defined.
"""

import dataclasses
import functools
import importlib
import inspect
from pathlib import Path

import mmcoconut
from mmcoconut import convert_coconut, convert_vlm, prepare_flickr30k, publish, serve
from mmcoconut.arguments.choices import CHOICES
from mmcoconut.arguments.fields import CLASSES
from mmcoconut.audit import command
from mmcoconut.demo import page as demo_page
from mmcoconut.evaluation import asking, evaluate
from mmcoconut.harnesses import __main__ as harnesses


PAGE = Path(__file__).with_name("api.md")
HEAD = """# API reference

Made from the docstrings by `python docs/make_api.py`: change it there. What a class inherits from `transformers` is
documented in that library.

"""
# What users call of the public classes.
METHODS = ("forward", "generate", "prefill", "save_pretrained", "apply_chat_template")
METHODS += ("decode_answers", "encode_images", "encode_prompt")
METHODS += ("get_image_features", "stage_at", "last_stage", "plan", "num_latents", "stage", "prompts", "evaluate")
METHODS += ("image_features", "answer_states", "build", "encode", "given", "loss", "check", "plans", "read", "load")
METHODS += ("save_model", "create_model_card", "push_to_hub", "with_count", "answer", "choose")
# What users import from modules, beside the names of the package itself; a test compares it with the pages.
MODULES = {
    "data": ("question_text",),
    "data.conversations": ("further_turn",),
    "data.arrow_mazes": ("generate", "draw", "draw_path", "question_of", "cell_name"),
    "data.tokenizer": ("train_tokenizer",),
    "harnesses.tasks": ("load",),
    "arguments.fields": ("RunArguments",),
    "arguments.recipes": ("parse_recipe",),
    "views_mmcoconut": ("ThoughtView",),
    "objectives.base": ("Objective", "Run", "RowsOfBatch", "mean_by_row"),
    "objectives.step_decoder": ("StepDecoder",),
    "objectives.rewards": ("exact_match_reward", "format_reward", "judged_text", "ModelReward"),
    "evaluation.answering": ("load_checkpoint", "Answerer"),
    "audit.interventions": ("intervening",),
    "audit.thoughts": ("read_thoughts", "geometry", "lens_text", "linear_probe"),
    "audit.thought_pictures": ("thought_strip",),
}
# A command, the docstring that says what it is for, and the classes of its arguments.
COMMANDS = (
    ("train_hf.py recipe.yaml", "", CLASSES),
    ("python -m mmcoconut.evaluation", evaluate.__doc__, [asking.EvaluationArguments]),
    ("python -m mmcoconut.harnesses lm_eval", harnesses.__doc__, []),
    ("python -m mmcoconut.audit", command.__doc__, [asking.EvaluationArguments, command.AuditArguments]),
    ("python -m mmcoconut.prepare_flickr30k", prepare_flickr30k.__doc__, [prepare_flickr30k.PreparationArguments]),
    ("python -m mmcoconut.convert_coconut", convert_coconut.__doc__, [convert_coconut.ConversionArguments]),
    ("python -m mmcoconut.convert_vlm", convert_vlm.__doc__, [convert_vlm.ConversionArguments]),
    ("python -m mmcoconut.publish", publish.__doc__, [publish.PublishArguments]),
    ("python -m mmcoconut.demo", demo_page.__doc__, [demo_page.DemoArguments]),
    ("python -m mmcoconut.serve", serve.__doc__, []),
)


def verbatim(docstring: str) -> str:
    """A docstring as an indented block, in which nothing has a meaning for Markdown."""
    lines = inspect.cleandoc(docstring).splitlines()
    return "\n".join(f"    {line}".rstrip() for line in lines) + "\n"


def signature_of(function) -> str:
    """Names and defaults of the parameters, without `self`; types stand in the docstring where they matter.

    >>> signature_of(lambda self, rows, *, split="test": 0)
    '(rows, *, split="test")'
    """
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    text = str(inspect.Signature(parameters))
    return text.replace("'", '"')


def is_own(thing) -> bool:
    return thing.__module__.startswith("mmcoconut.")


def own_classes(cls: type) -> list[type]:
    """The class and those of this package that it inherits from, but not those with an entry of their own."""
    public = {getattr(mmcoconut, name) for name in mmcoconut.PUBLIC_NAMES}
    found = []
    for base in cls.__mro__:
        if base is not cls and base in public:
            break  # what follows stands there
        found += [base] if is_own(base) else []
    return found


def member_entry(name: str, member) -> str | None:
    """Heading and docstring of a method or property; None for one that says nothing, or that a decorator made."""
    function = getattr(member, "__func__", member)
    function = member.fget if isinstance(member, property) else function
    if not inspect.isroutine(function) or not function.__doc__ or not is_own(function):
        return None
    head = name if isinstance(member, property) else name + signature_of(inspect.unwrap(function))
    return f"#### `{head}`\n\n{verbatim(function.__doc__)}"


def class_entry(cls: type) -> list[str]:
    entries, seen = [verbatim(cls.__doc__)], set()
    for owner in own_classes(cls):
        for name, member in vars(owner).items():
            entry = member_entry(name, member) if name in METHODS and name not in seen else None
            seen.add(name)
            entries += [entry] if entry is not None else []
    return entries


def public_entry(name: str, module: str = "mmcoconut") -> str:
    """A name that users import: a class with its methods, or a function."""
    thing = getattr(importlib.import_module(module), name)
    head = name if inspect.isclass(thing) else name + signature_of(thing)
    body = class_entry(thing) if inspect.isclass(thing) else [verbatim(thing.__doc__)]
    return "\n".join([f"### `{head}`\n", f"`from {module} import {name}`\n", *body])


def default_text(field: dataclasses.Field) -> str:
    """A default as a recipe spells it."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    words = {None: "", True: "true", False: "false"}
    return words[default] if default is None or isinstance(default, bool) else f"{default}"


def argument_line(field: dataclasses.Field) -> str:
    """A line of the table; signs that mean something in a table of Markdown are escaped."""
    choices = CHOICES.get(field.name) or asking.CHOICES.get(field.name) or ()
    values = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    default, said = default_text(field), field.metadata["help"].replace("<", "\\<").replace("|", "\\|")
    return f"| `{field.name}` | {f'`{default}`' if default else ''} | {said}{values} |"


def argument_table(cls: type) -> str:
    """The class's own fields, with their defaults, choices and help."""
    own = inspect.get_annotations(cls).keys()
    lines = [argument_line(field) for field in dataclasses.fields(cls) if field.name in own]
    return "\n".join([f"{inspect.cleandoc(cls.__doc__)}\n", "| key | default | |", "|---|---|---|", *lines, ""])


def command_entry(command: str, docstring: str, classes) -> str:
    body = [verbatim(docstring)] if docstring else []
    return "\n".join([f"### `{command}`\n", *body, *map(argument_table, classes)])


@functools.cache
def page() -> str:
    """The text of docs/api.md."""
    names = "\n".join(map(public_entry, mmcoconut.PUBLIC_NAMES))
    entries = [public_entry(name, f"mmcoconut.{module}") for module, some in MODULES.items() for name in some]
    more = "\n".join(entries)
    commands = "\n".join(command_entry(*command) for command in COMMANDS)
    return f"{HEAD}## Names\n\n{names}\n## Names of modules\n\n{more}\n## Commands\n\n{commands}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
