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
from tda_lightning.applications.unlearning import (
    FirstOrder,
    RewindPlan,
    SecondOrder,
    Unlearned,
    UnrolledUpdate,
    rewind_plan,
    unlearn,
)

__all__ = [
    "AUM",
    "EL2N",
    "FirstOrder",
    "Forgetting",
    "GraNd",
    "Importance",
    "LabelLoss",
    "Lowest",
    "RewindPlan",
    "SecondOrder",
    "Selection",
    "SelfInfluence",
    "Unlearned",
    "UnrolledUpdate",
    "coreset",
    "prune",
    "rewind_plan",
    "select",
    "unlearn",
]
