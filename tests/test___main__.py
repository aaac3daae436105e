"""`python -m moe_embed`: every verb is in the table, and what else is asked of it is a sentence."""

import pathlib
import subprocess
import sys

import pytest

from moe_embed import __main__ as door

ROOT = pathlib.Path(__file__).parents[1]


def test_every_verb_is_listed_with_what_it_does():
    assert len(door.VERBS) > 15
    files = (ROOT / "moe_embed").glob("*.py")
    assert sorted(door.VERBS) == sorted(path.stem for path in files if "    verb.run(main" in path.read_text("utf-8"))
    done = subprocess.run([sys.executable, "-m", "moe_embed"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()[2:]
    assert [line.split()[0] for line in lines if line[2] != " "] == list(door.VERBS)
    assert max(map(len, lines)) <= 80  # no terminal here
    assert all(len(entry.split(maxsplit=1)[1]) > 20 for entry in door.table(1000).splitlines())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--config=x"], "a verb is a module of its own: python -m moe_embed.train\n"),
        (["trian"], "trian is no verb of python -m moe_embed.VERB; did you mean train?\n"),
        (["--verbose"], "--verbose is no verb of python -m moe_embed.VERB; known: doctor, plan, "),
    ],
)
def test_what_is_no_call_of_a_verb_is_a_sentence(argv, said, capsys):
    assert door.main(argv) == 2
    assert said in capsys.readouterr().err
