"""Load the model and the queries that a command line names.

A name stands for an object, or for a class or a function without required arguments that returns
it. A LightningCLI configuration holds ``model`` and ``data``, each with a ``class_path`` and
``init_args``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tda_lightning.cli.configuration import build_section
from tda_lightning.cli.importing import import_object, in_short

# Of loaders over a dataset that has none.
_BATCH_SIZE = 50
# Stage and loader of a LightningDataModule, per split.
SPLITS = {
    "train": ("fit", "train_dataloader"),
    "val": ("validate", "val_dataloader"),
    "test": ("test", "test_dataloader"),
    "predict": ("predict", "predict_dataloader"),
}


def load_model(
    model: str | None, config: Path | None, checkpoint: Path | None, trust_checkpoint: bool
) -> nn.Module:
    """Return the trained model: named by an import path, or by the class in a configuration.

    Raises:
        click.UsageError: If the options do not name a trained model.
    """
    saved = None if checkpoint is None else _read_checkpoint(checkpoint, trust_checkpoint)
    named = None if model is None else import_object(model)
    if config is not None and not isinstance(named, nn.Module):
        loaded = build_section(config, "model", named, "--model")
    elif named is None:
        raise click.UsageError("Name the model: `--model module:name`, or `--config config.yaml`.")
    elif inspect.isclass(named):
        loaded = _call(named, _matching(named, (saved or {}).get("hyper_parameters") or {}))
    else:
        loaded = _call(named, {}) if inspect.isfunction(named) else named
    if not isinstance(loaded, nn.Module):
        raise click.UsageError(f"`{model}` is a {type(loaded).__name__}; expected a model.")
    if saved is not None:
        _load_weights(loaded, saved, checkpoint)
    elif inspect.isclass(named) or config is not None:
        raise click.UsageError(
            f"A new `{type(loaded).__name__}` has no trained weights. Pass `--checkpoint`."
        )
    return loaded


def load_queries(
    queries: str | None, config: Path | None, split: str, option: str = "--queries"
) -> Any:
    """Return a batch or a loader of queries: named by an import path, or in a configuration.

    ``option`` is the option that names them.

    Raises:
        click.UsageError: If the options do not name queries.
    """
    named = None if queries is None else import_object(queries)
    if named is None or (config is not None and inspect.isclass(named)):
        if config is None:
            raise click.UsageError("Name the queries: `--queries module:name`, or `--config`.")
        named = build_section(config, "data", named, option)
    elif inspect.isclass(named) or inspect.isfunction(named):
        named = _call(named, {})
    return _loader_of(named, split) if hasattr(named, SPLITS[split][1]) else named


def as_loader(data: Any) -> Any:
    """Return a loader over a dataset; batches and loaders are returned unchanged."""
    return DataLoader(data, batch_size=_BATCH_SIZE) if isinstance(data, Dataset) else data


def _loader_of(data: Any, split: str) -> Any:
    """Return the loader of a LightningDataModule for a split."""
    stage, method = SPLITS[split]
    try:
        if hasattr(data, "prepare_data"):
            data.prepare_data()
        if hasattr(data, "setup"):
            data.setup(stage)
        return getattr(data, method)()
    except Exception as error:
        raise click.UsageError(
            f"`{type(data).__name__}` has no data for the split `{split}`: {in_short(error)}. "
            "Choose another with `--split`."
        ) from error


def _read_checkpoint(checkpoint: Path, trust: bool) -> dict[str, Any]:
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=not trust)
    except Exception as error:
        remedy = "" if trust else " If you trust its source, pass `--trust-checkpoint`."
        raise click.UsageError(
            f"`{checkpoint}` cannot be loaded: {in_short(error)}.{remedy}"
        ) from error
    if not isinstance(saved, dict):
        raise click.UsageError(f"`{checkpoint}` holds a {type(saved).__name__}; expected weights.")
    return saved


def _load_weights(model: nn.Module, saved: Mapping[str, Any], checkpoint: Path | None) -> None:
    try:
        model.load_state_dict(saved.get("state_dict", saved))
    except Exception as error:
        raise click.UsageError(
            f"The weights of `{checkpoint}` do not fit `{type(model).__name__}`: {in_short(error)}."
        ) from error


def _matching(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a class or a function takes."""
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return {name: value for name, value in arguments.items() if not name.startswith("_")}
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in arguments.items() if name in names}


def _call(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except Exception as error:
        name = getattr(factory, "__name__", type(factory).__name__)
        raise click.UsageError(
            f"`{name}({', '.join(arguments)})` failed: {in_short(error)}."
        ) from error
