"""Draw the first screen of the report, for README and the documentation.

`python tests/benchmarks/pictures_report.py` trains the model of `examples/digits.py`, writes its
report, and saves what Chromium shows of it as `report.png`, in a minute.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from tda_lightning import GradientRecorder
from tda_lightning.report import report

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "support")]

from chromium import Chromium  # noqa: E402
from digits import DigitsCNN, load  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("report.png"))
    options = parser.parse_args()
    pl.seed_everything(0)
    train, test, _ = load(0)
    model = DigitsCNN()
    with TemporaryDirectory() as folder:
        run, page = Path(folder) / "run.tda", Path(folder) / "report.html"
        trainer = pl.Trainer(
            max_epochs=15,
            accelerator="cpu",
            callbacks=[GradientRecorder(run)],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True))
        report(run, model, test.tensors, train=train, out=page, title="Handwritten digits")
        with Chromium() as browser:
            tab = browser.open(page)
            tab.resize(1440, 900, scale=0.75)
            tab.picture(options.picture)


if __name__ == "__main__":
    main()
