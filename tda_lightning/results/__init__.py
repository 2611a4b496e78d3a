"""The objects that attribution returns."""

from tda_lightning.results.contributions import Contributions
from tda_lightning.results.embedding import Embedding
from tda_lightning.results.ranking import Ranking, SampleRanking
from tda_lightning.results.sample_scores import SampleScores
from tda_lightning.results.scores import Scores
from tda_lightning.results.top_scores import TopScores
from tda_lightning.results.trajectory import Trajectory

__all__ = [
    "Contributions",
    "Embedding",
    "Ranking",
    "SampleRanking",
    "SampleScores",
    "Scores",
    "TopScores",
    "Trajectory",
]
