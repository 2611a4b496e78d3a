"""``python -m tda_lightning.cli``: the command line without its installed script."""

import sys

from tda_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
