"""Who may scrape, and over what: a bearer token and TLS, both from files that may be replaced while we serve."""

from __future__ import annotations

import hmac
import logging
import os
import ssl
from pathlib import Path

from fastapi_headroom.errors import HeadroomError
from fastapi_headroom.settings import Settings

log = logging.getLogger("fastapi_headroom")

_LARGEST_TOKEN = 4096
_Version = tuple[tuple[int, int, int], ...]


class Access:
    """The token and the TLS context of an exporter; without settings everybody may scrape, in plain HTTP.

    Raises HeadroomError when a file cannot be used. Once it serves, a token that cannot be read any more lets
    nobody in, and a certificate that cannot be read leaves the one before in use.
    """

    def __init__(self, settings: Settings) -> None:
        self._token_file = settings.exporter_token_file
        self._certificate, self._key = settings.exporter_certificate_file, settings.exporter_key_file
        self._token: tuple[_Version, bytes] | None = None
        self._loaded: _Version = ()
        self._refused: _Version = ()
        self._token_failed = False
        self.tls: ssl.SSLContext | None = None
        """What connections are wrapped with; None for plain HTTP."""
        if self._token_file is not None:
            self._read_token(self._token_file)
        if self._certificate is not None:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.minimum_version = ssl.TLSVersion.TLSv1_2
            self._loaded = _version(self._certificate, self._key)
            self._load(self.tls, self._certificate, check=True)
        elif self._key is not None:
            raise HeadroomError(
                f"the key {self._key} has no certificate: set HEADROOM_EXPORTER_CERTIFICATE_FILE or --certificate-file"
            )
        if self._token_file is not None and self.tls is None and not _is_loopback(settings.host):
            log.warning(
                "fastapi-headroom: the token of scrapers crosses the network in clear text; set "
                "HEADROOM_EXPORTER_CERTIFICATE_FILE, or listen on 127.0.0.1 behind a proxy that speaks TLS"
            )

    def allows(self, authorization: str) -> bool:
        """Return whether an ``Authorization`` header shows the token. Takes the same time for every wrong one."""
        if self._token_file is None:
            return True
        try:
            token = self._read_token(self._token_file)
        except HeadroomError as error:
            if not self._token_failed:  # every request comes here, also those of strangers
                log.error("fastapi-headroom: nobody may scrape: %s", error)
            self._token_failed = True
            return False
        if self._token_failed:
            self._token_failed = False
            log.info("fastapi-headroom: the token file %s can be read again", self._token_file)
        scheme, _, shown = authorization.strip().partition(" ")
        return hmac.compare_digest(shown.strip().encode("utf-8", "replace"), token) and scheme.lower() == "bearer"

    def refresh(self) -> None:
        """Load certificate and key again when their files were replaced; connections that are open keep theirs."""
        if self.tls is None or self._certificate is None:
            return
        version = _version(self._certificate, self._key)
        if version in (self._loaded, self._refused):
            return
        try:
            # On a context to try first: the one in use would be left with a certificate and the other's key.
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._certificate, check=True)
            self._load(self.tls, self._certificate, check=False)
        except HeadroomError as error:
            self._refused = version
            log.error("fastapi-headroom: %s; the certificate from before stays in use", error)
            return
        self._loaded, self._refused = version, ()
        log.info("fastapi-headroom: %s was replaced and is in use", self._certificate)

    def _read_token(self, path: Path) -> bytes:
        try:
            version = _version(path)
            if self._token is None or self._token[0] != version or not version:
                with path.open("rb") as file:
                    token = file.read(_LARGEST_TOKEN + 1).strip()
                if not token or len(token) > _LARGEST_TOKEN:
                    found = "empty" if not token else f"longer than {_LARGEST_TOKEN} bytes"
                    raise HeadroomError(f"the token file {path} is {found}: write one line with the token into it")
                self._token = (version, token)
        except OSError as error:
            raise HeadroomError(
                f"the token file {path} cannot be read ({error.strerror}): name a file that this user may read with "
                "HEADROOM_EXPORTER_TOKEN_FILE or --token-file"
            ) from error
        return self._token[1]

    def _load(self, context: ssl.SSLContext, certificate: Path, *, check: bool) -> None:
        for path in (certificate, self._key) if check else ():
            if path is not None and not os.access(path, os.R_OK):
                reason = "may not be read by this user" if path.exists() else "does not exist"
                raise HeadroomError(f"TLS: {path} {reason}: {_TLS_REMEDY}")
        try:
            context.load_cert_chain(certificate, self._key, password=_no_password)
        except (ssl.SSLError, OSError) as error:
            key = self._key or certificate
            reason = (error.reason if isinstance(error, ssl.SSLError) else error.strerror) or "no PEM files"
            raise HeadroomError(f"TLS: {certificate} and {key} cannot be used ({reason}): {_TLS_REMEDY}") from error


_TLS_REMEDY = (
    "name PEM files of a certificate and its unencrypted key with HEADROOM_EXPORTER_CERTIFICATE_FILE and "
    "HEADROOM_EXPORTER_KEY_FILE, or --certificate-file and --key-file"
)


def _no_password() -> str:
    """Give no password: the question would wait for somebody at the terminal."""
    return ""


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _version(*paths: Path | None) -> _Version:
    """Return what tells one content of files from another; empty while one of them is missing."""
    try:
        states = [path.stat() for path in paths if path is not None]
    except OSError:
        return ()
    return tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)
