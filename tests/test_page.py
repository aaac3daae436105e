"""The frame of the HTML report: its numbers come back from the links, and nothing that is said can become markup."""

import csv
import html.parser
import io
import re
import urllib.parse

from moe_embed import page


def read_link(href: str) -> list[list[str]]:
    """A data: link of CSV -> its rows."""
    head, _, body = href.partition(",")
    assert head == "data:text/csv;charset=utf-8"
    return list(csv.reader(io.StringIO(urllib.parse.unquote(body))))


class Read(html.parser.HTMLParser):
    """Checks that every element is closed in order, and keeps what was met."""

    EMPTY = ("meta", "link")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.text = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        """Of <a b=c>: (a, {b: c}, the ids of the sections around it)."""
        self.elements.append((tag, dict(attrs), [a["id"] for t, a in self.open if t == "section"]))
        if tag not in self.EMPTY:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        """Of <a/>."""
        self.elements.append((tag, dict(attrs), [a["id"] for t, a in self.open if t == "section"]))

    def handle_endtag(self, tag):
        """What closes is what was opened last."""
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        """Text by the section around it."""
        for tag, attrs in self.open:
            if tag == "section":
                self.text[attrs["id"]] = self.text.get(attrs["id"], "") + data


def test_numbers_come_back_from_the_link():
    rows = [[0, 0.1234567, None], [1, 'a, "b"\n<c> & 100 % #', "ф"]]
    assert read_link(page.as_link(["step", "x", "y"], rows)) == [
        ["step", "x", "y"], ["0", "0.123457", ""], ["1", 'a, "b" <c> & 100 % #', "ф"],
    ]  # fmt: skip
    assert read_link(page.as_link(["a\rb", "c"], [["d\re", 1]])) == [["a b", "c"], ["d e", "1"]]
    href = page.as_link(["s"], rows)
    assert not set(href) & set('"<>&#\n')
    assert read_link(page.as_link(["s"], [[1.0]])) != read_link(page.as_link(["s"], [[1.5]]))


def test_text_stays_text():
    evil = '<script>alert("&")</script>'
    made = page.document(title=evil, lead=evil, sections={
        "a": (evil, page.say(evil) + page.table([evil], [[evil]]) + page.figure(page.svg([], 9, evil), title=evil, note=evil, columns=[evil], rows=[])),
    })  # fmt: skip
    read = Read(made)
    assert [tag for tag, _, _ in read.elements].count("script") == 1
    assert read.text["a"].count(evil) >= 4


def test_a_flag_in_a_sentence_is_one_piece():
    made = page.say(
        "give evaluate's <output> as --evaluation=r&d.json, or with --dims. A -- b, x--y, or python -m moe_embed.plan."
    )
    assert re.findall("<code>(.*?)</code>", made) == ["--evaluation=r&amp;d.json", "--dims", "python -m moe_embed.plan"]
    assert "&lt;output&gt; as <code>" in made
    assert made.endswith("</code>.</p>\n")


def test_wide_pictures_scroll_in_their_box():
    made = page.figure(page.svg([], 9, "t"), title="t", columns=[], rows=[], kind="map wide")
    assert [(tag, attributes.get("class")) for tag, attributes, _ in Read(made).elements][4:6] == [
        ("div", "picture"),
        ("svg", None),
    ]
    assert re.search(r"\.wide \.picture[^}]*overflow: auto", page.STYLE)
    assert re.search(r"\.wide svg { min-width: \d+px", page.STYLE)


def test_a_table_by_hand():
    made = page.table(["run", "n", "x"], [["a", 3, 0.123456], ["b", 12_345.6, None]])
    assert '<tr><td class="word">a</td><td>3</td><td>0.1235</td></tr>' in made
    assert '<tr><td class="word">b</td><td>12,346</td><td>–</td></tr>' in made


def test_colours_are_those_of_okabe_and_ito():
    assert page.COLORS[:2] == ("#0072B2", "#D55E00")
    assert len(set(page.COLORS)) == len(page.COLORS) == 7
