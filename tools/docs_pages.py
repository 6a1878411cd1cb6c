"""A hook of mkdocs: the pages that lie beside ``docs/`` join the site.

The README and its like are read where they are on a forge, too. So they stay at the
root, and their links are turned to where the site has them.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "README.md": "index.md",
    **{
        f"{name}.md": f"{name}.md"
        for name in ("ARCHITECTURE", "CHANGELOG", "CONTRIBUTING", "SECURITY")
    },
}
# What a browser would fetch from elsewhere while it shows a page.
_FETCHED = re.compile(
    r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+"
    # The theme's script (mkdocs-material 9) has mermaid come for these.
    r"|<pre class=\"mermaid\""
)
_LINK = re.compile(r"\]\((\.\./)?([\w./-]+\.md)((?:#[^)]*)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds `PAGES` to what the site is made of."""
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        text = (root / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turns links between the root and ``docs/``."""
    if page.file.src_uri not in PAGES.values() and "/" in page.file.src_uri:
        return markdown

    def turned(link: re.Match[str]) -> str:
        target = link[2].removeprefix("docs/")
        return f"]({PAGES.get(target, target)}{link[3]})"

    return _LINK.sub(turned, markdown)


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Refuses a page that asks another host for anything.

    Raises:
        PluginError: it names the page and what it would fetch.
    """
    if found := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from elsewhere: {found[0]}")
    return output
