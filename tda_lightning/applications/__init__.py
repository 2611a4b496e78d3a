"""Uses of a recorded run: each returns ids with reasons, and changes nothing of the user's."""

from tda_lightning.applications.errors import Errors, explain_errors
from tda_lightning.applications.groups import (
    Gap,
    GroupInfluence,
    MeanLoss,
    Summary,
    WorstGroupLoss,
    attribute_summary,
    influence_by_group,
)
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
from tda_lightning.applications.loss_history import LossHistory, loss_history
from tda_lightning.applications.mislabel_results import Mislabeled
from tda_lightning.applications.mislabels import find_mislabeled
from tda_lightning.applications.neighbors import (
    Duplicates,
    Outliers,
    find_duplicates,
    find_outliers,
)
from tda_lightning.applications.notes import Note
from tda_lightning.applications.out_of_sample import OutOfSample, out_of_sample_probabilities
from tda_lightning.applications.pruning import Selection, coreset, prune
from tda_lightning.applications.retraining import (
    Plan,
    Retrainings,
    check_removal,
    leave_out,
    random_subsets,
    retrain,
    same_data,
)
from tda_lightning.applications.shortcuts import Shortcut, find_shortcut
from tda_lightning.applications.targeted_selection import select
from tda_lightning.applications.tracing import (
    BM25,
    Candidates,
    NextToken,
    TokenScores,
    candidates_of,
    last_layer_scores,
    rescore,
    trace_facts,
    trace_tokens,
)
from tda_lightning.applications.unlearning import (
    FirstOrder,
    Replay,
    RewindPlan,
    SampledRetraining,
    SecondOrder,
    Unlearned,
    UnrolledUpdate,
    rewind_plan,
    unlearn,
)
from tda_lightning.results.alarms import Alarm, Alarms, find_alarms

__all__ = [
    "AUM",
    "BM25",
    "EL2N",
    "Alarm",
    "Alarms",
    "Candidates",
    "Duplicates",
    "Errors",
    "FirstOrder",
    "Forgetting",
    "Gap",
    "GraNd",
    "GroupInfluence",
    "Importance",
    "LabelLoss",
    "LossHistory",
    "Lowest",
    "MeanLoss",
    "Mislabeled",
    "NextToken",
    "Note",
    "OutOfSample",
    "Outliers",
    "Plan",
    "Replay",
    "Retrainings",
    "RewindPlan",
    "SampledRetraining",
    "SecondOrder",
    "Selection",
    "SelfInfluence",
    "Shortcut",
    "Summary",
    "TokenScores",
    "Unlearned",
    "UnrolledUpdate",
    "WorstGroupLoss",
    "attribute_summary",
    "candidates_of",
    "check_removal",
    "coreset",
    "explain_errors",
    "find_alarms",
    "find_duplicates",
    "find_mislabeled",
    "find_outliers",
    "find_shortcut",
    "influence_by_group",
    "last_layer_scores",
    "leave_out",
    "loss_history",
    "out_of_sample_probabilities",
    "prune",
    "random_subsets",
    "rescore",
    "retrain",
    "rewind_plan",
    "same_data",
    "select",
    "trace_facts",
    "trace_tokens",
    "unlearn",
]
