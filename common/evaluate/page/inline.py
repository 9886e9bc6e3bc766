"""Images as text inside a page, and curves as numbers for an SVG."""

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np

_EXACT = 48  # pixels; images up to here keep every pixel (PNG)
_SHOWN = 112  # side of an image in a grid, at most
_THUMBNAIL = 48  # in the atlas
_BLOCK = 16  # JPEG's: cells of whole blocks do not bleed into each other
_STEPS = (1, 2, 5, 10)  # between the ticks of an axis, times a power of ten
_POINTS = 400  # of a curve; more cannot be seen


def data_uri(image: np.ndarray) -> str:
    """One uint8 image `[h, w, 3]`, as what an `<img src>` takes."""
    from PIL import Image

    picture, buffer = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= _EXACT:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((_SHOWN * 2, _SHOWN * 2))  # twice, for sharp screens
        picture.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Shrinks uint8 images `[n, h, w, 3]` to the size they have in an atlas."""
    from PIL import Image

    h, w = images.shape[1:3]
    if max(h, w) <= _THUMBNAIL:
        return images
    size = (_THUMBNAIL, _THUMBNAIL)
    return np.stack([np.asarray(Image.fromarray(x).resize(size)) for x in images])


def atlas(images: np.ndarray) -> dict:
    """Many small images as one JPEG.

    Args:
        images: uint8 `[n, h, w, 3]`.

    Returns:
        {"uri", "columns", "rows", "cell" (pixels from one to the next), "side" (of an image)}.
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
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"uri": uri, "columns": columns, "rows": rows, "cell": cell, "side": max(h, w)}


@dataclasses.dataclass(frozen=True)
class Chart:
    """A curve in a box of `WIDTH` x `HEIGHT`, with what stands at its axes."""

    title: str
    unit: str  # of the horizontal axis
    points: str  # "x,y x,y ...", of an SVG polyline
    dots: tuple[tuple[float, float], ...]  # empty where there are too many to draw
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    level: float | None  # y of a horizontal line of comparison
    level_name: str

    WIDTH = 420
    HEIGHT = 240
    LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 40


def chart(
    title: str,
    x: Sequence[float],
    y: Sequence[float],
    unit: str,
    level: float | None = None,
    level_name: str = "",
) -> Chart | None:
    """Scales a curve into its box; None without two points."""
    from matplotlib.ticker import MaxNLocator

    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 2 or x[0] == x[-1]:
        return None
    if len(x) > _POINTS:  # means of equal pieces
        x, y = (np.array([p.mean() for p in np.array_split(v, _POINTS)]) for v in (x, y))
    low, high = y.min(), y.max()
    if level is not None:
        low, high = min(low, level), max(high, level)
    if high - low < 1e-6 * max(1, abs(high)):  # a level curve: the ticks must differ
        low, high = low - 0.5, high + 0.5
    ticks = MaxNLocator(5, steps=_STEPS, min_n_ticks=3).tick_values(low, high)
    low, high = ticks[0], ticks[-1]
    x_ticks = [
        t for t in MaxNLocator(6, steps=_STEPS).tick_values(x[0], x[-1]) if x[0] <= t <= x[-1]
    ]

    def across(v):
        width = Chart.WIDTH - Chart.LEFT - Chart.RIGHT
        return np.round(Chart.LEFT + width * (v - x[0]) / (x[-1] - x[0]), 1)

    def up(v):
        height = Chart.HEIGHT - Chart.TOP - Chart.BOTTOM
        return np.round(Chart.TOP + height * (1 - (v - low) / (high - low)), 1)

    pairs = [(float(a), float(b)) for a, b in zip(across(x), up(y), strict=True)]
    return Chart(
        title=title,
        unit=unit,
        points=" ".join(f"{a:g},{b:g}" for a, b in pairs),
        dots=tuple(pairs) if len(pairs) <= 40 else (),
        x_ticks=tuple(zip(map(float, across(np.array(x_ticks))), _numbers(x_ticks), strict=True)),
        y_ticks=tuple(zip(map(float, up(ticks)), _numbers(ticks), strict=True)),
        level=None if level is None else float(up(level)),
        level_name=level_name,
    )


def _numbers(ticks: Sequence[float]) -> list[str]:
    """As text, all with as many decimals as the finest needs: 5.0 beside 5.2."""
    texts = [f"{t:.10g}" for t in ticks]
    if any("e" in text for text in texts):  # very small or large: as it is
        return texts
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [f"{t:,.{decimals}f}" for t in ticks]
