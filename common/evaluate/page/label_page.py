"""`label_these.html`: the images to label, each with a place to type into; one file, no network."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from common import version
from common.data.feed.pipeline import images_of
from common.data.sources import subset
from common.data.sources.base import Source
from common.evaluate.feature_files import printable
from common.evaluate.page import inline, template
from common.evaluate.pretrained import Pretrained
from common.run import files

_AT_ONCE = 256  # images in memory
_SIDE = 224  # pixels, at least, of files: more than many encoders see


def write(
    path: epath.Path,
    opened: Pretrained,
    source: Source,
    ids: np.ndarray,
    names: Sequence[str],
    sizes: Sequence[int],
    classes: Sequence[str],
    table: str,
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        opened: the run that made the choice.
        source: the images; a streamed one is read once more.
        ids: int `[m]` of the images to label.
        names: of these.
        sizes: how many images the cluster of each has.
        classes: labels in use already, for the browser to offer.
        table: name of the CSV file that is to be filled in.
    """
    part = subset.select(source, ids)
    side = opened.image_size if part.kind in ("pixels", "views") else max(opened.image_size, _SIDE)
    uris = [
        inline.image_uri(image)
        for i in range(0, len(ids), _AT_ONCE)
        for image in images_of(part, np.arange(i, min(i + _AT_ONCE, len(ids))), side)
    ]
    shown = [
        {"uri": uri, "name": name, "size": size}
        for uri, name, size in zip(uris, names, sizes, strict=True)
    ]
    text = template.render(
        "label_page.html",
        "label_page.js",
        images=shown,
        table=table,
        data=printable(source.name),
        subject=opened.subject,
        classes=list(classes),
        code=version.in_words(),
    )
    files.write_text(path, text)
