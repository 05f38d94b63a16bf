"""What mkdocs calls while it makes the site: generated pages, pictures and READMEs become files of it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.site.alerts import alerts_list
from docs.site.commands import commands_page
from docs.site.configuration import configuration_page
from docs.site.findings import findings_table
from docs.site.links import relinked
from docs.site.metrics import metrics_page
from docs.site.pictures import PICTURES
from docs.site.script_flags import script_flags_page

ROOT = Path(__file__).resolve().parents[2]
GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/configuration.md": configuration_page,
    "reference/commands.md": commands_page,
    "reference/script_flags.md": script_flags_page,
    "reference/metrics.md": metrics_page,
}
"""By place in the documentation: what makes the page."""
_ROOMS = ("parallelism", "checkpoint", "fault", "runtime", "launcher", "deploy")
SHOWN = {
    "README.md": "code/repository.md",
    "CONTRIBUTING.md": "code/contributing.md",
    "CHANGELOG.md": "code/changelog.md",
    "runtime/data/README.md": "code/data.md",
} | {f"{room}/README.md": f"code/{room}.md" for room in _ROOMS}
"""By file of the repository outside of the documentation: the page that shows it."""
_BEHIND = ("decisions/", "code/")
"""Pages that search shows behind others: why things are so, and where."""
_MARKS: Mapping[str, Callable[[], str]] = {"<!-- kinds of findings -->": findings_table, "<!-- alerts -->": alerts_list}
"""What pages have in place of generated parts."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not below ``docs``."""
    for place, make in GENERATED.items():
        files.append(File.generated(config, place, content=make()))
    for source, place in SHOWN.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    for name, draw in PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.png", content=draw()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill marks, and lead links to the pages of the files that they name."""
    for mark, make in _MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    pages = SHOWN | {f"docs/{file.src_uri}": file.src_uri for file in files}
    place = page.file.src_uri
    if place.startswith(_BEHIND):
        page.meta["search"] = {"boost": 0.3}
    source = next((source for source, shown in SHOWN.items() if shown == place), f"docs/{place}")
    return relinked(markdown, source, place, pages)
