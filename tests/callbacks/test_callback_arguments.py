"""What is said of wrong arguments of the callbacks, when they are made."""

import pytest
from unchecked_calls import require_said, what_is_said

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
    "stride in words": recorder(every_n_steps="2"),
    "audit": recorder(audit=-1),
    "audit as a switch": recorder(audit=True),
    "disk": recorder(max_gb=0),
    "disk in words": recorder(max_gb="5 GB"),
    "time": recorder(max_overhead="10 %"),
    "share": recorder(curvature_share=1.5),
    "share in words": recorder(curvature_share="all"),
    "snapshots": recorder(snapshots=-2),
    "snapshots in a list": recorder(snapshots=[3, -1]),
    "snapshots in words": recorder(snapshots="all"),
    "layers": recorder(layers="net.2"),
    "layers by number": recorder(layers=[2]),
    "ids": recorder(sample_ids=3),
    "axes": recorder(batch_dims="flattened"),
    "axes by word": recorder(batch_dims={"head": "flat"}),
    "projector": recorder(projector=Identity),
    "no projector": recorder(projector=None),
    "store": recorder(store=None),
    "tracked reduction": tracker(reduction="avg"),
    "tracked preconditioner": tracker(preconditioner="adam"),
    "tracked mode": tracker(mode="test"),
    "tracked existing": tracker(existing="overwrite"),
    "tracked stride": tracker(every_n_steps=0),
    "period": tracker(period="batch"),
    "period of none": tracker(period=0),
    "tracked layers": tracker(layers="net.2"),
    "tracked projector": tracker(projector="whole"),
    "tracked store": tracker(store=MemoryStore()),
    "nothing wrong": recorder(
        layers=("net.0",), snapshots=range(3), batch_dims={"net.*": 1, "head": "flattened"},
        sample_ids="id", max_gb=2, max_overhead=0.1, audit=3, projector=Identity(),
    ),
    "nothing wrong with a tracker": tracker(period=3, projector=None, mode="train", layers=["net"]),
}
"""
WORD = "expected one of"
EXPECTED = {
    "reduction": f"`reduction` is 'avg'; {WORD} 'mean', 'sum'.",
    "preconditioner": f"`preconditioner` is 'adam'; {WORD} 'optimizer', 'none'.",
    "curvature": f"`curvature` is 'sampled'; {WORD} 'fisher', 'none'.",
    "existing": f"`existing` is 'overwrite'; {WORD} 'refuse', 'replace'.",
    "stride": "`every_n_steps` is 2.5; expected a whole number of 1 or more.",
    "stride in words": "`every_n_steps` is '2'; expected a whole number of 1 or more.",
    "audit": "`audit` is -1; expected a whole number of 0 or more.",
    "audit as a switch": "`audit` is True; expected a whole number of 0 or more.",
    "disk": "`max_gb` is 0; expected a number above 0.",
    "disk in words": "`max_gb` is '5 GB'; expected a number above 0.",
    "time": "`max_overhead` is '10 %'; expected a share of the time of training above 0",
    "share": "`curvature_share` is 1.5; expected a share of each batch above 0 and up to 1.",
    "share in words": "`curvature_share` is 'all'; expected a share of each batch above 0",
    "snapshots": "`snapshots` is -2; expected a whole number of steps, 0 for none, or a list",
    "snapshots in a list": "`snapshots` is [3, -1]; expected a whole number of steps",
    "snapshots in words": "`snapshots` is 'all'; expected a whole number of steps",
    "layers": "`layers` is 'net.2'; expected a list of names of modules",
    "layers by number": "`layers` is [2]; expected a list of names of modules",
    "ids": "`sample_ids` is 3; expected a key of the batch, or a function of it",
    "axes": "`batch_dims` is 'flattened'; expected axes by names of modules",
    "axes by word": "`batch_dims` is {'head': 'flat'}; expected axes by names of modules",
    "projector": "expected an object such as `KroneckerCountSketch()` or `Identity()`.",
    "no projector": "`projector` is None; expected an object such as `KroneckerCountSketch()`",
    "store": "`store` is None; expected the path of a folder to record into, or an `HDF5Store(",
    "tracked reduction": f"`reduction` is 'avg'; {WORD} 'mean', 'sum'.",
    "tracked preconditioner": f"`preconditioner` is 'adam'; {WORD} 'optimizer', 'none'.",
    "tracked mode": f"`mode` is 'test'; {WORD} 'eval', 'train'.",
    "tracked existing": f"`existing` is 'overwrite'; {WORD} 'refuse', 'replace'.",
    "tracked stride": "`every_n_steps` is 0; expected a whole number of 1 or more.",
    "period": "`period` is 'batch'; expected 'epoch', 'run', or a whole number of steps.",
    "period of none": "`period` is 0; expected a whole number of 1 or more.",
    "tracked layers": "`layers` is 'net.2'; expected a list of names of modules",
    "tracked projector": "`projector` is 'whole'; expected an object such as",
    "tracked store": "expected the path of a file to write, such as 'probe.npz'.",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_wrong_argument_is_named_with_what_was_expected(name):
    require_said(CALLS, name, EXPECTED[name])


@pytest.mark.parametrize("name", ["nothing wrong", "nothing wrong with a tracker"])
def test_what_is_right_is_taken(name):
    assert what_is_said(CALLS)[name] == "nothing was said"
