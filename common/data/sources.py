"""Where images come from: one config string opens a `Source`.

    embedded     Fashion-MNIST, ships with this code (10,000 + 2,000 images, 28 x 28)
    tfds:NAME    any TensorFlow data set of images that is already prepared on this machine
    folder:PATH  a tree of image files, in class folders or not
    shards:PATH  what `--mode=prepare` wrote: any of these as a few large files
    fake         random views, made once: everything but the data can be timed with it

Paths may be remote (`gs://...`). Nothing is ever downloaded. Grey images become RGB.
"""

import dataclasses
import functools
import pathlib

import numpy as np
from ml_collections import ConfigDict

from common.data import decoding, draws, folder_layout, slices
from common.data.decoding import DEFAULT, Decoding
from common.errors import UserError


def default_config(source: str = "embedded", image_size: int = 28) -> ConfigDict:
    """The config's `data` section.

    Args:
      source: see the top of this file.
      image_size: side of the training views and of the evaluation images, in pixels.

    Returns:
      ConfigDict; the comments below say what each field means.
    """
    config = ConfigDict()
    config.source = source
    config.train_split = "train"
    config.test_split = "test"
    config.bank_split = ""  # whose examples vote in kNN; "" = train_split. STL10: "train"
    # What the labels are, which only kNN and probes see: "auto" (what the set says; of a folder its
    # class folders, and a tree that can be read in two ways is refused), "folders" (each folder is
    # a class, in any case), "none" (there are none)
    config.labels = "auto"
    config.dir = ""  # of TensorFlow data sets; "" = TFDS_DATA_DIR, or else TFDS's own default
    config.image_size = image_size
    config.cache_gib = 16.0  # images held in memory at most; a larger TFRecord set is streamed
    config.shuffle_buffer = 16384  # encoded images, for streamed sets only
    config.on_corrupt = "error"  # or "replace": by the next good image, with a counted warning
    # Images of more than 8 bits: the values "LOW:HIGH" that become black and white, in all of them
    # alike; "auto" = decided from a sample of the training images when a run begins
    config.value_range = "auto"
    config.jpeg = "exact"  # as Pillow decodes, to the byte; or "fast", off by some levels
    config.exif_rotation = False  # turn photographs as their EXIF says; ImageFolder does not
    # Where the views are made: "host" (TensorFlow), "both" (the host decodes, crops and flips, the
    # rest runs inside the train step) or "device" (all inside the step, with the data set in device
    # memory: small sets of images of one shape)
    config.augment_on = "host"
    config.fake_examples = 4096
    config.fake_classes = 10
    return config


@dataclasses.dataclass
class Source:
    """A labelled or unlabelled set of images with random access.

    Attributes:
      name, split: for messages.
      kind: what `fetch` returns: "pixels" (uint8 [b, h, w, 3]), "encoded" (object [b] of bytes),
        "path" (object [b] of bytes), "views" (pixels that want no augmentation), or "stream" (no
        random access; see `stream.py`).
      num_examples: >= 1.
      num_classes: 0 when unlabelled.
      class_names: of length num_classes, or empty when the classes have no names.
      labels: int32 [num_examples], -1 unlabelled; None when only reading the images tells.
      image_shape: (h, w) when all images share it, else None.
      on_corrupt: "error" or "replace".
      decoding: how files become pixels.
      replaced: id of a corrupt image -> id of the image that stands in for it.
      seen_good: ids that a search for corrupt images could decode; it need not look again.
      listing: changes when examples are added, removed or renamed, even if their number stays.
      account: lines that say how a set was read that could have been read otherwise.
    """

    name: str
    split: str
    kind: str
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]
    labels: np.ndarray | None
    image_shape: tuple[int, int] | None = None
    on_corrupt: str = "error"
    decoding: Decoding = DEFAULT
    replaced: dict[int, int] = dataclasses.field(default_factory=dict)
    seen_good: set[int] = dataclasses.field(default_factory=set)
    account: tuple[str, ...] = ()

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (as `kind` says) and int32 labels of the examples [b]; nothing is replaced."""
        raise NotImplementedError

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Images of the examples [b], as `kind` says; corrupt ones, once known, are replaced."""
        return self.read(self.stand_ins(ids))[0]

    def stand_ins(self, ids: np.ndarray) -> np.ndarray:
        """Puts the ids of the replacements in the place of corrupt examples."""
        if not self.replaced:
            return ids
        return np.array([self.replaced.get(int(i), int(i)) for i in ids], np.int64)

    def describe(self, index: int) -> str:
        """Names one example in an error message."""
        return f"example {index} of {self.name} ({self.split})"

    def names(self, ids: np.ndarray) -> np.ndarray:
        """Names of examples [b] for files that may go elsewhere: no path outside the set."""
        return np.array([str(i) for i in ids])

    def summary(self) -> tuple[str, ...]:
        """What this is, in a line, and the account of how it was read."""
        labels = "no labels"
        if self.num_classes:
            labels = f"{self.num_classes:,} class{'es' * (self.num_classes > 1)}"
        text = f"{self.name} ({self.split}): {self.num_examples:,} images, {labels}"
        return text, *self.account

    @property
    def listing(self) -> str:
        return ""

    @property
    def corrupt_count(self) -> int:
        """How many corrupt images have been replaced so far."""
        return len(self.replaced)


@dataclasses.dataclass
class ArraySource(Source):
    """Images in memory: pixels [n, h, w, 3], or encoded bytes [n]."""

    images: np.ndarray = None

    def read(self, ids):
        return self.images[ids], self.labels[ids]


@dataclasses.dataclass
class FakeSource(Source):
    """A small pool of random images, seen again and again."""

    def read(self, ids):
        return self.views(ids, self.image_shape[0]), self.labels[ids % self.num_examples]

    def views(self, ids: np.ndarray, size: int) -> np.ndarray:
        """The images as views of another size than `image_shape`: other random pixels."""
        pool = _random_images(self.split == "train", min(self.num_examples, _POOL), size)
        return pool[ids % len(pool)]


_POOL = 64  # images


@functools.lru_cache(maxsize=4)
def _random_images(stream: int, count: int, size: int) -> np.ndarray:
    words = draws.hash64(stream, np.arange(count * size * size * 3 // 8 + 1))
    return words.view(np.uint8)[: count * size * size * 3].reshape(count, size, size, 3)


ROLES = ("train", "test", "bank")
KINDS = ("embedded", "fake", "folder", "shards", "tfds")


def open_source(config: ConfigDict, split: str) -> Source:
    """Opens a data set.

    Classes are compared by name: label i of "test" and "bank" is the i-th class of "train", or of
    the bank where "train" has no labels.

    Args:
      config: the config's `data` section.
      split: "train", "test" or "bank" (then `config.train_split` etc. say which split of the
        data set that is), or the name of a split; or a slice of one, such as "train[:80%]".

    Returns:
      The source.

    Raises:
      UserError: unknown source, missing data set or split, empty folder, no image in it, a class
        in the test set that the others lack.
    """
    role, split = split, config[f"{split}_split"] if split in ROLES else split
    if config.on_corrupt not in ("error", "replace"):
        raise UserError(
            f"data.on_corrupt is {config.on_corrupt!r}; expected 'error' (stop and name the file) "
            "or 'replace' (use another image and count it)."
        )
    if config.labels not in folder_layout.LABELS:
        raise UserError(
            f"data.labels is {config.labels!r}; expected 'auto', 'folders' (each folder is a "
            "class) or 'none'."
        )
    how = decoding.of(config)
    kind, path = kind_of(config.source)
    name, bounds = part_of(kind, path, split)
    source = _open(kind, path, name, config, compared=role in ("test", "bank"))
    if config.labels == "none" and source.num_classes:
        source.num_classes, source.class_names = 0, ()
        source.labels = np.full(source.num_examples, -1, np.int32)
    source.on_corrupt, source.decoding = config.on_corrupt, how
    from common.data import class_names, subset  # which build on this module

    if role in ("test", "bank") and source.class_names:
        class_names.align(source, config)
    if bounds is None:
        return source

    part = subset.select(source, slices.ids(split, bounds, source.num_examples))
    return dataclasses.replace(part, split=split)


def part_of(kind: str, path: str, split: str) -> tuple[str, tuple[str, str] | None]:
    """The split to open, and which slice of it to take."""
    if kind == "tfds":  # which slices its own sets
        return split, None
    if kind == "shards":
        from common.data import shards

        if shards.holds(path, split):  # a slice that was prepared
            return split, None
    return slices.parse(split)


def kind_of(source: str) -> tuple[str, str]:
    """The kind of `data.source`, and what stands behind the colon.

    Raises:
      UserError: an unknown kind.
    """
    kind, _, rest = source.partition(":")
    if kind in KINDS and bool(rest) == (kind in ("folder", "shards", "tfds")):
        return kind, rest
    near = f" Did you mean 'folder:{source}'?" if pathlib.Path(source).is_dir() else ""
    raise UserError(
        f"data.source is {source!r}; expected 'embedded', 'tfds:NAME', 'folder:PATH', "
        f"'shards:PATH' or 'fake'.{near}"
    )


def _open(kind: str, path: str, split: str, config: ConfigDict, compared: bool) -> Source:
    if kind == "embedded":
        return _open_embedded(split)
    if kind == "fake":
        return _open_fake(config, split)
    # these build on this module
    if kind == "folder":
        from common.data import folder_source

        return folder_source.open_folder(path, split, config.labels)
    if kind == "shards":
        from common.data import shards

        return shards.open_shards(path, split, config)
    from common.data import tfds_source  # imports TensorFlow

    return tfds_source.open_tfds(path, split, config, sure=compared)


def listed(names: list[str], noun: str, verb: str, most: int = 5) -> str:
    """ "; 2 damaged images left out: a, b", or "" of no names; of many only the first."""
    if not names:
        return ""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    plural = "s" if len(names) > 1 else ""
    return f"; {len(names):,} {noun}{plural} {verb}: {', '.join(names[:most])}{more}"


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Repeats the one channel of grey images: [..., h, w, 1] -> [..., h, w, 3]."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _open_embedded(split: str) -> Source:
    if split not in ("train", "test"):
        raise UserError(f"the embedded data set has no split {split!r}; expected train or test.")
    archive = pathlib.Path(__file__).with_name("fashion_mnist.npz")
    with np.load(archive, allow_pickle=False) as arrays:
        images = to_rgb(arrays[f"{split}_images"][..., None])
        labels = arrays[f"{split}_labels"].astype(np.int32)
        names = tuple(str(name) for name in arrays["class_names"])
    return ArraySource(
        name="fashion_mnist", split=split, kind="pixels", num_examples=len(images),
        num_classes=len(names), class_names=names, labels=labels, image_shape=images.shape[1:3],
        images=images,
    )  # fmt: skip


def _open_fake(config: ConfigDict, split: str) -> Source:
    n, classes, size = config.fake_examples, config.fake_classes, config.image_size
    if n < 1 or classes < 0:
        raise UserError(
            f"data.fake_examples is {n} and data.fake_classes {classes}; expected at least 1 and 0."
        )
    labels = np.arange(n, dtype=np.int32) % classes if classes else np.full(n, -1, np.int32)
    return FakeSource(
        name="fake", split=split, kind="views", num_examples=n, num_classes=classes,
        class_names=tuple(f"class {i}" for i in range(classes)), labels=labels,
        image_shape=(size, size),
    )  # fmt: skip
