"""How `--mode=finetune` trains: three recipes of the literature, and any field of them changed.

SGD is Chen et al. 2020, B.5. LARS is SimCLR v2's (Chen et al. 2020b, and the command in its
README): the classifier has no trust ratio, as in the authors' code. AdamW is that of DeiT's code
(Touvron et al. 2021), with which MoCo v3 fine-tunes its ViTs, without RandAugment, random erasing,
repeated augmentation and averaged weights, and with mixup and CutMix only where asked for.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from common import optim
from common.config import one_of_field, section
from common.errors import UserError

# Of fields that are None. A warm-up in percent fits a run of any length; DeiT's is 5 of 300 epochs.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {
        "learning_rate": 0.05, "scaling": "linear", "weight_decay": 0.0, "warmup": "0 steps",
        "drop_path": 0.0, "label_smoothing": 0.0,
    },
    "lars": {  # 0.16 with 1,024 images
        "learning_rate": 0.005, "scaling": "sqrt", "weight_decay": 0.0, "warmup": "0 steps",
        "drop_path": 0.0, "label_smoothing": 0.0,
    },
    "adamw": {  # 5e-4 x batch / 512
        "learning_rate": 2.5e-4, "scaling": "linear", "weight_decay": 0.05, "warmup": "5 %",
        "drop_path": 0.1, "label_smoothing": 0.1,
    },
}  # fmt: skip
_NAMES = {"sgd": "SGD with Nesterov momentum", "lars": "LARS", "adamw": "AdamW"}
_BELOW_1 = ("drop_path", "label_smoothing")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides a step of fine-tuning, beside the network and the batch.

    Attributes:
        optimizer: "sgd" (Nesterov momentum 0.9), "lars" (momentum 0.9) or "adamw" (0.9, 0.999,
            1e-8).
        learning_rate: base value, see `scaling`.
        weight_decay: on kernels, >= 0.
        warmup: a duration, linear; a cosine to 0 follows.
        layer_decay: factor of the learning rate from each layer to the one before it, in (0, 1].
        drop_path: of a ViT, see there, in [0, 1).
        label_smoothing: share of the target spread over all classes, in [0, 1).
        mixup: alpha of Beta(alpha, alpha), see `mixing.draw`; 0 = off.
        cutmix: likewise.
        scaling: of the learning rate by the batch: "linear" (x batch / 256), "sqrt"
            (x sqrt(batch)) or "none".
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.05
    weight_decay: float = 0.0
    warmup: str = "0 steps"
    layer_decay: float = 1.0
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    scaling: str = "linear"

    @classmethod
    def of(cls, c: ConfigDict, encoder: str) -> "Recipe":
        """The recipe of the section `eval.finetune`; None is the value of the optimiser's recipe.

        Args:
            c: the section.
            encoder: `model.encoder` of the run: "auto" is AdamW for a ViT, and SGD for others.

        Raises:
            UserError: for a value out of its range, or drop path where the encoder has none.
        """
        name, vit = one_of_field("eval.finetune.optimizer", c.optimizer), encoder == "vit"
        if name == "auto":
            name = "adamw" if vit else "sgd"
        if c.drop_path and not vit:
            raise UserError(
                f"eval.finetune.drop_path={c.drop_path} needs a vision transformer, found "
                f"model.encoder={encoder}: leave it out"
            )
        default = _DEFAULTS[name] | ({} if vit else {"drop_path": 0.0})
        values = {
            field.name: default[field.name] if c[field.name] is None else c[field.name]
            for field in dataclasses.fields(cls)
        }
        recipe = cls(**(values | {"optimizer": name}))
        recipe._check()
        return recipe

    def _check(self) -> None:
        one_of_field("eval.finetune.scaling", self.scaling)
        for name in ("learning_rate", "weight_decay", "mixup", "cutmix", *_BELOW_1):
            value, top = getattr(self, name), 1 if name in _BELOW_1 else math.inf
            if not 0 <= value < top:
                most = " and less than 1" if top == 1 else ""
                raise UserError(
                    f"eval.finetune.{name}={value} cannot be used: expected a finite number, 0 or "
                    f"more{most}"
                )
        if not 0 < self.layer_decay <= 1:
            raise UserError(
                f"eval.finetune.layer_decay={self.layer_decay}: expected more than 0 and at most "
                "1, which is off"
            )

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def in_words(self) -> str:
        """For the record, e.g. "crops and flips, SGD with Nesterov momentum"."""
        mixing = [f"{name} {a:g}" for name in ("mixup", "cutmix") if (a := getattr(self, name))]
        views = ["crops", "flips", *mixing]
        return f"{', '.join(views[:-1])} and {views[-1]}, {_NAMES[self.optimizer]}"


SGD = Recipe()


def optimizer(
    recipe: Recipe,
    batch_size: int,
    steps: int,
    steps_per_epoch: int,
    layers: Sequence[Sequence[str]] = (),
) -> optax.GradientTransformation:
    """The optimiser of a recipe, for the parameters of `finetune.Finetuned`.

    Args:
        recipe: of the fine-tuning.
        batch_size: images in the global batch.
        steps: of the whole fine-tuning.
        steps_per_epoch: likewise.
        layers: of the encoder, see `Encoder.layers`; read with a `layer_decay` other than 1.

    Raises:
        UserError: for a warm-up that is longer than the fine-tuning, or an encoder whose layers are
            not known.
    """
    warmup = optim.steps_of(recipe.warmup, steps_per_epoch, steps, "eval.finetune.warmup")
    if warmup > steps:
        raise UserError(
            f'eval.finetune.warmup="{recipe.warmup}" is {warmup} steps, more than all '
            f"{steps} of the fine-tuning: shorten it, or raise eval.finetune.epochs"
        )
    c = section("optimizer")
    c.update(
        name=recipe.optimizer, learning_rate=recipe.learning_rate, scaling=recipe.scaling,
        weight_decay=recipe.weight_decay, momentum=0.9, nesterov=recipe.optimizer == "sgd",
        schedule="cosine", warmup=f"{warmup} steps",
    )  # fmt: skip
    tx, _ = optim.make_optimizer(c, batch_size, steps, steps_per_epoch, unadapted=[("classifier",)])
    if recipe.layer_decay == 1:
        return tx
    if not layers:
        raise UserError(
            f"eval.finetune.layer_decay={recipe.layer_decay} needs an encoder that names its "
            "layers (Encoder.layers), and this one does not: leave it out"
        )
    return optax.chain(tx, _by_depth(recipe.layer_decay, layers))


def scales(params: Any, decay: float, layers: Sequence[Sequence[str]]) -> Any:
    """Factors of the learning rates: decay^(n - i) in layer i of an encoder of n layers.

    The classifier, layers of the head, and what the encoder has behind its layers (a final norm)
    have the factor 1. For a ViT of L blocks that is decay^(L + 1 - i), with 0 for the patches, the
    class token and the positions, and i for the i-th block, as in BEiT and MAE (Bao et al. 2022;
    He et al. 2022), after ELECTRA (Clark et al. 2020).

    Args:
        params: `{"network": {"backbone": ...}, "classifier": ...}`.
        decay: in (0, 1].
        layers: of the encoder, see `Encoder.layers`.

    Returns:
        A float for each parameter, in a tree like `params`.
    """
    depth = {name: i for i, names in enumerate(layers) for name in names}

    def scale(path: tuple, _: Any) -> float:
        part, *rest = (key.key for key in path)
        if part != "network" or rest[0] != "backbone":
            return 1.0
        return float(decay ** (len(layers) - depth.get(rest[1], len(layers))))

    return jax.tree_util.tree_map_with_path(scale, params)


def _by_depth(decay: float, layers: Sequence[Sequence[str]]) -> optax.GradientTransformation:
    """Scales whole updates: decoupled weight decay too, which has the learning rate as a factor."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, scales(updates, decay, layers))
    )
