"""Meshes, sharding rules, and which rows of a batch a process holds, on eight fake devices and on made-up pods."""

import itertools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

from common.mesh import MeshSpec, make_mesh, one_program_at_a_time
from common.sharding import (
    batch_sharding,
    logical_axes,
    partition_spec,
    rows_held,
    shardings,
    to_host,
)

S = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    process_index: int
    platform: str
    device_kind: str
    slice_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    client: None = field(default=None, repr=False)


def tpus(kind, *grid, slices=1):
    """A TPU of so many slices, each a grid of chips."""
    places = [(s, *reversed(c)) for s in range(slices) for c in np.ndindex(*reversed(grid))]
    return [Device(i, i // 4, "tpu", kind, s, coords=tuple(c)) for i, (s, *c) in enumerate(places)]


def gpus(nodes, each, order=1):
    """As jax numbers them: a node is a "slice"."""
    found = [Device(n * each + i, n, "gpu", "H100", n) for n in range(nodes) for i in range(each)]
    return found[::order]


def ids(mesh):
    return np.vectorize(lambda d: d.id)(mesh.devices)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (MeshSpec(), (1, 8, 1)),
        (MeshSpec(2, -1, 2), (2, 2, 2)),
        (MeshSpec(-1, 1, 4), (2, 1, 4)),
        (MeshSpec(8, 1, 1), (8, 1, 1)),
    ],
)
def test_mesh_sizes(spec, sizes):
    assert tuple(make_mesh(spec).shape.values()) == sizes


def test_programs_overlap_but_on_several_cpu_devices():
    meshes = [make_mesh(MeshSpec(), d) for d in (jax.devices(), jax.devices()[:1], gpus(1, 8))]
    assert [one_program_at_a_time(mesh) for mesh in meshes] == [True, False, False]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_mesh(MeshSpec(fsdp=3)), "needs 3 devices, but there are 8"),
        (lambda: make_mesh(MeshSpec(replica=3)), "8 devices do not divide by 3"),
        (lambda: MeshSpec(replica=-1, fsdp=-1), "at most one of them -1"),
        (lambda: MeshSpec(tensor=0), "must be positive"),
        (lambda: MeshSpec(mode="manual"), "mode='manual' is unknown: 'auto' or 'explicit'"),
    ],
)
def test_mesh_errors_name_the_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Each kind of chip as jax names it, with the grid of a pod whose axes the released meshes (replica=4) have to split.
PODS = {
    "TPU v4": (4, 4, 8),
    "TPU v5 lite": (16, 16, 1),
    "TPU v5": (4, 4, 4),
    "TPU v6 lite": (8, 8, 1),
}


@pytest.mark.parametrize("kind", PODS)
def test_every_mesh_of_the_right_size_fits_a_tpu_pod(kind):
    devices = tpus(kind, *PODS[kind])
    powers = [2**i for i in range(9)]
    sizes = [s for s in itertools.product(powers, powers, (1, 2, 8)) if np.prod(s) == len(devices)]
    assert len(sizes) > 10
    for size in sizes:
        mesh = make_mesh(MeshSpec(*size), devices)
        assert mesh.devices.shape == size
        assert sorted(ids(mesh).flat) == list(range(len(devices)))


def test_replicas_run_between_the_slices_of_a_tpu():
    devices = tpus("TPU v6 lite", 8, 8, 1, slices=2)
    mesh = make_mesh(MeshSpec(replica=8), devices)
    assert mesh.devices.shape == (8, 16, 1)
    assert {d.slice_index for d in mesh.devices[:4].flat} == {0}
    assert {d.slice_index for d in mesh.devices[4:].flat} == {1}
    with pytest.raises(ValueError, match="replica must be a multiple of the 2 slices of the TPU"):
        make_mesh(MeshSpec(), devices)


@pytest.mark.parametrize("error", [NotImplementedError, AssertionError, ValueError])
def test_a_mesh_that_a_tpu_cannot_take_is_a_plain_error(error, monkeypatch):
    def refuse(*args, **kwargs):
        raise error("no place for\n  axis 1")

    monkeypatch.setattr(mesh_utils, "create_device_mesh", refuse)
    message = r"replica=2 x fsdp=-1 x tensor=1 does not fit these 64 chips .*'TPU v5': no place for axis 1\. Choose"
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshSpec(2), tpus("TPU v5", 4, 4, 4))


@pytest.mark.parametrize(
    "spec",
    [
        MeshSpec(),
        MeshSpec(tensor=8),
        MeshSpec(replica=4),
        MeshSpec(4, 1, 8),
        MeshSpec(2, -1, 2),
        MeshSpec(1, 2, 16),
        MeshSpec(32, 1, 1),
    ],
)
def test_every_mesh_of_the_right_size_fits_several_nodes_with_gpus(spec):
    mesh = make_mesh(spec, gpus(4, 8, order=-1))
    assert tuple(mesh.shape.values()) == spec.sizes(32)
    # Node by node, so that the last axes stay within a node and the first one runs between nodes.
    np.testing.assert_array_equal(ids(mesh).ravel(), np.arange(32))


def test_sizes_that_do_not_fit_gpu_nodes_say_nothing_of_slices():
    with pytest.raises(ValueError, match="needs 16 devices, but there are 32") as error:
        make_mesh(MeshSpec(2, 1, 8), gpus(4, 8))
    assert "slice" not in str(error.value)


# --- rows of the batch ----------------------------------------------------------------------------


class Held:
    """A batch's sharding over a mesh, as one of its processes sees it."""

    def __init__(self, sizes, processes, process, order=None):
        devices = np.arange(np.prod(sizes)) if order is None else np.array(order)
        owner = (np.arange(devices.size) * processes // devices.size)[devices]
        self.owner, self.process = owner.reshape(sizes), process

    def addressable_devices_indices_map(self, shape):
        ways = self.owner.shape[0] * self.owner.shape[1]
        size, rest = divmod(shape[0], ways)
        if rest:
            raise ValueError("does not divide")
        parts = np.arange(ways).reshape(self.owner.shape[:2])
        mine = [
            place for place in np.ndindex(self.owner.shape) if self.owner[place] == self.process
        ]
        return {
            place: (slice(parts[place[:2]] * size, (parts[place[:2]] + 1) * size),)
            for place in mine
        }


@pytest.mark.parametrize(
    ("sizes", "processes", "rows"),
    [
        ((1, 4, 1), 2, [((0, 4),), ((4, 8),)]),
        ((2, 2, 1), 2, [((0, 4),), ((4, 8),)]),
        ((1, 1, 4), 2, [((0, 8),), ((0, 8),)]),  # tensor spans the processes: both hold everything
        ((1, 2, 2), 2, [((0, 4),), ((4, 8),)]),
        ((2, 1, 4), 4, [((0, 4),), ((0, 4),), ((4, 8),), ((4, 8),)]),
        ((1, 2, 4), 8, [((0, 4),)] * 4 + [((4, 8),)] * 4),
        ((1, 4, 1), 1, [((0, 8),)]),
    ],
)
def test_a_process_holds_the_rows_of_its_devices(sizes, processes, rows):
    held = [rows_held(Held(sizes, processes, p), 8) for p in range(processes)]
    assert held == rows


def test_rows_of_a_process_may_lie_apart():
    order = [0, 2, 1, 3]  # as a torus may order its chips
    held = [rows_held(Held((1, 4, 1), 2, p, order), 8) for p in range(2)]
    assert held == [((0, 2), (4, 6)), ((2, 4), (6, 8))]


def test_without_a_device_in_the_mesh_there_are_no_rows():
    with pytest.raises(ValueError, match="process 0 has no device in the mesh"):
        rows_held(Held((1, 2, 1), 1, process=5), 8)


@pytest.mark.parametrize("spec", [MeshSpec(), MeshSpec(2, 2, 2), MeshSpec(tensor=8, fsdp=1)])
def test_one_process_holds_all_rows(spec):
    assert rows_held(batch_sharding(make_mesh(spec)), 16) == ((0, 16),)


def test_split_arrays_come_back_whole():
    mesh = make_mesh(MeshSpec(2, 2, 2))
    w = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    tree = {
        "w": jax.device_put(w, jax.NamedSharding(mesh, P("fsdp", "tensor"))),
        "n": jax.device_put(3, jax.NamedSharding(mesh, P())),
    }
    whole = to_host(tree)
    np.testing.assert_array_equal(whole["w"], w)
    assert isinstance(whole["w"], np.ndarray) and whole["n"] == 3


def test_the_longest_ending_wins_and_stacks_get_a_layer_axis():
    table = {"kernel": ("embed", None), "out/kernel": ("heads", "embed")}
    tree = {"a": {"kernel": S((4, 4), jnp.float32)}, "out": {"kernel": S((2, 4, 4), jnp.float32)}}
    assert logical_axes(tree, table) == {
        "a": {"kernel": ("embed", None)},
        "out": {"kernel": ("layers", "heads", "embed")},
    }


def test_uncovered_parameters_are_all_named():
    tree = {"a": S((1,), jnp.float32), "b": {"c": S((1,), jnp.float32)}}
    with pytest.raises(ValueError, match=r"a: no entry.*b/c: no entry"):
        logical_axes(tree, {"kernel": ("embed",)})
    with pytest.raises(ValueError, match=r"a: shape \(1,\) does not fit"):
        logical_axes({"a": S((1,), jnp.float32)}, {"a": ("embed", "mlp")})


def test_rules_map_names_and_refuse_collisions():
    assert partition_spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    with pytest.raises(ValueError, match="would split two of them"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="have no rule"):
        partition_spec(("colour",))


def test_indivisible_parameters_are_named_with_the_remedy():
    mesh = make_mesh(MeshSpec(fsdp=4, tensor=2))
    tree = {"w": S((6, 8), jnp.float32), "v": S((8, 3), jnp.float32), "ok": S((8, 8), jnp.float32)}
    axes = {k: ("embed", "mlp") for k in tree}
    with pytest.raises(
        ValueError, match=r"(?s)v \(8, 3\): 3.*tensor=2.*w \(6, 8\): 6.*fsdp=4.*replica"
    ):
        shardings(tree, axes, mesh)
    assert shardings({"ok": tree["ok"]}, {"ok": axes["ok"]}, mesh)["ok"].spec == P("fsdp", "tensor")
