"""The objects that attribution returns."""

from tda_lightning.results.contributions import Contributions
from tda_lightning.results.embedding import Embedding
from tda_lightning.results.scores import Ranking, SampleScores, Scores, TopScores
from tda_lightning.results.trajectory import Trajectory

__all__ = [
    "Contributions",
    "Embedding",
    "Ranking",
    "SampleScores",
    "Scores",
    "TopScores",
    "Trajectory",
]
