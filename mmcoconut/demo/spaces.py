"""Upload the demo as a Space: a folder that runs `mmcoconut.demo` on a checkpoint of the Hub.

The Space loads the checkpoint by its Hub name, and installs this package for the page and the model's code.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi, SpaceCardData
from huggingface_hub.utils import validate_repo_id
from packaging.requirements import InvalidRequirement, Requirement

from mmcoconut.demo.one_question import write_examples


EXAMPLES = "examples"
PINNED = ("torch", "transformers")  # to the tested versions; the Space installs gradio by sdk_version
PACKAGE_REMEDY = (
    "set the requirement that installs this package: --package 'mmcoconut @ git+https://<host>/<owner>/"
    "<repository>'; there is no release on a package index."
)
APP = '''"""A page that asks {model}, shows its thoughts, and replaces them."""

from pathlib import Path

from mmcoconut.demo.one_question import Asker, read_examples
from mmcoconut.demo.page import build_page, launch
from mmcoconut.evaluation.answering import load_checkpoint


MODEL, REVISION = {model!r}, {revision!r}

model, processor = load_checkpoint(MODEL, revision=REVISION)
examples = read_examples(Path(__file__).with_name({examples!r}))
asker = Asker(model, processor, examples, max_new_tokens={max_new_tokens}, num_beams={num_beams}, seed={seed})
page = build_page(asker, name=MODEL, num_latents={num_latents})

if __name__ == "__main__":
    launch(page)
'''
README = """---
{metadata}
---

# {title}

Asks [{model}](https://huggingface.co/{model}) about a picture, shows what its continuous thoughts decode to and where
they look, and asks again with other thoughts in their place. Made with `python -m mmcoconut.demo --push_space`.
"""


def check_package(package: str | None) -> None:
    """Check that a requirement installs this package.

    Raises:
        ValueError: no requirement, an invalid one, or one of another package.
    """
    if package is None:
        raise ValueError(f"package is None: {PACKAGE_REMEDY}")
    try:
        name = Requirement(package).name
    except InvalidRequirement as error:
        raise ValueError(f"package is {package!r}, which is not a valid requirement: {PACKAGE_REMEDY}") from error
    if name != "mmcoconut":
        raise ValueError(f"package is {package!r}, which installs {name}: {PACKAGE_REMEDY}")


def check_on_the_hub(model: str) -> None:
    """Check that a Space could load the model by this name; does not contact the Hub.

    Raises:
        ValueError: a local folder, or no name.
    """
    if Path(model).exists():
        raise ValueError(
            f"model is the local folder {model!r}, and a Space loads from the Hub. Push the checkpoint, and "
            "set its name, --model user/name, with --recipe or --dataset for the examples."
        )
    validate_repo_id(model)


def readme_of(model: str) -> str:
    """Return README.md of the Space; its header is read by the Hub."""
    title = f"{model.rpartition('/')[2]}: continuous thoughts"
    metadata = SpaceCardData(
        title=title,
        emoji="🥥",
        colorFrom="blue",
        colorTo="indigo",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        models=[model],
        license="mit",
    )
    return README.format(metadata=metadata.to_yaml(), title=title, model=model)


def build_space(
    folder: Path,
    rows: Sequence[Mapping],
    *,
    model: str,
    package: str | None,
    revision: str | None = None,
    **options,
) -> None:
    """Write app.py, requirements.txt, README.md and the examples, with their pictures, to a folder.

    Args:
        rows: the examples, of `mmcoconut.data`.
        model, revision: checkpoint that app.py loads.
        package: the requirement that installs mmcoconut.
        options: `num_latents`, `max_new_tokens`, `num_beams`, `seed` of the page.

    Raises:
        ValueError: a package that cannot be installed.
    """
    check_package(package)
    options = {"num_latents": None, "max_new_tokens": 64, "num_beams": 1, "seed": 0} | options
    write_examples(folder / EXAMPLES, rows)
    app = APP.format(model=model, revision=revision, examples=EXAMPLES, **options)
    (folder / "app.py").write_text(app, encoding="utf-8")
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in PINNED]
    (folder / "requirements.txt").write_text("\n".join([package, *pins, ""]), encoding="utf-8")
    (folder / "README.md").write_text(readme_of(model), encoding="utf-8")


def push_demo(arguments, rows: Sequence[Mapping]) -> str:
    """Upload the demo of `mmcoconut.demo.page.DemoArguments` as the Space `push_space`; return its address.

    Uploads the three files and the examples' pictures. The token is that of `hf auth login`, or HF_TOKEN.

    Raises:
        ValueError: an invalid name of a model, a Space or a package.
    """
    validate_repo_id(arguments.push_space)
    check_on_the_hub(arguments.model)
    names = ("model", "revision", "package", "num_latents", "max_new_tokens", "num_beams", "seed")
    with tempfile.TemporaryDirectory() as folder:
        build_space(Path(folder), rows, **{name: getattr(arguments, name) for name in names})
        api, space = HfApi(), {"repo_id": arguments.push_space, "repo_type": "space"}
        url = api.create_repo(**space, space_sdk="gradio", private=arguments.private, exist_ok=True)
        api.upload_folder(**space, folder_path=folder, commit_message=f"Demo of {arguments.model}")
    return str(url)
