"""What learning a rate costs: train steps of an MLP of 10 M parameters, batch 256, in pairs with plain optax (figure 4f).

  python -m experiments.metaopt.bench [--contenders=adamw,level1,level3,level50,auto] [--rounds=40] [--write]
  python -m experiments.metaopt.bench --original     # the original package over torch Adam; needs the `peers` extra

Contenders take turns step by step in one process, so that other work of the machine hits all of them. Where memory
happens to lie favours one or another by some percent for as long as a process lives: so there are several. The ratio is the
median over all rounds of each contender's step to the plain step of the same round, with its quartiles; and the same
of CPU time over all threads. What 49 further levels cost is the ratio of level50 to level1 (level50 takes a minute to
compile, unless XLA's cache is on).
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments.shared.bench import in_turns, run_worker, write_row

WIDTHS, BATCH = (784, 2048, 2048, 2048, 10), 256
RESULTS = Path(__file__).parents[1] / "results" / "metaopt" / "bench_overhead.jsonl"


def contenders() -> dict[str, Any]:
    import optax

    import metaopt
    from metaopt import hyper, learn

    def tower(height: int):
        by = optax.sgd(0.02)
        for _ in range(height - 1):
            by = hyper(optax.adam, learning_rate=learn(0.02), by=by)
        return hyper(optax.adamw, learning_rate=learn(1e-3), by=by)

    return {
        "adamw": optax.adamw(1e-3),
        "level1": tower(1),
        "level2": tower(2),
        "level3": tower(3),
        "level50": tower(50),
        "auto": metaopt.auto(optax.adamw),
    }


def ours(names: list[str], rounds: int) -> dict[str, Any]:
    """Seconds and CPU seconds of each step by contender, and bytes of optimizer state."""
    from common.cpu_heap import keep_freed_memory

    keep_freed_memory()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((BATCH, WIDTHS[0])), jnp.float32)
    y = jnp.asarray(rng.integers(0, WIDTHS[-1], BATCH))
    params = [
        jnp.asarray(rng.standard_normal((n, m)) / n**0.5, jnp.float32)
        for n, m in itertools.pairwise(WIDTHS)
    ]

    def loss(params):
        h = x
        for w in params[:-1]:
            h = jax.nn.relu(h @ w)
        return optax.softmax_cross_entropy_with_integer_labels(h @ params[-1], y).mean()

    steps, states, sizes = {}, {}, {}
    for name in names:
        tx = contenders()[name]

        def step(params, state, tx=tx):
            grads = jax.grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        states[name] = jax.tree.map(jnp.copy, (params, tx.init(params)))
        sizes[name] = sum(s.nbytes for s in jax.tree.leaves(states[name][1]))
        steps[name] = jax.jit(step, donate_argnums=(0, 1)).lower(*states[name]).compile()

    def run(name: str) -> None:
        states[name] = jax.block_until_ready(steps[name](*states[name]))

    return _in_turns({name: partial(run, name) for name in names}, rounds) | {"bytes": sizes}


def original(rounds: int) -> dict[str, Any]:
    """The original package's Adam / SGD against torch's Adam, as its README says to use it (create_graph)."""
    import torch  # pyright: ignore[reportMissingImports]  # extra: peers
    from gradient_descent_the_ultimate_optimizer import gdtuo  # pyright: ignore[reportMissingImports]  # extra: peers

    torch.set_num_threads(2)

    def net() -> Any:
        layers: list[Any] = []
        for n, m in itertools.pairwise(WIDTHS):
            layers += [torch.nn.Linear(n, m, bias=False), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1])

    x, y = torch.randn(BATCH, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (BATCH,))
    plain = net()
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)

    def plain_step() -> None:
        adam.zero_grad()
        torch.nn.functional.cross_entropy(plain(x), y).backward()
        adam.step()

    wrapped = gdtuo.ModuleWrapper(net(), optimizer=gdtuo.Adam(1e-3, optimizer=gdtuo.SGD(1e-5)))  # pyright: ignore[reportArgumentType]  # typed by its default
    wrapped.initialize()

    def tower_step() -> None:
        wrapped.begin()
        loss = torch.nn.functional.cross_entropy(wrapped.forward(x), y)
        wrapped.zero_grad()
        loss.backward(create_graph=True)
        wrapped.step()

    return _in_turns({"torch_adam": plain_step, "gdtuo": tower_step}, rounds) | {"bytes": {}}


def _in_turns(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    seconds, cpu = in_turns(runs, rounds)
    return {"seconds": seconds, "cpu": cpu}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.metaopt.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=40, help="steps of each contender a process")
    parser.add_argument("--turns", type=int, default=3, help="processes")
    parser.add_argument(
        "--contenders", default="adamw,level1,level3,level50,auto", help="by comma (%(default)s)"
    )
    parser.add_argument(
        "--original", action="store_true", help="the original package instead (extra `peers`)"
    )
    parser.add_argument("--write", action="store_true", help=f"append a row to {RESULTS.name}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        found = original if args.worker == "original" else partial(ours, args.worker.split(","))
        print("RESULT " + json.dumps(found(args.rounds)))
        return 0
    mode = "original" if args.original else args.contenders
    turns = []
    for turn in range(args.turns):
        print(f"process {turn + 1}/{args.turns} ...", file=sys.stderr, flush=True)
        turns.append(
            run_worker("experiments.metaopt.bench", mode, f"--rounds={args.rounds}", threads=2)
        )
    seconds, cpu = (
        {name: [s for turn in turns for s in turn[kind][name]] for name in turns[0][kind]}
        for kind in ("seconds", "cpu")
    )
    sizes = turns[0]["bytes"]
    reference = next(iter(seconds))
    metrics = {f"seconds_{reference}": statistics.median(seconds[reference])}
    print(
        f"{reference}: {1000 * metrics[f'seconds_{reference}']:.1f} ms a step, {args.turns} x {args.rounds} rounds"
    )
    pairs = [(name, reference, name) for name in list(seconds)[1:]]
    if {"level1", "level50"} <= seconds.keys():
        pairs.append(("level50", "level1", "level50_level1"))
    for name, to, key in pairs:
        low, middle, high = _quartiles(seconds[name], seconds[to])
        of_cpu = _quartiles(cpu[name], cpu[to])[1]
        metrics |= {f"ratio_{key}": middle, f"ratio_low_{key}": low, f"ratio_high_{key}": high}
        metrics[f"ratio_cpu_{key}"] = of_cpu
        extra = ""
        if sizes:
            metrics[f"extra_bytes_{key}"] = float(sizes[name] - sizes[to])
            extra = f"; {sizes[name]:,} bytes of state, {sizes[name] - sizes[to]:+,}"
        print(
            f"{name}: {middle:.3f} [{low:.3f}, {high:.3f}] of {to}, {of_cpu:.3f} of its CPU time{extra}"
        )
    if args.write:
        write_row(
            RESULTS, "metaopt_overhead", metrics, seconds, steps=args.rounds * args.turns, arg=mode
        )
    return 0


def _quartiles(a: list[float], b: list[float]) -> list[float]:
    return statistics.quantiles((x / y for x, y in zip(a, b)), n=4)


if __name__ == "__main__":
    sys.exit(main())
