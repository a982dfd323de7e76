"""The arrows of the house: who may import whom. A new arrow is a decision, not an accident."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "instrumentation" / "fastapi_headroom"
ROOT = PACKAGE.parents[1]

# room -> rooms that it may import; a room is a folder, or a module at the top
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "catalog": {"errors"},
    "thresholds": {"errors"},
    "settings": {"errors"},
    "ledger": set(),
    "apps": set(),
    "own_io": set(),
    "holds": set(),
    "sockets": set(),
    "urls": set(),
    "driver": {"ledger", "holds", "sockets"},
    "store": {"catalog", "errors", "own_io"},
    "tracing": {"settings", "ledger", "errors"},
    "probes": {
        "catalog", "errors", "settings", "thresholds", "ledger", "driver", "holds", "sockets", "tracing",
        "store.writer", "store.claims", "advice", "own_io", "urls",
    },
    "advice": {"catalog", "thresholds"},
    "exporter": {
        "catalog", "thresholds", "errors", "settings", "advice", "store.reader", "store.exemplars", "store.slot",
        "store.layout", "urls",
        "probes.queue_adapters", "probes.key_pattern", "probes.key_learning",
    },
    "pack": {"catalog", "thresholds", "errors"},
    "wiring": {"apps", "own_io", "settings", "errors", "store.writer", "probes", "tracing", "exporter"},
    "testing": {"wiring", "settings", "store.writer", "errors", "probes"},
    "pytest_plugin": {"testing"},
    "cli": {"settings", "errors", "exporter", "pack"},
    "__init__": {"wiring", "probes.cache", "probes.pool_autosize"},
}  # fmt: skip
STANDARD_LIBRARY_ONLY = {"apps", "own_io", "ledger", "driver", "holds", "sockets", "urls"}
NEVER = {
    "exporter": {"fastapi", "starlette", "sqlalchemy"},
    "advice": {"fastapi"},
    "store": {"fastapi", "prometheus_client"},
}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide arrows"
            module = node.module or ""
            # `from package import name`: the name may be a module
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "fastapi_headroom" else {module}
            if module.startswith("fastapi_headroom."):
                found |= {
                    f"{module}.{alias.name}"
                    for alias in node.names
                    if (
                        PACKAGE / module.removeprefix("fastapi_headroom.").replace(".", "/") / f"{alias.name}.py"
                    ).exists()
                }
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_module_imports_only_along_the_arrows(path: Path) -> None:
    """Each module imports only the rooms that its own room may know."""
    room = room_of(path)
    assert room in ARROWS, f"{room} is a new room: give it arrows here"
    allowed = ARROWS[room]
    for name in imports_of(path):
        if not name.startswith("fastapi_headroom."):
            top = name.split(".")[0]
            assert top not in NEVER.get(room, set()), f"{room} must not import {top}"
            continue
        target = name.removeprefix("fastapi_headroom.")
        head = target.split(".")[0]
        fits = head == room or head in allowed or any(target == a or target.startswith(a + ".") for a in allowed)
        # `from fastapi_headroom.store import writer` is seen as the folder and as the module: the module decides
        is_folder_of_allowed = (PACKAGE / target).is_dir() and any(a.startswith(target + ".") for a in allowed)
        assert fits or is_folder_of_allowed, f"{path.relative_to(PACKAGE)} imports {target}: no arrow from {room}"


def test_the_ledger_needs_the_standard_library_alone() -> None:
    """The ledger, the driver and what they ask import nothing but the standard library and each other."""
    for room in STANDARD_LIBRARY_ONLY:
        for name in imports_of(PACKAGE / f"{room}.py"):
            assert name.split(".")[0] in {*sys.stdlib_module_names, "fastapi_headroom"}, name


def test_only_settings_reads_the_environment() -> None:
    """No module but settings looks at os.environ or os.getenv."""
    for path in FILES:
        if path.name != "settings.py":
            assert "environ" not in path.read_text() and "getenv" not in path.read_text(), path.name


def test_the_demo_uses_public_names_only() -> None:
    """The demo app imports the package itself, and none of its modules."""
    for path in (ROOT / "demo_app").rglob("*.py"):
        for name in imports_of(path):
            if name.startswith("fastapi_headroom"):
                assert name == "fastapi_headroom", f"{path.name} imports {name}"


def test_init_imports_nothing_that_only_some_workers_need() -> None:
    """Besides this package ``init`` loads the standard library alone; what only settings ask for stays on the disk."""
    code = (
        "import json, sys, anyio._backends._asyncio, fastapi, uvicorn\n"
        "app, before = fastapi.FastAPI(), set(sys.modules)\n"
        "import fastapi_headroom\n"
        "fastapi_headroom.init(app)\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(json.loads(printed))
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"fastapi_headroom"}
    assert not loaded & {"argparse", "difflib"}
    adapters = "fastapi_headroom.probes.queue_adapters"
    assert {name for name in loaded if name.startswith(adapters)} == {adapters, f"{adapters}.base"}
    rooms = {".".join(name.split(".")[1:3]) for name in loaded if name.startswith("fastapi_headroom.")}
    assert not rooms & {"cli", "pack", "testing", "exporter.sidecar", "exporter.cache_servers", "tracing.gate"}
