"""Settings of every test: offline, one thread, the same random numbers each time."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


torch.set_num_threads(1)


# Fixtures whose tests are slow, as they start processes, servers, browsers or compilers.
SLOW_FIXTURES = {"fresh_compiler", "trained", "server", "results", "workplace", "interpreted_module"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
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
