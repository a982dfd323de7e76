"""The settings of fastapi-headroom, and the only place that reads the environment.

Every field is an argument of ``init`` and a ``HEADROOM_*`` variable. Arguments are code, so a wrong
one raises :class:`~fastapi_headroom.errors.SettingsError`; variables are deployment, so a wrong one is
logged in one line with its remedy and the default stands in: a typo must not take an app down.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from fastapi_headroom.errors import SettingsError

log = logging.getLogger("fastapi_headroom")
PREFIX = "HEADROOM_"
STEMS = ("request", "pool", "cache", "loop", "queue", "runtime")
Words = tuple[str, ...]


class Settings(BaseModel):
    """What can be set. Durations are seconds; names lists are comma-separated in variables."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    service_name: str = ""
    """Name of the service; default: OTEL_SERVICE_NAME, else the name of the working directory."""
    service_version: str = ""
    """Version of the service, shown in ``headroom_app_info`` so that boards can mark deploys."""
    directory: Path | None = None
    """Directory of the store; default: PROMETHEUS_MULTIPROC_DIR, else one in memory per user and service."""
    group_readable: bool = False
    """Let the directory's group read it (0750 instead of 0700), for a sidecar of another user."""
    prometheus_registry: bool = True
    """Export what the app registers in prometheus_client's default registry beside our metrics."""
    exporter: bool = True
    """Let one elected worker serve /metrics while no sidecar runs."""
    host: str = "127.0.0.1"
    """Address that the exporter listens on."""
    port: int = Field(default=9464, ge=0, le=65535)
    """Port that the exporter listens on."""
    exporter_token_file: Path | None = None
    """File with a bearer token that scrapers must show. Read again when it changes."""
    exporter_certificate_file: Path | None = None
    """PEM file with the exporter's certificate, and its chain: the exporter then speaks TLS only."""
    exporter_key_file: Path | None = None
    """PEM file with the certificate's private key; default: it is in the certificate's file."""
    disable: Words = ()
    """Probes to leave off: any of request, pool, cache, loop, queue, runtime."""
    excluded_paths: Words = ()
    """Paths that are served without being measured, such as /healthz. Exact, or a prefix that ends in ``*``."""
    server_timing: Literal["never", "always"] = "never"
    """Whether every response tells in ``Server-Timing`` where its time went. It shows insides to whoever asks."""
    server_timing_secret: SecretStr = SecretStr("")
    """Requests that show this in ``X-Headroom-Timing`` get ``Server-Timing``; at least 16 visible ASCII characters."""
    trust_request_start: bool = False
    """Believe the header ``X-Request-Start`` about when a request reached the proxy before the app. Only where a proxy
    sets it on every request: clients could send any."""
    sample_interval: float = Field(default=1.0, gt=0.01, le=60)
    """Seconds between two samples of gauges; up to a second, twice as many while the event loop has nothing to do."""
    block_threshold: float = Field(default=0.1, ge=0.02, le=60)
    """Seconds from which on a held event loop is reported as blocked."""
    hold_threshold: float = Field(default=10.0, ge=0.05, le=3600)
    """Seconds from which on a database connection that is checked out is reported as held for long."""
    read_database_limit: bool = True
    """Ask the database, once per pool and over a connection that the app opens anyhow, how many it allows."""
    max_series: int = Field(default=20_000, ge=100, le=1_000_000)
    """Series that one worker may create; further label sets fold into ``_overflow``."""
    expected_workers: int | None = Field(default=None, ge=1)
    """Number of workers that should run; default: WEB_CONCURRENCY, else unknown."""
    queues: Words = ()
    """Queues to poll, as URLs: ``celery+redis://host:6379/0?queues=mail,reports``, ``celery+amqp``, ``rq+redis``,
    ``stream+redis``, ``list+redis``, ``kafka``. Spaces or commas between; one inside the query string stays there."""
    cache_servers: Words = ()
    """Cache servers to poll for memory, evictions and look-ups, as URLs: ``redis://host:6379/0?name=main``, where
    ``name`` is what the app calls this cache (default: ``host:port/db``). With ``&sample=20`` as many random keys are
    looked at now and then, for memory, age and expiry by pattern. Spaces or commas between."""
    tracing: bool = True
    """Trace when a provider is configured or the standard ``OTEL_*`` variables ask for export."""
    keep_fastapi_telemetry: bool = False
    """Leave FastAPI's own dormant telemetry on (it costs CPU on every request; see benchmarks/results.md)."""

    @field_validator("disable", "excluded_paths", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(word for word in re.split(r"[,\s]+", value) if word) if isinstance(value, str) else value

    @field_validator("queues", "cache_servers", mode="before")
    @classmethod
    def _split_urls(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(word for word in re.split(r"\s+|,(?=[\w+]+://)", value) if word)
        return value

    @field_validator("excluded_paths")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if not path.startswith("/"):
                raise ValueError(f"{path!r} is no path: paths start with /, such as /healthz or /internal/*")
            if "*" in path[:-1]:
                raise ValueError(f"{path!r} has a * that is not at its end: only a prefix can be excluded")
        return value

    @field_validator("server_timing", mode="before")
    @classmethod
    def _always_or_never(cls, value: Any) -> Any:
        if value not in ("always", "never"):
            raise ValueError("it is always or never; for single requests set HEADROOM_SERVER_TIMING_SECRET")
        return value

    @field_validator("server_timing_secret")
    @classmethod
    def _can_be_sent(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if text and (len(text) < 16 or not all("!" <= character <= "~" for character in text)):
            raise ValueError("a secret has at least 16 visible ASCII characters; `openssl rand -hex 16` makes one")
        return value

    @field_validator("disable")
    @classmethod
    def _known_stems(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for stem in value:
            if stem not in STEMS:
                raise ValueError(f"{stem!r} is no probe; the probes are {', '.join(STEMS)}")
        return value

    @property
    def store_directory(self) -> Path:
        """The directory of the store, with the default filled in."""
        if self.directory is not None:
            return self.directory
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.service_name) or "app"
        return _default_base() / f"headroom-{os.getuid()}-{slug}"


def default_stores() -> list[Path]:
    """Return the stores of this user's services that have the default directory, alive or not, the latest first."""
    found: list[tuple[float, Path]] = []
    for path in _default_base().glob(f"headroom-{os.getuid()}-*"):
        with contextlib.suppress(OSError):  # it may have been deleted
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


def _default_base() -> Path:
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def load(environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
    """Return the settings from arguments over variables over defaults.

    Raises SettingsError for an unknown or unusable argument. An unknown or unusable variable is
    logged as one warning that names the remedy, and left out; an empty one is as good as none.
    """
    env = os.environ if environ is None else environ
    values = _standard_variables(env)
    for key, text in env.items():
        if not key.startswith(PREFIX):
            continue
        name = key.removeprefix(PREFIX).lower()
        if name not in Settings.model_fields:
            log.warning("fastapi-headroom: unknown variable %s is ignored%s", key, _suggest(name, PREFIX, upper=True))
        elif not text.strip():
            continue  # as compose files leave what is unset; for a path it would be the working directory
        elif (problem := _problem(name, text)) is not None:
            log.warning(
                "fastapi-headroom: %s=%r is ignored: %s; the default%s is used",
                key, _shown(name, text), problem, _default(name),
            )  # fmt: skip
        else:
            values[name] = text
    for name, value in arguments.items():
        if name not in Settings.model_fields:
            raise SettingsError(f"init() has no setting {name!r}{_suggest(name)}")
        if (problem := _problem(name, value)) is not None:
            raise SettingsError(f"setting {name}={_shown(name, value)!r} cannot be used: {problem}")
    return Settings(**(values | arguments))


def _standard_variables(env: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {"service_name": env.get("OTEL_SERVICE_NAME") or Path.cwd().name or "app"}
    if env.get("PROMETHEUS_MULTIPROC_DIR"):
        values["directory"] = env["PROMETHEUS_MULTIPROC_DIR"]
    if env.get("WEB_CONCURRENCY", "").isdigit():
        values["expected_workers"] = max(1, int(env["WEB_CONCURRENCY"]))
    return values


def multiprocess_directory(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the directory that prometheus_client writes to in its multiprocess mode, None when that is off."""
    env = os.environ if environ is None else environ
    named = env.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(named) if named else None


def otlp_requested(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether the standard ``OTEL_*`` variables ask for traces to be exported by OTLP."""
    env = os.environ if environ is None else environ
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporters = env.get("OTEL_TRACES_EXPORTER", "").lower()
    if exporters:
        return "otlp" in exporters.split(",")
    return bool(env.get("OTEL_EXPORTER_OTLP_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def otlp_protocol(environ: Mapping[str, str] | None = None) -> str:
    """Return the protocol that the standard ``OTEL_*`` variables name for the export of traces."""
    env = os.environ if environ is None else environ
    named = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    return named or "http/protobuf"


def sdk_counts_spans(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether OpenTelemetry's SDK is told to count the spans that it starts, sampled or not."""
    env = os.environ if environ is None else environ
    return env.get("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "").strip().lower() == "true"


def _problem(name: str, value: Any) -> str | None:
    try:
        Settings(**{name: value})
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return None


def _default(name: str) -> str:
    """Return the default with a space before it; nothing of one that has to be looked up or says nothing."""
    default = Settings.model_fields[name].default
    return f" {str(default).lower()}" if isinstance(default, bool | int | float | str) and default != "" else ""


def _shown(name: str, value: Any) -> Any:
    """Return what a message may say of a value: a secret stays one when it is wrong, too."""
    return "***" if Settings.model_fields[name].annotation is SecretStr else value


def _suggest(name: str, prefix: str = "", *, upper: bool = False) -> str:
    import difflib  # for this message alone, and it is large

    near = difflib.get_close_matches(name, Settings.model_fields, n=1)
    if not near:
        known = ", ".join(sorted(Settings.model_fields))
        return f"; the settings are {known}"
    return f"; did you mean {prefix}{near[0].upper() if upper else near[0]}?"
