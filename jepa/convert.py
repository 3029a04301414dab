"""Public I-JEPA weights into our parameter trees (docs/papers/ijepa.md 1.8, 4).

Input is a mapping from torch-style names to arrays, such as `safetensors.numpy.load_file` returns.
Three sets of names are known, and the caller need not tell them apart:

- the official `encoder`, `target_encoder` and `predictor` dicts, with or without "module.";
- Hugging Face's `IJepaModel` as files on its hub name it (`encoder.layer.0.intermediate...`);
- `IJepaModel.state_dict()` since transformers 5 (`layers.0.mlp.fc1...`).

Two choices that no file records decide which features come out. The paper evaluates the official
`target_encoder`, on images normalised with ImageNet's mean and deviation (`augment.normalize`). The
Hugging Face conversions took the context `encoder` instead, and ship a processor with mean and
deviation 0.5: as they come, their features are not the paper's.
"""

import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from common.nn.embed import sincos_2d
from common.nn.module import Params
from common.sharding import path_name
from jepa.config import ViTConfig
from jepa.encoder import Encoder
from jepa.predictor import Predictor

# Applied in order, these turn a torch name into ours: "blocks.3.attn.qkv.weight" into
# "blocks.3.attention.qkv.kernel". "qkv:0" is the query's third of the joint projection.
RENAMES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^(module\.|ijepa\.)+", ""),  # DistributedDataParallel; a model under a head
        # official
        (r"^predictor_", ""),
        (r"^patch_embed\.", "patch."),
        (r"\.attn\.qkv\.", ".attention.qkv."),
        (r"\.attn\.proj\.", ".attention.out."),
        # Hugging Face: (on the hub | since transformers 5)
        (r"^embeddings\.patch_embeddings\.projection\.", "patch.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^(encoder\.layer|layers)\.", "blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.attention\.(attention\.query|q_proj)\.", ".attention.qkv:0."),
        (r"\.attention\.(attention\.key|k_proj)\.", ".attention.qkv:1."),
        (r"\.attention\.(attention\.value|v_proj)\.", ".attention.qkv:2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attention.out."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.up."),
        (r"\.output\.dense\.", ".mlp.down."),
        (r"^layernorm\.", "norm."),
        # both
        (r"\.mlp\.fc1\.", ".mlp.up."),
        (r"\.mlp\.fc2\.", ".mlp.down."),
        (r"(norm[12]?)\.weight$", r"\1.scale"),
        (r"\.weight$", ".kernel"),
    )
)


def encoder_params(tensors: Mapping[str, np.ndarray], config: ViTConfig) -> Params:
    """Float32 NumPy parameters of `Encoder(config)`, from an official or Hugging Face encoder.

    Position tables are fixed: a file's is checked, not loaded. Raises ValueError listing everything
    that is missing, unexpected or misshapen.
    """
    abstract = jax.eval_shape(Encoder(config).init, jax.random.key(0))
    return _convert(tensors, abstract, sincos_2d(*config.grid, config.width))


def predictor_params(tensors: Mapping[str, np.ndarray], config: ViTConfig) -> Params:
    """Float32 NumPy parameters of `Predictor(config)`, from an official predictor; see above."""
    abstract = jax.eval_shape(Predictor(config).init, jax.random.key(0))
    return _convert(tensors, abstract, sincos_2d(*config.grid, config.predictor_width))


def _convert(tensors: Mapping[str, np.ndarray], abstract: Params, table_ND: np.ndarray) -> Params:
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract)
    empty = dict(_slots(params))
    problems = []
    for name, tensor in tensors.items():
        ours = name
        for pattern, replacement in RENAMES:
            ours = pattern.sub(replacement, ours)
        if ours == "pos_embed":
            problems += _check_positions(name, tensor, table_ND)
            continue
        value = _layout(tensor)
        parts = {ours: value}
        if ".qkv." in ours:
            thirds = enumerate(np.array_split(value, 3, axis=-1))
            parts = {ours.replace(".qkv.", f".qkv:{i}."): third for i, third in thirds}
        for slot, part in parts.items():
            view = empty.pop(slot, None)
            if view is None:
                problems.append(f"unexpected: {name}")
            elif view.shape != part.shape:
                wanted = (*view.shape[:-1], view.shape[-1] * len(parts))
                sizes = f"becomes {value.shape}, the model's {ours} is {wanted}"
                problems.append(f"misshapen: {name} {tensor.shape} {sizes}")
            else:
                view[...] = part
    problems += [f"missing: {slot}" for slot in empty]
    if problems:
        raise ValueError(
            "these weights do not fit the model: check its size, patch and image, and leave heads "
            "out of the mapping\n  " + "\n  ".join(dict.fromkeys(problems))
        )
    return params


def _slots(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """(name, view to fill) of all that a file should hold: stacks by layer, qkv by its thirds."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path).replace("/", ".")
        stacked = name.startswith("blocks.")
        for i, view in enumerate(leaf if stacked else [leaf]):
            slot = name.replace("blocks.", f"blocks.{i}.", 1)
            if ".qkv." not in slot:
                yield slot, view
                continue
            for third, part in enumerate(np.split(view, 3, axis=-1)):
                yield slot.replace(".qkv.", f".qkv:{third}."), part


def _layout(tensor: np.ndarray) -> np.ndarray:
    """A torch tensor in our layout, by its rank: convolution, mask token, linear kernel, vector."""
    if tensor.ndim == 4:  # OIHW to HWIO, flattened to [H * W * I, O]
        return tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))
    if tensor.ndim == 3:  # [1, 1, P]
        return tensor.reshape(-1)
    return tensor.T


def _check_positions(name: str, tensor: np.ndarray, table_ND: np.ndarray) -> list[str]:
    """The problems of a file's table. A wrong one is off by about 1, a bfloat16 one by .002."""
    if tensor.shape != (1, *table_ND.shape):
        return [f"misshapen: {name} {tensor.shape}: positions need {(1, *table_ND.shape)}"]
    error = np.abs(tensor[0].astype(np.float32) - table_ND).max()
    if error < 5e-3:
        return []
    return [f"unexpected: {name} is off the fixed 2-D sine-cosine table by {error:.2g}"]
