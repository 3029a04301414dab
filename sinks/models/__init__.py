"""The families, one file each. A family is a module with four functions:

  layout(config) -> the tree of parameters (sinks/params.py)
  embed(config, params, tokens_BT) -> x_BTD
  block(config, p, x_BTD, attend) -> x_BTD, with p one block's parameters
  unembed(config, params, x_BTD) -> logits_BTV in float32

`attend(q_BTHK, k_BTGK, v_BTGK, sink_logit_H) -> mixed_BTHK` belongs to whoever runs the blocks: it rotates queries and keys,
reads and writes the cache, and applies ALiBi. Models know nothing of positions. sink_logit_H is None where
config.sink_logits is not "learned".
"""

import importlib
from types import ModuleType

from sinks.config import ModelConfig


def family(config: ModelConfig) -> ModuleType:
    """The module that computes this config."""
    return importlib.import_module(f"sinks.models.{config.family}")
