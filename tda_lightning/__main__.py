"""``python -m tda_lightning``: the command line."""

import sys

from tda_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
