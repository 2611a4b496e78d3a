"""Settings for all tests: the number of threads, ignored warnings, and quick checks of types.

Warnings are errors. The few that are ignored here concern Lightning and torch, not this package.
"""

import os
import sys

# The tests run in one process per core, and their matrices are small. A value in the environment
# takes precedence.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import type_checks

type_checks.install()

IGNORED_WARNINGS = (
    "ignore:.*does not have many workers.*",
    "ignore:This DataLoader will create 3 worker processes.*",
    "ignore:Starting from v1.9.0, .tensorboardX. has been removed.*",
    "ignore:Found 1 module.s. in eval mode.*",
    "ignore:The number of training batches.*smaller than the logging interval.*",
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*treespec, LeafSpec.*",
    "ignore:.*sampler has shuffling enabled.*",
)


def pytest_collection_modifyitems(items):
    # Groups are long, and one process runs each: they start first, so none of them ends last.
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    for item in items:
        for ignored in IGNORED_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(ignored))


def seed_torch():
    """Start torch's random numbers anew: no test depends on which tests ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    if fixturedef.scope != "function":
        seed_torch()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    type_checks.begin_test()
    seed_torch()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    seed_torch()


@pytest.fixture(autouse=True)
def compilation_is_switched_on_again():
    """Check that recording leaves torch.compile as it found it."""
    yield
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    stance = getattr(dynamo, "_stance", None)
    assert stance is None or stance.stance == "default"
