"""All parts of the demo: how each is started, what it is told, and how all of them end together."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_app.faults import FAULTS, Switches
from demo_app.stack import config
from demo_app.stack.grafana import HOW_TO_GET_IT, Grafana, find_grafana
from demo_app.stack.process import Process, ProcessError, accepts, free_port, wait_until
from demo_app.stack.rules import write_scaled
from demo_app.stack.servers import Alertmanager, Postgres, Prometheus, Redis

ROOT = Path(__file__).parents[2]
WORKERS = 2
JOB_WORKERS = 2
SCRAPE_INTERVAL = 1.0
_FOREIGN = ("HEADROOM_", "SHOP_", "PROMETHEUS_MULTIPROC_DIR", "WEB_CONCURRENCY", "LOCUST_", "CELERY_")


def answers(url: str) -> bool:
    """Return whether an address answers with a success."""
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except (OSError, ValueError):
        return False


def get_json(url: str) -> Any:
    """Return the JSON behind an address."""
    with urllib.request.urlopen(url, timeout=5) as response:
        return json.load(response)


class Stack:
    """The running demo. ``home`` (``.demo``) holds everything that it writes; ``say`` shows progress."""

    def __init__(self, home: Path, *, scale: float, say: Callable[[str], None]) -> None:
        self.home, self.scale, self._say = home, scale, say
        self.run, self.logs, self._data = home / "run", home / "logs", home / "data"
        self.switches = Switches(self.run / "faults.json")
        self.parts: list[Process] = []
        self.addresses: dict[str, str] = {}
        self.notes: list[str] = []

    def start(self) -> None:
        """Start all parts in order, each when what it needs is ready. Raises ProcessError."""
        for folder in (self.run, self.logs, self._data):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        postgres = self._begin(Postgres(self._data / "postgres"), "PostgreSQL")
        redis = self._begin(Redis(self._data / "redis"), "Redis for jobs")
        caches = {"redis": self._start_cache("cache"), "redis-west": self._start_cache("cache-west")}
        sidecar_port, shop_port = free_port(), free_port()
        environment = self._environment(postgres.url(), redis.url, sidecar_port)
        environment |= {"SHOP_CACHE_URL": caches["redis"], "SHOP_CACHE_WEST_URL": caches["redis-west"]}
        environment["SHOP_CARRIERS_URL"] = self._start_carriers(environment)
        self._run_once("seed", environment, "products, users with posts and orders into PostgreSQL")
        self._start_sidecar(environment, sidecar_port, environment["SHOP_BROKER_URL"], caches)
        self._start_shop(environment, shop_port)
        self._start_alerting(sidecar_port)
        self._start_grafana()
        self._start_load(environment)
        wait_until(self._measured, 30, "Prometheus has numbers of the shop's requests")
        self._say("all parts are up, and Prometheus has their numbers")

    def check(self) -> None:
        """Do what faults do to parts; raise ProcessError when a part has ended by itself."""
        stopped = {FAULTS[name].stops for name in self.switches.all_on()}
        for part in self.parts:
            if part.name in stopped:
                part.halt()
            elif part.halted:
                part.start()
            if not part.running and not part.halted:
                status = part.child.returncode if part.child else "?"
                raise ProcessError(f"{part.name} has ended (status {status}); its last lines:\n{part.tail()}")

    def stop(self) -> None:
        """End all parts, the last one started first. Idempotent."""
        while self.parts:
            self.parts.pop().stop()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the vector that Prometheus answers with; empty when it cannot answer now."""
        url = f"{self.addresses['Prometheus']}/api/v1/query?query={urllib.parse.quote(expression)}"
        try:
            return list(get_json(url)["data"]["result"])
        except (OSError, ValueError, KeyError):
            return []

    def received(self) -> list[dict[str, Any]]:
        """Return the alerts that the inbox has received."""
        return list(get_json(f"{self.addresses['Inbox']}/alerts"))

    def _begin(self, part: Any, what: str) -> Any:
        began = time.monotonic()
        part.log_file = self.logs / f"{part.name}.log"
        self.parts.append(part)
        part.start()
        self._say(f"{what} ({time.monotonic() - began:.1f} s)")
        return part

    def _python(self, name: str, command: list[str], environment: dict[str, str], **options: Any) -> Process:
        log = self.logs / f"{name}.log"
        return Process(name, [sys.executable, *command], log=log, cwd=ROOT, env=environment, **options)

    def _environment(self, database: str, redis: str, sidecar_port: int) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        return {
            **inherited,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "instrumentation")]),
            "PYTHONUNBUFFERED": "1",
            "SHOP_DATABASE_URL": database,
            "SHOP_BROKER_URL": redis.removesuffix("/0") + "/1",
            "SHOP_RUN_DIRECTORY": str(self.run),
            "SHOP_WORKERS": str(WORKERS),
            "HEADROOM_SERVICE_NAME": config.JOB,
            "HEADROOM_DIRECTORY": str(self.run / "store"),
            "HEADROOM_PORT": str(sidecar_port),
        }

    def _run_once(self, command: str, environment: dict[str, str], what: str) -> None:
        began = time.monotonic()
        part = self._python(command, ["-m", "demo_app", command], environment)
        part.start()
        try:
            wait_until(lambda: not part.running, 60, command)
            if part.child and part.child.returncode != 0:
                raise ProcessError(f"{command} failed:\n{part.tail()}")
        finally:
            part.stop()
        self._say(f"{what} ({time.monotonic() - began:.1f} s)")

    def _start_cache(self, name: str) -> str:
        options = {"maxmemory": "32mb", "maxmemory-policy": "allkeys-lru"}
        return str(self._begin(Redis(self._data / name, name=name, **options), f"Redis as {name}").url)

    def _start_sidecar(self, environment: dict[str, str], port: int, broker: str, caches: dict[str, str]) -> None:
        command = ["-m", "fastapi_headroom.cli", "sidecar", "--dir", environment["HEADROOM_DIRECTORY"]]
        command += ["--port", str(port), "--queue", f"celery+{broker}?queues=mail,reports"]
        for name, server in caches.items():
            command += ["--cache", f"{server}?name={name}&sample=20"]
        url = f"http://127.0.0.1:{port}"
        # Celery's main process has a slot beside its children.
        environment = {**environment, "HEADROOM_EXPECTED_WORKERS": str(WORKERS + 1 + JOB_WORKERS)}
        sidecar = self._python("sidecar", command, environment, ready=lambda: answers(f"{url}/healthz"))
        self._begin(sidecar, "headroom sidecar")
        self.addresses["Sidecar"] = url

    def _start_carriers(self, environment: dict[str, str]) -> str:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = ["-m", "uvicorn", "demo_app.carriers:app", "--port", str(port), "--log-level", "warning"]
        carriers = self._python("carriers", command, environment, ready=lambda: answers(f"{url}/healthz"))
        self._begin(carriers, "carriers: another service, which the shop asks")
        return url

    def _start_shop(self, environment: dict[str, str], port: int) -> None:
        url = f"http://127.0.0.1:{port}"
        command = ["-m", "uvicorn", "demo_app.app:app", "--port", str(port), "--log-level", "warning"]
        environment = {**environment, "WEB_CONCURRENCY": str(WORKERS)}
        shop = self._python("shop", command, environment, ready=lambda: answers(f"{url}/healthz"))
        self._begin(shop, f"the shop with {WORKERS} uvicorn workers")
        self.addresses["Shop"] = url

    def _start_alerting(self, sidecar_port: int) -> None:
        inbox_port = free_port()
        inbox_url = f"http://127.0.0.1:{inbox_port}"
        command = ["-m", "demo_app", "inbox", "--port", str(inbox_port)]
        self._begin(self._python("inbox", command, {**os.environ}, ready=lambda: accepts(inbox_port)), "inbox")
        alertmanager_file = config.write_alertmanager(
            self._data / "alertmanager.yml", shipped=ROOT / "alerts" / "alertmanager.yml", inbox=inbox_url
        )
        alertmanager = self._begin(Alertmanager(self._data / "alertmanager", alertmanager_file), "Alertmanager")
        rules = write_scaled(ROOT / "alerts", self._data / "rules", self.scale, scrape_interval=SCRAPE_INTERVAL)
        if not rules:
            self.notes.append("alerts/ holds no *.rules.yml: no alert can fire; run `make packs`")
        prometheus_file = config.write_prometheus(
            self._data / "prometheus.yml",
            target=f"127.0.0.1:{sidecar_port}",
            alertmanager=f"127.0.0.1:{alertmanager.port}",
            rules=self._data / "rules",
            scrape_interval=SCRAPE_INTERVAL,
        )
        prometheus = Prometheus(self._data / "prometheus", prometheus_file)
        # An alert that fires before Alertmanager is discovered is dropped, and sent again a minute later by default.
        prometheus.command.append("--rules.alert.resend-delay=5s")
        prometheus.ready = lambda: answers(f"{prometheus.url}/-/ready")
        pace = "as shipped" if self.scale == 1 else f"{self.scale:g} times as fast as shipped"
        self._begin(prometheus, f"Prometheus with {len(rules)} rule files, {pace}")
        self.addresses |= {"Prometheus": prometheus.url, "Alertmanager": alertmanager.url, "Inbox": inbox_url}

    def _start_grafana(self) -> None:
        found = find_grafana()
        if found is None:
            self.notes.append(HOW_TO_GET_IT)
            return
        boards = ROOT / "dashboards"
        provisioning = config.write_grafana_provisioning(
            self._data / "provisioning", prometheus=self.addresses["Prometheus"], dashboards=boards
        )
        grafana = Grafana(
            *found,
            data=self._data / "grafana",
            provisioning=provisioning,
            first_board=boards / "headroom-overview.json",
            log=self.logs / "grafana.log",
        )
        self._begin(grafana, "Grafana with the boards")
        self.addresses["Grafana"] = grafana.url

    def _start_load(self, environment: dict[str, str]) -> None:
        worker = [
            "-m",
            "celery",
            "-A",
            "demo_app.worker",
            "worker",
            "-Q",
            "mail,reports",
            "--concurrency",
            str(JOB_WORKERS),
        ]
        worker += ["--without-gossip", "--without-mingle", "--loglevel", "WARNING"]
        self._begin(self._python("worker", worker, environment), "Celery worker for mail and reports")
        load = ["-m", "locust", "-f", "demo_app/load.py", "--headless", "--host", self.addresses["Shop"]]
        load += ["--only-summary", "--loglevel", "WARNING"]
        self._begin(self._python("load", load, environment, grace=3.0), "load by locust")

    def _measured(self) -> bool:
        self.check()
        return bool(self.query(f'sum(rate(headroom_requests_total{{job="{config.JOB}"}}[5s])) > 5'))
