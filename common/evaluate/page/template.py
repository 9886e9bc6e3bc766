"""A page of a template, a script and a style sheet beside this file; it needs no network."""

import base64
import hashlib
import pathlib
from typing import Any

_HERE = pathlib.Path(__file__).parent


def render(template: str, script: str, **values: Any) -> str:
    """The text of a page.

    Args:
        template: name of the file; it gets `script`, `style` and `digest`, which is for its
            Content-Security-Policy.
        script: name of the file.
        values: what else the template shows, escaped: names come from users' disks.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    code, style = ((_HERE / name).read_text() for name in (script, "page.css"))
    # The browser runs this script and no other, whatever else gets into the page.
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    page = environment.get_template(template)
    return page.render(script=code, style=style, digest=digest, **values)
