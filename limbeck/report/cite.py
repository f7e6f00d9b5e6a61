"""The papers behind a run, as links and as BibTeX."""

import re
from collections.abc import Iterable

from limbeck.report.runs import Citation

ARXIV = re.compile(r"(\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7})(v\d+)?")


def unique(citations: Iterable[Citation]) -> list[Citation]:
    """Each paper once: by its arXiv identifier, else by what it is called."""
    seen: dict[str, Citation] = {}
    for citation in citations:
        if citation.paper or citation.arxiv:
            seen.setdefault(citation.arxiv or citation.paper, citation)
    return list(seen.values())


def link(citation: Citation) -> str:
    """The page of the paper, '' when the identifier is none of arXiv's."""
    return f"https://arxiv.org/abs/{citation.arxiv}" if ARXIV.fullmatch(citation.arxiv) else ""


def bibtex(citations: Iterable[Citation]) -> str:
    """One entry a paper; a card's 'Hinton et al. 2015, eq. 4' gives the authors, the year and a note."""
    entries, keys = [], set[str]()
    for citation in citations:
        paper = re.sub(r"[{}\\]", "", citation.paper)
        parts = re.match(r"(?P<authors>.*?),?\s*\(?(?P<year>(19|20)\d\d)\)?[,:;.]?\s*(?P<note>.*)", paper)
        authors, year, note = parts.group("authors", "year", "note") if parts else (paper, "", "")
        first = re.sub(r"[^a-z0-9]", "", (authors.split() or ["paper"])[0].lower()) or "paper"
        key = next(k for k in (first + year + suffix for suffix in suffixes()) if k not in keys)
        keys.add(key)
        fields = {
            "author": re.sub(r",?\s+et al\.?$", " and others", authors).strip(),
            "year": year,
            "note": note,
            "eprint": re.sub(r"[{}\\]", "", citation.arxiv),
            "archivePrefix": "arXiv" if citation.arxiv else "",
        }
        body = ",\n".join(f"  {name:<13} = {{{text}}}" for name, text in fields.items() if text)
        entries.append(f"@misc{{{key},\n{body}\n}}")
    return "\n\n".join(entries)


def suffixes() -> Iterable[str]:
    """'', 'a', 'b', ..., 'z', '27', '28', ...: what keeps two keys apart."""
    yield ""
    yield from "abcdefghijklmnopqrstuvwxyz"
    count = 27
    while True:
        yield f"x{count}"
        count += 1
