"""README.md of an export: each form says how it loads and who reads it, and no figure that is not the model's."""

import dataclasses

import pytest

from moe_embed import hf_layout, model_card
from tests import hf_tiny

REPORT = {"texts": 36, "moe_embed": 1.2e-7, "torch": 3.4e-7}


def card(encoder, moe, *, prompts=None, report=REPORT) -> str:
    return model_card.model_card(encoder, moe, {} if prompts is None else prompts, name="my_model", report=report)


@pytest.mark.parametrize(("encoder", "moe"), hf_tiny.ALL.values(), ids=hf_tiny.ALL)
def test_each_form_says_how_it_loads(encoder, moe):
    text, kind = card(encoder, moe), hf_layout.model_type(encoder, moe)
    total, active = hf_layout.num_parameters(encoder, moe)
    assert f"| parameters | {total:,}, of which {active:,} are active" in text
    assert ('SentenceTransformer("my_model", trust_remote_code=True)' in text) == (kind in ("nomic_bert", "moe_embed"))
    assert ("add_pooling_layer=False" in text) == (kind in ("bert", "xlm-roberta"))
    assert ("cannot read this folder" in text) == (kind == "moe_embed")
    assert ("mixture-of-experts" in text) == (moe.num_experts > 0)
    assert text.startswith("---\nlibrary_name")
    assert text.endswith("\n")
    assert "{" not in text


def test_what_no_server_reads_comes_with_the_commands_that_mend_it():
    text = card(hf_tiny.XLM_R, hf_tiny.MOE)
    for part in ("TEI, vLLM and llama.cpp cannot", "import_hf --model=my_model --position=rotary --output=my_model_rotary",
                 "--config=configs/nomic_v2/mlm.py --init_from=my_model_rotary", "learned, 18 rows"):  # fmt: skip
        assert part in text
    assert "know this layout" in card(hf_tiny.NOMIC, hf_tiny.MOE)
    assert "know this layout" not in card(hf_tiny.NOMIC, dataclasses.replace(hf_tiny.MOE, every=4))


def test_prompts_and_parity_are_the_models():
    text = card(hf_tiny.BERT, hf_tiny.DENSE, prompts={"query": "q: "})
    assert 'model.encode(["..."], prompt_name="query")' in text
    assert 'documents = model.encode(["..."])' in text
    assert '| query | `"q: "` |' in text
    assert "in sentence-transformers 3.4e-07 (parity.json)" in text
    text = card(hf_tiny.BERT, hf_tiny.DENSE, report=REPORT | {"torch": "not run"})
    assert "in sentence-transformers not run" in text
    assert "| (none) | |" in text


def test_what_llama_cpp_makes_of_it_is_said():
    whole = dataclasses.replace(hf_tiny.NOMIC, vocab_size=250_048)
    assert "takes no vocabulary below 250,002 rows" in card(hf_tiny.NOMIC, hf_tiny.MOE)
    assert "takes no vocabulary" not in card(whole, hf_tiny.MOE)
    text = card(whole, hf_tiny.MOE)
    assert "drops the experts' shared bias: a GGUF" in text
    assert "model-f16.gguf" not in text
    text = card(whole, hf_tiny.MOE, report=REPORT | {"shared_bias": "folded", "gguf": 0.9999})
    assert "is folded into other weights" in text
    assert "to this model: 0.99990" in text
    assert "to this model: not run" in card(whole, hf_tiny.MOE, report=REPORT | {"gguf": "not run"})


def calibrated(name: str) -> str:
    return model_card.model_card(hf_tiny.NOMIC, hf_tiny.MOE, {}, name=name, report=REPORT, calibrated=True)


def test_the_ranges_are_read_where_the_model_is():
    here, on_the_hub = calibrated("my_model"), calibrated("acme/my_model")
    assert 'json.load(open("my_model/calibration.json"))' in here
    assert "hf_hub_download" not in here
    assert 'hf_hub_download("acme/my_model", "calibration.json")' in on_the_hub
    assert 'open("acme' not in on_the_hub
    for text in (here, on_the_hub):
        code = text[text.index("import json") :].partition("```")[0]
        compile(code, "card", "exec")
        assert "sentence-transformers 6 or newer: older ones wrap around outside of the ranges." in text


def test_the_commands_for_a_model_of_the_hub_fetch_it_first():
    text = model_card.model_card(hf_tiny.XLM_R, hf_tiny.MOE, {}, name="acme/my_model", report=REPORT)
    assert "hf download acme/my_model --local-dir=my_model\n" in text
    assert "import_hf --model=my_model --position=rotary --output=my_model_rotary" in text
    assert "hf download" not in card(hf_tiny.XLM_R, hf_tiny.MOE)
