"""The methods that the benchmark `lds.py` compares, each as one entry of a list."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lds_bars import influence, sampled_influence, trak
from lds_baselines import cosine, features, knn_shapley
from lds_runs import Run
from lds_tasks import Task
from lds_truths import Retrainer
from torch import Tensor

from tda_lightning import (
    TRAK,
    FullInfluenceFunction,
    GradientSimilarity,
    InfluenceFunction,
    KroneckerCountSketch,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.attribution import Attributor, Averaged, Linear, Mixed, SampledLabels
from tda_lightning.full_influence import EKFAC, ConjugateGradient, Solver, Woodbury
from tda_lightning.stores.snapshots import Moment

MODELS_OF_TRAK = 5
# The eigenvectors of a matrix of this size take seconds.
LARGEST_FOR_SOURCE = 2048
NEIGHBOURS = (1, 2, 5, 10, 20, 50, 100, 200)
Grid = Callable[[], Iterable[tuple[str, Tensor]]]


def recordings(dimension: int) -> dict[str, dict[str, object]]:
    """Return the settings of each recorder, by name.

    Every method of the library is evaluated on each of these runs.

    Args:
        dimension: Length of the rows of the wider recording.
    """
    wide = {"curvature": "fisher", "projector": KroneckerCountSketch(dimension)}
    sampled = {"curvature": "fisher"}
    return {"": {}, "sampled labels": sampled, f"sampled labels, k = {dimension}": wide}


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        name: Of the method.
        compute: Returns scores at the defaults, shape ``(n_query, n_train)``; none for bars.
        grid: Returns the names and the scores of other settings.
        mebibytes: Size of the store that the method reads.
    """

    name: str
    compute: Callable[[], Tensor] | None
    grid: Grid = tuple
    mebibytes: float | None = None


def methods_of(runs: Mapping[str, Run], retrainer: Retrainer) -> list[Entry]:
    """Return all entries that are compared on a task.

    Args:
        runs: The recorded runs, by the name of their recording.
        retrainer: Trains more models, for the methods that need them.
    """
    main = runs[""]
    return [
        *(entry for recording, run in runs.items() for entry in of_the_library(run, recording)),
        *by_whole_gradients(main),
        *without_gradients(main, "inputs", main.task.raw_points),
        *without_gradients(main, "features", partial(features, main.learner.network)),
        *bars(main, retrainer),
    ]


def of_the_library(run: Run, recording: str) -> list[Entry]:
    """Return the methods that read a run, each with its defaults and a grid of other settings."""
    if recording:
        return of_sampled_labels(run, recording)
    return [
        from_run(run, recording, TracIn()),
        from_run(run, recording, TracIn(), at="snapshots"),
        from_run(run, recording, GradientSimilarity(), [GradientSimilarity("dot")]),
        from_run(run, recording, Unrolled(), [Unrolled(propagator=Linear())]),
        from_run(run, recording, Source(), [Source(1), Source(6)]),
        from_run(run, recording, Source(), at="snapshots"),
        from_run(run, recording, InfluenceFunction(), [InfluenceFunction(rows="last visit")]),
        from_run(run, recording, InfluenceFunction(), at="snapshots"),
        averaged(run, recording),
        *([from_run(run, recording, TRAK())] if run.has_one_class else []),
    ]


def of_sampled_labels(run: Run, recording: str) -> list[Entry]:
    """Return the methods that gain from rows of sampled labels."""
    unrolled = [Unrolled(propagator=Linear()), Unrolled(SampledLabels())]
    entries = [
        from_run(run, recording, Unrolled(), unrolled),
        from_run(run, recording, InfluenceFunction(), [InfluenceFunction(Mixed())]),
        from_run(run, recording, InfluenceFunction(), at="snapshots"),
        averaged(run, recording),
    ]
    if run.store.recipe.dimension <= LARGEST_FOR_SOURCE:
        entries.append(from_run(run, recording, Source(), [Source(3, SampledLabels())]))
        entries.append(from_run(run, recording, Source(), at="snapshots"))
    return entries


def from_run(
    run: Run,
    recording: str,
    method: Attributor,
    settings: Sequence[Attributor] = (),
    at: Moment = "now",
) -> Entry:
    where = "" if at == "now" else "at snapshots"
    name = ", ".join(part for part in (type(method).__name__, where, recording) if part)

    def grid() -> Iterable[tuple[str, Tensor]]:
        return ((arguments_of(setting), run.scores(setting, at)) for setting in settings)

    return Entry(name, partial(run.scores, method, at), grid, run.mebibytes)


def averaged(run: Run, recording: str) -> Entry:
    name = f"Averaged, {recording}".strip(", ")
    return Entry(name, partial(run.scores, Averaged(), None), mebibytes=run.mebibytes)


def arguments_of(method: Attributor) -> str:
    return repr(method).removeprefix(type(method).__name__).strip("()")


def by_whole_gradients(run: Run) -> list[Entry]:
    """Return the methods with whole gradients: at the final weights, and along the run.

    EKFAC refuses sequences and batch norms; conjugate gradients take hours with many terms per
    sample.
    """
    solvers: list[Solver] = [Woodbury()]
    if run.has_one_label:
        solvers.append(ConjugateGradient())
    if run.has_one_label and not any(True for _ in run.task.network().buffers()):
        solvers.append(EKFAC())
    entries = []
    for solver in solvers:
        method = FullInfluenceFunction(solver)
        name = f"FullInfluenceFunction, {type(solver).__name__}"
        entries.append(Entry(name, partial(run.scores_by_gradients, method)))
    along = "FullInfluenceFunction along the run"
    method = FullInfluenceFunction()
    at_snapshots = partial(run.scores_along, method, "snapshots")
    entries.append(Entry(along, partial(run.scores_along, method, "now")))
    entries.append(Entry(f"{along}, at snapshots", at_snapshots))
    return entries


def without_gradients(run: Run, space: str, points: Callable[[Tensor], Tensor]) -> list[Entry]:
    """Return the baselines that compare points of a space; Shapley values need classes."""
    data = run.task.data()
    train, queries = points(data.train.tensors[0]), points(data.queries.tensors[0])
    labels = (data.train.tensors[1], data.queries.tensors[1])
    shapley = partial(knn_shapley, train, queries, *labels)

    def grid() -> Iterable[tuple[str, Tensor]]:
        names = [f"{number} neighbours" for number in NEIGHBOURS]
        return zip(names, shapley(NEIGHBOURS), strict=True)

    by_neighbours = Entry(f"kNN-Shapley of {space}", lambda: shapley([5])[0], grid)
    by_cosine = Entry(f"cosine of {space}", partial(cosine, train, queries))
    return [by_neighbours, by_cosine] if run.task.has_classes else [by_cosine]


def bars(run: Run, retrainer: Retrainer) -> list[Entry]:
    """Return the bars: methods whose settings are tuned by the truth itself."""
    task: Task = run.task

    def of_several_models() -> Iterable[tuple[str, Tensor]]:
        return trak(task, retrainer.others(MODELS_OF_TRAK))

    of_models = Entry(f"TRAK of {MODELS_OF_TRAK} models, exact rows", None, of_several_models)
    return [
        Entry("influence, exact rows", None, partial(influence, task, run.final)),
        Entry("influence, sampled labels", None, partial(sampled_influence, task, run.final)),
        *([of_models] if task.has_classes else []),
    ]
