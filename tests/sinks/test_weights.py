"""Folders that are incomplete, cut off or something else are named, and pickled weights are never opened."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from sinks import weights
from tests.sinks.checkpoints import LLAMA, save, tensors


def test_values_are_read_when_they_are_asked_for(tmp_path):
    there = tensors(LLAMA)
    config, got = weights.read_folder(save(tmp_path, LLAMA, there, files=2))
    assert config == LLAMA and got.keys() == there.keys()
    for name, tensor in there.items():
        assert got[name].shape == tensor.shape and (got[name].read() == tensor).all()


def test_a_cut_off_file_is_named(tmp_path):
    save(tmp_path, LLAMA, tensors(LLAMA), files=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:5], b"", b"PK\3\4" + bytes(100)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"00002-of-00002.* is no whole safetensors file"):
            weights.read_folder(tmp_path)


def test_missing_files_are_named(tmp_path):
    save(tmp_path, LLAMA, tensors(LLAMA), files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00003\.safetensors, which its"):
        weights.read_folder(tmp_path)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        weights.read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        weights.read_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match=r"has no \.safetensors file$"):
        weights.read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="only pickled weights, which are never loaded"):
        weights.read_folder(tmp_path)


@pytest.mark.parametrize("name", [
    "../other.safetensors", "a/../../other.safetensors", "/other.safetensors", "./model-00001-of-00002.safetensors",
    "..\\other.safetensors", "C:other.safetensors", "config.json", "", None, 3, ["model-00001-of-00002.safetensors"],
])  # fmt: skip
def test_an_index_names_files_beside_it_and_no_others(tmp_path, name):
    folder = save(tmp_path / "folder", LLAMA, tensors(LLAMA), files=2)
    (tmp_path / "other.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )
    index = json.loads((folder / weights.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json says that model\.norm\.weight is in"):
        weights.read_folder(folder)


def test_a_file_may_be_a_link_as_in_the_hubs_cache(tmp_path):
    folder = save(tmp_path / "snapshots" / "abc", LLAMA, tensors(LLAMA), files=2)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{i}")
    _, got = weights.read_folder(folder)
    assert got.keys() == tensors(LLAMA).keys()


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", "{", "[" * 100_000, "\0", '{"weight_map": []}', "{}"]
)
def test_an_index_that_is_something_else_is_named(tmp_path, content):
    folder = save(tmp_path, LLAMA, tensors(LLAMA), files=2)
    (folder / weights.INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        weights.read_folder(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    there = tensors(LLAMA)
    folder = save(tmp_path, LLAMA, there, files=2)
    for i in (1, 2):
        save_file(there, folder / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"00002-of-00002\.safetensors holds .*, and so does .*00001"
    ):
        weights.read_folder(folder)


def test_other_safetensors_beside_the_model_are_passed_over(tmp_path):
    """An adapter, or the same weights as their authors' own code names them."""
    folder = save(tmp_path, LLAMA, tensors(LLAMA))
    save_file({"tok_embeddings.weight": np.zeros((2, 2))}, folder / "consolidated.safetensors")
    assert weights.read_folder(folder)[1].keys() == tensors(LLAMA).keys()


@pytest.mark.parametrize("name", ["EleutherAI/pythia-160m", "a/b@main", "m-1/x.y_z@v1.0"])
def test_names_on_the_hub(name):
    assert weights.is_hub_id(name)


@pytest.mark.parametrize("name", ["smollm2", "/a/b", "a/b/c", "./a", "../a", "a b/c", ""])
def test_names_that_are_not(name):
    assert not weights.is_hub_id(name)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    import huggingface_hub

    def offline(repository, revision, allow_patterns):
        assert (repository, revision) == ("owner/model", "v2")
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        OSError, match=r"owner/model@v2 .*no connection\). Check the name.*hf auth login"
    ):
        weights.fetch_from_hub("owner/model@v2")
