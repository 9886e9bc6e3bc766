"""The views of images on the host: of a batch of one shape, or of one encoded image.

The first is for small images, which are held as pixels; the second decodes as little as it can.
Both take what `draws.py` drew; nothing here is random but the boxes of `draw_box`, whose seed is.
"""

import functools

from common.data.augment import draws, pixel_ops
from common.data.augment.boxes import (
    OBJECT_COVERED,
    TF_TRIES,
    TORCH_TRIES,
    central_sides,
    torch_try,
)
from common.data.augment.colour import colour_ops
from common.data.augment.presets import Augmentation, crop_only
from common.data.images import decoding, orientation
from common.data.images.decode import decode, is_fine_jpeg
from common.data.images.decoding import Decoding
from common.data.images.tensorflow_host import fused, tf, xp

MAX_RATIO = 8  # of the sides of an image that evaluation resizes whole


def _coloured(images: tf.Tensor, parameters: tf.Tensor, a: Augmentation) -> tf.Tensor:
    """`colour_ops`, as uint8 [n, size, size, 3]."""
    return _interleaved(colour_ops(images, parameters, a, pixel_ops))


@fused
def _interleaved(images: tf.Tensor) -> tf.Tensor:
    """float32 [n, 3, h, w] to uint8 [n, h, w, 3]."""
    return tf.transpose(to_bytes(images), [0, 2, 3, 1])


@fused
def _planes(images: tf.Tensor) -> tf.Tensor:
    """float32 [1, h, w, 3] of 0 to 255 to [1, 3, h, w] of 0 to 1."""
    return tf.transpose(images, [0, 3, 1, 2]) * (1 / 255)


@fused
def _bytes_of_all(*views: tf.Tensor) -> tf.Tensor:
    """Each of float32 [1, h, w, 3] about 0 to 255; together uint8 [v, h, w, 3]."""
    return to_bytes(tf.concat(views, axis=0) * (1 / 255))


def to_bytes(images: tf.Tensor) -> tf.Tensor:
    """float32 about [0, 1] to uint8, clipped and rounded."""
    return tf.cast(tf.clip_by_value(images, 0.0, 1.0) * 255.0 + 0.5, tf.uint8)


def augment_pixels(
    images: tf.Tensor, parameters: tf.Tensor, augmentations: tuple[Augmentation, ...]
) -> tf.Tensor:
    """The views of every image of a batch of one shape.

    Args:
        images: uint8 [b, h, w, 3].
        parameters: float32 [b, v, draws.PARAMETERS], boxes included.
        augmentations: one a view, v of them.

    Returns:
        uint8 [b, v, size, size, 3].
    """
    first, n = augmentations[0], len(augmentations)
    planes = tf.cast(tf.transpose(images, [0, 3, 1, 2]), tf.float32) * (1 / 255)

    def views(x: tf.Tensor, p: tf.Tensor, a: Augmentation) -> tf.Tensor:
        return _coloured(pixel_ops.crop_resize(x, p[:, draws.BOX], p[:, draws.FLIP], a), p, a)

    if len(set(augmentations)) > 1:
        made = [views(planes, parameters[:, i], a) for i, a in enumerate(augmentations)]
        return tf.stack(made, axis=1)
    parameters = tf.reshape(parameters, [-1, draws.PARAMETERS])
    made = views(tf.repeat(planes, n, axis=0), parameters, first)
    return tf.reshape(made, [-1, n, first.size, first.size, 3])


def augment_encoded(
    data: tf.Tensor,
    parameters: tf.Tensor,
    crops: tf.Tensor,
    augmentations: tuple[Augmentation, ...],
    whole: bool = False,
    how: Decoding = decoding.DEFAULT,
) -> tf.Tensor:
    """The views of one encoded image.

    Of a JPEG, only the part that their crops cover together is decoded, once.

    Args:
        data: scalar string, the file.
        parameters: float32 [v, draws.PARAMETERS]; the boxes in it are not used.
        crops: float32 [v, draws.CROP_DRAWS].
        augmentations: one a view, v of them.
        whole: decode all of the image, so that any damage in it is seen.
        how: the rules by which its dataset is decoded.

    Returns:
        uint8 [v, size, size, 3].
    """

    def boxes_for(shape: tf.Tensor) -> tf.Tensor:
        pair = zip(augmentations, tf.unstack(crops), strict=True)
        return tf.stack([draw_box(a, shape[0], shape[1], crop) for a, crop in pair])

    def everything():
        image = decode(data, how)
        return image, boxes_for(tf.shape(image))

    def jpeg_part():
        shape = tf.image.extract_jpeg_shape(data)[:2]
        if how.exif_rotation:
            turn = orientation.of(data)
            boxes = boxes_for(orientation.shape_shown(shape, turn))
            needed = orientation.box_stored(_around(boxes), shape, turn)
        else:
            boxes = boxes_for(shape)
            needed = _around(boxes)
        # One column more on each side: libjpeg smooths colours between columns, and at the edge of
        # a window the next one is missing.
        start = tf.maximum(needed[:2] - [0, 1], 0)
        end = tf.minimum(needed[:2] + needed[2:] + [0, 1], shape)
        # Of the columns all are decoded where more than half are needed: that takes less time
        # than to cut the rest off.
        whole_side = tf.constant([False, True]) & (2 * (end - start) > shape)
        start, end = tf.where(whole_side, 0, start), tf.where(whole_side, shape, end)
        window = tf.concat([start, end - start], axis=0)
        image = tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method=how.dct_method)
        if how.exif_rotation:
            image = orientation.turned(image, turn)
            window = orientation.box_shown(window, shape, turn)
        return image, boxes - tf.concat([window[:2], [0, 0]], axis=0)

    if whole:
        image, boxes = everything()
    else:
        image, boxes = tf.cond(is_fine_jpeg(data), jpeg_part, everything)
    views = []
    for a, box, p in zip(augmentations, tf.unstack(boxes), tf.unstack(parameters), strict=True):
        view = _resized(tf.slice(image, [box[0], box[1], 0], [box[2], box[3], 3]), a)
        # reversed here, where TensorFlow has a quick way: between columns of 3 numbers
        views.append(tf.cond(p[draws.FLIP] > 0, functools.partial(tf.reverse, view, [1]),
                             functools.partial(tf.identity, view))[None])  # fmt: skip
    if augmentations == tuple(map(crop_only, augmentations)):  # the device does the rest
        return _bytes_of_all(*views)
    # one view at a time: each does only what it needs
    rest = zip(views, tf.unstack(parameters), augmentations, strict=True)
    return tf.concat([_coloured(_planes(view), p[None], a) for view, p, a in rest], axis=0)


def _around(boxes: tf.Tensor) -> tf.Tensor:
    """The smallest box int32 [4] (top, left, height, width) around all of [n, 4]."""
    start = tf.reduce_min(boxes[:, :2], axis=0)
    return tf.concat([start, tf.reduce_max(boxes[:, :2] + boxes[:, 2:], axis=0) - start], axis=0)


def _resized(crop: tf.Tensor, a: Augmentation) -> tf.Tensor:
    """uint8 [h, w, 3] to float32 [a.size, a.size, 3], 0 to 255."""
    resize = functools.partial(
        tf.image.resize, size=[a.size, a.size], method=a.interpolation, antialias=a.antialias
    )
    if a.antialias:  # turns all pixels into floats itself
        view = resize(crop)
    else:  # turns each into a float whenever it reads it: often, unless the crop is very large
        few = tf.reduce_prod(tf.shape(crop)[:2]) <= 8 * a.size**2
        view = tf.cond(few, lambda: resize(tf.cast(crop, tf.float32)), lambda: resize(crop))
    return tf.ensure_shape(view, [a.size, a.size, 3])


def draw_box(
    augmentation: Augmentation, height: tf.Tensor, width: tf.Tensor, u: tf.Tensor
) -> tf.Tensor:
    """Draws a crop box for an image whose size is known only now.

    The distribution is that of `draws.crop_boxes`; the boxes of crop="tf" differ.

    Args:
        augmentation: the recipe.
        height, width: int32 scalars.
        u: float32 [draws.CROP_DRAWS] in [0, 1).

    Returns:
        int32 [4]: top, left, height, width.
    """
    a = augmentation
    if a.crop == "tf":
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.stack([height, width, 3]),
            bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=tf.cast(u[:2] * 2.0**24, tf.int32),
            min_object_covered=OBJECT_COVERED,
            aspect_ratio_range=(a.ratio_min, a.ratio_max),
            area_range=(a.area_min, a.area_max),
            max_attempts=TF_TRIES,
        )
        return tf.concat([begin[:2], size[:2]], axis=0)
    tall, wide = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    tries = tf.reshape(u[2:], [TORCH_TRIES, 2])
    h, w, good = torch_try(a, tall, wide, tries, xp)
    first = tf.argmax(good)
    out_h, out_w = central_sides(a, tall, wide, xp)
    found = tf.reduce_any(good)
    h, w = tf.where(found, h[first], out_h), tf.where(found, w[first], out_w)
    top = tf.where(found, tf.floor(u[0] * (tall - h + 1)), tf.floor((tall - h) / 2))
    left = tf.where(found, tf.floor(u[1] * (wide - w + 1)), tf.floor((wide - w) / 2))
    return tf.cast(tf.stack([top, left, h, w]), tf.int32)


def centre(image: tf.Tensor, shorter: int, size: int) -> tf.Tensor:
    """Resizes the shorter side (bilinear, antialiased) and cuts the centre out.

    Args:
        image: uint8 [h, w, 3].
        shorter: length of the shorter side after resizing, >= size.
        size: side of the result.

    Returns:
        uint8 [size, size, 3].
    """
    # Of a strip (20,000 x 1, say) only the middle is resized: all of it would fill the memory.
    tall, wide = tf.unstack(tf.shape(image)[:2])
    longest = MAX_RATIO * tf.minimum(tall, wide)
    h, w = tf.minimum(tall, longest), tf.minimum(wide, longest)
    image = tf.slice(image, [(tall - h) // 2, (wide - w) // 2, 0], [h, w, 3])
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    shape = tf.cast(tf.round(shape * (shorter / tf.reduce_min(shape))), tf.int32)
    image = tf.image.resize(image, shape, antialias=True)
    top, left = tf.unstack((shape - size) // 2)
    image = tf.slice(image, [top, left, 0], [size, size, 3])
    return tf.cast(tf.clip_by_value(image, 0.0, 255.0) + 0.5, tf.uint8)
