"""The loss of knowledge distillation: a student is to give the teacher's probabilities."""

import jax
import jax.numpy as jnp

from common.contrast import check_temperature
from common.errors import UserError


def distillation_loss(
    student: jax.Array, teacher: jax.Array, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """Cross-entropy of the student's class probabilities under the teacher's, times T^2.

    Chen et al. 2020b (arXiv 2006.10029), eq. 2, where both are softmaxes of logits / T, as a mean
    over the images. The factor T^2 (Hinton et al. 2015, section 2) keeps the gradient from
    shrinking with T; it is in the authors' code, and not in their equation.

    Args:
        student: logits `[n, c]`, any float type.
        teacher: logits `[n, c]`; no gradient reaches them.
        temperature: T > 0; above 1 it softens the probabilities, below 1 it sharpens them.

    Returns:
        Scalar, at least float32. At its least, where both agree, it is T^2 times the mean entropy
        of the teacher's probabilities.

    Raises:
        UserError: if the shapes differ or are not `[n, c]`, or the temperature is not positive.
    """
    return distillation_loss_with_metrics(student, teacher, temperature)[0]


@jax.named_scope("loss")
def distillation_loss_with_metrics(
    student: jax.Array, teacher: jax.Array, temperature: float | jax.Array = 1.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`distillation_loss`, and what to watch while training.

    Args:
        student: as there.
        teacher: as there.
        temperature: as there.

    Returns:
        The loss, and metrics without gradient: `agreement` (share of images for which both have the
        same most likely class), `teacher_confidence` (mean of the teacher's largest probability, at
        T = 1), `teacher_entropy` (mean of the targets' entropy, in nats, at T), `divergence` (the
        loss above its least value: T^2 times the mean Kullback-Leibler divergence).

    Raises:
        UserError: as there.
    """
    check_temperature(temperature, "distil.temperature")
    if student.shape != teacher.shape or student.ndim != 2:
        raise UserError(
            f"distillation: the student's logits are {list(student.shape)} and the teacher's "
            f"{list(teacher.shape)}: expected two equal shapes [n, c], of the same images and "
            "classes"
        )
    kind = jnp.promote_types(jnp.promote_types(student.dtype, teacher.dtype), jnp.float32)
    student, teacher = student.astype(kind), jax.lax.stop_gradient(teacher.astype(kind))
    log_targets = jax.nn.log_softmax(teacher / temperature)
    targets = jnp.exp(log_targets)
    losses = -jnp.sum(targets * jax.nn.log_softmax(student / temperature), axis=-1)
    loss = temperature**2 * losses.mean()
    # 0 log 0 is 0: of a class whose probability is too small for a float nothing is left
    entropy = -jnp.sum(jnp.where(targets > 0, targets * log_targets, 0), axis=-1).mean()
    metrics = {
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).astype(kind).mean(),
        "teacher_confidence": jax.nn.softmax(teacher).max(-1).mean(),
        "teacher_entropy": entropy,
        "divergence": loss - temperature**2 * entropy,
    }
    return loss, jax.lax.stop_gradient(metrics)
