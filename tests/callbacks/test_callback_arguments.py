"""Wrong arguments of the callbacks raise an error in the constructor."""

import pytest
from unchecked_calls import errors_of, require_error

CALLS = """
def recorder(**arguments):
    return lambda: GradientRecorder(**{"store": MemoryStore(), **arguments})

def tracker(**arguments):
    return lambda: ContributionTracker(queries, **{"store": "probe.npz", **arguments})

calls = {
    "reduction": recorder(reduction="avg"),
    "preconditioner": recorder(preconditioner="adam"),
    "curvature": recorder(curvature="sampled"),
    "existing": recorder(existing="overwrite"),
    "stride": recorder(every_n_steps=2.5),
    "stride as a string": recorder(every_n_steps="2"),
    "audit": recorder(audit=-1),
    "audit as a boolean": recorder(audit=True),
    "disk": recorder(max_gb=0),
    "disk as a string": recorder(max_gb="5 GB"),
    "time": recorder(max_overhead="10 %"),
    "share": recorder(curvature_share=1.5),
    "share as a string": recorder(curvature_share="all"),
    "snapshots": recorder(snapshots=-2),
    "snapshots in a list": recorder(snapshots=[3, -1]),
    "snapshots as a string": recorder(snapshots="all"),
    "layers": recorder(layers="net.2"),
    "layers by number": recorder(layers=[2]),
    "ids": recorder(sample_ids=3),
    "axes": recorder(batch_dims="flattened"),
    "unknown axes": recorder(batch_dims={"head": "flat"}),
    "projector": recorder(projector=Identity),
    "no projector": recorder(projector=None),
    "store": recorder(store=3),
    "numbers in memory": recorder(existing="number"),
    "tracked reduction": tracker(reduction="avg"),
    "tracked preconditioner": tracker(preconditioner="adam"),
    "tracked mode": tracker(mode="test"),
    "tracked existing": tracker(existing="overwrite"),
    "tracked stride": tracker(every_n_steps=0),
    "period": tracker(period="batch"),
    "period of zero": tracker(period=0),
    "tracked layers": tracker(layers="net.2"),
    "tracked projector": tracker(projector="whole"),
    "tracked store": tracker(store=MemoryStore()),
    "valid arguments": recorder(
        layers=("net.0",), snapshots=range(3), batch_dims={"net.*": 1, "head": "flattened"},
        sample_ids="id", max_gb=2, max_overhead=0.1, audit=3, projector=Identity(),
    ),
    "valid tracker arguments": tracker(period=3, projector=None, mode="train", layers=["net"]),
}
"""
ONE_OF = "expected one of"
EXPECTED = {
    "reduction": f"`reduction` is 'avg'; {ONE_OF} 'mean', 'sum'.",
    "preconditioner": f"`preconditioner` is 'adam'; {ONE_OF} 'optimizer', 'none'.",
    "curvature": f"`curvature` is 'sampled'; {ONE_OF} 'fisher', 'none'.",
    "existing": f"`existing` is 'overwrite'; {ONE_OF} 'refuse', 'replace', 'number'.",
    "numbers in memory": "`existing` is 'number', and `store` is a `MemoryStore`; expected",
    "stride": "`every_n_steps` is 2.5; expected a whole number of 1 or more.",
    "stride as a string": "`every_n_steps` is '2'; expected a whole number of 1 or more.",
    "audit": "`audit` is -1; expected a whole number of 0 or more.",
    "audit as a boolean": "`audit` is True; expected a whole number of 0 or more.",
    "disk": "`max_gb` is 0; expected a number above 0.",
    "disk as a string": "`max_gb` is '5 GB'; expected a number above 0.",
    "time": "`max_overhead` is '10 %'; expected a share of the time of training above 0",
    "share": "`curvature_share` is 1.5; expected a share of the steps above 0 and up to 1.",
    "share as a string": "`curvature_share` is 'all'; expected a share of the steps above 0",
    "snapshots": "`snapshots` is -2; expected 'auto', a whole number of steps, 0 for none",
    "snapshots in a list": "`snapshots` is [3, -1]; expected 'auto', a whole number of steps",
    "snapshots as a string": "`snapshots` is 'all'; expected 'auto', a whole number of steps",
    "layers": "`layers` is 'net.2'; expected a list of names of modules",
    "layers by number": "`layers` is [2]; expected a list of names of modules",
    "ids": "`sample_ids` is 3; expected a key of the batch, or a function of it",
    "axes": "`batch_dims` is 'flattened'; expected axes by names of modules",
    "unknown axes": "`batch_dims` is {'head': 'flat'}; expected axes by names of modules",
    "projector": "expected an object such as `KroneckerCountSketch()` or `Identity()`. Call the",
    "no projector": "`projector` is None; expected an object such as `KroneckerCountSketch()`",
    "store": "`store` is 3; expected the path of a folder to record into, or an `HDF5Store(",
    "tracked reduction": f"`reduction` is 'avg'; {ONE_OF} 'mean', 'sum'.",
    "tracked preconditioner": f"`preconditioner` is 'adam'; {ONE_OF} 'optimizer', 'none'.",
    "tracked mode": f"`mode` is 'test'; {ONE_OF} 'eval', 'train'.",
    "tracked existing": f"`existing` is 'overwrite'; {ONE_OF} 'refuse', 'replace'.",
    "tracked stride": "`every_n_steps` is 0; expected a whole number of 1 or more.",
    "period": "`period` is 'batch'; expected 'epoch', 'run', or a whole number of steps.",
    "period of zero": "`period` is 0; expected a whole number of 1 or more.",
    "tracked layers": "`layers` is 'net.2'; expected a list of names of modules",
    "tracked projector": "`projector` is 'whole'; expected an object such as",
    "tracked store": "expected the path of a file to write, such as 'probe.npz'.",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_arguments_raise_an_error_with_the_expected_values(name):
    require_error(CALLS, name, EXPECTED[name])


@pytest.mark.parametrize("name", ["valid arguments", "valid tracker arguments"])
def test_valid_arguments_are_accepted(name):
    assert errors_of(CALLS)[name] == "no error"
