"""Fault 22: mutations of a config end in sentences, or run."""

import random
import time
import typing

import pytest

from moe_embed import config as config_lib
from moe_embed import train
from moe_embed.config import UserError
from tests.faults import runs

pytestmark = pytest.mark.faults
VALUES = ("-1", "0", "1", "2", "3", "7", "48", "100003", "0.5", "-0.5", "1e30", "inf", "nan", "None", "True", "x", "", "(1,2)",
          "[", "a,b", "\N{SNOWMAN}", "\0")  # fmt: skip
FIELDS = [
    (section, key) for section, kind in config_lib.SECTIONS.items() for key in (*typing.get_type_hints(kind), "keyy")
]


class Reached(Exception):
    """The train step would be compiled now: all that is the config's has been said."""


def test_no_mutation_of_a_config_is_a_traceback(pairs, tmp_path, monkeypatch):
    """Twenty of one to three fields each, other ones each time, up to the point where a step would be compiled."""

    def reached(*_):
        raise Reached

    monkeypatch.setattr(train, "compile_step", reached)
    ends, start = {"sentences": 0, "runs": 0}, time.time_ns()
    for seed in range(start, start + 20):
        rng = random.Random(seed)
        chosen = [(*rng.choice(FIELDS), rng.choice(VALUES)) for _ in range(rng.randint(1, 3))]
        overrides = [f"--config.{section}.{key}={value}" for section, key, value in chosen]
        try:
            config = config_lib.load("configs/demo.py:tiny", [*runs.flags(pairs)[1:], *overrides])
            train.train(config, workdir=tmp_path / str(seed))
        except UserError as error:
            ends["sentences"] += all(sentence.strip() for sentence in error.args)
        except Reached:
            ends["runs"] += 1
        except Exception as error:
            raise AssertionError(f"{overrides} ends with {type(error).__name__}: {error}") from error
    assert ends["sentences"] + ends["runs"] == 20  # none without words
    assert ends["sentences"] > 5
