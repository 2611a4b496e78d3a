"""Settings for all tests: threads, and Lightning's remarks on how small the tests are.

Warnings are errors; the few that are ignored here are not about this package.
"""

import os

# The tests run in one process per core, and their matrices are small. Set it to override.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

REMARKS = (
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
    for item in items:
        for remark in REMARKS:
            item.add_marker(pytest.mark.filterwarnings(remark))
