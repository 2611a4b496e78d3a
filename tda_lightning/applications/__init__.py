"""Uses of a recorded run: each returns ids with reasons, and changes nothing of the user's."""

from tda_lightning.applications.importance import (
    AUM,
    EL2N,
    Forgetting,
    GraNd,
    Importance,
    LabelLoss,
    Lowest,
    SelfInfluence,
)
from tda_lightning.applications.pruning import coreset, prune
from tda_lightning.applications.selection import select
from tda_lightning.applications.selections import Selection
from tda_lightning.applications.tracing import (
    BM25,
    Candidates,
    NextToken,
    TokenScores,
    candidates_of,
    rescore,
    trace_facts,
    trace_tokens,
)
from tda_lightning.applications.unlearning import (
    FirstOrder,
    RewindPlan,
    SecondOrder,
    Unlearned,
    UnrolledUpdate,
    rewind_plan,
    unlearn,
)
from tda_lightning.stores.alarms import Alarm, Alarms, find_alarms

__all__ = [
    "AUM",
    "BM25",
    "EL2N",
    "Alarm",
    "Alarms",
    "Candidates",
    "FirstOrder",
    "Forgetting",
    "GraNd",
    "Importance",
    "LabelLoss",
    "Lowest",
    "NextToken",
    "RewindPlan",
    "SecondOrder",
    "Selection",
    "SelfInfluence",
    "TokenScores",
    "Unlearned",
    "UnrolledUpdate",
    "candidates_of",
    "coreset",
    "find_alarms",
    "prune",
    "rescore",
    "rewind_plan",
    "select",
    "trace_facts",
    "trace_tokens",
    "unlearn",
]
