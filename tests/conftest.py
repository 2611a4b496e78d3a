"""Warnings are errors; these few are Lightning's remarks on how small the tests are."""

import pytest

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
