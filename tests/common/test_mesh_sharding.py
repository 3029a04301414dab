"""Meshes and sharding rules on eight fake devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from common.mesh import MeshSpec, make_mesh
from common.sharding import logical_axes, partition_spec, shardings

S = jax.ShapeDtypeStruct


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
