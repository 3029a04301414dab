"""Programs for 8 H100s, compiled without one where JAX's CUDA plugin is installed."""

import json
import os
import subprocess
import sys

import pytest

from common.config import ConfigError
from experiments.shared.topologies import compiler

try:
    INSTALLED = compiler("h100")
except ConfigError:
    INSTALLED = ""
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not INSTALLED, reason="needs JAX's CUDA plugin (extra `preflight`)"),
]


def python(code, *arguments):
    """What a process of its own prints, as JSON: the plugin changes how jax starts."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


ATTENTION = """
import json
from experiments import preflight  # which sets up jax
import jax, jax.numpy as jnp, numpy as np
from experiments.shared.topologies import COMPILER_OPTIONS, topology_chips
chip, devices = topology_chips("h100:8")
mesh = jax.sharding.Mesh(np.array(devices), ("data",))

def calls(implementation):
    def loss(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation).astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((64, 256, 8, 80), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("data")))
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return preflight.count_calls(step.lower(x, x, x).compile(COMPILER_OPTIONS[chip]).as_text())

print(json.dumps([calls("cudnn"), calls("xla")]))
"""


def test_cudnn_attention_is_compiled_forward_and_backward_and_stays_on_its_chip():
    fused, plain = python(ATTENTION)
    assert fused == {"__cudnn$fmhaSoftmax": [1, 0.0], "__cudnn$fmhaSoftmaxBackward": [1, 0.0]}
    assert plain and not any("cudnn" in name for name in plain)


NODES = """
import json
from experiments import preflight  # which sets up jax
from common.mesh import MeshSpec, make_mesh
from experiments.shared.topologies import topology_chips
found = []
for topology in ("h100:8", "h100:4x8"):
    kind, devices = topology_chips(topology)
    mesh = make_mesh(MeshSpec(-1, 8), devices)
    found.append([kind, mesh.shape["replica"], [len({d.process_index for d in row.flat}) for row in mesh.devices]])
print(json.dumps(found))
"""


def test_nodes_hold_the_fsdp_axis():
    assert python(NODES) == [["h100", 1, [1]], ["h100", 4, [1, 1, 1, 1]]]


RECIPES = """
import json
from experiments import preflight
values = preflight._load("experiments/jepa/configs/in1k_vith14.py:smoke")  # patches of 8 x 8
found = []
for image, compute in ((192, "bfloat16"), (112, "bfloat16"), (192, "float32")):
    values["model"].update(image=image)
    values["policy"].update(compute=compute)
    values["masks"].update(context_tokens=image * image // 96)
    found.append(preflight.check(values, "h100:8").custom_calls)
print(json.dumps(found))
"""


def test_a_recipe_has_cudnn_attention_from_256_tokens_in_bfloat16():
    long, short, exact = ({k for k in calls if "cudnn" in k} for calls in python(RECIPES))
    assert long == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}  # 576 tokens
    assert not short and not exact  # 196 tokens; cuDNN takes no float32
