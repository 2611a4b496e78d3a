"""All models of the zoo, by name."""

from dataclasses import replace

from zoo_cases import Case
from zoo_decoders import DECODERS
from zoo_encoders import ENCODERS
from zoo_perception import PERCEPTION
from zoo_plain import PLAIN

FROM_CONFIG = {**DECODERS, **ENCODERS, **PERCEPTION}
ZOO: dict[str, Case] = {
    **PLAIN,
    **{name: replace(case, packages=("transformers",)) for name, case in FROM_CONFIG.items()},
}
