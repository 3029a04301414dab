"""The peer's I-JEPA training step in PyTorch: from the official repository's modules, or from transformers'.

Both are driven by the same step: targets from the EMA encoder (a second layer norm, then the blocks), context, predictor,
smooth-L1, backward, AdamW, EMA. The order of tokens and of repeated batches is the original's.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch  # pyright: ignore[reportMissingImports]  # extra: peers
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]  # extra: peers
from torch import nn  # pyright: ignore[reportMissingImports]  # extra: peers


class Models(NamedTuple):
    """encoder(images, masks or None) -> tokens; predictor(tokens, context masks, target masks) -> tokens."""

    encoder: nn.Module
    predictor: nn.Module


def gather(x: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """The masks' tokens, mask-major on the batch axis."""
    return torch.cat([x.gather(1, m.unsqueeze(-1).expand(-1, -1, x.size(-1))) for m in masks])


def from_official(path: str, image, patch, width, depth, heads, p_width, p_depth) -> Models:
    """Modules of a checkout of facebookresearch/ijepa (non-commercial licence: it is run, not copied)."""
    sys.path.insert(0, path)
    from src.models import vision_transformer as vit  # type: ignore

    norm = partial(nn.LayerNorm, eps=1e-6)
    encoder = vit.VisionTransformer(
        img_size=[image], patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=4, qkv_bias=True,
        norm_layer=norm,
    )  # fmt: skip
    predictor = vit.vit_predictor(
        num_patches=encoder.patch_embed.num_patches, embed_dim=width, predictor_embed_dim=p_width, depth=p_depth,
        num_heads=heads,
    )  # fmt: skip
    return Models(encoder, predictor)


def from_transformers(_: str, image, patch, width, depth, heads, p_width, p_depth) -> Models:
    """The same shapes from Hugging Face's I-JEPA layers, which come without masks and predictor."""
    from transformers import IJepaConfig  # pyright: ignore[reportMissingImports]  # extra: peers
    from transformers.models.ijepa.modeling_ijepa import IJepaEmbeddings, IJepaLayer  # pyright: ignore[reportMissingImports]  # extra: peers

    def config(width: int) -> Any:
        return IJepaConfig(
            hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, image_size=image, patch_size=patch,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]  # its base class takes it
        )  # fmt: skip

    def first(out: Any) -> torch.Tensor:
        return out[0] if isinstance(out, tuple) else out

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = IJepaEmbeddings(config(width))
            self.blocks = nn.ModuleList([IJepaLayer(config(width)) for _ in range(depth)])
            self.norm = nn.LayerNorm(width, eps=1e-6)

        def forward(self, images, masks=None):
            x = self.embeddings(images)
            if masks is not None:
                x = gather(x, masks)
            for block in self.blocks:
                x = first(block(x))
            return self.norm(x)

    class Predictor(nn.Module):
        positions: torch.Tensor

        def __init__(self):
            super().__init__()
            tokens = (image // patch) ** 2
            self.embed, self.proj = nn.Linear(width, p_width), nn.Linear(p_width, width)
            self.mask_token = nn.Parameter(torch.randn(1, 1, p_width) * 0.02)
            self.register_buffer("positions", torch.randn(1, tokens, p_width))
            self.blocks = nn.ModuleList([IJepaLayer(config(p_width)) for _ in range(p_depth)])
            self.norm = nn.LayerNorm(p_width, eps=1e-6)

        def forward(self, z, context, targets):
            B, C = z.shape[:2]
            positions = self.positions.expand(B, -1, -1)
            x = self.embed(z) + gather(positions, context)
            masks = self.mask_token + gather(positions, targets)
            x = torch.cat([x.repeat(len(targets), 1, 1), masks], dim=1)
            for block in self.blocks:
                x = first(block(x))
            return self.proj(self.norm(x[:, C:]))

    return Models(Encoder(), Predictor())


def make_step(
    models: Models, *, bf16: bool, compiled: bool | str, device: torch.device = torch.device("cpu")
) -> Callable[..., torch.Tensor]:
    """step(images, context masks, target masks) -> loss, with autocast to bfloat16 and torch.compile (True: its default
    mode) as asked, on `device`; there the fused AdamW."""
    encoder, predictor = (model.to(device) for model in models)
    target = copy.deepcopy(encoder).requires_grad_(False)
    named = [*encoder.named_parameters(), *predictor.named_parameters()]
    named = [(n, p) for n, p in named if p.requires_grad]
    flat = [p for n, p in named if n.endswith("bias") or p.ndim == 1]
    rest = [p for n, p in named if not (n.endswith("bias") or p.ndim == 1)]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": flat, "weight_decay": 0.0}], lr=1e-3, weight_decay=0.04,
        fused=device.type == "cuda",
    )  # fmt: skip
    mode = compiled if isinstance(compiled, str) else "default"
    run = partial(torch.compile, mode=mode) if compiled else lambda module: module
    encoder_fn, predictor_fn, target_fn = run(encoder), run(predictor), run(target)

    def step(images, context, targets) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                h = target_fn(images)
                h = gather(F.layer_norm(h, (h.size(-1),)), targets)
            z = predictor_fn(encoder_fn(images, context), context, targets)
            loss = F.smooth_l1_loss(z, h)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(encoder.parameters()), 0.004)
        return loss

    return step
