"""Rules for pairs by hand; copies against a set; runs of words against a loop."""

import unicodedata

import numpy as np
import pytest

from moe_embed.data import hygiene
from moe_embed.data.hygiene import Rules
from moe_embed.data.pairs import Pair


@pytest.mark.parametrize(
    ("pair", "rules", "fault"),
    [
        (Pair("q", "d", lang="de"), Rules(), ""),
        (Pair("q", "d", lang="de"), Rules(languages=("en",)), "other language"),
        (Pair("q", "d", lang="de"), Rules(languages=("en", "de")), ""),
        (Pair("q ", "q"), Rules(), "query is the document"),
        (Pair("q", "q?"), Rules(), ""),
        (Pair("qq", "d"), Rules(min_characters=2), "too short"),
        (Pair("qq", "ddd"), Rules(max_characters=2), "too long"),
        (Pair("a", "{}[]();= x"), Rules(max_symbols=0.5), "symbols"),
        (Pair("a", "für ½ हिन्दी 表 x."), Rules(max_symbols=0.2), ""),
    ],
)
def test_rules(pair, rules, fault):
    assert hygiene.fault(pair, rules) == fault


def test_what_shares_thirteen_words_with_a_benchmark_is_left_out():
    text = " ".join(f"w{i}" for i in range(40))
    benchmark = hygiene.of_benchmarks([text, "what is the capital of France"], 13)
    inside = lambda query, document: hygiene.fault(Pair(query, document), Rules(), benchmark)  # noqa: E731
    assert inside("x", "before " + " ".join(f"W{i}," for i in range(20, 33)) + " after") == "in a benchmark"
    assert inside("x", "before " + " ".join(f"w{i}" for i in range(20, 32)) + " after") == ""  # twelve
    assert inside("What is the capital of France?", "Paris") == "in a benchmark"
    assert inside("What is the capital of Spain?", "Madrid") == ""
    assert hygiene.of_benchmarks(["a b c d"], 13) == frozenset()  # too short to say anything
    words = [f"w{i}" for i in range(40)]
    loop = {hash(" ".join(words[i : i + 13])) for i in range(28)}
    assert set(hygiene.ngrams(text, 13)) == loop
    assert len(list(hygiene.ngrams("余白を変更するには", 5))) == 5  # characters


@pytest.mark.parametrize("bucket", [2**25, 7])
def test_copies_against_a_set(monkeypatch, bucket):
    monkeypatch.setattr(hygiene, "BUCKET", bucket)
    rng = np.random.default_rng(0)
    keys = [rng.choice(rng.integers(0, 2**64, 40, dtype=np.uint64), size) for size in (50, 0, 30, 20)]
    seen, expected = set(), []
    for array in keys:
        expected.append([])
        for value in array.tolist():
            expected[-1].append(value not in seen)
            seen.add(value)
    found = hygiene.first_of_its_kind(keys)
    assert [array.tolist() for array in found] == expected
    keys[0][0] = keys[3][-1] = 5
    assert [array.tolist() for array in hygiene.first_of_its_kind(keys)] != expected


def test_a_pair_is_both_of_its_texts():
    same = hygiene.key(Pair("a", "b"))
    assert same == hygiene.key(Pair("a", "b", ("n",), "de", "7"))
    assert same != hygiene.key(Pair("b", "a"))
    assert hygiene.key(Pair("ab", "c")) != hygiene.key(Pair("a", "bc"))


def test_an_answer_is_no_negative_of_its_own_row():
    both = [Pair("q", text, ("x", "e", "y"), scores=(score, 0.5, 0.6, 0.7)) for text, score in (("d", 2.0), ("e", 3.0))]
    found, count = hygiene.without_answers(both)
    assert count == 1
    assert [(pair.negatives, pair.scores) for pair in found] == [
        (("x", "y"), (2.0, 0.5, 0.7)),
        (("x", "y"), (3.0, 0.5, 0.7)),
    ]
    assert hygiene.without_answers(found) == (found, 0)
    assert hygiene.without_answers([Pair("q", "d", ("d", "d"))]) == ([Pair("q", "d")], 2)


def test_marks_belong_to_their_words_and_forms_are_one():
    """Vowel signs of Hindi are no borders of words; a text in NFD is the text in NFC."""
    assert hygiene.WORDS.findall("हिन्दी दिवस, naïve 日本") == ["हिन्दी", "दिवस", "naïve", "日", "本"]
    french = "été à la plage où l'on a mangé des crêpes et bu du café"
    composed, decomposed = (unicodedata.normalize(form, french) for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert set(hygiene.ngrams(composed, 13)) == set(hygiene.ngrams(decomposed, 13))
    assert not list(hygiene.ngrams("हिन्दी दिवस", 13))  # two words say nothing


def test_negatives_of_a_benchmark_go_with_their_scores():
    text = " ".join(f"word{i}" for i in range(14))
    benchmark = hygiene.of_benchmarks([text], 13)
    pair = Pair("q", "d", ("n", text, "m"), scores=(4.0, 3.0, 2.0, 1.0))
    left, count = hygiene.without_benchmark(pair, Rules(), benchmark)
    assert (left.negatives, left.scores, count) == (("n", "m"), (4.0, 3.0, 1.0), 1)
    assert hygiene.without_benchmark(pair, Rules(), frozenset()) == (pair, 0)


def test_a_nul_makes_no_copy():
    assert hygiene.key(Pair("a\0b", "c")) != hygiene.key(Pair("a", "b\0c"))
    assert hygiene.key(Pair("a", "b")) == hygiene.key(Pair("a", "b", id="other"))


@pytest.mark.parametrize(
    "text",
    [
        "เมืองหลวงของประเทศไทยคือเมืองอะไร",
        "ນະຄອນຫຼວງຂອງປະເທດລາວຊື່ວ່າແນວໃດ",
        "မြန်မာနိုင်ငံရဲ့မြို့တော်ကဘယ်မြို့ဖြစ်ပါသလဲ",
        "តើរាជធានីនៃប្រទេសកម្ពុជាមានឈ្មោះអ្វី",
    ],
    ids=["Thai", "Lao", "Burmese", "Khmer"],
)
def test_a_question_of_a_script_without_spaces_is_found(text):
    letters = hygiene.WORDS.findall(text)
    assert "".join(letters) == text  # each with its marks
    assert len(letters) > 13
    benchmark = hygiene.of_benchmarks([text], 13)
    inside = lambda document: hygiene.fault(Pair("x", document), Rules(), benchmark)  # noqa: E731
    assert inside(text) == "in a benchmark"
    assert (
        inside(letters[-1] + text[len(letters[0]) :]) == ""
    )  # another first letter: a whole short text has to be there


def test_letters_of_a_script_without_spaces_are_less_than_words():
    """Thirteen of them are four words of Thai, which any two texts share: a run is as many as thirteen words have."""
    rng = np.random.default_rng(0)
    letters = [chr(c) for c in rng.integers(0xE01, 0xE2F, 60)]
    benchmark = hygiene.of_benchmarks(["".join(letters)], 13)
    inside = lambda some, around: hygiene.fault(Pair("x", around + "".join(some) + around), Rules(), benchmark)  # noqa: E731
    run = 13 * hygiene.LETTERS
    for around in ("", " ๛ ", "ฯ abc "):
        assert inside(letters[7 : 7 + run], around) == "in a benchmark"
        assert inside(letters[7 : 6 + run], around) == ""
    mixed = [*letters[:15], *(f"w{i}" for i in range(8)), *letters[15:]]  # five words' worth and eight
    found = set(hygiene.ngrams(" ".join(mixed), 13))
    assert hash(" ".join(mixed[:23])) in found
    assert hash(" ".join(mixed[:22])) not in found
