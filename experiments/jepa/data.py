"""The images of an I-JEPA job: what it trains on, what its probes learn from, and what they are tested on."""

import os
from typing import NamedTuple

from common.config import ConfigError
from common.data import Source, open_source, overlapping
from experiments.jepa.settings import DataSettings, Settings

_OF_MEMORY = 0.7  # that the features of the probes may take, at most
_GiB = 2**30


class Sets(NamedTuple):
    """train: for pretraining. bank: what probes and kNN learn from. test: what they are tested on."""

    train: Source
    bank: Source
    test: Source


def open_sets(data: DataSettings) -> Sets:
    """Opens the splits that `config.data` names. Raises ValueError or FileNotFoundError, with the remedy."""

    def opened(split: str) -> Source:
        options = {"skip_bad": data.skip_bad, "held_out": data.held_out}
        return open_source(data.name, split, data.data_dir, **options)

    train, test = opened(data.split), opened(data.test_split)
    bank = data.probe_split or data.split
    return Sets(train, train if bank == data.split else opened(bank), test)


def check_sets(settings: Settings, sets: Sets) -> None:
    """Refuses what evaluations would only find out at their end.

    Raises:
      ConfigError: a probe tested on images it learned from, too few images, or features that the
        memory of this machine does not hold.
    """
    data, probe = settings.data, settings.probe
    split = "split" if data.probe_split is None else "probe_split"
    bank = f"config.data.{split}={getattr(data, split)!r}"
    test = f"config.data.test_split={data.test_split!r}"
    if not probe.test_on_train and overlapping(sets.bank, sets.test):
        raise ConfigError(
            f"{test} holds images that probes learn from ({bank}), or links to them, so they would be tested on their "
            "own training images. Choose another test_split, or, on purpose, set --config.probe.test_on_train=true"
        )
    if len(sets.bank) < probe.neighbors:
        raise ConfigError(
            f"{bank} has {len(sets.bank)} images, fewer than the config.probe.neighbors={probe.neighbors} that vote: "
            "lower it"
        )
    if len(sets.test) < 2:
        share = getattr(sets.test, "identity", {}).get("held_out")
        remedy = "choose another config.data.test_split"
        if share:
            remedy = f"raise config.data.held_out={share:g}, or {remedy}"
        raise ConfigError(
            f"{test} has {len(sets.test)} image, and the monitors compare 2 or more: add images, {remedy}"
        )
    _check_memory(settings, sets)


def _check_memory(settings: Settings, sets: Sets) -> None:
    if not settings.probe.linear:
        return
    (train, test), a_row = feature_rows(settings, sets)
    needed, limit = (train + test) * a_row, _OF_MEMORY * host_memory()
    if needed > limit:
        fits = int(limit / a_row) - test
        remedy = f"config.probe.train_examples to {fits:,} or less"
        if fits < 2:
            remedy = "config.probe.train_examples and config.probe.test_examples to fewer"
        raise ConfigError(
            f"the linear probe would keep the features of {train:,} training and {test:,} test images in "
            f"{needed / _GiB:.1f} GiB, of the {host_memory() / _GiB:.1f} GiB of memory here: set {remedy}, or "
            "config.probe.linear=False"
        )


def feature_rows(settings: Settings, sets: Sets) -> tuple[tuple[int, int], int]:
    """((training, test) images of the linear probe, bytes of the features of each, on every host)."""
    model, probe = settings.recipe.model, settings.probe
    wanted = (probe.train_examples, sets.bank), (probe.test_examples, sets.test)
    train, test = (min(n or len(source), len(source)) for n, source in wanted)
    return (train, test), 4 * model.width * (1 + min(4, model.depth))  # last layer, and last four


def host_memory() -> int:
    """This machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
