"""Hook of mkdocs: pages made of files outside docs/, and links between the two that work on the site as in the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "ddmd/pretrained/LICENSE.md": "weights/licence.md",
    "ddmd/pretrained/flair-image-labels.md": "weights/flair-image-labels.md",
    "ddmd/pretrained/flair-pixel-labels.md": "weights/flair-pixel-labels.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def relinked(text: str, source: str, page: str) -> str:
    """The text of a file with its relative links as they are on the site; what is not there becomes plain text.

    Parameters
    ----------
    text : Markdown
    source : path of the file in the repository
    page : path of the page below docs/
    """

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif path in PAGES:
            path = PAGES[path]
        else:
            return f"{words} (`{path}`)" if words.strip("`") != path else f"`{path}`"
        return f"[{words}]({posixpath.relpath(path, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, text)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files outside docs/."""
    for source, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Relative links of every page."""
    sources = {path: source for source, path in PAGES.items() if path != "index.md"}
    own = page.file.src_uri
    return relinked(markdown, sources.get(own, f"docs/{own}"), own)
