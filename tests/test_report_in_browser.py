"""The HTML report in a real browser: every section is drawn where it can be seen, the pointer is answered, no error is said."""

import html
import json
import re

import pytest

from moe_embed import charts, page, report
from tests import browser, written_runs
from tests.test_report import SECTIONS

pytestmark = pytest.mark.report

# Beside the page's own script: how large each picture is, what each says under the pointer, and where text runs out of the page.
PROBE = """
<script>
const found = {sections: {}, said: [], wide: document.documentElement.scrollWidth > innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches,
               paper: getComputedStyle(document.body).backgroundColor};
for (const section of document.querySelectorAll("section"))
  found.sections[section.id] = [...section.querySelectorAll("svg")].map(svg => { const box = svg.getBoundingClientRect(); return [box.width, box.height]; });
for (const figure of document.querySelectorAll("figure[data-box]")) {
  const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect(), k = box.width / svg.viewBox.baseVal.width;
  const [left, top, width, height] = figure.dataset.box.split(" ").map(Number);
  const at = share => new PointerEvent("pointermove", {clientX: box.left + k * (left + share * width), clientY: box.top + k * (top + height / 2)});
  const said = [];
  for (const share of [0.002, 0.998]) { svg.dispatchEvent(at(share)); said.push(figure.querySelector("output").textContent); }
  svg.dispatchEvent(at(2));
  found.said.push([figure.querySelector("b").textContent, ...said, figure.querySelector("output").textContent]);
}
const result = document.createElement("pre");
result.id = "found";
result.textContent = JSON.stringify(found);
document.body.append(result);
</script>
"""


def look(tmp_path, *flags: str, broken: str = "") -> tuple[dict, list[str]]:
    """(what PROBE found in the page of two runs, what the console said)."""
    if not (tmp_path / "r.html").is_file():
        for seed, name in enumerate(("one", "two & <b>")):
            written_runs.write(tmp_path / name, seed=seed)
        written_runs.evaluation(tmp_path / "r.json")
        written_runs.plan(tmp_path / "plan.json")
        report.main([f"--workdir={tmp_path / 'one'},{tmp_path / 'two & <b>'}", f"--output={tmp_path / 'r.html'}",
                     f"--evaluation={tmp_path / 'r.json'},{tmp_path / 'r.json'}", f"--plan={tmp_path / 'plan.json'}"])  # fmt: skip
    text = (tmp_path / "r.html").read_text("utf-8")
    (tmp_path / "probed.html").write_text(text.replace("</body>", f"{broken}{PROBE}</body>"), "utf-8")
    dom, console = browser.opened(tmp_path / "probed.html", tmp_path, *flags)
    said = re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL).group(1)
    return json.loads(html.unescape(said)), console


def test_every_section_is_drawn_and_answers_the_pointer(tmp_path):
    found, console = look(tmp_path)
    assert console == []
    assert not found["wide"]
    assert tuple(found["sections"]) == SECTIONS
    for name, boxes in found["sections"].items():
        assert bool(boxes) == (name != "glance"), name
        assert all(width > 300 and height > 40 for width, height in boxes), name
    assert len(found["said"]) == 26  # all pictures but the bars of tasks and of memory
    for title, left, right, outside in found["said"]:
        assert re.search(r"\d", left), title
        assert re.search(r"\d", right), title
        assert left != right, title
        assert outside == ""
    said = {title: (left, right) for title, left, right, _ in found["said"]}
    assert said["accuracy"] == ("step 0 · one 0 · two & <b> 0", "step 49 · one 0.98 · two & <b> 0.98")
    assert said["one: sentences and their translations"][0].startswith("de-en Seite")
    _, console = look(tmp_path, broken='<script>document.querySelector("gone").id</script>')
    assert "Cannot read properties of null" in console[0]  # an error is heard


def test_wide_pictures_stay_legible_on_a_narrow_screen(tmp_path):
    found, _ = look(tmp_path, "--window-size=500,900")
    assert not found["wide"]  # they scroll in their own box
    assert all(width >= 760 for width, _ in found["sections"]["translations"])
    assert all(width >= 600 for width, _ in found["sections"]["memory"])
    assert all(width < 500 for width, _ in found["sections"]["training"])


HAIR = """
<script>
const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + box.height / 3}));
document.body.innerHTML = ["hair x1", "circle cx"].map(name => name.split(" ")).map(([what, x]) =>
  `<p>${Number(svg.querySelector(what === "hair" ? "line.hair" : what).getAttribute(x)).toFixed(1)}</p>`).join("");
</script>
"""


def test_the_line_under_the_pointer_of_a_run_of_one_step_is_at_its_point(tmp_path):
    figure = charts.lines([charts.Line("a", [7], [0.3])], title="t", x_label="step")
    text = page.document(title="t", lead="", sections={"a": ("a", figure)})
    (tmp_path / "one.html").write_text(text.replace("</body>", f"{HAIR}</body>"), "utf-8")
    dom, console = browser.opened(tmp_path / "one.html", tmp_path)
    hair, point = re.findall(r"<p>([0-9.]+)</p>", dom)
    assert (hair, console) == (point, [])


def test_dark_and_narrow(tmp_path):
    light, _ = look(tmp_path)
    dark, console = look(tmp_path, "--blink-settings=preferredColorScheme=0")
    assert (light["dark"], dark["dark"], console) == (False, True, [])
    assert light["paper"] != dark["paper"]
    narrow, _ = look(tmp_path, "--window-size=500,900")
    assert not narrow["wide"]
