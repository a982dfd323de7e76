"""MariaDB for the tests of the MySQL drivers; the demo does not need it."""

from __future__ import annotations

import os
from pathlib import Path

from demo_app.stack.process import greets
from demo_app.stack.servers import Server, find


class MariaDB(Server):
    """MariaDB with one empty database and without accounts: whoever connects is let in. For throw-away data only.

    Debian's core package brings no service and no user, and an empty folder is enough to start in: without grants
    the server asks for no tables of its own.
    """

    DATABASE = "shop"

    def __init__(self, data: Path, *, port: int | None = None, max_connections: int = 100, **settings: str) -> None:
        super().__init__("mariadb", data, port)
        self.ready = lambda: greets(self.port, b"")
        options = {
            "datadir": str(self.data),
            "tmpdir": str(self.data),
            "socket": str(self.data / "socket"),
            "pid-file": str(self.data / "pid"),
            "bind-address": "127.0.0.1",
            "port": str(self.port),
            "max-connections": str(max_connections),
            "max-user-connections": str(max_connections - 10),  # can be changed while it runs, unless it is 0 here
            "innodb-log-file-size": "4M",
            "innodb-buffer-pool-size": "16M",
            "innodb-flush-log-at-trx-commit": "0",
            **settings,
        }
        flags = [f"--{key}={value}" for key, value in options.items()]
        if os.geteuid() == 0:
            flags.append("--user=root")  # it asks to be told so
        self.command = [str(find("mariadbd")), "--no-defaults", "--skip-grant-tables", "--skip-name-resolve", *flags]

    def start(self, timeout: float = 60.0) -> None:
        """Start in a folder made for it, which holds the database already."""
        (self.data / self.DATABASE).mkdir(parents=True, exist_ok=True)  # to MariaDB a folder is a database
        super().start(timeout)

    def url(self, driver: str = "asyncmy") -> str:
        """Return the SQLAlchemy URL for a driver: asyncmy, aiomysql or pymysql."""
        return f"mysql+{driver}://headroom@127.0.0.1:{self.port}/{self.DATABASE}"
