"""The site: it builds strictly, needs nothing from elsewhere, and can be read and searched."""

import posixpath
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs.site.hook import GENERATED
from docs.site.links import relinked
from docs.site.pictures import PICTURES
from evermesh.launcher import load_job
from tests.docs.conftest import DOCS, ROOT
from tests.launcher.dashboard.browser import Page

_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
_LINK = re.compile(r"\]\(([^)\s:#]+)(?:#[^)\s]*)?\)")


class _Loaded(HTMLParser):
    """What a page has the browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes).get(_LOADS.get(tag, ""))
        if found:
            self.addresses.append(found)


def test_every_page_is_there_and_loads_what_is_beside_it_alone(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 100
    for file in pages:
        loaded = _Loaded()
        loaded.feed(file.read_text())
        assert loaded.addresses
        for address in loaded.addresses:
            assert re.match(r"^(?!//|[a-z]+:)", address), f"{file} loads {address}"
            path = (site / address.lstrip("/")) if address.startswith("/") else file.parent / address
            assert path.resolve().is_file(), f"{file} loads {address}, which is not there"


def test_no_markup_is_left_in_what_readers_see(site: Path) -> None:
    for name in ("commands", "script_flags", "configuration", "metrics"):
        text = re.sub(
            r"<(script|style).*?</\1>", "", (site / "reference" / f"{name}.html").read_text(), flags=re.DOTALL
        )
        assert not re.search(r"\\\||``|\{ [.#]|\[/?(bold|dim)\]|\*\*", re.sub(r"<[^>]+>", "", text)), name


def test_style_sheets_load_nothing_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", file.read_text()), file


def test_all_pictures_are_drawn(site: Path) -> None:
    shown = {name for page in DOCS.rglob("*.md") for name in re.findall(r"pictures/([\w-]+)\.png", page.read_text())}
    assert shown == set(PICTURES)
    for name in PICTURES:
        picture = (site / "pictures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 8_000


def test_the_example_that_is_tested_is_the_one_that_is_shown(site: Path) -> None:
    shown = re.sub(r"<[^>]+>", "", (site / "launch" / "own_model.html").read_text())
    assert "class Text" in shown
    assert (site / "examples" / "own_model.py").read_text() == (DOCS / "examples" / "own_model.py").read_text()


def test_decisions_are_pages_that_do_not_crowd_the_navigation(site: Path) -> None:
    pages = {path.stem for path in (DOCS / "decisions").glob("0*.md")}
    assert pages == {path.stem for path in (site / "decisions").glob("0*.html")}
    assert not any(stem in (site / "index.html").read_text() for stem in pages)


def test_links_between_files_of_the_repository_lead_somewhere() -> None:
    files = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    made = {f"docs/{place}" for place in GENERATED} | {f"docs/pictures/{name}.png" for name in PICTURES}
    for file in files.split():
        for target in _LINK.findall((ROOT / file).read_text()):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
            assert path in made or (ROOT / path).exists(), f"{file} links to {target}"


def test_links_to_files_become_links_to_their_pages_or_words() -> None:
    pages = {"fault/README.md": "code/fault.md", "docs/decisions/0001-x.md": "decisions/0001-x.md"}
    text = "[a](../docs/decisions/0001-x.md#b), [c](../fault/README.md), [d](../tests/e.py), [f](#g), [h](https://i)"
    assert relinked(text, "runtime/README.md", "code/runtime.md", pages) == (
        "[a](../decisions/0001-x.md#b), [c](fault.md), d (`tests/e.py`), [f](#g), [h](https://i)"
    )


def test_the_job_file_of_the_quick_start_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.DOTALL)
    (tmp_path / "job.yaml").write_text(blocks[0])
    job = load_job(tmp_path / "job.yaml")
    assert (job.workers, job.train.layout.hdp, job.train.steps) == (2, 2, 60)


_SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize(
    "name", ["index", "reference/configuration", "reference/commands", "operate/findings", "compare"]
)
def test_a_page_is_laid_out_within_its_window(page: Page, served: str, name: str, size: str) -> None:
    width, height = _SIZES[size]
    page.look(width=width, height=height)
    page.open(f"{served}/{name}.html")
    page.wait("document.readyState == 'complete' && document.querySelector('article h1')")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelector('article').getBoundingClientRect().width") > width / 3
    assert page.run("getComputedStyle(document.querySelector('.md-header')).position") == "sticky", "no style sheet"
    assert page.run("[...document.images].every(picture => picture.naturalWidth > 0)")
    assert not page.errors
    assert all(url.startswith((served, "data:", "blob:", "about:")) for url in page.urls), page.urls


@pytest.mark.parametrize("of", ["a server", "the disk"])
def test_search_finds_a_setting_in_pages(page: Page, site: Path, served: str, of: str) -> None:
    root = served if of == "a server" else site.as_uri()
    page.open(f"{root}/index.html")
    page.wait("document.readyState == 'complete' && document.querySelector('.md-search__input')")
    page.run(
        "(() => { const input = document.querySelector('.md-search__input'); input.focus(); "
        "input.value = 'journal_copies'; input.dispatchEvent(new Event('keyup')); })()"
    )
    page.wait("document.querySelector('.md-search-result__item')")
    found = page.run("[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)")
    assert any("reference/configuration.html" in link for link in found), found
    assert all(url.startswith((root, "data:", "blob:", "about:")) for url in page.urls), page.urls
