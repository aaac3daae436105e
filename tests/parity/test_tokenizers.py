"""Our ids beside Hugging Face's, on 4,800 real texts: equal, or a tie of two cuts that score the same.

SentencePiece adds a text's scores in float32 from its beginning, the tokenizers package word by word in float64: where two cuts
of a word have one sum of scores, which one wins is a matter of rounding. So every difference is computed, and has to be such a
tie. Beside them stand the tokenizer.json that we export, transformers' own XLM-R class, and with --released=DIR a real folder.
"""

import copy
import json
import pathlib
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers

from moe_embed import tokenizer_json
from moe_embed.data import sources
from moe_embed.data import tokenizer as tokenizer_lib

pytestmark = pytest.mark.parity
SAMPLE = pathlib.Path(tokenizer_lib.__file__).parent.parent / "sample"
TIE = 1e-3  # of two sums of log-probabilities in float32; the sums are in the hundreds
NUM_TEXTS = 4_800
NO_CAP = 2**30


class Difference(NamedTuple):
    """A text that two tokenizers cut differently."""

    text: str
    gap: float  # the sum of our pieces' scores less that of theirs
    ours: list[str]  # the pieces that differ
    theirs: list[str]


@pytest.fixture(scope="module")
def texts():
    """Sections of LibreOffice's help, 480 in each of ten languages."""
    by_language: dict[str, list[str]] = {}
    for pair in sources.read_source(str(SAMPLE / "pairs" / "monolingual.jsonl.gz")).pairs:
        by_language.setdefault(pair.lang, []).append(pair.document)
    assert len(by_language) == 10
    found = [text for some in by_language.values() for text in some[:: len(some) // 480][:480]]
    assert len(found) == NUM_TEXTS
    return found


@pytest.fixture(scope="module")
def ours():
    return tokenizer_lib.read(SAMPLE / "tokenizer.model")


@pytest.fixture(scope="module")
def exported(ours):
    return tokenizer_json.translate(ours.model_bytes)


def of_json(found: dict, texts: list[str]) -> list[list[int]]:
    made = tokenizers.Tokenizer.from_str(json.dumps(found))
    return [one.ids for one in made.encode_batch(texts)]


def of_transformers(folder: pathlib.Path, texts: list[str]) -> list[list[int]]:
    """The ids of transformers' own class for XLM-R, from whatever files `folder` has."""
    made = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert "XLMRoberta" in type(made).__name__
    return made(texts, truncation=True, max_length=NO_CAP)["input_ids"]


def differences(tokenizer: tokenizer_lib.Tokenizer, texts: list[str], theirs: list[list[int]]) -> list[Difference]:
    """The texts whose ids differ, with the model's own scores of both cuts."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    pieces = model.get_piece_size()
    score_V = np.zeros(tokenizer.num_ids)
    score_V[4:-1] = [model.get_score(i) for i in range(3, pieces)]
    score_V[3] = score_V[4:-1].min() - 10  # what an unknown character costs, in both
    names = ["<s>", "<pad>", "</s>", "<unk>", *(model.id_to_piece(i) for i in range(3, pieces)), "<mask>"]
    found = []
    for text, a, b in zip(texts, tokenizer.encode(texts, max_length=NO_CAP)[0], theirs, strict=True):
        a, b = a.tolist(), list(b)
        if a != b:
            first = next(i for i, (x, y) in enumerate(zip([*a, None], [*b, None], strict=False)) if x != y)
            tail = next(i for i, (x, y) in enumerate(zip([*a[::-1], None], [*b[::-1], None], strict=False)) if x != y)
            tail = min(tail, len(a) - first, len(b) - first)
            x, y = a[first : len(a) - tail], b[first : len(b) - tail]
            gap = float(score_V[x].sum() - score_V[y].sum())
            found.append(Difference(text, gap, [names[i] for i in x], [names[i] for i in y]))
    return found


def check(found: list[Difference], *, most: float) -> None:
    """Every difference is a tie, and there are no more than `most` of the texts."""
    for one in found:
        print(f"{one.gap:+.1e}  {one.ours} | {one.theirs}")
    assert [one for one in found if abs(one.gap) > TIE] == []
    assert len(found) <= most * NUM_TEXTS


def test_the_exported_json(ours, exported, texts):
    check(differences(ours, texts, of_json(exported, texts)), most=0.001)


def test_transformers_own_class(ours, texts, tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(ours.model_bytes)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))
    check(differences(ours, texts, of_transformers(tmp_path, texts)), most=0.001)


def test_another_score_is_found(ours, exported, texts):
    """One frequent piece a little less likely: its texts differ, and by more than a tie."""
    changed = copy.deepcopy(exported)
    counts = np.bincount(np.concatenate(ours.encode(texts, max_length=NO_CAP)[0]), minlength=ours.num_ids)
    vocab = changed["model"]["vocab"]
    piece = max((i for i in range(4, ours.num_ids - 1) if len(vocab[i][0]) > 4), key=lambda i: counts[i])
    vocab[piece][1] -= 20.0
    found = differences(ours, texts, of_json(changed, texts))
    assert sum(abs(one.gap) > 1 for one in found) > 50
    with pytest.raises(AssertionError):
        check(found[:3], most=1.0)


def test_a_tie_is_a_difference_of_no_score(ours, texts):
    ids = ours.encode(texts[:1], max_length=NO_CAP)[0][0].tolist()
    swapped = [ids[0], ids[2], ids[1], *ids[3:]]  # as "ww" + "w" and "w" + "ww" are
    (found,) = differences(ours, texts[:1], [swapped])
    assert found.ours == found.theirs[::-1]
    assert found.gap == 0


def test_another_id_is_found(ours, exported, texts):
    shifted = [[i + 1 for i in ids] for ids in of_json(exported, texts[:40])]
    assert len(differences(ours, texts[:40], shifted)) == 40


@pytest.fixture
def released(request):
    """The folder named by --released: a real XLM-R tokenizer's sentencepiece.bpe.model and tokenizer.json."""
    return pathlib.Path(request.config.getoption("--released"))


@pytest.mark.released
def test_a_real_folder(released, texts, tmp_path):
    ours = tokenizer_lib.read(released / "sentencepiece.bpe.model")
    theirs = json.loads((released / "tokenizer.json").read_text("utf-8"))
    theirs |= {"truncation": None, "padding": None}
    check(differences(ours, texts, of_json(theirs, texts)), most=0.001)
    check(differences(ours, texts, of_json(tokenizer_json.translate(ours.model_bytes), texts)), most=0.001)
    for name in ("sentencepiece.bpe.model", "tokenizer.json"):
        shutil.copy(released / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))
    check(differences(ours, texts, of_transformers(tmp_path, texts)), most=0.001)
