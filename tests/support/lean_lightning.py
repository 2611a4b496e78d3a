"""Import Lightning without the large packages that it loads only because they are installed.

torchmetrics, which Lightning imports, imports each of these if it can. They take most of the time
of a process that starts. Scripts of the tests that start many processes import this module first.
"""

import importlib.metadata
import sys

UNUSED = ("matplotlib", "scipy", "transformers")
version_of = importlib.metadata.version


def version(name: str) -> str:
    if name in UNUSED:
        raise importlib.metadata.PackageNotFoundError(name)
    return version_of(name)


if "pytest" not in sys.modules:  # which imports every module, to find doctests
    importlib.metadata.version = version
    sys.modules.update(dict.fromkeys(UNUSED))  # importing them raises an `ImportError`
