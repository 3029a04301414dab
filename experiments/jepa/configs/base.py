"""Every setting of the I-JEPA job, for the configs to change; the released values (docs/papers/ijepa.md 1.6 to 1.8)."""

from types import SimpleNamespace

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """The full tree of settings of job "jepa_pretrain"; configs change what differs."""
    return ConfigDict(
        {
            "job": "jepa_pretrain",
            "name": "",
            "data": {
                "name": "scenes",
                "split": "train",
                "test_split": "test",
                "probe_split": "",  # what probes and kNN learn from; "" = split
                "held_out": 0.1,  # share set aside as the test set, of a folder that has none
                "data_dir": "",  # "" = TFDS_DATA_DIR
                "examples": 0,  # training images, where the set is not at hand (preflight)
                "crop_scale": (0.3, 1.0),
                "crop_ratio": (3 / 4, 4 / 3),
                "flip": False,
                "eval_resize": 0,  # short side before the centre crop; 0 = the model's image size
                "workers": 0,
                "skip_bad": False,  # go on without images that cannot be read; they are counted
            },
            "model": {
                "size": "tiny",
                "image": 64,
                "patch": 8,
                "width": 0,  # 0 in this group = what the size says
                "depth": 0,
                "heads": 0,
                "hidden": 0,
                "predictor_width": 0,
                "predictor_depth": 0,
                "predictor_heads": 0,
                "depth_rescale": False,
                "position_scale": 1.0,
            },
            "masks": {
                "mode": "fixed",
                "context_scale": (0.85, 1.0),
                "target_scale": (0.15, 0.2),
                "target_aspect": (0.75, 1.5),
                "num_targets": 4,
                "min_keep": 10,
                "context_tokens": 0,
                "collate": 128,
            },
            "objective": {
                "distance": "smooth_l1",
                "center": False,
                "position_noise": 0.0,
                "vicreg": 0.0,
                "variance": 25.0,
                "covariance": 1.0,
                "invariance": 25.0,
            },
            "optim": {
                "lr": 1e-3,
                "start_lr": 2e-4,
                "final_lr": 1e-6,
                "warmup_epochs": 0.0,
                "weight_decay": 0.04,
                "final_weight_decay": 0.4,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "clip": 0.0,
                "schedule_scale": 1.0,
                "auto": False,  # learn rate and weight decay on the way (metaopt), from lr and weight_decay
            },
            "ema": {"start": 0.996, "final": 1.0},
            "train": {
                "epochs": 0.0,  # either epochs or steps
                "steps": 0,
                "batch": 128,
                "seed": 0,
                "log_every": 10,
                "eval_every": 0,
                "save_every": 500,
                "accumulate": 1,
                "profile_start": 10,
                "profile_steps": 0,
            },
            "mesh": {"replica": 1, "fsdp": -1, "tensor": 1, "mode": "auto"},
            "policy": {"compute": "bfloat16", "remat": False, "unroll": 0},
            "checkpoint": {"keep": 2},
            "probe": {
                "knn_train": 5000,  # images in the bank of the kNN monitor, a random part; 0 = all
                "knn_test": 1000,
                "neighbors": 20,  # that vote
                "linear": True,  # linear probe at the end
                "train_examples": 0,  # of the linear probe, a random part; 0 = all
                "test_examples": 0,
                "test_on_train": False,  # allow a test set that shares images with what is learned from
                "epochs": 20,
                "batch": 1024,
            },
            "writers": {
                "tensorboard": False,
                "wandb": False,
                "wandb_project": "",  # "" = WANDB_PROJECT, else "triptych"
            },
        }
    )


def smoke(config: ConfigDict, args: SimpleNamespace, *, image: int, patch: int) -> ConfigDict:
    """Shrinks a config to a few steps that take seconds on a laptop, with the same code paths.

    What the argument itself says of epochs and batch stays.
    """
    config.model.update(image=image, patch=patch, width=32, depth=2, heads=2, hidden=64)
    config.model.update(predictor_width=16, predictor_depth=1, predictor_heads=2)
    if "epochs" not in args.given:
        config.train.update(epochs=0.0, steps=3)
    if "batch" not in args.given:
        config.train.batch = 8
    config.train.accumulate = 1
    config.train.update(log_every=1, eval_every=2, save_every=2)
    config.optim.warmup_epochs = 0.0
    config.masks.update(collate=8, context_tokens=0)
    config.mesh.update(replica=1, fsdp=-1, tensor=1)
    config.probe.update(
        knn_train=32, knn_test=16, train_examples=64, test_examples=32, epochs=2, batch=16
    )
    return config
