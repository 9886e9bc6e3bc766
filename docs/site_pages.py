"""MkDocs hook: pages of the site whose text lies at the top of the repository."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_page_markdown(markdown: str, page, **_) -> str:
    """The text of a page, with links as they are inside `docs/`."""
    name = PAGES.get(page.file.src_uri)
    if not name:
        return markdown
    text = (ROOT / name).read_text()
    for inside, outside in PAGES.items():
        text = text.replace(f"]({outside}", f"]({inside}")
    return text.replace("](docs/", "](")
