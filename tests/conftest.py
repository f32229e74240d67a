"""Settings of every test: offline, one thread, the same random numbers each time."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from vlm_table import Table


torch.set_num_threads(1)


# Fixtures whose tests are slow, as they start processes, servers, browsers or compilers.
SLOW_FIXTURES = {"browser", "fresh_compiler", "trained", "server", "results", "workplace", "interpreted_module"}


# Of a product with decoders, the first decoder has all of it in the fast suite, and each other every so many cases.
SHARE_OF_OTHERS = 3


def slow_in_products(items) -> list:
    """Items of tests marked `whole_on_the_first(name)` that stand for the rest of a product, by the values of name."""
    slow, seen = [], {}
    for item in items:
        marker = item.get_closest_marker("whole_on_the_first")
        if marker is None:
            continue
        value = item.callspec.params[marker.args[0]]
        cases = seen.setdefault(item.function, {}).setdefault(value, [])
        number = list(seen[item.function]).index(value)
        if number > 0 and (len(cases) + number) % SHARE_OF_OTHERS:
            slow.append(item)
        cases.append(item)
    return slow


@pytest.hookimpl(tryfirst=True)
def pytest_addoption(parser):
    parser.addoption(
        "--write-vlm-table", action="store_true", help="Write docs/backbones.md's table; see vlm_table.py."
    )


def pytest_collection_modifyitems(items):
    starting = [item for item in items if SLOW_FIXTURES & set(getattr(item, "fixturenames", ()))]
    for item in [*starting, *slow_in_products(items)]:
        item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """Without graphs of other tests, which count against the compiler's limit of one function."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def table(request) -> Table:
    """The page's table, written at the end of a run with --write-vlm-table."""
    table = Table(writes=request.config.getoption("--write-vlm-table"))
    yield table
    if table.writes:
        table.write()
