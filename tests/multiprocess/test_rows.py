"""However a mesh lies over two processes, they train on the batches of one."""

import itertools

import jax
import numpy as np
import pytest

from common.data import train_batches
from experiments.sinks import pretrain as sinks_pretrain
from tests.multiprocess import small
from tests.multiprocess.processes import finish, reported, start

pytestmark = pytest.mark.multiproc

BATCHES = """
import numpy as np
from jax.sharding import Mesh
from common.mesh import MeshSpec, make_mesh
from tests.multiprocess.small import shards
found = {}
for sizes in ((1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2)):
    mesh = make_mesh(MeshSpec(*sizes))
    found[str(sizes)] = shards(mesh)
apart = Mesh(np.array(jax.devices())[[0, 2, 1, 3]].reshape(1, 4, 1), mesh.axis_names, axis_types=mesh.axis_types)
found["rows apart"] = shards(apart)
report(**found)
"""

TRAIN = """
from pathlib import Path
from tests.multiprocess import small
folder = Path(sys.argv[3]).parent
losses, params = small.train_ijepa((1, 1, 4), folder / "ijepa")
small.pretrain_sinks(folder / "sinks")
report(losses=losses, params=params)
"""


def ran(program, folder, timeout=60):
    """What both processes report."""
    processes = start(program, folder)
    for process, (_, err) in zip(processes, finish(processes, timeout)):
        assert process.returncode == 0, err
    return [reported(folder, i) for i in range(2)]


def test_every_mesh_gives_the_batches_of_one_process(tmp_path):
    with_rows = small.with_rows
    host = train_batches(small.source(), small.SPEC, batch_transform=with_rows)
    whole = list(itertools.islice(host, 3))
    found = ran(BATCHES, tmp_path)
    assert len(found[0]) == 7
    for mesh in found[0]:
        shards = [shard for process in found for shard in process[mesh]]
        assert len(shards) == 3 * 2 * 4  # steps, arrays, devices
        for step, name, first, values in shards:
            wanted = whole[step][name][first : first + len(values)]
            assert values == wanted.tolist(), (mesh, step, name)
        covered = {first + i for *_, first, values in shards for i in range(len(values))}
        assert covered == set(range(8)), mesh


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path, monkeypatch):
    """I-JEPA with the tensor axis across the processes; the job that trains language models with sinks."""
    found = ran(TRAIN, tmp_path, timeout=400)
    four = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda *a: four)
    losses, params = small.train_ijepa((1, 1, 4), tmp_path / "ijepa_of_one")
    for process in found:
        np.testing.assert_allclose(process["losses"], losses, rtol=2e-5)
        np.testing.assert_allclose(process["params"], params, rtol=2e-5)

    monkeypatch.setattr(sinks_pretrain, "measure", None)  # restored after the test
    small.pretrain_sinks(tmp_path / "sinks_of_one")
    one, two = small.metrics(tmp_path / "sinks_of_one"), small.metrics(tmp_path / "sinks")
    assert one.keys() == two.keys() == {"vanilla/0+16", "vanilla/1+15"}
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=2e-5)
    # Process 0 alone wrote.
    assert len((tmp_path / "sinks" / "results.jsonl").read_text().splitlines()) == 1
