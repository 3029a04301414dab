"""What the metaopt configs share: every setting of job "metaopt_grid"."""

from ml_collections import ConfigDict

DECADES = tuple(10.0**k for k in range(-8, 3))  # 1e-8 to 1e2, figure 4


def base() -> ConfigDict:
    """The full tree of settings; configs change what differs."""
    return ConfigDict(
        {
            "job": "metaopt_grid",
            "name": "",
            "task": {
                "kind": "mlp",
                "data": "mnist",
                "data_dir": "",  # "" = TFDS_DATA_DIR
                "hidden": 128,
                "examples": 0,  # of the training set; 0 = all
            },
            "grid": {
                "epochs": 30,
                "batch": 256,
                "rates": DECADES,
                "seeds": (0,),
                "save_every": 5,
            },
            "methods": (),
        }
    )


def smoke(config: ConfigDict) -> ConfigDict:
    """Shrinks a config to seconds on the embedded digits, with the same code paths."""
    config.task.update(data="digits", hidden=8, examples=256)
    config.grid.update(epochs=2, batch=64, rates=(1e-3, 1.0), seeds=(0,), save_every=1)
    config.methods = config.methods[:2]
    return config
