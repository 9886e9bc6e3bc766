"""The views of images on the device, inside the train step: `on_host.py` in JAX.

Both take the rows that `draws.py` drew on the host, boxes included. They are 136 bytes an image and
take half a microsecond (an epoch of CIFAR-10: 40 ms), and so every draw is the same on a CPU, a GPU
and a TPU, whose float32 logarithms and square roots differ in the last bit.

Views are rounded to uint8 by the host's rule. So a method sees one kind of batch wherever it was
made, shuffling BN moves bytes, and nothing is standardised in two places.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from common.data.augment import device_ops, draws
from common.data.augment.colour import colour_ops
from common.data.augment.presets import Augmentation
from common.sharding import AXIS

Views = tuple[Augmentation, ...]

# Float pixels that a device works on at a time: 512 MB, and some copies. All views at once of the
# 4,096 images at 224 pixels that one device may take in micro-batches would be 5 GB.
PIECE = 2**27


def _coloured(images: jax.Array, parameters: jax.Array, a: Augmentation) -> jax.Array:
    return device_ops.clip(colour_ops(images, parameters, a, device_ops))


def augment_pixels(images: jax.Array, parameters: jax.Array, augmentations: Views) -> jax.Array:
    """The views of every image of a batch of one shape.

    Args:
        images: uint8 [b, h, w, 3].
        parameters: float32 [b, v, draws.PARAMETERS], boxes included.
        augmentations: one a view, v of them.

    Returns:
        float32 [b, v, 3, size, size] in [0, 1].
    """
    planes = _planes(images)

    def views(parameters: jax.Array, a: Augmentation, view: int | slice) -> jax.Array:
        del view  # all are of the same pixels
        boxes, flips = parameters[:, draws.BOX], parameters[:, draws.FLIP]
        return _coloured(device_ops.crop_resize(planes, boxes, flips, a), parameters, a)

    return _of_each(views, parameters, augmentations)


def augment_colour(views: jax.Array, parameters: jax.Array, augmentations: Views) -> jax.Array:
    """The rest of the augmentation of views that the host has cropped, resized and flipped.

    The host has rounded them to bytes, which an augmentation in one piece does after its last
    operation only: colours may differ by a few of 255 levels from it.

    Args:
        views: uint8 [b, v, size, size, 3].
        parameters: float32 [b, v, draws.PARAMETERS].
        augmentations: one a view, v of them.

    Returns:
        float32 [b, v, 3, size, size] in [0, 1].
    """

    def coloured(parameters: jax.Array, a: Augmentation, view: int | slice) -> jax.Array:
        images = views[:, view].reshape(-1, *views.shape[2:])
        return _coloured(_planes(images), parameters, a)

    return _of_each(coloured, parameters, augmentations)


def _planes(images: jax.Array) -> jax.Array:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [0, 1]."""
    return jnp.moveaxis(images, 3, 1).astype(jnp.float32) * jnp.float32(1 / 255)


def _of_each(make: Callable[..., jax.Array], parameters: jax.Array, recipes: Views) -> jax.Array:
    """All views: in one go where they share a recipe, image-major so that no row moves."""
    if len(set(recipes)) == 1:
        made = make(parameters.reshape(-1, parameters.shape[-1]), recipes[0], slice(None))
        return made.reshape(-1, len(recipes), *made.shape[1:])
    return jnp.stack([make(parameters[:, i], a, i) for i, a in enumerate(recipes)], axis=1)


def to_bytes(images: jax.Array) -> jax.Array:
    """float32 [..., 3, h, w] in [0, 1] to uint8 [..., h, w, 3], rounded as on the host."""
    return jnp.moveaxis((images * 255 + 0.5).astype(jnp.uint8), -3, -1)


def views(
    function: Callable, images: jax.Array, parameters: jax.Array, augmentations: Views, mesh: Mesh
) -> jax.Array:
    """`augment_pixels` or `augment_colour`, each device on its rows and some of them at a time.

    Args:
        function: one of the two.
        images: as it says, of a global batch.
        parameters: float32 [b, v, draws.PARAMETERS].
        augmentations: one a view, v of them.
        mesh: the device mesh.

    Returns:
        uint8 [b, v, size, size, 3], sharded along b.
    """

    def make(rows: tuple[jax.Array, ...]) -> jax.Array:
        return to_bytes(function(*rows, augmentations))

    def local(*rows: jax.Array) -> jax.Array:
        n = len(rows[0])
        least = -(-n * len(augmentations) * 3 * augmentations[0].size ** 2 // PIECE)
        parts = next(p for p in range(least, n + 1) if n % p == 0)
        if parts == 1:
            return make(rows)
        made = jax.lax.map(make, jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows))
        return made.reshape(n, *made.shape[2:])

    spec = PartitionSpec(AXIS)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(
        images, parameters
    )
