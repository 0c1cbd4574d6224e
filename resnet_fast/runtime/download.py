"""Download a file whose SHA-256 is known; a broken download is continued."""

from __future__ import annotations

import hashlib
import os
import shlex
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from tqdm import tqdm

from ..spec.values import brief
from .files import NotWritten, locked, opened, reason

CHUNK = 1 << 20
MOST = 1 << 30  # bytes of a file
TIMEOUT = 30  # seconds without data
PARTIAL, UNSATISFIABLE = 206, 416  # HTTP status


class NotDownloaded(OSError):
    """A file could not be downloaded, or its copy in the cache is damaged; the message names the
    file and its folder, and says what to do.
    """


def cached(url: str, path: Path, digest: str) -> Path:
    """Return `path`; download it from `url` first if it is missing.

    The data goes to a file beside it, named `path` and .part, which is renamed once its SHA-256 is
    right. If the connection breaks, that file stays, and the next call requests the rest (HTTP
    Range, RFC 9110, section 14). Processes that need the same file wait for each other. stderr
    shows a progress bar if it is a terminal.

    Args:
        url: address of the file.
        path: the file in the cache.
        digest: the first hexadecimal digits of its SHA-256.

    Raises:
        NotDownloaded: the server cannot be reached or has no such file, the connection broke, or
            the SHA-256 of the download or of the cached file differs.
        NotWritten: the folder of `path` cannot be written, or its disk is full.
    """
    command = f"curl -fL --create-dirs -o {shlex.quote(str(path))} {url}"
    lock = path.with_name(f".{path.name}.lock")
    try:
        if not path.exists():
            with locked(lock):
                if not path.exists():
                    _download(url, path, digest)
                lock.unlink(missing_ok=True)  # from here on, `path` exists
            return path
        found = _sha256(path)
    except NotWritten as error:
        raise NotWritten(
            f"{path.name}: not downloaded to {path.parent}: {error}; choose a folder that can be "
            f"written (TORCH_HOME=FOLDER), or download the file (curl -fLO {url}) and give its path"
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        raise NotDownloaded(
            f"{path.name}: not downloaded to {path.parent}: {_why(error)}; to download it by hand: "
            f"{command}"
        ) from None
    if not found.startswith(digest):
        raise NotDownloaded(
            f"{path}: damaged: its SHA-256 begins with {found[: len(digest)]}, expected {digest}; "
            f"remove it (rm {shlex.quote(str(path))}) and run again, or download it by hand: "
            f"{command}"
        )
    return path


def matches(path: Path, digest: str) -> bool:
    """Whether the SHA-256 of a file begins with `digest`. Raises OSError if it cannot be read."""
    return _sha256(path).startswith(digest)


def _download(url: str, path: Path, digest: str) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(part, flags, 0o666), "ab")
    except OSError as error:
        raise NotWritten(f"{part}: not written: {error.strerror}") from None
    with file:
        with _response(url, file.tell()) as response:
            _receive(response, file, path)
        os.fsync(file.fileno())
    found = _sha256(part)
    if not found.startswith(digest):
        part.unlink()
        raise ValueError(
            f"the SHA-256 of what the server sent begins with {found[: len(digest)]}, expected "
            f"{digest}; it was removed"
        )
    os.replace(part, path)


def _response(url: str, start: int) -> Any:
    """The open response with the bytes from `start`, or with all if the server has no ranges."""
    headers = {"User-Agent": "resnet_fast"}
    ranges = {"Range": f"bytes={start}-"} if start else {}
    try:
        request = urllib.request.Request(url, headers={**headers, **ranges})
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code != UNSATISFIABLE or not start:
            raise
    return _response(url, 0)  # there are no bytes from `start`


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the same scheme only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme != urlsplit(req.full_url).scheme:
            raise URLError(ValueError(f"the server redirects to {brief(newurl)}"))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive(response: Any, file: IO[bytes], path: Path) -> None:
    """Append the body to `file`, or replace its content if the body is the whole file."""
    if response.status != PARTIAL:
        file.truncate(0)
    start = file.seek(0, os.SEEK_END)
    length = response.headers.get("Content-Length")
    total = None if length is None else start + int(length)
    with tqdm(
        desc=path.name, total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024,
        disable=None,
    ) as bar:  # fmt: skip
        while chunk := response.read(CHUNK):
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise NotWritten(f"{file.name}: not written: {error.strerror}") from None
            bar.update(len(chunk))
            if file.tell() > MOST:
                file.truncate(0)
                raise ValueError(f"the server sent more than {MOST >> 20} MiB")
    if total is not None and file.tell() < total:
        raise ConnectionError(
            f"the connection broke after {file.tell()} of {total} bytes; run again to continue"
        )


def _sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _why(error: Exception) -> str:
    """The reason in one line."""
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {brief(' '.join(str(error.reason).split()))}"
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        return reason(error.reason)
    if isinstance(error, HTTPException):
        return f"the connection broke ({type(error).__name__}); run again to continue"
    return reason(error)
