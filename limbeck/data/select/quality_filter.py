"""Keeps text that looks like text: rules of thumb on words, symbols and lines."""

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput, nearest

Row = dict[str, Any]


@method(
    paper="Rae et al. 2021 (Gopher), appendix A.1.1",
    year=2021,
    arxiv="2112.11446",
    code="huggingface/datatrove@a649de7:src/datatrove/pipeline/filters/gopher_quality_filter.py",
    differs="words are what white space separates, where the code takes a tokenizer of the language, and one without a "
    "letter or digit counts as punctuation. Of the row this is the block of quality rules only: no classifiers, no "
    "perplexity, no removal of duplicates",
)
def quality_filter(
    rows: Iterable[Row],
    *,
    field: str = "text",
    min_words: int = 50,
    max_words: int = 100_000,
    min_word_length: float = 3.0,
    max_word_length: float = 10.0,
    max_symbols: float = 0.1,
    max_bullets: float = 0.9,
    max_ellipses: float = 0.3,
    min_alphabetic: float = 0.8,
    min_stop_words: int = 2,
    stop_words: Sequence[str] = ("the", "be", "to", "of", "and", "that", "have", "with"),
) -> Generator[Row, None, dict[str, int]]:
    """The rows that break no rule, in order -> rows as they came, with this filter added to their `provenance`.

    The generator's return value counts what was dropped by the first rule that it broke. The rules are for documents
    in English: for short rows set min_words lower, for another language give its stop words.

    field: the key of the text in a row.
    min_words, max_words: of a document, >= 0; words of punctuation only do not count.
    min_word_length, max_word_length: mean characters a word, >= 0.
    max_symbols: largest ratio to words of hash signs, and of ellipses; >= 0.
    max_bullets: largest share of lines that begin with a bullet, in [0, 1].
    max_ellipses: largest share of lines that end in an ellipsis, in [0, 1].
    min_alphabetic: smallest share of words with a letter in them, in [0, 1].
    min_stop_words: how many of the stop words must occur, >= 0.
    stop_words: words that any running text holds, written as they must occur.

    *Needs*: rows with text; nothing is downloaded. *Relates to*: run it before any teacher labels or rates the rows: it
        costs nothing. A stricter rule never keeps more rows.
    *Differs*: see the card.
    """
    require(0 <= min_words <= max_words, "min_words", min_words, f"in 0..{max_words}")
    require(0 <= min_word_length <= max_word_length, "min_word_length", min_word_length, f"in [0, {max_word_length}]")
    require(max_symbols >= 0, "max_symbols", max_symbols, ">= 0")
    require(0 <= max_bullets <= 1, "max_bullets", max_bullets, "in [0, 1]")
    require(0 <= max_ellipses <= 1, "max_ellipses", max_ellipses, "in [0, 1]")
    require(0 <= min_alphabetic <= 1, "min_alphabetic", min_alphabetic, "in [0, 1]")
    require(0 <= min_stop_words <= len(stop_words), "min_stop_words", min_stop_words, f"in 0..{len(stop_words)}")

    def broken(text: str) -> str:
        """The first rule that the text breaks, or ''."""
        words, lines = text.split(), text.splitlines() or [""]
        spoken = [w for w in words if any(c.isalnum() for c in w)]
        length = sum(map(len, spoken)) / max(1, len(spoken))
        per_word = 1 / max(1, len(words))
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        cut = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        rules = {
            "too few words": len(spoken) < min_words,
            "too many words": len(spoken) > max_words,
            "words too short": length < min_word_length,
            "words too long": length > max_word_length,
            "hash signs": text.count("#") * per_word > max_symbols,
            "ellipses": (text.count("...") + text.count("…")) * per_word > max_symbols,
            "bullets": bullets / len(lines) > max_bullets,
            "cut lines": cut / len(lines) > max_ellipses,
            "no letters": sum(any(c.isalpha() for c in w) for w in words) * per_word < min_alphabetic,
            "no stop words": len(set(stop_words) & set(words)) < min_stop_words,
        }
        return next((rule for rule, yes in rules.items() if yes), "")

    dropped: Counter[str] = Counter()
    for row in rows:
        if not isinstance(row.get(field), str):
            raise BadInput(f"a row has no text under {field!r}{nearest(field, row)}")
        if rule := broken(row[field]):
            dropped[rule] += 1
        else:
            before = row.get("provenance", [])
            yield {**row, "provenance": [*(before if isinstance(before, list) else [before]), "quality_filter"]}
    return dict(dropped)
