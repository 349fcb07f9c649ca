"""Typed settings: command line over environment over TOML file over default.

A service declares one subclass of :class:`ServiceSettings`; ``section`` is its table in the TOML file and its part
of the environment's names::

    mint-catalog --listen 127.0.0.1:7000
    MINT_CATALOG_LISTEN=127.0.0.1:7000 mint-catalog
    MINT_CONFIG=mint.toml mint-catalog          # [catalog] listen = "127.0.0.1:7000"

Nested models use two underscores in the environment (``MINT_LOADER_OBJECT_STORE__BUCKET``), dots on the command
line and tables in TOML. The table ``[common]`` holds what several services share; a service's own table wins.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from mint_core.errors import InvalidArgument
from mint_core.telemetry import TelemetrySettings

__all__ = ["ServiceSettings", "Settings", "load", "load_or_exit", "masked"]

CONFIG_VARIABLE = "MINT_CONFIG"
"""Environment variable that names the TOML file."""


class Settings(BaseSettings):
    """Base of every settings class; an unknown key is an error, so that a typing mistake cannot be silent."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    section: ClassVar[str]


class ServiceSettings(Settings):
    """What every service can be told."""

    listen: str = "127.0.0.1:0"
    """Address of the public endpoint: host:port (port 0 takes a free one) or unix:PATH."""
    runtime_listen: str = "127.0.0.1:0"
    """Address of the endpoint for MinT's own services."""
    grace_s: float = 10.0
    """Seconds that running calls get to finish after SIGTERM."""
    max_message_bytes: int = 8 * 1024 * 1024
    """Largest gRPC message taken or sent."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    telemetry: TelemetrySettings = TelemetrySettings()
    """Tracing and metrics; off by default."""


S = TypeVar("S", bound=Settings)


class _Environment(EnvSettingsSource):
    """The environment's part of the settings, out of any mapping."""

    def __init__(self, cls: type[BaseSettings], environ: Mapping[str, str], prefix: str) -> None:
        self._environ = {key.lower(): value for key, value in environ.items()}
        super().__init__(cls, env_prefix=prefix, env_nested_delimiter="__", case_sensitive=False)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._environ


def load(cls: type[S], argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> S:
    """Read settings from all sources.

    Raises :class:`InvalidArgument` with one line per bad value: key, value and what is expected.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    environment = os.environ if environ is None else environ
    config_path, arguments = _take_config(arguments, environment.get(CONFIG_VARIABLE, ""))
    prefix = f"mint_{cls.section}_"
    _reject_unknown_variables(cls, environment, prefix)

    class Loaded(cls):  # type: ignore[misc, valid-type]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            **_: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            command_line: CliSettingsSource[Any] = CliSettingsSource(
                settings_cls,
                cli_prog_name=f"mint-{cls.section}",
                cli_parse_args=arguments,
                cli_kebab_case=True,
                cli_hide_none_type=True,
                cli_avoid_json=True,
            )
            file = InitSettingsSource(settings_cls, init_kwargs=_read_toml(config_path, cls.section, settings_cls))
            return command_line, _Environment(settings_cls, environment, prefix), file

    Loaded.__name__ = cls.__name__
    Loaded.__doc__ = cls.__doc__
    try:
        values = Loaded()
    except ValidationError as error:
        raise InvalidArgument(_explain(cls, error)) from None
    return cls.model_construct(**{name: getattr(values, name) for name in cls.model_fields})


def load_or_exit(cls: type[S]) -> S:
    """:func:`load` for a process's start: a bad value ends it with status 2 and the explanation."""
    try:
        return load(cls)
    except InvalidArgument as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - before logging is set up
        raise SystemExit(2) from None


def masked(settings: BaseModel) -> dict[str, Any]:
    """The settings as plain values, secrets as asterisks."""
    dumped: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            dumped[name] = masked(value)
        elif isinstance(value, SecretStr):
            dumped[name] = "**********" if value.get_secret_value() else ""
        else:
            dumped[name] = str(value) if isinstance(value, Path) else value
    return dumped


def _take_config(arguments: list[str], default: str) -> tuple[str, list[str]]:
    rest: list[str] = []
    path = default
    items = iter(arguments)
    for item in items:
        if item == "--config":
            path = next(items, "")
        elif item.startswith("--config="):
            path = item.partition("=")[2]
        else:
            rest.append(item)
    return path, rest


def _read_toml(path: str, section: str, cls: type[BaseSettings]) -> dict[str, Any]:
    if not path:
        return {}
    try:
        with Path(path).open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise InvalidArgument(f"--config is {path!r}: {error.strerror}; name a readable TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"--config is {path!r}: not TOML: {error}") from None
    common = {key: value for key, value in document.get("common", {}).items() if key in cls.model_fields}
    return common | document.get(section, {})


def _reject_unknown_variables(cls: type[BaseSettings], environ: Mapping[str, str], prefix: str) -> None:
    """pydantic-settings ignores unknown environment variables; with our prefix they are typing mistakes."""
    for name in sorted(environ):
        if name.lower().startswith(prefix):
            field = name.lower().removeprefix(prefix).partition("__")[0]
            if field not in cls.model_fields:
                known = ", ".join(sorted(f"{prefix}{known}".upper() for known in cls.model_fields))
                raise InvalidArgument(f"{name} is set in the environment, but there is no such setting; known: {known}")


def _explain(cls: type[Settings], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        expected = _expected(cls, problem["loc"])
        value = "" if "secret" in key else f" is {problem['input']!r}"
        if problem["type"] == "missing":
            lines.append(f"{cls.section}.{key} is not set: expected {expected}")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"{cls.section}.{key}{value}: there is no such setting")
        else:
            lines.append(f"{cls.section}.{key}{value}: expected {expected}; {problem['msg']}")
    return "\n".join(lines)


def _expected(cls: type[BaseModel], location: tuple[int | str, ...]) -> str:
    model: type[BaseModel] = cls
    field: FieldInfo | None = None
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            break
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    if field is None or field.annotation is None:
        return "a known setting"
    name = getattr(field.annotation, "__name__", None)
    return name if name and "[" not in str(field.annotation) else str(field.annotation).replace("typing.", "")
