"""Public weights land where they belong, and whatever does not fit is said at once.

The files are made here, with the names and layouts of the released ones. tests/peers compares with
live models.
"""

import re

import jax
import numpy as np
import pytest

from jepa.convert import encoder_params, predictor_params
from jepa.encoder import Encoder
from jepa.predictor import Predictor
from tests.jepa import reference
from tests.jepa.small import CONFIG, random_params

ENCODER = random_params(Encoder(CONFIG), 1)
PREDICTOR = random_params(Predictor(CONFIG), 2)

OFFICIAL = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
HUB = (
    "layernorm_before",
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output.dense",
    "layernorm_after",
    "intermediate.dense",
    "output.dense",
)
TRANSFORMERS_5 = (
    "layernorm_before",
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.o_proj",
    "layernorm_after",
    "mlp.fc1",
    "mlp.fc2",
)


def torch_layer(name, p):
    if "scale" in p:
        return {f"{name}.weight": p["scale"], f"{name}.bias": p["bias"]}
    return {f"{name}.weight": p["kernel"].T, f"{name}.bias": p["bias"]}


def torch_blocks(prefix, names, blocks):
    tensors = {}
    for i in range(len(blocks["norm1"]["scale"])):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        attention, mlp = p["attention"], p["mlp"]
        ours = (p["norm1"], attention["qkv"], attention["out"], p["norm2"], mlp["up"], mlp["down"])
        for name, layer in zip(names, ours, strict=True):
            if isinstance(name, tuple):
                for third, part in enumerate(name):
                    cut = {k: np.split(v, 3, axis=-1)[third] for k, v in layer.items()}
                    tensors |= torch_layer(f"{prefix}.{i}.{part}", cut)
            else:
                tensors |= torch_layer(f"{prefix}.{i}.{name}", layer)
    return tensors


def torch_encoder(style="official", prefix=""):
    """ENCODER as a torch state dict."""
    patch, blocks, norm, positions, names = {
        "official": ("patch_embed.proj", "blocks", "norm", "pos_embed", OFFICIAL),
        "hub": ("", "encoder.layer", "layernorm", "", HUB),
        "transformers 5": ("", "layers", "layernorm", "", TRANSFORMERS_5),
    }[style]
    patch = patch or "embeddings.patch_embeddings.projection"
    positions = positions or "embeddings.position_embeddings"
    rows = ENCODER["patch"]["proj"]["kernel"].reshape(CONFIG.patch, CONFIG.patch, 3, CONFIG.width)
    tensors = {
        f"{patch}.weight": rows.transpose(3, 2, 0, 1),  # HWIO to OIHW
        f"{patch}.bias": ENCODER["patch"]["proj"]["bias"],
        positions: reference.positions(*CONFIG.grid, CONFIG.width)[None].astype(np.float32),
        **torch_blocks(blocks, names, ENCODER["blocks"]),
        **torch_layer(norm, ENCODER["norm"]),
    }
    return {prefix + name: tensor for name, tensor in tensors.items()}


def torch_predictor(prefix=""):
    """PREDICTOR as a torch state dict."""
    table = reference.positions(*CONFIG.grid, CONFIG.predictor_width)
    tensors = {
        "mask_token": PREDICTOR["mask_token"][None, None],
        "predictor_pos_embed": table[None].astype(np.float32),
        **torch_layer("predictor_embed", PREDICTOR["embed"]),
        **torch_blocks("predictor_blocks", OFFICIAL, PREDICTOR["blocks"]),
        **torch_layer("predictor_norm", PREDICTOR["norm"]),
        **torch_layer("predictor_proj", PREDICTOR["proj"]),
    }
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "style, prefix",
    [
        ("official", ""),
        ("official", "module."),
        ("hub", ""),
        ("hub", "ijepa."),
        ("transformers 5", ""),
    ],
)
def test_an_encoder_comes_back_bit_for_bit(style, prefix):
    got = encoder_params(torch_encoder(style, prefix), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, got, ENCODER)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_predictor_comes_back_bit_for_bit(prefix):
    got = predictor_params(torch_predictor(prefix), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, got, PREDICTOR)


def test_half_precision_files_load_as_float32():
    bfloat16 = {k: v.astype(jax.numpy.bfloat16) for k, v in torch_encoder().items()}
    got = encoder_params(bfloat16, CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), got, ENCODER)


def test_a_file_need_not_hold_positions():
    tensors = torch_encoder()
    del tensors["pos_embed"]
    encoder_params(tensors, CONFIG)


def problems(tensors, convert=encoder_params):
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        convert(tensors, CONFIG)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_everything_wrong_is_listed_in_one_error():
    tensors = torch_encoder("hub")
    tensors["classifier.weight"] = np.zeros((10, CONFIG.width), np.float32)
    tensors["encoder.layer.3.layernorm_before.bias"] = np.zeros(CONFIG.width, np.float32)
    del tensors["encoder.layer.1.attention.attention.key.bias"]
    tensors["layernorm.weight"] = np.zeros(CONFIG.width + 1, np.float32)
    tensors["embeddings.position_embeddings"] = tensors["embeddings.position_embeddings"][:, ::-1]
    got = problems(tensors)
    assert {re.sub(r"\(.*|by .*", "...", line) for line in got} == {
        "unexpected: classifier.weight",
        "unexpected: encoder.layer.3.layernorm_before.bias",
        "missing: blocks.1.attention.qkv:1.bias",
        "misshapen: layernorm.weight ...",
        "unexpected: embeddings.position_embeddings is off the fixed 2-D sine-cosine table ...",
    }
    assert len(got) == 5


def test_a_misshapen_joint_projection_is_one_problem():
    tensors = torch_encoder()
    tensors["blocks.0.attn.qkv.weight"] = np.zeros((3, 5), np.float32)
    (line,) = problems(tensors)
    assert line == (
        "misshapen: blocks.0.attn.qkv.weight (3, 5) becomes (5, 3), "
        "the model's blocks.0.attention.qkv.kernel is (36, 108)"
    )


def test_positions_of_another_grid_are_refused():
    tensors = torch_predictor()
    tensors["predictor_pos_embed"] = tensors["predictor_pos_embed"][:, 1:]
    (line,) = problems(tensors, predictor_params)
    assert line == "misshapen: predictor_pos_embed (1, 23, 16): positions need (1, 24, 16)"


def test_an_encoder_given_twice_is_refused():
    lines = problems(torch_encoder("official") | torch_encoder("hub"))
    assert len(lines) > 30 and all(line.startswith("unexpected") for line in lines)


def test_a_predictor_is_no_encoder():
    assert any(line == "missing: patch.proj.kernel" for line in problems(torch_predictor()))
