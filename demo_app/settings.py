"""What the shop can be told from outside, as ``SHOP_*`` variables."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

PRODUCTS, USERS, ORGANIZATIONS, ORDERS = 1_000, 5_000, 200, 10_000
"""How much the shop begins with. Ids run from 1."""


class ShopSettings(BaseSettings):
    """Addresses and limits. Durations are seconds."""

    model_config = SettingsConfigDict(env_prefix="SHOP_")

    database_url: str = "postgresql+asyncpg://headroom@127.0.0.1:5432/postgres"
    cache_url: str = "redis://127.0.0.1:6379/0"
    cache_west_url: str = "redis://127.0.0.1:6379/2"
    """The cache of the second region; a server of its own in the demo."""
    broker_url: str = "redis://127.0.0.1:6379/1"
    carriers_url: str = "http://127.0.0.1:8010"
    """Where the carriers answer; see ``carriers``."""
    run_directory: Path = Path(__file__).parents[1] / ".demo" / "run"
    """Where the switches of the faults lie; all processes of the shop look there."""
    workers: int = 2
    """Web workers that share the budget of connections."""
    connection_budget: int = 16
    """Database connections that all web workers together may hold."""
    pool_timeout: float = 2.0
    """How long a request waits for a connection before it is turned away with 503."""
    cache_ttl: float = 60.0
    """How long entries stay in Redis, before jitter."""
    cache_west_ttl: float = 30.0
    """The same in the second region: how far it may be behind."""

    @property
    def pool_minimum(self) -> int:
        """Connections that one worker always has: a quarter of its share."""
        return max(1, self.connection_budget // self.workers // 4)

    @property
    def pool_size(self) -> int:
        """Connections that one worker keeps open: three quarters of its share."""
        return max(1, self.connection_budget // self.workers * 3 // 4)

    @property
    def max_overflow(self) -> int:
        """Connections that one worker may open beyond that: the rest of its share."""
        return max(0, self.connection_budget // self.workers - self.pool_size)


@lru_cache
def shop_settings() -> ShopSettings:
    """Return the settings of this process, read once."""
    return ShopSettings()
