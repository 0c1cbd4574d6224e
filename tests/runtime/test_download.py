"""Downloads into a cache: complete or not there, continued, shared; errors say what to do."""

import hashlib
import io
import os
import resource
import shlex
import socket
import sys
import threading

import pytest
from file_server import serving

from resnet_fast.runtime import download
from resnet_fast.runtime.download import NotDownloaded, cached, matches
from resnet_fast.runtime.files import NotWritten

BODY = bytes(range(251)) * 4000  # a megabyte
DIGEST = hashlib.sha256(BODY).hexdigest()[:8]
NAME = f"net-{DIGEST}.pth"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as one:
        one.files[f"/{NAME}"] = BODY
        yield one


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hub" / "checkpoints" / NAME


@pytest.fixture
def get(server, path):
    return lambda: cached(f"{server.url}/{NAME}", path, DIGEST)


def ranges(server):
    return [asked for _, _, asked in server.seen]


def part_of(path):
    return path.with_name(f"{path.name}.part")


def test_downloaded_once(server, path, get):
    """The folder is created, nothing else is left in it, and a hit needs no server."""
    assert get() == path
    assert path.read_bytes() == BODY
    assert list(path.parent.iterdir()) == [path]
    server.shutdown()
    server.server_close()
    assert get() == path
    assert len(server.seen) == 1
    assert matches(path, DIGEST) and not matches(path, "0" * 8)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_only(monkeypatch, path, get, terminal):
    class Screen(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr(sys, "stderr", Screen())
    get()
    shown = sys.stderr.getvalue()
    assert (f"{NAME}: 100%" in shown) if terminal else shown == ""


@pytest.mark.parametrize("supported", [True, False], ids=["ranges", "no ranges"])
def test_a_broken_download_is_continued(server, path, get, supported):
    """From the byte where it stopped, or from the start if the server has no ranges."""
    server.ranges, server.cut = supported, 700_000
    with pytest.raises(NotDownloaded) as raised:
        get()
    assert "broke after 700000 of 1004000 bytes; run again to continue" in str(raised.value)
    assert not path.exists()
    assert part_of(path).read_bytes() == BODY[:700_000]
    server.cut = None
    get()
    assert path.read_bytes() == BODY
    assert ranges(server) == [None, "bytes=700000-"]
    assert list(path.parent.iterdir()) == [path]


def test_a_part_that_is_too_long_is_replaced(server, path, get):
    """The server has no byte at its end (416), so the download starts again."""
    path.parent.mkdir(parents=True)
    part_of(path).write_bytes(BODY + b"more")
    get()
    assert path.read_bytes() == BODY
    assert ranges(server) == [f"bytes={len(BODY) + 4}-", None]


def test_an_interrupt_leaves_a_part(server, monkeypatch, path, get):
    class Bar(download.tqdm):
        def update(self, count):
            raise KeyboardInterrupt

    monkeypatch.setattr(download, "CHUNK", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(download, "tqdm", Bar)
        with pytest.raises(KeyboardInterrupt):
            get()
    assert not path.exists()
    assert part_of(path).read_bytes() == BODY[:1000]
    get()
    assert path.read_bytes() == BODY
    assert ranges(server) == [None, "bytes=1000-"]


@pytest.mark.parametrize("start", [b"", b"of another file"], ids=["whole", "continued"])
def test_a_wrong_hash_leaves_nothing(server, path, get, start):
    path.parent.mkdir(parents=True)
    if start:
        part_of(path).write_bytes(start)
    else:
        server.files[f"/{NAME}"] = b"<html>sign in</html>"
    with pytest.raises(NotDownloaded, match=f"begins with [0-9a-f]{{8}}, expected {DIGEST}; it "):
        get()
    assert not path.exists() and not part_of(path).exists()


def test_errors_of_the_network_name_file_folder_and_command(server, path, get):
    """One line each: no such file, no server, no such host."""
    del server.files[f"/{NAME}"]
    url = f"{server.url}/{NAME}"
    with pytest.raises(NotDownloaded, match="the server answered 404 Not Found") as raised:
        get()
    said = str(raised.value)
    assert said.startswith(f"{NAME}: not downloaded to {path.parent}: ")
    command = f"curl -fL --create-dirs -o {shlex.quote(str(path))} {url}"
    assert said.endswith(f"to download it by hand: {command}") and "\n" not in said
    with socket.socket() as closed, pytest.raises(NotDownloaded, match="Connection refused"):
        closed.bind(("127.0.0.1", 0))  # it does not listen
        cached(f"http://127.0.0.1:{closed.getsockname()[1]}/{NAME}", path, DIGEST)
    with pytest.raises(NotDownloaded, match=r"not downloaded to .*[Nn]ame (or|res)"):
        cached(f"http://nowhere.invalid/{NAME}", path, DIGEST)
    assert not path.exists()


@pytest.mark.parametrize("status", ["HTTP/1.1", "HTTP/1.1 200 OK\r\nContent-Length: x"])
def test_an_answer_that_is_not_http_is_an_error(monkeypatch, server, get, status):
    def answer(handler):
        handler.wfile.write(f"{status}\r\n\r\n".encode())
        handler.close_connection = True

    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", answer)
    with pytest.raises(NotDownloaded, match=f"{NAME}: not downloaded to "):
        get()


def test_a_cache_that_cannot_be_written(server, path, get):
    """Before anything is requested; the message says how to choose another folder."""
    path.parent.parent.write_text("a file in the place of the folder")
    with pytest.raises(NotWritten, match="TORCH_HOME=FOLDER") as raised:
        get()
    assert f"curl -fLO {server.url}/{NAME}" in str(raised.value)
    assert str(path.parent) in str(raised.value)
    assert server.seen == []


def test_a_part_that_cannot_be_opened(path, get):
    part_of(path).mkdir(parents=True)
    with pytest.raises(NotWritten, match="not written: Is a directory"):
        get()


def test_a_disk_without_space(server, monkeypatch, path, get):
    """A limit of the process stands for it; the part is continued once there is space."""
    monkeypatch.setattr(download, "CHUNK", 1 << 16)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        with pytest.raises(NotWritten, match="not written: File too large"):
            get()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()
    assert get().read_bytes() == BODY
    assert ranges(server) == [None, f"bytes={1 << 18}-"]


def test_a_damaged_file_in_the_cache_is_named(server, path, get):
    """It is not removed, because it may be another's."""
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY[:-1])
    with pytest.raises(NotDownloaded, match=f"{path}: damaged: its SHA-256 begins with") as raised:
        get()
    assert f"remove it (rm {shlex.quote(str(path))}) and run again" in str(raised.value)
    assert path.exists() and server.seen == []
    path.unlink()
    path.mkdir()
    with pytest.raises(NotDownloaded, match="expected a regular file"):
        get()


def test_who_wants_the_same_file_waits(server, path, get):
    """One request; each gets the whole file."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(get().read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BODY] * 4
    assert len(server.seen) == 1
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/net", "file:///etc/hostname"])
def test_another_scheme_is_not_followed(server, path, get, monkeypatch, target):
    del server.files[f"/{NAME}"]
    monkeypatch.setattr(server, "redirect", target)
    with pytest.raises(NotDownloaded, match=r"(?i)redirect.*(ftp|file):"):
        get()
    assert not path.exists()


def test_a_body_without_end_is_cut(server, path, get, monkeypatch):
    monkeypatch.setattr(download, "MOST", len(BODY) // 2)
    monkeypatch.setattr(download, "CHUNK", 1000)
    with pytest.raises(NotDownloaded, match="the server sent more than 0 MiB"):
        get()
    assert part_of(path).stat().st_size == 0


def test_a_link_in_place_of_the_part_is_not_followed(server, path, get, tmp_path):
    path.parent.mkdir(parents=True)
    (tmp_path / "other").write_text("mine")
    part_of(path).symlink_to(tmp_path / "other")
    with pytest.raises(NotWritten, match=r"\.part: not written"):
        get()
    assert (tmp_path / "other").read_text() == "mine"
