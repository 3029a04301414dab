"""The device mesh: (replica, fsdp, tensor) on one TPU slice or several, on one node with GPUs or several."""

import math
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("replica", "fsdp", "tensor")
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes.

    Attributes:
      replica: copies of the parameters (plain data parallelism; between TPU slices, or GPU nodes, the slow network).
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

    The network is slowest between TPU slices, and there only the replica axis runs. Between nodes with GPUs runs first
    the replica axis, then fsdp, then tensor.

    Raises:
      ValueError: the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = spec.sizes(len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform != "tpu":
        grid = _in_order(devices, sizes)
    elif sizes[0] % slices:
        raise ValueError(
            f"mesh {spec.describe()}: replica must be a multiple of the {slices} slices of the TPU"
        )
    else:
        try:
            grid = _on_tpu(devices, sizes, slices)
        except (ValueError, NotImplementedError, AssertionError) as error:
            chips = f"{len(devices)} chips of kind {devices[0].device_kind!r}"
            raise ValueError(
                f"mesh {spec.describe()} does not fit these {chips}: {' '.join(str(error).split())}. Choose other "
                "sizes of the axes (config.mesh)"
            ) from error
    return Mesh(grid, AXES, axis_types=(MODES[spec.mode],) * len(AXES))


def _in_order(devices: list, sizes: tuple[int, int, int]) -> np.ndarray:
    """Devices node by node (jax numbers nodes with GPUs by `slice_index`), the last axis within a node if it fits."""
    if devices[0].platform != "cpu":
        devices = sorted(
            devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id)
        )
    return np.array(devices).reshape(sizes)


def _on_tpu(devices: list, sizes: tuple[int, int, int], slices: int) -> np.ndarray:
    """Devices such that neighbours along an axis are neighbours in the torus; an axis of ours may take a part of one of
    the torus, without which most meshes would have no place."""
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def auto_mesh(mesh: Mesh) -> Mesh:
    """`mesh` with Auto axes: for all that runs outside the train step."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def one_program_at_a_time(mesh: Mesh) -> bool:
    """Whether a program has to end before the next is dispatched: several virtual CPU devices share a thread pool, in
    which the collectives of two programs can wait for each other forever."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
