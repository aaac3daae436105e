"""Folders of Hugging Face: what is read from which file, what is left out by name, and every refusal."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import moe_embed
from moe_embed import hf_folder, hf_layout
from moe_embed.config import UserError
from tests import hf_tiny
from tests.hf_tiny import BERT, DENSE, MOE, NOMIC, XLM_R, random_params, write_folder

PREFIXES = {"bert": (BERT, "bert.", "cls.predictions."), "xlm-roberta": (XLM_R, "roberta.", "lm_head.")}


@pytest.fixture
def sample_tokenizer() -> bytes:
    return (pathlib.Path(moe_embed.__file__).parent / "sample" / "tokenizer.model").read_bytes()


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize(("encoder", "moe"), hf_tiny.ALL.values(), ids=hf_tiny.ALL)
def test_folder_round_trip_with_prompts_and_length(tmp_path, encoder, moe):
    params = write_folder(tmp_path, encoder, moe)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": false}')
    prompts = {"query": "q: ", "passage": "d: ", "none": ""}
    written = {"prompts": prompts, "default_prompt_name": "none"}  # nothing in front of a text given without a name
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(written))
    found = hf_folder.read_folder(tmp_path)
    assert equal(params, found.params)  # through the file: a view would be scrambled
    assert (found.moe, found.encoder.max_seq_length, found.encoder.dim) == (moe, 12, 8)
    assert found.prompts == {**prompts, "document": "d: "}
    assert found.tokenizer.file_name == "tokenizer.json"
    assert found.model_type == hf_layout.model_type(encoder, moe)
    assert found.left_out == []


def test_a_learned_table_bounds_the_length(tmp_path):
    write_folder(tmp_path, XLM_R, DENSE)
    assert hf_folder.read_folder(tmp_path).encoder.max_seq_length == 16
    assert hf_folder.read_folder(tmp_path).prompts == {}
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 18}')  # rows; two come before any text
    assert hf_folder.read_folder(tmp_path).encoder.max_seq_length == 16
    for wrong in ("0", "true", '"12"'):
        (tmp_path / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {wrong}}}')
        with pytest.raises(UserError, match=r"sentence_bert_config\.json has max_seq_length"):
            hf_folder.read_folder(tmp_path)


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize(
    "tied",
    [
        (),
        ("decoder.weight",),
        ("decoder.weight", "decoder.bias"),
        ("decoder.bias", "no bias"),
        ("decoder.weight", "no word"),
    ],
)
def test_a_head_is_read_and_what_hangs_off_it_left_out(tmp_path, kind, tied):
    encoder, prefix, head = PREFIXES[kind]
    params = random_params(encoder, DENSE, with_head=True)
    tensors = hf_layout.to_tensors(params, encoder=encoder, moe=DENSE)
    extra = {
        "pooler.dense.weight": np.zeros((8, 8), np.float32),
        "pooler.dense.bias": np.zeros(8, np.float32),
        "embeddings.position_ids": np.arange(16)[None],
    }
    saved = {name if name.startswith(head) else prefix + name: tensor for name, tensor in (tensors | extra).items()}
    if "decoder.weight" in tied:
        saved[f"{head}decoder.weight"] = tensors["embeddings.word_embeddings.weight"]
    if "decoder.bias" in tied:
        saved[f"{head}decoder.bias"] = tensors[f"{head}bias"]
    if "no bias" in tied:  # the shared vector under its other name
        del saved[f"{head}bias"]
    if "no word" in tied:
        del saved[f"{prefix}embeddings.word_embeddings.weight"]
    left_out = sorted(prefix + name for name in extra)
    if kind == "bert":
        saved |= {"cls.seq_relationship.weight": np.zeros((2, 8)), "cls.seq_relationship.bias": np.zeros(2)}
        left_out += ["cls.seq_relationship.weight", "cls.seq_relationship.bias"]
    write_folder(tmp_path, encoder, DENSE)
    hf_tiny.save(tmp_path, saved)
    found = hf_folder.read_folder(tmp_path)
    assert equal(params, found.params)
    assert found.left_out == sorted(left_out)


def test_a_head_that_is_not_tied_or_not_whole_is_refused(tmp_path):
    params = random_params(BERT, DENSE, with_head=True)
    tensors = hf_layout.to_tensors(params, encoder=BERT, moe=DENSE)
    write_folder(tmp_path, BERT, DENSE)
    word, bias = tensors["embeddings.word_embeddings.weight"], tensors["cls.predictions.bias"]
    other = word.copy()
    other[3, 3] = np.nextafter(other[3, 3], 9)
    for change, words in (
        ({"cls.predictions.decoder.weight": other}, r"decoder\.weight is not embeddings\.word_embeddings\.weight"),
        ({"cls.predictions.decoder.bias": bias + 1}, r"decoder\.bias is not cls\.predictions\.bias"),
        ({"cls.predictions.transform.dense.bias": None}, r"tensor cls\.predictions\.transform\.dense\.bias is missing"),
        ({"bert.embeddings.LayerNorm.bias": np.zeros(8, np.float32)}, r"LayerNorm\.bias is there twice"),
        ({"classifier.weight": np.zeros((2, 8), np.float32)}, r"classifier\.weight is unknown"),
        ({"lm_head.bias": np.zeros(96, np.float32)}, r"lm_head\.bias is unknown"),
        ({"encoder.layer.2.attention.self.key.bias": None}, r"layer\.2\.attention\.self\.key\.bias is missing"),
        (
            {"embeddings.position_embeddings.weight": np.zeros((18, 8), np.float32)},
            r"\[18, 8\]; the config asks for \[16",
        ),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        hf_tiny.save(tmp_path, changed)
        with pytest.raises(UserError, match=words):
            hf_folder.read_folder(tmp_path)


def test_old_names_of_norms(tmp_path):
    """google-bert's files: gamma and beta, as TensorFlow said."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(tensors):
        for new, name in old.items():
            tensors = {
                f"bert.{key.removeprefix('bert.').replace(new, name)}": tensor for key, tensor in tensors.items()
            }
        return tensors

    params = write_folder(tmp_path, BERT, DENSE, rename=rename)
    assert "bert.encoder.layer.0.output.LayerNorm.beta" in hf_folder.read_safetensors(tmp_path / "model.safetensors")
    assert equal(params, hf_folder.read_folder(tmp_path).params)


def test_half_precision_is_widened_exactly_and_integers_are_refused(tmp_path):
    write_folder(tmp_path, NOMIC, MOE)
    tensors = hf_folder.read_safetensors(tmp_path / "model.safetensors")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        hf_tiny.save(tmp_path, half)
        word = hf_folder.read_folder(tmp_path).params["embedding"]["word_VD"]
        assert word.dtype == np.float32
        np.testing.assert_array_equal(word, half["embeddings.word_embeddings.weight"].astype(np.float32))
    hf_tiny.save(tmp_path, tensors | {"emb_ln.bias": np.zeros(8, np.int8)})
    with pytest.raises(UserError, match=r"emb_ln\.bias as int8"):
        hf_folder.read_folder(tmp_path)


def test_the_tokenizer_is_sentencepiece_else_a_json_of_berts_kind(tmp_path, sample_tokenizer):
    write_folder(tmp_path, BERT, DENSE)
    fast = tmp_path / "tokenizer.json"
    fast.write_bytes(hf_tiny.word_pieces([" ".join(f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh")]))
    with pytest.raises(UserError, match=r"tokenizer\.json has 121 ids; the embedding table has 96 rows"):
        hf_folder.read_folder(tmp_path)
    fast.write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["<s>", 0.0], ["a", -1.0]], "unk_id": 0}}))
    with pytest.raises(UserError, match=r"put its sentencepiece\.bpe\.model beside it"):
        hf_folder.read_folder(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(sample_tokenizer)
    with pytest.raises(UserError, match=r"sentencepiece\.bpe\.model has 16002 ids"):
        hf_folder.read_folder(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").unlink()
    fast.unlink()
    with pytest.raises(UserError, match=r"no sentencepiece\.bpe\.model and no tokenizer\.json"):
        hf_folder.read_folder(tmp_path)


def test_the_command_that_makes_a_tokenizer_json_of_a_vocab_txt(tmp_path):
    write_folder(tmp_path, BERT, DENSE)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)))
    wanted = hf_folder.read_folder(tmp_path).tokenizer.encode(["What is it?"], max_length=16)[0][0]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"vocab\.txt and no tokenizer\.json") as error:
        hf_folder.read_folder(tmp_path)
    command = str(error.value).split(": ", 1)[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    found = hf_folder.read_folder(tmp_path).tokenizer.encode(["What is it?"], max_length=16)[0][0]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("file", "text", "words"), [
    ("1_Pooling/config.json", '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', "other vectors than"),
    ("1_Pooling/config.json", '{"pooling_mode": "lasttoken"}', "other vectors than the mean"),
    ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": true, "include_prompt": false}', "other vectors than"),
    ("modules.json", '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]', "has a Dense after"),
    ("modules.json", '[{"type": "sentence_transformers.models.Transformer", "path": ""}]', "has no Pooling"),
    ("modules.json", "[" * 100_000, "cannot be read as JSON"),
    ("modules.json", '{"a": 1}', "list of types and paths"),
    ("modules.json", '[{"type": "a.Pooling", "path": "1\\u0000"}]', "which is not in"),
    ("modules.json", '[{"type": "a.Pooling", "path": "' + 5_000 * "x" + '"}]', "which is not in"),
    ("tokenizer_config.json", '{"added_tokens_decoder": 5}', "added_tokens_decoder = 5; it must list tokens"),
    ("modules.json", "7", "list of types and paths"),
    ("sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case"),
    ("config_sentence_transformers.json", '{"prompts": ["a"]}', "not names and texts"),
    ("config_sentence_transformers.json", "{", "cannot be read as JSON"),
    ("config_sentence_transformers.json", '{"prompts": {"query": "q: "}, "default_prompt_name": "query"}', "'query' in front of every text"),
    ("config_sentence_transformers.json", '{"prompts": {}, "default_prompt_name": ["a"]}', "make default_prompt_name null"),
    ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": false}', "other vectors than the mean"),
    ("sentence_xlm-roberta_config.json", '{"max_seq_length": 4}', "rename it to sentence_bert_config"),
    ("tokenizer_config.json", '{"do_lower_case": false}', "do_lower_case = False, tokenizer.json lowercase = True"),
    ("tokenizer_config.json", '{"strip_accents": false}', "strip_accents = False"),
    ("config_sentence_transformers.json", '{"prompts": {"query": "[MASK] "}}', r"special token \[MASK\] in its query"),
])  # fmt: skip
def test_what_sentence_transformers_would_do_otherwise_is_refused(tmp_path, file, text, words):
    write_folder(tmp_path, BERT, DENSE)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=words):
        hf_folder.read_folder(tmp_path)


def test_what_a_tokenizer_config_may_say(tmp_path):
    write_folder(tmp_path, BERT, DENSE)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 9}')
    assert hf_folder.read_folder(tmp_path).encoder.max_seq_length == 9
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert hf_folder.read_folder(tmp_path).encoder.max_seq_length == 16


def test_tokens_added_to_a_sentencepiece_model_are_refused(tmp_path, sample_tokenizer):
    write_folder(tmp_path, dataclasses.replace(XLM_R, vocab_size=16_064), DENSE)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(sample_tokenizer)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"content": "<mask>"}, {"content": "</s>"}]}')
    assert hf_folder.read_folder(tmp_path).tokenizer.num_ids == 16_002
    (tmp_path / "added_tokens.json").write_text('{"[QUERY]": 16002}')
    with pytest.raises(UserError, match=r"adds the tokens \[QUERY\] to those of sentencepiece"):
        hf_folder.read_folder(tmp_path)


def test_another_padding_than_the_positions_count_from_is_refused(tmp_path):
    write_folder(tmp_path, XLM_R, DENSE, tokenizer=hf_tiny.word_pieces())
    with pytest.raises(UserError, match=r"pad_token_id = 1; the <pad> of tokenizer\.json is 0"):
        hf_folder.read_folder(tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    def spoil(tensors):
        tensors["encoder.layer.1.output.dense.weight"][0, 0] = np.nan
        return tensors

    write_folder(tmp_path, BERT, DENSE, rename=spoil)
    with pytest.raises(UserError, match=r"numbers in encoder\.layer\.1\.output\.dense\.weight that are not finite"):
        hf_folder.read_folder(tmp_path)


@pytest.mark.parametrize("pooling", [
    {"pooling_mode": "mean", "include_prompt": True},
    {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False},
])  # fmt: skip
def test_both_ways_to_say_mean_are_known(tmp_path, pooling):
    write_folder(tmp_path, BERT, DENSE)
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "config.json").write_text(json.dumps(pooling))
    kinds = (("Transformer", ""), ("Pooling", "pool"), ("Normalize", "2"))
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert hf_folder.read_folder(tmp_path).encoder == BERT
    (tmp_path / "pool" / "config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(UserError, match="other vectors"):
        hf_folder.read_folder(tmp_path)


def test_untrusted_weights_are_refused_before_they_are_read(tmp_path):
    write_folder(tmp_path, NOMIC, MOE)
    file = tmp_path / "model.safetensors"
    good = file.read_bytes()
    size = int.from_bytes(good[:8], "little")
    lying = good[8 : 8 + size].replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)
    for bad, words in (
        (b"", "not a safetensors file"),
        (b"\x80\x02}q\x00.", "not a safetensors file"),
        ((1 << 62).to_bytes(8, "little") + good[8:], "not a safetensors file"),
        ((200 << 20).to_bytes(8, "little") + good[8:], "not a safetensors file"),
        (good[:8] + b"[" * size + good[8 + size :], "damaged safetensors header"),
        (good[:8] + b"7" + b" " * (size - 1) + good[8 + size :], "damaged safetensors header"),
        (good[:-4], "cut short"),
        (good[:8] + lying + good[8 + size :], "cannot be read"),
    ):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=words):
            hf_folder.read_folder(tmp_path)
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="in shards"):
        hf_folder.read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled"):
        hf_folder.read_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        hf_folder.read_folder(tmp_path)
