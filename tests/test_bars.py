"""Bars of bytes."""

import xml.etree.ElementTree as ElementTree

from moe_embed import bars

GIB = 2**30
PARTS = {"parameters": 2.0 * GIB, "activations": 6.0 * GIB, "<loss>": 0.0}


def test_text_stacks_parts_and_draws_the_limit():
    lines = bars.as_text(PARTS, limit=16.0 * GIB, width=95)  # 4 marks a GiB
    assert [line.count("#") + line.count("=") for line in lines] == [8, 24, 0, 32]
    assert "2.00 GiB" in lines[0]
    assert "8.00 GiB" in lines[-1]
    assert lines[-1].endswith("=" + 32 * " " + "|")
    assert max(map(len, lines)) <= 95


def test_what_does_not_fit_stands_beyond_the_limit():
    last = bars.as_text(PARTS, limit=4.0 * GIB, width=63)[-1]  # 4 marks a GiB
    before, after = last.split("|")
    assert (before.count("#"), before.count("="), after.count("=")) == (8, 8, 16)


def test_the_picture_is_xml_with_a_rectangle_a_part():
    assert 'font-size="15">short<' in bars.as_svg(PARTS, limit=4.0 * GIB, title="short")
    assert 'font-size="6.8">' in bars.as_svg(PARTS, limit=4.0 * GIB, title="x" * 200)  # else its end would not be seen
    svg = bars.as_svg(PARTS, limit=4.0 * GIB, title="a < b & c")
    tree = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in tree.iter(f"{space}text")]
    assert texts[0] == "a < b & c"
    assert "parameters 2.00 GiB" in texts
    assert "limit 4.00 GiB" in texts
    widths = [float(rect.get("width")) for rect in tree.iter(f"{space}rect") if rect.find(f"{space}title") is not None]
    assert len(widths) == 3
    assert widths[1] == 3 * widths[0] or abs(widths[1] / widths[0] - 3) < 0.01
    assert sum(widths) <= 680
    assert float(tree.find(f"{space}path").get("d").split()[0][1:]) < 20 + sum(widths)  # the limit lies inside
