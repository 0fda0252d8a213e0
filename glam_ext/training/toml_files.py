"""TOML text, and --section.field=value from the command line, to a TrainingConfig and back.

Every error names the key and what to do: an unknown key its nearest known name, a wrong type the type that is expected.
The [model] section holds the fields of GLaMConfig, all of them or a `preset` and what differs from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glam_ext.config import GLaMConfig
from glam_ext.training.config import ConfigError, TrainingConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib
    except ModuleNotFoundError:
        raise ImportError("glam_ext.training: Python 3.10 needs tomli; pip install 'glam_ext[train]'") from None

Table = dict[str, Any]

TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "a table"}


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Reads a TOML file, then applies overrides of the form "--section.field=value" (later ones win).

    Raises ConfigError; its message starts with the name of the file.
    """
    path = Path(file)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; give the path of a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}; mend the line") from error
    for override in overrides:
        _apply(tables, override)
    try:
        return decode(tables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def decode(tables: Mapping[str, Any]) -> TrainingConfig:
    """A TrainingConfig out of nested tables, as tomllib gives them."""
    sections = _field_types(TrainingConfig)
    values: Table = {}
    for name, table in tables.items():
        if name not in sections:
            raise ConfigError(_unknown(f"[{name}]", name, sections))
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: expected a section [{name}], got {table!r}; write its fields under [{name}]")
        decoder = _decode_model if sections[name] is GLaMConfig else _decode_section
        values[name] = decoder(name, sections[name], table)
    for field in dataclasses.fields(TrainingConfig):
        if field.name not in values and field.default_factory is dataclasses.MISSING:
            values[field.name] = _decode_missing(field.name, sections[field.name])
    return TrainingConfig(**values)


def to_tables(config: TrainingConfig) -> Table:
    """Every section with every field; fields without a value (None) are left out. `decode` reads it back."""
    tables: Table = {}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        values = section.to_dict() if isinstance(section, GLaMConfig) else dataclasses.asdict(section)
        tables[field.name] = {key: value for key, value in values.items() if value is not None}
    return tables


def to_toml(config: TrainingConfig) -> str:
    """The resolved configuration as a TOML file that says everything and starts the same run."""
    lines: list[str] = []
    for name, table in to_tables(config).items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
        lines.append("")
        for key, value in table.items():
            if isinstance(value, Mapping) and value:
                lines += [f"[{name}.{key}]", *(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()), ""]
    return "\n".join(lines)


def differences(old: TrainingConfig, new: TrainingConfig) -> list[str]:
    """One line "section.field: old -> new" for every field that differs."""
    before, after = to_tables(old), to_tables(new)
    return [
        f"{section}.{key}: {before[section].get(key)!r} -> {after[section].get(key)!r}"
        for section in after
        for key in sorted(before[section].keys() | after[section].keys())
        if before[section].get(key) != after[section].get(key)
    ]


def _apply(tables: Table, override: str) -> None:
    """Writes one --section.field=value into the tables, its text read by the type of the field."""
    name, equals, text = override.removeprefix("--").partition("=")
    path = name.split(".")
    if not override.startswith("--") or not equals or len(path) < 2 or not all(path):
        raise ConfigError(f"{override}: expected --section.field=value, for instance --run.steps=100")
    sections = _field_types(TrainingConfig)
    if path[0] not in sections:
        raise ConfigError(_unknown(override, path[0], sections))
    fields = _known_fields(sections[path[0]])
    if path[1] not in fields:
        raise ConfigError(_unknown(override, path[1], fields))
    is_table = fields[path[1]] is dict
    if len(path) != (3 if is_table else 2):
        raise ConfigError(f"{override}: expected --{path[0]}.{path[1]}{'.KEY' if is_table else ''}=value")
    table = tables
    for key in path[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{override}: {key} is no section in the file; write its fields under [{key}]")
    table[path[-1]] = text if fields[path[1]] is str else _read_value(override, text, is_table)


def _read_value(override: str, text: str, string_is_fine: bool) -> Any:
    try:
        values = tomllib.loads(f"value = {text}")
        if values.keys() == {"value"}:
            return values["value"]
    except tomllib.TOMLDecodeError:
        pass
    if string_is_fine:
        return text
    raise ConfigError(f"{override}: expected a number or true or false after the =, got {text!r}")


def _decode_section(section: str, kind: type, table: Table) -> Any:
    types = _known_fields(kind)
    for key, value in table.items():
        if key not in types:
            raise ConfigError(_unknown(f"{section}.{key}", key, types))
        _check_type(f"{section}.{key}", types[key], value)
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in table:
            raise ConfigError(f"{section}.{field.name}: missing; write it under [{section}]")
    return kind(**{key: float(value) if types[key] is float else value for key, value in table.items()})


def _decode_model(section: str, kind: type[GLaMConfig], table: Table) -> GLaMConfig:
    types = _known_fields(kind)
    for key in table:
        if key not in types:
            raise ConfigError(_unknown(f"{section}.{key}", key, types))
    fields = dict(table)
    preset = fields.pop("preset", "")
    try:
        return kind.preset(preset, **fields) if preset else kind.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"[{section}] {error}") from error


def _decode_missing(section: str, kind: type) -> Any:
    """The section is not in the file: every required field is missing, and the error names the first."""
    if kind is GLaMConfig:
        raise ConfigError(f'[{section}]: missing; write it, for instance with preset = "debug"')
    return _decode_section(section, kind, {})


def _check_type(key: str, expected: type, value: Any) -> None:
    fits = isinstance(value, (int, float)) if expected is float else isinstance(value, expected)
    if expected is not bool and isinstance(value, bool):
        fits = False
    if not fits:
        raise ConfigError(f"{key}: expected {TYPE_NAMES[expected]}, got {value!r}")
    if expected is float and not math.isfinite(value):
        raise ConfigError(f"{key}: expected a finite number, got {value}")


def _known_fields(kind: type) -> dict[str, type]:
    """Field names and types of a section; tables are dict."""
    types = {
        name: dict if typing.get_origin(hint) is Mapping or hint is Mapping[str, Any] else hint
        for name, hint in _field_types(kind).items()
    }
    return {"preset": str, **types} if kind is GLaMConfig else types


def _field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _unknown(where: str, name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    advice = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}"
    return f'{where}: unknown name "{name}"; {advice}'


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml_value(key)
