"""docs/api.md is what the docstrings say, and leaves out no public name and no argument."""

import dataclasses
import doctest
import inspect
import re
import sys
from pathlib import Path

import pytest

import mmcoconut
from mmcoconut.arguments.fields import CLASSES
from mmcoconut.audit.command import AuditArguments


ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))

import make_api  # noqa: E402


def test_the_page_is_the_one_that_the_docstrings_make():
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "run `python docs/make_api.py`"


@pytest.mark.parametrize("name", mmcoconut.PUBLIC_NAMES)
def test_every_public_name_has_an_entry_with_its_docstring(name):
    first_line = getattr(mmcoconut, name).__doc__.strip().splitlines()[0]
    entry = make_api.page().split(f"### `{name}")[1]
    assert f"    {first_line}\n" in entry.split("\n### ")[0]


@pytest.mark.parametrize("cls", [*CLASSES, AuditArguments], ids=lambda cls: cls.__name__)
def test_every_argument_has_a_line_with_its_help(cls):
    lines = make_api.page().splitlines()
    for field in dataclasses.fields(cls):
        if field.name in inspect.get_annotations(cls):
            start, said = f"| `{field.name}` |", field.metadata["help"].split("<")[0]
            assert any(line.startswith(start) and said in line for line in lines), field.name


@pytest.mark.parametrize("name", make_api.METHODS)
def test_what_users_call_has_an_entry(name):
    assert f"\n#### `{name}`\n" in make_api.page() or f"\n#### `{name}(" in make_api.page()


def test_every_name_that_the_pages_import_has_an_entry():
    pages = [ROOT / "README.md", *DOCS.glob("*.md"), *ROOT.glob("notebooks/*.ipynb")]
    found = re.findall(r"from mmcoconut\.([a-z0-9_.]+) import ([\w, ]+)", "".join(page.read_text() for page in pages))
    imported = {(module, name.strip()) for module, names in found for name in names.split(",")}
    assert imported and not {
        (module, name) for module, name in imported if name not in make_api.MODULES.get(module, mmcoconut.PUBLIC_NAMES)
    }


def test_what_the_library_defines_is_not_repeated():
    """`generate` is overridden here, `eval` and the configuration's `to_dict` are not."""
    page = make_api.page()
    assert "#### `generate(" in page
    assert "#### `eval(" not in page and "#### `to_dict(" not in page


def test_the_script_says_the_truth_of_itself():
    assert doctest.testmod(make_api).failed == 0


def test_signs_of_a_table_are_escaped_in_help_texts():
    field = dataclasses.field(default=None, metadata={"help": "<a|b>"})
    field.name = "key"
    assert make_api.argument_line(field) == "| `key` |  | \\<a\\|b> |"
