"""Send a figure to the logger of a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tda_lightning.results.optional import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figure(logger: Any, name: str, figure: Figure, *, step: int | None = None) -> None:
    """Send a figure to the logger of a trainer, such as TensorBoard or Weights & Biases.

    Args:
        logger: ``trainer.logger``. Either it has ``log_image``, as ``WandbLogger`` has, or its
            ``experiment`` has ``add_figure``, as that of ``TensorBoardLogger`` has.
        name: Name of the figure.
        figure: The figure, such as that of :func:`~tda_lightning.report.plots.plot_proponents`.
        step: Step to log it at; by default that of the logger.

    Raises:
        ValueError: If the logger takes no figures.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(name, figure, global_step=step)
    elif hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[_pixels(figure)], step=step)
    else:
        raise ValueError(
            f"`logger` is a `{type(logger).__name__}`, which takes no figures; expected one with "
            "`log_image`, such as `WandbLogger`, or `TensorBoardLogger`. Save the figure: "
            '`figure.savefig("proponents.png")`.'
        )


def _pixels(figure: Figure) -> Any:
    with needs("plots"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
