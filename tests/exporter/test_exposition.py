"""The exposition: what Prometheus' own parsers make of it."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from fastapi_headroom import catalog
from fastapi_headroom.exporter.exposition import Renderer, wants_gzip, wants_openmetrics
from fastapi_headroom.store.reader import Family, Reader
from fastapi_headroom.store.writer import Writer

HOSTILE = 'a "quoted" \\ back\\nslash\nnew line, {braces} # é 漢 \r'
PARSERS = pytest.mark.parametrize("openmetrics", [False, True], ids=["text", "openmetrics"])


def parsed(body: bytes, *, openmetrics: bool) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = parse_openmetrics(body.decode()) if openmetrics else parse_text(body.decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def gauge(name: str, *samples: tuple[dict[str, str], float], help_text: str = "Text.") -> Family:
    return Family(name, "gauge", help_text, [(name, tuple(labels.items()), value) for labels, value in samples])


def whole_catalog(directory: Path) -> Reader:
    """Write every row of the catalog twice, with hostile label values."""
    writer = Writer.open(directory)
    for metric in catalog.ALL:
        for text in ("plain", HOSTILE):
            labels = [text for _ in metric.labels]
            if metric.kind == "counter":
                writer.counter(metric, *labels).inc(1.5)
            elif metric.kind == "gauge":
                writer.gauge(metric, *labels).set(2.5)
            else:
                writer.histogram(metric, *labels).observe(0.3)
    return Reader(directory)


@PARSERS
def test_the_whole_catalog_parses_to_what_was_written(tmp_path: Path, openmetrics: bool) -> None:
    """Every row of the catalog, with hostile label values, comes out of Prometheus' parser as the store holds it."""
    snapshot = whole_catalog(tmp_path).read()
    seen = parsed(Renderer().render(snapshot.families, openmetrics=openmetrics), openmetrics=openmetrics)
    assert seen == snapshot.values()
    assert {family.name for family in snapshot.families} >= {metric.family for metric in catalog.ALL}


def test_promtool_finds_nothing_but_opentelemetrys_own_name(tmp_path: Path) -> None:
    """``promtool check metrics`` accepts the whole catalog; its one remark is on a name that OpenTelemetry chose."""
    body = Renderer().render(whole_catalog(tmp_path).read().families)
    done = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, timeout=30, check=False)
    remarks = (done.stdout + done.stderr).decode().splitlines()
    assert [line for line in remarks if not line.startswith("db_client_connection_count non-histogram")] == []
    # 3 is a remark, 1 is an exposition that cannot be parsed
    assert done.returncode == (3 if remarks else 0)


@PARSERS
def test_numbers_without_a_value_are_spelled_as_prometheus_does(openmetrics: bool) -> None:
    """Infinities and NaN survive beside ordinary numbers."""
    family = gauge("g", ({"n": "a"}, math.inf), ({"n": "b"}, -math.inf), ({"n": "c"}, math.nan), ({"n": "d"}, 1e-7))
    body = Renderer().render([family], openmetrics=openmetrics)
    seen = parsed(body, openmetrics=openmetrics)
    assert b'g{n="a"} +Inf\ng{n="b"} -Inf\ng{n="c"} NaN\ng{n="d"} 1e-07\n' in body
    assert seen["g", (("n", "a"),)] == math.inf
    assert seen["g", (("n", "d"),)] == 1e-7


def test_openmetrics_names_a_counter_without_total_and_ends_with_eof() -> None:
    """A counter's family is ``x`` in OpenMetrics and ``x_total`` in text, its sample ``x_total`` in both."""
    family = Family("x", "counter", "Text.", [("x_total", (), 1.0)])
    assert Renderer().render([family], openmetrics=True) == b"# HELP x Text.\n# TYPE x counter\nx_total 1.0\n# EOF\n"
    assert Renderer().render([family]) == b"# HELP x_total Text.\n# TYPE x_total counter\nx_total 1.0\n"


def test_help_texts_are_escaped() -> None:
    """A help text with a line break, a backslash and quotes stays one line and says the same."""
    family = gauge("g", ({}, 1.0), help_text='one\ntwo \\ "three"')
    for openmetrics, parse in ((False, parse_text), (True, parse_openmetrics)):
        (read,) = parse(Renderer().render([family], openmetrics=openmetrics).decode())
        assert read.documentation == family.help


def test_a_foreign_name_is_made_a_legacy_name() -> None:
    """Names with other characters, which a user's own metrics may have, are exposed with underscores."""
    body = Renderer().render([gauge("mémoire.utilisée", ({"né:e": "é"}, 1.0))])
    assert parsed(body, openmetrics=False) == {("m_moire_utilis_e", (("n__e", "é"),)): 1.0}


def test_a_lone_surrogate_does_not_lose_the_scrape() -> None:
    """A label value that is no valid Unicode is replaced, and all other samples are there."""
    seen = parsed(Renderer().render([gauge("g", ({"n": "\ud800"}, 1.0), ({"n": "b"}, 2.0))]), openmetrics=False)
    assert seen == {("g", (("n", "?"),)): 1.0, ("g", (("n", "b"),)): 2.0}


def test_a_warm_renderer_says_the_same_as_a_new_one(tmp_path: Path) -> None:
    """What is kept between scrapes never shows: values that change, series that come and families that stay."""
    writer, reader, warm = Writer.open(tmp_path), Reader(tmp_path), Renderer()
    for step in range(6):
        writer.counter(catalog.REQUESTS, f"/route/{step // 2}", "ok").inc()
        writer.gauge(catalog.LOOP_UTILIZATION, writer.worker).set(step / 2)
        families = reader.read().families
        for openmetrics in (False, True):
            assert warm.render(families, openmetrics=openmetrics) == Renderer().render(
                families, openmetrics=openmetrics
            )
    writer.close()


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; version=1.0.0", True),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.0, text/plain", False),
        # what Prometheus 2.42 and 3 send
        (
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
            "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            True,
        ),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;q=0.3",
            True,
        ),
        (";;,=,;q=", False),
    ],
)
def test_the_accept_header_chooses_the_form(accept: str, expected: bool) -> None:
    """OpenMetrics goes to whoever names it in a version that we speak."""
    assert wants_openmetrics(accept) is expected


@pytest.mark.parametrize(
    ("accept", "expected"), [("", False), ("gzip", True), ("deflate, GZIP;q=0.5", True), ("gzip;q=0", False)]
)
def test_the_accept_encoding_header_chooses_gzip(accept: str, expected: bool) -> None:
    """A body is compressed for whoever takes it."""
    assert wants_gzip(accept) is expected


@PARSERS
def test_label_names_are_valid_and_there_once(openmetrics: bool) -> None:
    """Prometheus refuses a whole scrape for a label name that is empty, reserved or there twice: a collector of the
    app's own may give all three, and names of any UTF-8 may become the same."""
    family = gauge("t", ({"a.b": "1", "a_b": "2"}, 1.0), ({"": "3"}, 2.0), ({"__name__": "4"}, 3.0), ({"é": "5"}, 4.0))
    family.rows.series += (("t", (("x", "6"), ("x", "7"))),)
    family.values = [*family.values, 5.0]
    assert parsed(Renderer().render([family], openmetrics=openmetrics), openmetrics=openmetrics) == {
        ("t", (("a_b", "1"), ("a_b_", "2"))): 1.0,
        ("t", (("_", "3"),)): 2.0,
        ("t", (("exported__name__", "4"),)): 3.0,
        ("t", (("_", "5"),)): 4.0,
        ("t", (("x", "6"), ("x_", "7"))): 5.0,
    }
