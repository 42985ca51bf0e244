"""The report page: nothing that comes in is markup, figures are readable, folds are closed."""

import base64
from html.parser import HTMLParser

from megatron_dft.drift.page import Picture, Section, Table, number, render

NASTY = "<img src=x onerror=\"alert(1)\"> & 'x' </td></script>"


class _Page(HTMLParser):
    """Tags with their attributes, and all text outside style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("style", "script"):
            self.texts.append(data)


def _page(section, title="t", subtitle="s"):
    return _Page(render(title, subtitle, [section]))


def test_every_string_is_text_wherever_it_stands():
    table = Table((NASTY, "n"), [[NASTY, 1]], NASTY)
    folded = Table(("a",), [[NASTY]], NASTY, folded=True)
    section = Section(
        NASTY, [NASTY], [Picture(NASTY, b"png", NASTY)], [table, folded], (NASTY, NASTY), NASTY
    )
    page = _page(section, NASTY, NASTY)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 1 and images[0]["alt"] == NASTY
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    # title, h1, subtitle, link, heading, verdict ×2, meaning, paragraph, caption ×3, two cells
    assert page.texts.count(NASTY) == 14
    # A column's name may break, but its text is the same.
    assert NASTY in "".join(page.texts).replace(NASTY, "", 12)
    cells = [attrs["data-v"] for tag, attrs in page.tags if tag == "td"]
    assert cells == [NASTY, "1", NASTY]


def test_figures_and_what_a_column_sorts_by():
    assert [number(v) for v in (None, 1234567, 0.00012345, 12345.678, "x")] == [
        "–", "1,234,567", "0.0001234", "1.235e+04", "x",
    ]  # fmt: skip
    page = _page(Section("h", tables=[Table(("a", "b"), [["x", 0.123456789], ["y", None]])]))
    assert [a["data-v"] for t, a in page.tags if t == "td"] == ["x", "0.123456789", "y", ""]
    assert "0.1235" in page.texts and "–" in page.texts


def test_pictures_are_inside_and_folded_tables_are_closed():
    section = Section("h", (), [Picture("a.png", b"\x89PNG")], [Table(("a",), [["x"]], "c", True)])
    page = _page(section)
    (image,) = (attrs for tag, attrs in page.tags if tag == "img")
    assert image["src"] == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    (details,) = (attrs for tag, attrs in page.tags if tag == "details")
    assert "open" not in details
    for tag, attrs in page.tags:
        assert not attrs.get("href", "#").startswith("http") and tag != "link"


def test_a_table_without_rows_is_its_caption():
    page = _page(Section("h", (), [], [Table(("column",), [], "None were found.", True)]))
    assert "None were found." in page.texts and "column" not in page.texts
    assert not [tag for tag, _ in page.tags if tag in ("table", "details")]
