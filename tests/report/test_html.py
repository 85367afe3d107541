"""HTML that is safe by construction."""

from mmjax.report.html import Html, tag


def test_tags_escape_what_is_not_html() -> None:
    made = tag("p", "<b>", tag("i", "&"), Html("<hr>"), None, title='"<', class_=None, hidden="")
    assert made == '<p title="&quot;&lt;" hidden>&lt;b&gt;<i>&amp;</i><hr></p>'
