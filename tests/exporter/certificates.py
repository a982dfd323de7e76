"""Certificates for tests, by the openssl command."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A self-signed certificate for 127.0.0.1 and its key."""

    certificate: Path
    key: Path

    @property
    def options(self) -> tuple[str, ...]:
        """The options of the sidecar that name the files."""
        return ("--certificate-file", str(self.certificate), "--key-file", str(self.key))


def make_pair(folder: Path, name: str = "tls", *, password: str = "") -> Pair:
    """Make a pair that is valid for a day; with a password the key is encrypted."""
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    protection = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "1",
         *protection, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", pair.key, "-out", pair.certificate],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return pair
