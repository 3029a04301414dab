"""The settings of job "jepa_pretrain", from a config's dict to the library's dataclasses."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.augment import CenterCrop, RandomResizedCrop
from common.config import ConfigError, build
from common.mesh import MeshSpec
from common.nn.policy import Policy
from common.optim import OptimSpec
from common.sharding import BATCH_AXES
from common.train_loop import TrainSpec
from experiments.shared.learned_optim import optimizer_of
from jepa.config import ViTConfig, vit
from jepa.device_batch import DeviceBatch
from jepa.masks import MaskSpec
from jepa.objective import ObjectiveSpec
from jepa.probe import ProbeSpec
from jepa.recipe import EmaSpec, IJepa


@dataclass(frozen=True)
class DataSettings:
    name: str
    split: str
    test_split: str
    probe_split: str
    held_out: float
    data_dir: str
    examples: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool
    eval_resize: int
    workers: int
    skip_bad: bool
    on_device: bool = False

    def __post_init__(self):
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: give a share, at least 0 and below 1")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"config.data.crop_scale={self.crop_scale}: give the least and the largest share of the image's "
                "area, both above 0 and at most 1, the smaller first"
            )
        low, high = self.crop_ratio
        if not 0 < low <= high < math.inf:
            raise ConfigError(
                f"config.data.crop_ratio={self.crop_ratio}: give the least and the largest width / height, both "
                "above 0, the smaller first"
            )

    def check_resize(self, image: int) -> None:
        """Raises ConfigError unless the resized image holds the centre crop of `image` pixels."""
        if self.eval_resize and self.eval_resize < image:
            raise ConfigError(
                f"config.data.eval_resize={self.eval_resize}: give config.model.image={image} pixels or more, or 0 "
                "for just that"
            )


@dataclass(frozen=True)
class ModelSettings:
    size: str
    image: int
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    predictor_width: int
    predictor_depth: int
    predictor_heads: int
    depth_rescale: bool
    position_scale: float

    def config(self) -> ViTConfig:
        """The named size with every non-zero field replaced."""
        values = dataclasses.asdict(self)
        fixed = {k: values.pop(k) for k in ("size", "image", "patch")}
        return vit(**fixed, **{k: v for k, v in values.items() if v})


@dataclass(frozen=True)
class ProbeSettings:
    knn_train: int
    knn_test: int
    neighbors: int
    linear: bool
    train_examples: int
    test_examples: int
    test_on_train: bool
    epochs: int
    batch: int

    def __post_init__(self):
        if self.neighbors < 1:
            raise ValueError(f"neighbors={self.neighbors}: at least 1 image votes")
        # of rows that a probe learns from or is tested on; the collapse monitors compare two images
        least = {
            "knn_train": self.neighbors,
            "knn_test": 2,
            "train_examples": 2,
            "test_examples": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value and value < low:
                reason = f", as neighbors={low} vote" if name == "knn_train" else ""
                raise ValueError(
                    f"{name}={value}: give at least {low}{reason}, or 0 for all images"
                )
        self.spec(seed=0)

    def spec(self, seed: int) -> ProbeSpec:
        """How the linear probe is trained."""
        return ProbeSpec(epochs=self.epochs, batch=self.batch, seed=seed)


@dataclass(frozen=True)
class CheckpointSettings:
    keep: int


@dataclass(frozen=True)
class WriterSettings:
    tensorboard: bool
    wandb: bool
    wandb_project: str = ""


@dataclass(frozen=True)
class Settings:
    """A whole pretraining job, resolved. `values` is the config it came from."""

    name: str
    data: DataSettings
    recipe: IJepa
    train: TrainSpec
    mesh: MeshSpec
    probe: ProbeSettings
    checkpoint: CheckpointSettings
    writers: WriterSettings
    values: dict[str, Any]

    @property
    def augmentation(self) -> RandomResizedCrop:
        """The training transform: random resized crop, and a flip where asked for."""
        return RandomResizedCrop(
            size=self.recipe.model.image[0],
            scale=self.data.crop_scale,
            ratio=self.data.crop_ratio,
            flip=self.data.flip,
        )

    @property
    def device_batch(self) -> DeviceBatch | None:
        """What makes batches inside the train step, where the images lie on the device."""
        if not self.data.on_device:
            return None
        return DeviceBatch(self.augmentation, self.recipe.masks, self.train.seed)

    @property
    def evaluation_crop(self) -> CenterCrop:
        """The test transform: resize and centre crop."""
        size = self.recipe.model.image[0]
        return CenterCrop(size=size, resize=self.data.eval_resize or size)


def resolve(values: Mapping[str, Any], examples: int = 0) -> Settings:
    """Checks a config's dict and turns epochs into steps.

    Args:
      examples: length of the training set; 0 takes config.data.examples.

    Raises:
      ConfigError: naming the setting, its value and the remedy.
    """
    groups = ("job", "name", "data", "model", "masks", "objective", "optim", "ema", "train", "mesh", "policy",
              "checkpoint", "probe", "writers")  # fmt: skip
    missing = [g for g in groups if g not in values]
    if missing:
        raise ConfigError(f"config.{missing[0]} is missing")
    data = build(DataSettings, values["data"], "config.data.")
    examples = examples or data.examples
    train, per_epoch = _training(values["train"], examples)
    optim_values = dict(values["optim"])
    optim_values["warmup"] = int(optim_values.pop("warmup_epochs") * per_epoch)
    optim = build(OptimSpec, optim_values, "config.optim.")
    try:
        model = build(ModelSettings, values["model"], "config.model.").config()
        data.check_resize(model.image[0])
        mask_values = {**values["masks"], "grid": model.grid}
        masks = build(MaskSpec, mask_values, "config.masks.")
        if masks.mode == "paper" and train.batch % masks.collate:
            raise ConfigError(
                f"config.masks.collate={masks.collate} does not divide config.train.batch={train.batch}"
            )
        optim.lr_schedule(train.steps)  # refuses a warm-up that does not fit
        recipe = IJepa(
            model=model,
            masks=masks,
            steps=train.steps,
            optim=optim,
            ema=build(EmaSpec, values["ema"], "config.ema."),
            optimizing=optimizer_of(optim),
            objective=build(ObjectiveSpec, values["objective"], "config.objective."),
            policy=dataclasses.replace(
                build(Policy, values["policy"], "config.policy."), batch_axes=BATCH_AXES
            ),
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Settings(
        name=values["name"],
        data=data,
        recipe=recipe,
        train=train,
        mesh=build(MeshSpec, values["mesh"], "config.mesh."),
        probe=build(ProbeSettings, values["probe"], "config.probe."),
        checkpoint=build(CheckpointSettings, values["checkpoint"], "config.checkpoint."),
        writers=build(WriterSettings, values["writers"], "config.writers."),
        values=dict(values),
    )


def _training(values: Mapping[str, Any], examples: int) -> tuple[TrainSpec, int]:
    """(config.train with its epochs as steps, the steps of an epoch)."""
    values, batch = dict(values), values["batch"]
    per_epoch = examples // batch if batch > 0 else 0
    values["steps"] = _steps(values.pop("epochs"), values["steps"], per_epoch, batch, examples)
    return build(TrainSpec, values, "config.train."), per_epoch


def _steps(epochs: float, steps: int, per_epoch: int, batch: int, examples: int) -> int:
    if bool(epochs) == bool(steps):
        raise ConfigError(
            f"config.train.epochs={epochs} and config.train.steps={steps}: set exactly one of them"
        )
    if examples and not per_epoch:
        raise ConfigError(
            f"config.train.batch={batch} is larger than the {examples} training images: lower it"
        )
    return steps or int(epochs * per_epoch)
