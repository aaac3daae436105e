"""The whole data engine: over two epochs of five sources, stopped anywhere and resumed on other devices, nobody is lost."""

import collections
import json

import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import prepare, run_data

SIZES = {"a": 37, "b": 64, "c": 5, "d": 90, "e": 12}  # c and e are smaller than a batch
BATCH, EPOCHS = 16, 2
STEPS = EPOCHS * sum(SIZES.values()) // BATCH


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    for name, count in SIZES.items():
        rows = [{"query": f"{name} {i}", "document": f"d {name} {i}", "id": f"{name}{i}", "lang": ("de", "ja")[i % 2]} for i in range(count)]  # fmt: skip
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main([f"--input={root}/*.jsonl", f"--output={root}/out", "--shard_size=70", "--processes=1"])
    return root


def batches(source: str, *, num_shards: int = 1, seed: int = 0, by_language: bool = False):
    overrides = ["weights=()", f"batch_size={BATCH}", f"by_language={by_language}", "dev=()", "rows=1"]
    overrides = [f"--config.data.{o}" for o in overrides] + [f"--config.run.steps={STEPS}", f"--config.run.seed={seed}"]
    config = config_lib.load(
        "configs/demo.py:tiny", [f"--config.data.sources={source}", "--config.run.eval_every=0", *overrides]
    )
    return run_data.open_data(config, num_shards=num_shards)[1]


def ids(made, step: int) -> list[str]:
    return [pair.id for pair, _ in made.pairs_at(step)[1]]


@pytest.mark.parametrize("kind", ["*.jsonl", "out"])
@pytest.mark.parametrize("by_language", [False, True])
def test_every_pair_once_an_epoch_however_the_run_is_cut(root, kind, by_language):
    whole = batches(f"{root}/{kind}", by_language=by_language)
    straight = [ids(whole, step) for step in range(STEPS)]
    rng, cut = np.random.default_rng(0), []
    while len(cut) < STEPS:  # a new process each time, on 1, 2 or 4 devices
        made = batches(f"{root}/{kind}", num_shards=int(rng.choice([1, 2, 4])), by_language=by_language)
        cut += [ids(made, step) for step in range(len(cut), min(len(cut) + int(rng.integers(1, 9)), STEPS))]
    assert cut == straight
    of_group = collections.defaultdict(list)
    for step, batch in enumerate(straight):
        of_group[int(whole.mixture.group_of_step[step])] += batch
    groups = {g: {whole.sources[group.source].take(group.members[np.array([k])])[0].id for k in range(len(group.members))}
              for g, group in enumerate(whole.groups)}  # fmt: skip
    assert sorted(i for members in groups.values() for i in members) == sorted(
        f"{n}{i}" for n, c in SIZES.items() for i in range(c)
    )
    for group, drawn in of_group.items():
        size = len(groups[group])
        for start in range(
            0, len(drawn) - size + 1, size
        ):  # a group's epochs lie end to end: each holds everybody once
            assert sorted(drawn[start : start + size]) == sorted(groups[group])
        rest = drawn[len(drawn) // size * size :]
        assert len(set(rest)) == len(rest)  # and the last, begun one nobody twice
    assert straight != [ids(batches(f"{root}/{kind}", seed=1, by_language=by_language), step) for step in range(STEPS)]


def test_a_batch_is_of_one_source_and_every_source_comes(root):
    made = batches(f"{root}/out")
    drawn = [ids(made, step) for step in range(STEPS)]
    assert all(len({i[0] for i in batch}) == 1 for batch in drawn)
    share = collections.Counter(batch[0][0] for batch in drawn)
    for name, count in SIZES.items():
        assert abs(share[name] - STEPS * count / sum(SIZES.values())) < 1
