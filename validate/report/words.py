"""What the words of a report mean: the page's glossary. docs/accuracy.md has the same one, which a test compares."""

from __future__ import annotations

WORDS = (
    ("seeded", "The case whose tokens are drawn evenly from the vocabulary, by --seed."),
    (
        "windows",
        "The case that feeds a whole text in pieces of 128 tokens, one token a step, so that each token but a piece's "
        "first is predicted once: perplexity comes from it.",
    ),
    (
        "near tie",
        "A router's (or a greedy) choice between candidates whose scores lie so close that rounding alone explains "
        "another choice. The reference then follows the backend's choice, and everything else is compared as strictly "
        "as ever.",
    ),
    (
        "set aside",
        "A token's line of an output that left its tolerance and is not counted, as its sequence met a near tie before "
        "and the backend does not show its choices. Never more than half of an output's lines; the report counts them.",
    ),
    (
        "ulps",
        "Units in the last place: an error counted in steps between neighbouring numbers of the dtype that the backend "
        "computes in.",
    ),
    (
        "margin",
        "In the first box: the largest error as a share of its tolerance, over all outputs; beyond 100% an output "
        "fails. Of a router's choice: the least move of the router's logits, relative to the largest, that makes the "
        "reference choose alike.",
    ),
    (
        "floor",
        "The rounding floor: the error of torch in the bundle's own dtype against torch in float32, on the same steps. "
        "A backend may be off by at most four times that.",
    ),
)
