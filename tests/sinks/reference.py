"""StreamingLLM written straight from the paper: one token at a time, concatenate, rotate by slot, slice.

The step is that of docs/papers/streamingllm.md 1.2, evict_for_space that of 1.3.

NumPy, float64, one stream. It shares no code with sinks/ but the names of the parameters.
"""

import math

import numpy as np


def stream(config, params, tokens, sinks: int, recent: int, events=None) -> np.ndarray:
    """Logits [T, V] of a Llama-shaped model, token by token, with the cache trimmed after each.

    Args:
      events: {t: n}: before token t, evict_for_space(n) of the official chat, and no trimming from then on.
    """
    blocks = [
        {k: np.asarray(v[i], np.float64) for k, v in params["blocks"].items()}
        for i in range(config.depth)
    ]
    embed = np.asarray(params["embed"], np.float64)
    past = [(np.zeros((0, config.kv_heads, config.head_dim)),) * 2 for _ in blocks]
    out, trim = [], True
    for t, token in enumerate(tokens):
        if events and t in events:
            trim = False
            past = [tuple(_evict_for_space(x, events[t], sinks, recent) for x in kv) for kv in past]
        x = embed[token]
        for i, p in enumerate(blocks):
            h = _rms(x, p["attn_norm"], config.norm_eps)
            q = (h @ p["q"]).reshape(config.heads, config.head_dim)
            k = (h @ p["k"]).reshape(1, config.kv_heads, config.head_dim)
            v = (h @ p["v"]).reshape(1, config.kv_heads, config.head_dim)
            keys, values = (np.concatenate(pair) for pair in zip(past[i], (k, v)))
            x = x + _attention(config, p, q, keys, values).reshape(-1) @ p["o"]
            h = _rms(x, p["mlp_norm"], config.norm_eps)
            gate = h @ p["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ p["up"])) @ p["down"]
            if trim and len(keys) > sinks + recent:
                keys, values = (
                    np.concatenate([a[:sinks], a[len(a) - recent :]]) for a in (keys, values)
                )
            past[i] = keys, values
        unembed = embed.T if config.tie_embeddings else np.asarray(params["unembed"], np.float64)
        out.append(_rms(x, np.asarray(params["norm"], np.float64), config.norm_eps) @ unembed)
    return np.stack(out)


def _attention(config, p, q, keys, values):
    n = len(keys)
    mixed = np.zeros_like(q)
    for head in range(config.heads):
        group = head // (config.heads // config.kv_heads)
        query = _rope(config, q[head], n - 1)
        scores = np.array([query @ _rope(config, keys[slot, group], slot) for slot in range(n)])
        scores /= math.sqrt(config.head_dim)
        if config.alibi:
            scores -= 2.0 ** (-8 * (head + 1) / config.heads) * (n - 1 - np.arange(n))
        if config.sink_logits == "zero":
            scores, keys_v = (
                np.append(scores, 0.0),
                np.append(values[:, group], 0 * values[:1, group], 0),
            )
        elif config.sink_logits == "learned":
            scores = np.append(scores, p["sink_logit"][head])
            keys_v = np.append(values[:, group], 0 * values[:1, group], 0)
        else:
            keys_v = values[:, group]
        weights = np.exp(scores - scores.max())
        mixed[head] = weights @ keys_v / weights.sum()
    return mixed


def _rope(config, x, position):
    half = int(config.head_dim * config.rope_fraction) // 2 if config.rope_theta else 0
    out = x.copy()
    for i in range(half):
        angle = position * config.rope_theta ** (-i / half)
        a, b = x[i], x[half + i]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[half + i] = b * math.cos(angle) + a * math.sin(angle)
    return out


def _rms(x, scale, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * scale


def _evict_for_space(x, coming, sinks, recent):
    if len(x) + coming <= sinks + recent:
        return x
    return np.concatenate([x[:sinks], x[len(x) - recent + coming :]])
