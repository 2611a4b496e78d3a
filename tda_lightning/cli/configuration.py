"""Build the model or the data of a LightningCLI configuration.

Only the section that is needed is built, and no trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from tda_lightning.cli.importing import import_object, in_short

Section = Literal["model", "data"]


def build_section(config: Path, section: Section, named: Any, option: str) -> Any:
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
    cls = named if class_path is None else import_object(":".join(class_path.rsplit(".", 1)))
    arguments = settings if class_path is None else settings.get("init_args") or {}
    try:
        return _build(cls, arguments)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise click.UsageError(
            f"`{section}` in `{config}` cannot be built: {in_short(error)}."
        ) from error


def _read_section(config: Path, section: Section) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.UsageError(f"`{config}` is no YAML: {in_short(error)}.") from error
    content = content.get("fit", content) if isinstance(content, dict) else {}
    settings = content.get(section)
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
