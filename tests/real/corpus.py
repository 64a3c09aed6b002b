"""Texts that tokenizers and models are compared on. Imports nothing, so that any Python can read it."""

from __future__ import annotations

TEXTS = [
    "", " ", "a", " a", "a ", "\n", "\n\n\n", "  two  blanks ", "tab\there", "\r\nwindows\r\n",
    "It's we'll I'D YOU'RE don't 'quoted'", "1234567890 3.14159 1,000,000 12:34", "HTTPServerError snake_case",
    "Naïve café, übergrößenträger, Łódź, İstanbul", "日本語の文章です。中文句子，没有空格。", "한국어 문장입니다.",
    "Привет, мир! Ελληνικά. עברית ומשהו. العربية نصٌّ", "हिन्दी में वाक्य। ภาษาไทยไม่มีช่องว่าง", "🙂🙃👩‍👩‍👧‍👦🇩🇪 🤗x",
    "e\u0301 \u200b\ufeff#include \ufeff// \u2028line \u00a0nbsp \u3000wide", "\x00\x01\x1b[0m\x7f", "𝒜𝓑 𐍈 ﷺ ﬁ Å Å",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # it's\n\n\n", "<div class=\"a\">&amp;</div>\n```python\nx\n```",
    " " * 70 + "end" + "\n" * 40, "word " * 300, "=" * 200 + "-" * 33, "ja" * 500,
]  # fmt: skip
PROSE = """
The harbour lay quiet under a thin layer of fog. Two fishing boats had come in before dawn, and their crews were
already sorting the catch on the stone quay. Mackerel went into the blue boxes, herring into the grey ones, and
anything too small was thrown back over the wall, where the gulls were waiting for it. Nobody spoke much. The work
had been done in the same order for thirty years, and every hand knew its place.

A compiler translates a program from one language into another. It first reads the text and groups the characters
into words, then it groups the words into sentences and checks that they follow the grammar. Only after that does it
look at the meaning: which names are declared, which types fit together, and which values can be computed before the
program runs. The last part writes instructions for the machine, and a good compiler spends most of its time there,
because the same calculation can be written in many ways and some of them are much faster than others.

In 1854 a physician in London marked every death of an outbreak of cholera on a map of the streets. Most of the marks
stood close to one public pump. The people who lived near it but had a well of their own stayed healthy, and so did
the workers of a brewery, who drank beer. He asked the parish to remove the handle of the pump, and it did. What he
had shown was that the disease came with the water and not with the air, many years before anybody saw the bacterium.

To bake a simple bread you need 500 grams of flour, 350 millilitres of water, 10 grams of salt and a little yeast. Mix
them in a bowl until no dry flour is left, cover it, and wait. After twelve hours the dough has doubled in size. Fold
it four times, shape it into a ball, and let it rest for another hour while the oven gets as hot as it can.
"""
QUESTIONS = (
    "What is the capital of France?",
    "Tell me a long story about a fox.",
    "Write Python code that sorts a list in five ways.",
    "List ten animals and say something about each.",
)
