"""Load the model and the queries that a command line names.

A name is ``module:name`` or ``path/to/file.py:name``. It stands for an object, or for a class or a
function without required arguments that returns it. A LightningCLI configuration holds ``model``
and ``data``, each with a ``class_path`` and ``init_args``; only the section that is needed is
built, and no trainer.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import click
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

# Of loaders over a dataset that has none.
_BATCH_SIZE = 50
# First bytes of the files of `torch.save`: a zip archive, or a pickle by old versions.
_SAVED_BY_TORCH = (b"PK", b"\x80\x02")
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
        loaded = _build_section(config, "model", named, "--model")
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
        named = _build_section(config, "data", named, option)
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
            f"`{type(data).__name__}` has no data for the split `{split}`: {_in_short(error)}. "
            "Choose another with `--split`."
        ) from error


def _read_checkpoint(checkpoint: Path, trust: bool) -> dict[str, Any]:
    with checkpoint.open("rb") as file:
        is_saved_by_torch = file.read(2) in _SAVED_BY_TORCH
    if not is_saved_by_torch:
        raise click.UsageError(
            f"`{checkpoint}` is no checkpoint; expected a file saved by a Trainer or `torch.save`."
        )
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=not trust)
    except Exception as error:
        if isinstance(error, UnpicklingError) and not trust:
            raise click.UsageError(
                f"`{checkpoint}` holds more than weights and Python's own types, and loading it "
                "may run code. If you trust its source, pass `--trust-checkpoint`."
            ) from error
        raise click.UsageError(f"`{checkpoint}` cannot be loaded: {_in_short(error)}.") from error
    if not isinstance(saved, dict):
        raise click.UsageError(f"`{checkpoint}` holds a {type(saved).__name__}; expected weights.")
    return saved


def _load_weights(model: nn.Module, saved: Mapping[str, Any], checkpoint: Path | None) -> None:
    try:
        model.load_state_dict(saved.get("state_dict", saved))
    except Exception as error:
        name = type(model).__name__
        raise click.UsageError(
            f"The weights of `{checkpoint}` do not fit `{name}`: {_in_short(error)}."
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
            f"`{name}({', '.join(arguments)})` failed: {_in_short(error)}."
        ) from error


def _build_section(config: Path, section: Literal["model", "data"], named: Any, option: str) -> Any:
    """Return the model or the data that a configuration describes.

    ``named`` is the class to build, if the section has no ``class_path``; ``option`` names it.

    Raises:
        click.UsageError: If the section is missing, or if it cannot be built.
        ModuleNotFoundError: If jsonargparse is not installed.
    """
    settings = _read_section(config, section)
    class_path = settings.get("class_path")
    if class_path is None and named is None:
        raise click.UsageError(
            f"`{section}` in `{config}` has no `class_path`. Name the class: "
            f"`{option} module:Class`."
        )
    if class_path is not None and not (isinstance(class_path, str) and "." in class_path):
        raise click.UsageError(
            f"`class_path` of `{section}` in `{config}` is `{class_path}`; expected `module.Class`."
        )
    cls = named if class_path is None else import_object(":".join(class_path.rsplit(".", 1)))
    arguments = settings if class_path is None else settings.get("init_args") or {}
    try:
        return _build(cls, arguments)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise click.UsageError(
            f"`{section}` in `{config}` cannot be built: {_in_short(error)}."
        ) from error


def _read_section(config: Path, section: Literal["model", "data"]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.UsageError(f"`{config}` is no YAML: {_in_short(error)}.") from error
    content = content.get("fit", content) if isinstance(content, dict) else {}
    settings = content.get(section) if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise click.UsageError(f"`{config}` has no section `{section}`.")
    return settings


def _build(cls: Any, arguments: dict[str, Any]) -> Any:
    try:
        from jsonargparse import ArgumentParser
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`{error.name}` is not installed: pip install 'jsonargparse[signatures]'",
            name=error.name,
        ) from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "built", fail_untyped=False)
    parsed = parser.parse_object({"built": arguments})
    # Its name since 4.49; Lightning admits earlier ones.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(parsed)["built"]


def import_object(path: str) -> Any:
    """Return the object at an import path; the working directory is searched first.

    Raises:
        click.UsageError: If there is none.
    """
    place, separator, name = path.rpartition(":")
    if not separator or not name:
        raise click.UsageError(f"`{path}` is no import path; expected `module:name`.")
    try:
        value: Any = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except Exception as error:
        raise click.UsageError(
            f"`{place}` cannot be imported: {_in_short(error)}. Modules are searched in the "
            "working directory and among installed packages; `path/to/file.py:name` names a file."
        ) from error
    for part in name.split("."):
        if not hasattr(value, part):
            close = difflib.get_close_matches(part, dir(value), n=1)
            hint = f" Did you mean `{close[0]}`?" if close else f" Correct `{path}`."
            raise click.UsageError(f"`{place}` has no `{name}`.{hint}")
        value = getattr(value, part)
    return value


def _in_short(error: Exception) -> str:
    """Return the class and the message of an error, in one line of limited length."""
    text = " ".join(str(error).split()) or "no message"
    shown = text if len(text) <= 300 else f"{text[:297]}..."
    return f"{type(error).__name__}: {shown}".removesuffix(".")


def _import_module(name: str) -> Any:
    if str(Path.cwd()) not in sys.path:  # Scripts of an environment do not search it by default.
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(file: Path) -> Any:
    specification = importlib.util.spec_from_file_location(file.stem, file)
    if specification is None or specification.loader is None or not file.exists():
        raise FileNotFoundError("there is no such file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[file.stem] = module  # Dataclasses and pickles look their module up.
    specification.loader.exec_module(module)
    return module
