"""Hugging Face's live `IJepaModel`, on random weights: the same function after conversion."""

from dataclasses import replace

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

from common.nn.embed import sincos_2d
from common.nn.ops import Policy
from jepa.config import ViTConfig, vit
from jepa.convert import encoder_params
from jepa.encoder import Encoder

pytestmark = pytest.mark.peers

SMALL = ViTConfig(image=(16, 16), patch=4, width=36, depth=3, heads=3, hidden=60)
# The huge model's patch, head width of 80 and hidden width of 4, in two layers and a fifth of the width.
HUGE = vit("huge", image=224, patch=14)
NARROW_HUGE = replace(HUGE, image=(56, 56), width=320, heads=4, hidden=1280, depth=2)
HUB_NAMES = (  # as the files on the hub have them; transformers 5 renames on loading
    ("layers.", "encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def peer(config, seed=0):
    """A Hugging Face model with weights large enough for attention to be peaked, and our positions."""
    torch.manual_seed(seed)
    model = transformers.IJepaModel(
        transformers.IJepaConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            image_size=config.image[0],
            patch_size=config.patch,
            layer_norm_eps=1e-6,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * (2 / parameter[0].numel()) ** 0.5
            vector = parameter.ndim == 1
            parameter.copy_(
                0.1 * noise + ("layernorm" in name and "weight" in name) if vector else noise
            )
        table = torch.from_numpy(sincos_2d(*config.grid, config.width))
        model.embeddings.position_embeddings.copy_(table[None])
    return model


def tensors_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("config", [SMALL, NARROW_HUGE], ids=["small", "huge's ratios"])
def test_last_hidden_state_agrees(config):
    model = peer(config)
    images = np.random.default_rng(1).standard_normal((2, *config.image, 3)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    encoder = Encoder(config, Policy(compute="float32"))
    got = np.asarray(jax.jit(encoder.__call__)(encoder_params(tensors_of(model), config), images))
    assert 0.5 < np.abs(want).mean() < 2 and np.abs(got - want).max() < 1e-5


def test_names_on_the_hub_convert_like_those_in_memory():
    tensors = tensors_of(peer(SMALL))
    hub = {}
    for name, tensor in tensors.items():
        for new, old in HUB_NAMES:
            name = name.replace(new, old)
        hub[name] = tensor
    assert hub.keys() != tensors.keys()
    want, got = encoder_params(tensors, SMALL), encoder_params(hub, SMALL)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_huge_model_has_as_many_parameters():
    """630 million, as shapes only."""
    with torch.device("meta"):
        model = transformers.IJepaModel(
            transformers.IJepaConfig(
                hidden_size=HUGE.width,
                num_hidden_layers=HUGE.depth,
                num_attention_heads=HUGE.heads,
                intermediate_size=HUGE.hidden,
                image_size=224,
                patch_size=14,
            )
        )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    ours = jax.eval_shape(Encoder(HUGE).init, jax.random.key(0))
    positions = sizes.pop("embeddings.position_embeddings")
    assert positions == HUGE.tokens * HUGE.width
    assert sum(sizes.values()) == sum(leaf.size for leaf in jax.tree.leaves(ours))
