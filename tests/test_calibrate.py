"""calibration.json: from which documents, and that what is read is what the vectors span."""

import json

import numpy as np
import pytest

from moe_embed import calibrate, export, quantize
from moe_embed.config import UserError
from tests.test_export import small_model

TEXTS = [f"{text} {i}" for i in range(4) for text in export.TEXTS]


def test_the_ranges_are_those_of_the_documents_bit_for_bit(tmp_path):
    model = small_model()
    calibrate.write(model, TEXTS, tmp_path)
    found, vector_ND = calibrate.read(tmp_path), model.encode(TEXTS, "document")
    wanted = quantize.ranges_of(vector_ND)
    np.testing.assert_array_equal(found.low_D, wanted.low_D)
    np.testing.assert_array_equal(found.high_D, wanted.high_D)
    assert not np.array_equal(wanted.low_D, quantize.ranges_of(model.encode(TEXTS, "query")).low_D)
    content = json.loads((tmp_path / calibrate.FILE).read_text())
    assert (content["dim"], content["documents"], content["task"]) == (32, len(TEXTS), "document")
    assert np.array(content["ranges"]).shape == (2, 32)


@pytest.mark.parametrize("column", ["text", "document"])
def test_documents_come_from_texts_or_pairs(column, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"query": "q", column: text}) + "\n" for text in TEXTS))
    assert calibrate.texts_of(str(path), model_root=tmp_path) == TEXTS
    path.write_text("".join(json.dumps({column: f"t{i}"}) + "\n" for i in range(3 * calibrate.MOST)))
    some = calibrate.texts_of(str(path), model_root=tmp_path)
    assert len(some) == len(set(some)) == calibrate.MOST
    assert (some[0], some[-1]) == ("t0", f"t{3 * calibrate.MOST - 1}")


def test_what_cannot_calibrate_is_said(tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "a"}\n')
    for argument, said in ((str(tmp_path / "few.jsonl"), "1 documents; give 100"), ("nowhere.jsonl", "does not exist"),
                           ("workdir", "is no workdir trained on pairs")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            calibrate.texts_of(argument, model_root=tmp_path)
    with pytest.raises(UserError, match="holds no ranges"):
        calibrate.read(tmp_path)
