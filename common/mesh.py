"""The device mesh: (replica, fsdp, tensor) on one slice or several."""

import math
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("replica", "fsdp", "tensor")
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes.

    Attributes:
      replica: copies of the parameters (plain data parallelism; between slices the slow network).
      fsdp: ways that parameters, moments and batch are split; -1 takes what the other axes leave.
      tensor: ways that heads and hidden layers are split.
      mode: "auto", or "explicit": then shardings are part of the types of parameters, gradients, optimizer state and
        batch while the train step is traced, and what does not fit together is an error, not a silent copy. Inside
        the loss the compiler places what we do not constrain, in both.
    """

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1
    mode: str = "auto"

    def __post_init__(self):
        sizes = (self.replica, self.fsdp, self.tensor)
        if sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError(
                f"mesh sizes {self.describe()} must be positive, at most one of them -1"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is unknown: {' or '.join(map(repr, MODES))}")

    def describe(self) -> str:
        return " x ".join(f"{a}={getattr(self, a)}" for a in AXES)

    def sizes(self, n_devices: int) -> tuple[int, int, int]:
        """The axis sizes on `n_devices`, with -1 resolved. Raises ValueError when they do not multiply up."""
        sizes = [self.replica, self.fsdp, self.tensor]
        if -1 in sizes:
            rest = math.prod(s for s in sizes if s != -1)
            if n_devices % rest:
                raise ValueError(
                    f"mesh {self.describe()}: {n_devices} devices do not divide by {rest}; choose mesh sizes whose "
                    f"product divides {n_devices}"
                )
            sizes[sizes.index(-1)] = n_devices // rest
        if math.prod(sizes) != n_devices:
            raise ValueError(
                f"mesh {self.describe()} needs {math.prod(sizes)} devices, but there are {n_devices}; set one axis "
                "to -1 to take what is left"
            )
        return sizes[0], sizes[1], sizes[2]


def make_mesh(spec: MeshSpec, devices=None) -> Mesh:
    """A mesh over `devices` (default: all), its axes in the spec's mode.

    On a multi-slice pod the replica axis runs between slices, where the network is slowest.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = spec.sizes(len(devices))
    types = (MODES[spec.mode],) * len(AXES)
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if len(slices) > 1:
        from jax.experimental import mesh_utils

        if sizes[0] % len(slices):
            raise ValueError(
                f"mesh {spec.describe()}: replica must be a multiple of the {len(slices)} slices"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // len(slices), *sizes[1:]), (len(slices), 1, 1), devices
        )
        return Mesh(grid, AXES, axis_types=types)
    if len(devices) == 1:
        return Mesh(np.array(devices).reshape(1, 1, 1), AXES, axis_types=types)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


def auto_mesh(mesh: Mesh) -> Mesh:
    """`mesh` with Auto axes: for all that runs outside the train step."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
