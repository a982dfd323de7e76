"""The real servers: PostgreSQL, Redis, RabbitMQ, Prometheus and Alertmanager from the system's packages.

Each listens on a free loopback port, keeps its data in a folder of its own and touches nothing of the host's.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from demo_app.stack.process import Process, accepts, answers, free_port, greets

PACKAGES = {
    "postgres": "postgresql",
    "redis-server": "redis-server",
    "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
}
"""Which Debian package brings which binary."""
TEST_PACKAGES = {"rabbitmq-server": "rabbitmq-server", "mariadbd": "mariadb-server-core", "memcached": "memcached"}
"""The same for what the tests start and the demo does not."""


_HELLO = b"\0\0\0\x29\0\3\0\0user\0headroom\0database\0postgres\0\0"
"""A client's first message to PostgreSQL: its length, version 3.0 of the protocol, who comes and what for."""


class MissingBinaryError(RuntimeError):
    """A server is not installed; the message names the package that brings it."""


def find(binary: str) -> Path:
    """Return the path of a server's binary. Raises MissingBinaryError with the remedy."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{binary}"), key=lambda path: int(path.parts[4]))
    if versions:
        return versions[-1]
    for place in (shutil.which(binary), f"/usr/sbin/{binary}", f"/usr/bin/{binary}"):
        if place and Path(place).exists():
            return Path(place)
    package = (PACKAGES | TEST_PACKAGES).get(binary, "postgresql" if binary == "initdb" else binary)
    raise MissingBinaryError(f"{binary} is not installed: run `apt-get install {package}`")


class Server(Process):
    """A server on a free loopback port with a data folder of its own."""

    def __init__(self, name: str, data: Path, port: int | None) -> None:
        self.port = port or free_port()
        self.data = data.resolve()
        super().__init__(name, [], log=self.data.parent / f"{name}.log", ready=lambda: accepts(self.port))


class Postgres(Server):
    """PostgreSQL with trusted local connections and no fsync: fast, and for throw-away data only."""

    def __init__(self, data: Path, *, port: int | None = None, max_connections: int = 100, **settings: str) -> None:
        super().__init__("postgres", data, port)
        self.ready = self._is_ready
        self.stop_signal = signal.SIGINT  # "fast" shutdown; SIGTERM would wait for the clients
        wanted = self.data
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            self.user = "postgres"
            self.data = _reachable(self.data, self.user)
        self._elsewhere = self.data != wanted
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "max_connections": str(max_connections),
            **settings,
        }
        flags = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        self.command = [str(find("postgres")), "-D", str(self.data), *flags]
        self.cwd = self.data

    def start(self, timeout: float = 60.0) -> None:
        """Create the cluster if there is none, and start it."""
        self.data.mkdir(parents=True, exist_ok=True)
        if not (self.data / "PG_VERSION").exists():
            if self.user:
                shutil.chown(self.data, self.user, self.user)
            subprocess.run(
                [find("initdb"), "-D", self.data, "-U", "headroom", "-A", "trust", "-E", "UTF8", "--no-sync",
                 "--locale=C"],
                check=True, capture_output=True, user=self.user, group=self.user,
                extra_groups=[] if self.user else None, cwd=self.data,
            )  # fmt: skip
        super().start(timeout)

    def stop(self) -> None:
        """Stop, and remove the data if they had to lie elsewhere than asked for."""
        super().stop()
        if self._elsewhere:
            shutil.rmtree(self.data, ignore_errors=True)

    def _is_ready(self) -> bool:
        """Return whether the server lets somebody in: its port accepts while it still starts, and refuses them all."""
        return greets(self.port, _HELLO, b"R")  # AuthenticationOk; an ErrorResponse begins with E

    def url(self, driver: str = "asyncpg", database: str = "postgres") -> str:
        """Return the SQLAlchemy URL for a driver such as asyncpg or psycopg."""
        return f"postgresql+{driver}://headroom@127.0.0.1:{self.port}/{database}"

    @property
    def dsn(self) -> str:
        """The URL as libpq and asyncpg understand it."""
        return f"postgresql://headroom@127.0.0.1:{self.port}/postgres"


class Redis(Server):
    """Redis without persistence. ``settings`` are its own; ``name`` is the part's."""

    def __init__(self, data: Path, *, port: int | None = None, name: str = "redis", **settings: str) -> None:
        super().__init__(name, data, port)
        options = {"bind": "127.0.0.1", "port": str(self.port), "dir": str(self.data), "save": "", "appendonly": "no"}
        self.command = [str(find("redis-server"))]
        for key, value in {**options, **settings}.items():
            self.command += [f"--{key}", value]

    def start(self, timeout: float = 30.0) -> None:
        """Start with an empty data folder made for it."""
        self.data.mkdir(parents=True, exist_ok=True)
        super().start(timeout)

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"


class Memcached(Server):
    """memcached, which holds 64 MB; for tests, the demo does not need it."""

    def __init__(self, data: Path, *, port: int | None = None) -> None:
        super().__init__("memcached", data, port)
        command = [find("memcached"), "-l", "127.0.0.1", "-p", self.port, "-U", "0", "-t", "1"]
        self.command = [str(word) for word in command]
        if os.geteuid() == 0:  # it refuses to run as root unless told as whom
            self.command += ["-u", "nobody"]


class RabbitMQ(Server):
    """RabbitMQ without plugins, a node of its own that joins no other; for tests, the demo does not need it.

    The wrapper in ``/usr/sbin`` is passed by: it writes below ``/var``. A node has to register its name with the
    Erlang port mapper, so one of its own is started beside it and ends with it.
    """

    def __init__(self, data: Path, *, port: int | None = None) -> None:
        super().__init__("rabbitmq", data, port)
        find("rabbitmq-server")  # names the package where it is missing
        self.grace = 20.0
        wanted = self.data
        if os.geteuid() == 0:  # the data belong to a user of its own, as on a real host
            self.user = "rabbitmq"
            self.data = _reachable(self.data, self.user)
        self._elsewhere = self.data != wanted
        mapper = free_port()
        self.ready = self._is_ready
        self.env = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(self.data),
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(mapper),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"headroom{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self.data / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.data / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(self.data / "pid"),
            "RABBITMQ_CONFIG_FILE": str(self.data / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(self.data / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.data / "enabled_plugins"),
        }
        self.command = ["/usr/lib/rabbitmq/bin/rabbitmq-server"]
        self._mapper = Process(
            "epmd", [find("epmd"), "-port", str(mapper), "-address", "127.0.0.1"],
            log=self.log_file.with_name("epmd.log"), user=self.user, ready=lambda: accepts(mapper),
        )  # fmt: skip

    def start(self, timeout: float = 90.0) -> None:
        """Start with a folder and an Erlang cookie made for it."""
        self.data.mkdir(parents=True, exist_ok=True)
        for name, text in {
            "rabbitmq.conf": "disk_free_limit.absolute = 1MB\nvm_memory_high_watermark.relative = 0.6\n",
            "rabbitmq-env.conf": "",
            "enabled_plugins": "[].\n",
        }.items():
            (self.data / name).write_text(text)
        if self.user:
            shutil.chown(self.data, self.user, self.user)
        self.cwd = self.data
        if not self._mapper.running:
            self._mapper.start()
        super().start(timeout)

    def stop(self) -> None:
        """Stop the node and its port mapper; the data stay for the next start."""
        super().stop()
        self._mapper.stop()

    def remove(self) -> None:
        """Stop, and remove the data if they had to lie elsewhere than asked for."""
        self.stop()
        if self._elsewhere:
            shutil.rmtree(self.data, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def url(self) -> str:
        """The URL of the default virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def _is_ready(self) -> bool:
        """Return whether the broker greets: its port accepts before it does."""
        return greets(self.port, b"AMQP\x00\x00\x09\x01")


class Prometheus(Server):
    """Prometheus on a configuration file. Exemplars are on; ``POST /-/reload`` works."""

    def __init__(self, data: Path, config: Path, *, port: int | None = None) -> None:
        super().__init__("prometheus", data, port)
        self.ready = lambda: answers(f"{self.url}/-/ready")
        self.command = [
            str(find("prometheus")),
            f"--config.file={config}",
            f"--storage.tsdb.path={self.data}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--enable-feature=exemplar-storage",
            "--web.enable-lifecycle",
            "--log.level=warn",
        ]

    @property
    def url(self) -> str:
        """The address of its pages and API."""
        return f"http://127.0.0.1:{self.port}"


class Alertmanager(Server):
    """Alertmanager on a configuration file, alone (no cluster)."""

    def __init__(self, data: Path, config: Path, *, port: int | None = None) -> None:
        super().__init__("alertmanager", data, port)
        self.ready = lambda: answers(f"{self.url}/-/ready")
        self.command = [
            str(find("prometheus-alertmanager")),
            f"--config.file={config}",
            f"--storage.path={self.data}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ]

    @property
    def url(self) -> str:
        """The address of its pages and API."""
        return f"http://127.0.0.1:{self.port}"


def _reachable(data: Path, user: str) -> Path:
    """Return the folder, or one in the temporary directory where the user may not walk down to it.

    A checkout below ``/root`` is closed to the user that PostgreSQL or RabbitMQ runs as.
    """
    account = pwd.getpwnam(user)
    for parent in data.parents:
        if not parent.exists():
            continue
        status = parent.stat()
        shift = 6 if status.st_uid == account.pw_uid else 3 if status.st_gid == account.pw_gid else 0
        if not status.st_mode >> shift & 0o1:
            return Path(tempfile.mkdtemp(prefix=f"headroom-{user}-"))
    return data
