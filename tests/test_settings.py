"""Settings: what is wrong is named with its remedy, and what is unset is unset."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fastapi_headroom import settings
from fastapi_headroom.settings import Settings


def test_an_empty_variable_is_as_good_as_none(caplog: pytest.LogCaptureFixture) -> None:
    """Compose and Kubernetes hand over what nobody set as empty text: the defaults hold, and nothing is said."""
    empty = {f"HEADROOM_{name.upper()}": "" for name in Settings.model_fields}
    standard = {"OTEL_SERVICE_NAME": "shop", "WEB_CONCURRENCY": "4", "PROMETHEUS_MULTIPROC_DIR": "/metrics"}
    assert settings.load(empty | standard) == settings.load(standard)
    assert not caplog.records
    loaded = settings.load(empty | standard)
    assert (loaded.service_name, loaded.expected_workers, loaded.directory) == ("shop", 4, Path("/metrics"))
    assert loaded.exporter_token_file is None


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("HEADROOM_BLOCK_THRESHOLD=100ms", ("'100ms' is ignored", "valid number", "the default 0.1 is used")),
        ("HEADROOM_EXPORTER=maybe", ("valid boolean", "the default true is used")),
        ("HEADROOM_EXPECTED_WORKERS=0", ("greater than or equal to 1", "the default is used")),
        ("HEADROOM_PROT=1", ("unknown variable HEADROOM_PROT", "did you mean HEADROOM_PORT?")),
    ],
)
def test_a_wrong_variable_is_one_line_that_says_what_holds_instead(
    variable: str, says: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the variable, what is wrong with it, and what it is taken for."""
    caplog.set_level(logging.WARNING)
    name, _, text = variable.partition("=")
    assert settings.load({name: text}) == settings.load({})
    (record,) = caplog.records
    assert all(part in record.getMessage() for part in (name, *says))
