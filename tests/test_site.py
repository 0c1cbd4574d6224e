"""The documentation site builds without a warning, is whole, and opens without an error."""

import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


class Page(HTMLParser):
    """Names that a page has, and what it links to or loads."""

    def __init__(self, path):
        super().__init__()
        self.names, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        loads = found.get("src") or (tag == "link" and found.get("href"))
        if loads and found.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(loads)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make docs installs it)")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return out


def test_every_link_leads_somewhere(site):
    """Anchors too; and a page loads nothing from another server."""
    pages = {path: Page(path) for path in site.glob("**/*.html") if path.name != "404.html"}
    assert len(pages) == len(list(ROOT.glob("docs/*.md")))
    broken = []
    for path, page in pages.items():
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme:
                broken += [(path.name, link)] if link in page.loaded else []
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            if target.is_dir():
                target /= "index.html"
            known = pages[target.resolve()].names if target.resolve() in pages else ()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in known):
                broken.append((path.name, link))
    assert broken == []


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)}")
def test_every_page_opens_without_an_error(site, tmp_path):
    """In a headless browser: the page has its title and its text, and the console is empty."""
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path in sorted(site.glob("*.html")):
            opened = subprocess.run(
                [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                 f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000", "--dump-dom",
                 f"http://127.0.0.1:{server.server_port}/{path.name}"],
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert re.search(r"<h1[^>]*>\S", opened.stdout), path.name
            said = [line for line in opened.stderr.splitlines() if "CONSOLE" in line]
            assert said == [], path.name
        server.shutdown()
