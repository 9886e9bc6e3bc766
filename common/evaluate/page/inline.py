"""Images as text inside a page."""

import base64
import io

import numpy as np

_EXACT = 48  # pixels; images up to here keep every pixel (PNG)
LARGE = 224  # side of an image in a row of 8, at most: twice that on the page, for sharp screens
SMALL = 160  # where there are many
_CELLS = (96, 64, 48, 32, 16)  # sides of the images of an atlas
_ATLAS = 8_000_000  # pixels: 30 MB in a browser, which telephones bear
_BLOCK = 16  # JPEG's; cells of whole blocks do not bleed into each other


def data_uri(data: bytes, kind: str) -> str:
    """The bytes of an image file as the `src` of an `<img>`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_uri(image: np.ndarray, most: int = LARGE) -> str:
    """A uint8 image `[h, w, 3]`, of a side of at most `most`, as the `src` of an `<img>`."""
    from PIL import Image

    picture, buffer = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= _EXACT:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((most, most))
        picture.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return data_uri(buffer.getvalue(), kind)


def cell_side(n: int) -> int:
    """The largest side of the images of an atlas of n, in pixels: the fewer, the larger."""
    return next((side for side in _CELLS if n * side**2 <= _ATLAS), _CELLS[-1])


def thumbnails(images: np.ndarray, side: int) -> np.ndarray:
    """Shrinks uint8 images `[n, h, w, 3]` to the size they have in an atlas, at most `side`."""
    from PIL import Image

    h, w = images.shape[1:3]
    if max(h, w) <= side:
        return images
    size = (side, side)
    return np.stack([np.asarray(Image.fromarray(x).resize(size)) for x in images])


def atlas(images: np.ndarray) -> tuple[str, dict[str, int]]:
    """Many small images as one JPEG.

    Args:
        images: uint8 `[n, h, w, 3]`.

    Returns:
        The data URI, and `{"columns", "rows", "cell", "side"}`: the grid, the pixels from one image
        to the next, and the larger side of an image.
    """
    from PIL import Image

    n, h, w, _ = images.shape
    cell = -(-max(h, w) // _BLOCK) * _BLOCK
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    padding = ((0, columns * rows - n), (0, cell - h), (0, cell - w), (0, 0))
    edged = np.pad(images, ((0, 0), *padding[1:3], (0, 0)), mode="edge")
    tiles = np.pad(edged, (padding[0], (0, 0), (0, 0), (0, 0)))
    tiles = tiles.reshape(rows, columns, cell, cell, 3).swapaxes(1, 2)
    sheet, buffer = Image.fromarray(tiles.reshape(rows * cell, columns * cell, 3)), io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80, subsampling=0)
    cells = {"columns": columns, "rows": rows, "cell": cell, "side": max(h, w)}
    return data_uri(buffer.getvalue(), "jpeg"), cells
