# SPDX-License-Identifier: Apache-2.0
"""Text of any kind stays text, in Markdown and in HTML."""

from __future__ import annotations

import base64
from pathlib import Path

from ahm_engines.study.markup import Bullets, Heading, Paragraph, Picture, Table, to_html, to_markdown

NASTY = "a|b *c* <script>x</script> `d` [e](f) $g$\nnext"


def test_marks_in_text_are_shown_as_they_are() -> None:
    cell = r"a\|b \*c\* \<script>x\</script> \`d\` \[e\](f) \$g\$ next"
    assert to_markdown([Table(["x", "y"], [[NASTY, "1"]])]) == f"| x | y |\n| :-- | --: |\n| {cell} | 1 |\n"
    assert to_markdown([Paragraph(NASTY), Bullets([NASTY])]) == f"{cell}\n\n- {cell}\n"
    page = to_html(
        [Table(["x"], [[NASTY]]), Paragraph(NASTY), Bullets([NASTY]), Heading(NASTY)], title=NASTY, folder=Path()
    )
    assert "<script>" not in page and page.count("&lt;script&gt;") == 5


def test_markdown_links_a_picture_and_html_holds_it(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one.png").write_bytes(b"pixels")
    picture = Picture("figures/one.png", "What it shows.", 3.5)
    assert "![What it shows.](figures/one.png)" in to_markdown([picture])
    page = to_html([picture], title="", folder=tmp_path)
    assert f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}" in page and "figures/one.png" not in page
