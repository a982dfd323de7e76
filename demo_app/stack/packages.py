"""The Debian packages that the demo and the tests need: says which are missing, and installs them if it may."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping

from demo_app.stack.servers import PACKAGES, MissingBinaryError, find

# Services that the packages bring are not started: the demo starts servers of its own.
_INSTALL = """set -e
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap 'rm -f '$policy EXIT
  printf '#!/bin/sh\\nexit 101\\n' > $policy
  chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -y -q --no-install-recommends "$@"
"""


class PackagesMissingError(RuntimeError):
    """Packages are missing and could not be installed; the message says what to run."""


def missing_packages(wanted: Mapping[str, str] = PACKAGES) -> list[str]:
    """Return the packages whose binaries are not here; ``wanted`` is binary to package."""
    missing = []
    for binary, package in wanted.items():
        try:
            find(binary)
        except MissingBinaryError:
            missing.append(package)
    return missing


def ensure_packages(say: Callable[[str], None], wanted: Mapping[str, str] = PACKAGES) -> None:
    """Install what is missing, as root or by sudo without a password. Raises PackagesMissingError."""
    missing = missing_packages(wanted)
    if not missing:
        return
    remedy = f"run: sudo apt-get install {' '.join(missing)}"
    if shutil.which("apt-get") is None:
        raise PackagesMissingError(f"{', '.join(missing)} not found, and this is no Debian: install them by hand")
    prefix = _become_root()
    if prefix is None:
        raise PackagesMissingError(f"{', '.join(missing)} not installed, and only root may do that; {remedy}")
    say(f"installing {' '.join(missing)} (their own services are left off)")
    done = subprocess.run([*prefix, "sh", "-c", _INSTALL, "sh", *missing], capture_output=True, text=True, check=False)
    if done.returncode != 0 or missing_packages(wanted):
        last = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
        raise PackagesMissingError(f"{', '.join(missing)} could not be installed; {remedy}\n{last}")


def _become_root() -> list[str] | None:
    """Return what to put before a command so that root runs it; None when that is not possible."""
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode == 0:
        return [sudo, "-n"]
    return None
