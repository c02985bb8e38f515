"""The text that a reader of an HTML page sees, without its markup.

Contract: paragraphs are parted by an empty line, list items and table rows by a line end and cells by a tab, so that a
chunker finds them; white space is folded as a browser folds it, except in `<pre>`.
Limit: knows no stylesheets, so text that a page hides is text here.
"""

import re
import warnings

_DROPPED = frozenset("head noscript script style svg template title".split())
_BREAKS = {
    **dict.fromkeys(
        "address article aside blockquote body details dialog div dl fieldset figcaption figure footer form h1 h2 h3 "
        "h4 h5 h6 header hr main nav ol p pre section summary table ul".split(),
        "\n\n",
    ),
    **dict.fromkeys("br caption dd dt li option tr".split(), "\n"),
    **dict.fromkeys("td th".split(), "\t"),
}
_WEAK_TO_STRONG = ["", " ", "\t", "\n", "\n\n"]


def title_and_text(html: str) -> tuple[str, str]:
    """The page's `<title>` ("" where it has none) and its visible text; offsets are into the latter."""
    import bs4
    from bs4.element import CData, NavigableString, PageElement, Tag

    with warnings.catch_warnings():
        # The file's name said HTML; that it looks like XML or like a path is no news to anyone.
        warnings.simplefilter("ignore", bs4.XMLParsedAsHTMLWarning)
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        soup = bs4.BeautifulSoup(html, "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""

    parts: list[str] = []
    gap = ""  # the strongest break since the last word
    # A stack and no recursion: a page may nest deeper than Python does. The plain strings on it are breaks.
    stack: list[tuple[PageElement | str, bool]] = [(soup, False)]
    while stack:
        node, preformatted = stack.pop()
        if isinstance(node, Tag):
            if node.name not in _DROPPED:
                around = _BREAKS.get(node.name, "")
                inside = [(child, preformatted or node.name == "pre") for child in reversed(node.contents)]
                stack += [(around, False), *inside, (around, False)]
        elif type(node) is str:
            gap = max(gap, node, key=_WEAK_TO_STRONG.index)
        elif type(node) in (NavigableString, CData):  # their other subclasses are comments and the like
            before, words, after = _folded(str(node), preformatted)
            gap = max(gap, before, key=_WEAK_TO_STRONG.index)
            if words:
                parts += [gap, words] if parts else [words]
                gap = after
    return title, "".join(parts)


def _folded(string: str, preformatted: bool) -> tuple[str, str, str]:
    """(" " or "", the words, " " or ""): white space inside is single, or as it was where the text is preformatted."""
    if preformatted:
        return "", string, ""
    folded = re.sub(r"\s+", " ", string)
    return " " if folded.startswith(" ") else "", folded.strip(" "), " " if folded.endswith(" ") else ""
