"""From a YAML file and `section.field=value` overrides to a checked RunConfig."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from distpc.config.schema import RunConfig
from distpc.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, apply overrides such as `finetune.num_epochs=5`, and check every field.

    Raises:
        ConfigError: naming the file or override, the field, what was found and the nearest key.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    try:
        return parse_config(values, where=str(path))
    except ConfigError:
        # Where the file alone is right, an override is to blame.
        parse_config(_read_yaml(path), where=str(path))
        return parse_config(values, where=" ".join(overrides))


def parse_config(values: dict[str, Any], where: str) -> RunConfig:
    """Check plain values (as from YAML) against the schema; `where` names them in errors."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from error


def dump_config(config: RunConfig) -> str:
    """The configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            "the config file does not exist", where=path, fix="see configs/ for examples"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError("the config file is not YAML", where=path, found=error) from error
    if not isinstance(values, dict):
        raise ConfigError(
            "the config file holds no sections",
            where=path,
            found=type(values).__name__,
            expected="a mapping such as `data:`, `teacher:`, ...",
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            "an override is not of the form section.field=value",
            found=override,
            expected="for example finetune.num_epochs=5",
        )
    target = values
    for part in parts[:-1]:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                "an override goes below a field that is no section",
                where=override,
                found=f"{part} = {inner!r}",
            )
        target = inner
    try:
        target[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("an override's value is not YAML", where=override) from error


def _explain(error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    field = _field(first["loc"])
    rest = error.error_count() - 1
    suffix = f" (and {rest} more)" if rest else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        return ConfigError(
            f"unknown config key '{field}'{suffix}",
            where=where,
            found=first["loc"][-1],
            expected=f"one of: {', '.join(known)}",
            fix=f"did you mean '{near[0]}'?" if near else "see docs/config.md for every field",
        )
    found = first["input"]
    # What a validator of ours says needs no announcement.
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(
        f"config field '{field or 'the run'}' is wrong: {message}{suffix}",
        where=where,
        found=None if isinstance(found, BaseModel | dict) else repr(found),
        fix="see docs/config.md for every field",
    )


def _field(location: tuple[str | int, ...]) -> str:
    """The path that a user would write: without the tag of a discriminated union."""
    parts = [str(part) for part in location]
    if parts[:2] == ["data", "source"]:
        del parts[2:3]
    return ".".join(parts)


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """The keys of the section in which `location`'s last part is unknown."""
    options: list[type[BaseModel]] = [RunConfig]
    for part in map(str, location[:-1]):
        if len(options) > 1:
            # Below a discriminated union pydantic adds the tag ("digits") to the location.
            options = [model for model in options if _tag(model) == part]
        else:
            options = _models(options[0], part)
    return sorted(options[0].model_fields)


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else next(map(str, get_args(field.annotation)), None)


def _models(model: type[BaseModel], part: str) -> list[type[BaseModel]]:
    annotation = model.model_fields[part].annotation
    options = [annotation, *get_args(annotation)]
    return [option for option in options if isinstance(option, type) and _is_model(option)]


def _is_model(option: type) -> bool:
    return issubclass(option, BaseModel)
