"""Write the pack: boards, rules and the table of metrics, the same bytes on every run."""

from __future__ import annotations

from pathlib import Path

from fastapi_headroom.pack import cache, loop, metrics_doc, overview, pool, queue, request, rules, runtime, slo
from fastapi_headroom.pack.rules import Links, Rule

RULES: dict[str, tuple[Rule, ...]] = {
    "slo": slo.RULES,
    "request": request.RULES,
    "pool": pool.RULES,
    "cache": cache.RULES,
    "loop": loop.RULES,
    "queue": queue.RULES,
    "runtime": runtime.RULES,
}
"""Rules by stem, in the order of the stems."""
BOARDS = (overview, request, pool, cache, loop, queue, runtime)


def build(root: Path, links: Links | None = None) -> list[Path]:
    """Write ``dashboards/*.json``, ``alerts/*.rules.yml`` and ``docs/metrics.md`` under root; return the paths."""
    texts = render(links or Links())
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [root / name for name in texts]


def stale(root: Path, links: Links | None = None) -> list[Path]:
    """Return the generated files under root that are missing, or not what the code builds."""
    texts = {root / name: text for name, text in render(links or Links()).items()}
    return [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def render(links: Links) -> dict[str, str]:
    """Return every generated file's text by its path below the project."""
    boards = {module.UID: module.render() for module in BOARDS}
    texts = {f"dashboards/{uid}.json": text for uid, text in boards.items()}
    texts |= {f"alerts/{stem}.rules.yml": rules.to_yaml(stem, found, links) for stem, found in RULES.items()}
    texts["docs/metrics.md"] = metrics_doc.render(boards, [rule for found in RULES.values() for rule in found])
    return texts
