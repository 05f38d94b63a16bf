"""Links of a page that lead to files of the repository: to their pages where they have one, else to nothing."""

import posixpath
import re
from collections.abc import Mapping

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def relinked(markdown: str, source: str, page: str, pages: Mapping[str, str]) -> str:
    """The text with its links leading to pages.

    Args:
        markdown: the text; code in it is left alone as far as it has no links.
        source: its file in the repository.
        page: where it is in the documentation, as a source of mkdocs.
        pages: by file of the repository: where it is in the documentation.
    """

    def replaced(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if file in pages:
            return f"[{words}]({posixpath.relpath(pages[file], posixpath.dirname(page) or '.')}{anchor})"
        return match[0] if file.startswith("docs/") else f"{words} (`{file}`)"

    return _LINK.sub(replaced, markdown)
