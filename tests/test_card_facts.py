"""What a card may say: what the workdir, evaluate's output and the user know, and no path."""

import argparse
import json

import pytest
import yaml  # with orbax, in the core

from moe_embed import card_facts, checkpoint, config, held_out, model_card
from moe_embed.config import UserError
from tests import hf_tiny

REPORT = {"texts": 36, "moe_embed": 1.2e-7, "torch": 3.4e-7}


def card(facts) -> str:
    return model_card.model_card(hf_tiny.NOMIC, hf_tiny.MOE, {}, name="m", report=REPORT, facts=facts)


def test_what_is_not_known_is_not_said():
    text = card(card_facts.Facts())
    for word in ("license", "base_model", "language:", "## Data", "## Retrieval", "Held-out", "calibration"):
        assert word not in text


def test_a_workdir_gives_names_counts_and_the_verdict(tmp_path, monkeypatch):
    config_ = config.Config(
        encoder=hf_tiny.NOMIC, moe=hf_tiny.MOE, loss=config.Loss(), mesh=config.Mesh(),
        data=config.Data(sources=("/secret/pairs.csv",), tokenizer="", batch_size=32),
        optim=config.Optim(learning_rate=1e-3), run=config.Run(steps=5),
    )  # fmt: skip
    description = {"config": config.to_dict(config_), "prompts": {}}
    description["init_from"] = "/cache/models--owner--small/snapshots/1a2b"
    (tmp_path / "workdir.json").write_text(json.dumps(description))
    measured = held_out.Measured({"q": 0.5}, {"q": 0.53}, steps=5, verdict="better by 3.0 points.")
    (tmp_path / held_out.FILE).write_text(json.dumps(measured._asdict()))
    monkeypatch.setattr(checkpoint, "newest_verified", lambda folder, say: 5)
    written = {"files": [["pairs.csv", 1234, 99]], "batch_size": 32}
    monkeypatch.setattr(checkpoint, "facts", lambda folder, step: written)
    facts = card_facts.of_workdir(tmp_path)
    text = card(facts)
    for part in ("| pairs.csv | 1,234 |", "Trained for 5 steps of 32 pairs", "before and after: better by 3.0 points.",
                 'base_model: "owner/small"'):  # fmt: skip
        assert part in text
    (tmp_path / held_out.FILE).write_text(json.dumps(measured._replace(steps=4)._asdict()))
    assert "better by" not in card(card_facts.of_workdir(tmp_path))  # the run has gone on since
    assert "/secret" not in text
    assert "/cache" not in text
    assert card_facts.of_workdir(tmp_path / "elsewhere") == card_facts.Facts()


def test_figures_become_a_table():
    figures = {
        "moe_embed": {"a": {"ndcg@10": 0.5012, "recall@10": 0.75}},
        "bm25": {"a": {"ndcg@10": 0.1, "recall@10": 0.2}},
    }
    text = card(card_facts.Facts(evaluation=figures))
    assert "| task | moe_embed: nDCG@10 | recall@10 | bm25: nDCG@10 | recall@10 |" in text
    assert "| a | 50.1 | 75.0 | 10.0 | 20.0 |" in text


def test_a_system_that_lacks_a_task_has_a_dash():
    of = {"ndcg@10": 0.5, "recall@10": 0.75}
    text = card(card_facts.Facts(evaluation={"moe_embed": {"a": of, "b": of}, "bm25": {"a": of}}))
    assert "| b | 50.0 | 75.0 | - | - |" in text


def test_the_front_matter_is_yaml_that_the_hub_reads():
    facts = flags("--license=apache-2.0", "--languages=de,no", "--base_model=a/b")
    read = yaml.safe_load(card(facts).split("---")[1])
    assert read["language"] == ["de", "no"]  # unquoted, "no" would be false
    assert (read["license"], read["base_model"], read["library_name"]) == ("apache-2.0", "a/b", "sentence-transformers")


def flags(*argv) -> card_facts.Facts:
    parser = argparse.ArgumentParser()
    card_facts.add_flags(parser)
    return card_facts.from_flags(card_facts.Facts(), parser.parse_args(argv))


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--license=Apache 2", "--license=Apache 2"), ("--languages=German", "--languages"), ("--base_model=x", "OWNER/NAME"),
     ("--evaluation=nowhere.json", "does not exist")],
)  # fmt: skip
def test_what_is_no_fact_is_refused(flag, said):
    with pytest.raises(UserError, match=said):
        flags(flag)


def test_what_prepare_said_is_in_the_card(tmp_path):
    assert "| a.jsonl | 3 | 3 |" in card(card_facts.Facts(data_card="3 pairs.\n\n| a.jsonl | 3 | 3 |  |"))
