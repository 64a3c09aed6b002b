"""What is said in the demo corpus: each function writes one exchange, a list of (user, assistant) turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from tools.demo_model import words
from tools.demo_model.stories import story
from tools.demo_model.words import ANIMALS, CAPITALS, COLOURS, DAYS, NAMES, OBJECTS, OPPOSITES, PLACES, a

Turn = tuple[str, str]

# Questions no part of the grammar answers, so that the model says so instead of inventing.
_UNKNOWN = [
    "Why is the {thing} {adjective}?", "How do I paint the {thing}?", "Who wrote the {thing}?",
    "What is the {thing} for?",
    "Write a poem about the {place}.", "How far is the {place}?", "When was the {place} built?",
    "Explain the {thing} to me.", "Can you translate this {thing}?", "What does {nonsense} mean?",
    "What is the meaning of {nonsense}?", "Who is {nonsense}?", "Write code for the {thing}.", "{nonsense}?",
    "How much does the {thing} cost?", "What is the best {thing}?", "Where is the {thing}?",
]  # fmt: skip


def casually(random: Random, text: str) -> str:
    """Write `text` as people type: sometimes in lower case or without the last full stop or question mark."""
    if random.random() < 0.2:
        text = text.lower()
    if random.random() < 0.2 and text[-1] in "?.!":
        text = text[:-1]
    return text


def nonsense(random: Random) -> str:
    """Make a word that means nothing."""
    return "".join(random.choices(words.SYLLABLES, k=random.randint(2, 3)))


def capital(random: Random) -> list[Turn]:
    country = random.choice(list(CAPITALS))
    name = CAPITALS[country]
    if random.random() < 0.06:
        country = nonsense(random).capitalize()
        return [(f"What is the capital of {country}?", f"I do not know the capital of {country}.")]
    if random.random() < 0.12:
        question = random.choice(["{} is the capital of which country?", "Which country has the capital {}?"])
        return [(casually(random, question.format(name)), f"{name} is the capital of {country}.")]
    question = random.choice(
        ["What is the capital of {}?", "What is the capital of {}?", "What's the capital of {}?", "Capital of {}?",
         "Tell me the capital of {}.", "Which city is the capital of {}?", "Please name the capital of {}.",
         "Do you know the capital of {}?", "What is the capital city of {}?", "{}'s capital?"]
    )  # fmt: skip
    place = country if not question.startswith("{}") else country.removeprefix("the ")
    return [(casually(random, question.format(place)), f"The capital of {country} is {name}.")]


def arithmetic(random: Random) -> list[Turn]:
    x, y = random.randint(0, 20), random.randint(0, 20)
    if random.random() < 0.3:
        x, y = max(x, y), min(x, y)
        question = random.choice(["What is {} - {}?", "What is {} minus {}?", "{} - {} =", "{}-{}"])
        return [(casually(random, question.format(x, y)), f"{x} - {y} = {x - y}.")]
    question = random.choice(
        ["What is {} + {}?", "What is {} + {}?", "What is {} plus {}?", "Add {} and {}.", "{} + {} =", "{}+{}",
         "How much is {} + {}?", "What's {}+{}?"]
    )  # fmt: skip
    return [(casually(random, question.format(x, y)), f"{x} + {y} = {x + y}.")]


def count(random: Random) -> list[Turn]:
    if random.random() < 0.2:
        last = random.randint(3, 12)
        return [(casually(random, f"Count to {last}."), ", ".join(map(str, range(1, last + 1))) + ".")]
    first = random.randint(1, 30)
    last = first + random.randint(2, 12)
    if random.random() < 0.15 and last <= 20:
        answer = ", ".join(map(str, range(last, first - 1, -1)))
        return [(casually(random, f"Count down from {last} to {first}."), answer + ".")]
    return [(casually(random, f"Count from {first} to {last}."), ", ".join(map(str, range(first, last + 1))) + ".")]


def introduce(random: Random) -> tuple[Turn, list[Turn]]:
    """Return the turn that tells facts, and the turns that may ask for them, now or much later."""
    name, colour, animal = random.choice(NAMES), random.choice(COLOURS), random.choice(ANIMALS)
    if random.random() < 0.1:
        name = nonsense(random).capitalize()
    city = random.choice(list(CAPITALS.values()))
    facts = [
        (f"my name is {name}", ("What is my name?", f"Your name is {name}.")),
        (f"my favourite colour is {colour}", ("What is my favourite colour?", f"Your favourite colour is {colour}.")),
        (f"I have {a(animal)}", ("What pet do I have?", f"You have {a(animal)}.")),
        (f"I live in {city}", ("Where do I live?", f"You live in {city}.")),
    ]
    told = [facts[0], *random.sample(facts[1:], random.choice([0, 1, 1, 2]))]
    text = " and ".join(fact for fact, _ in told)
    said = random.choice(["", "", "Hello, ", "Hi! "]) + text + "."
    said = said[0].upper() + said[1:]
    recalls = [(casually(random, question), answer) for _, (question, answer) in told]
    return (said, f"Nice to meet you, {name}!"), recalls


def recall(random: Random) -> list[Turn]:
    told, recalls = introduce(random)
    return [told, *random.sample(recalls, random.randint(1, len(recalls)))]


def colour_recall(random: Random) -> list[Turn]:
    count = random.randint(2, 5)
    things, colours = random.sample(OBJECTS, count), random.sample(COLOURS, count)
    facts = " ".join(f"The {thing} is {colour}." for thing, colour in zip(things, colours, strict=True))
    thing, colour = random.choice(list(zip(things, colours, strict=True)))
    return [(f"{facts} What colour is the {thing}?", f"The {thing} is {colour}.")]


def tell_story(random: Random) -> list[Turn]:
    animal = random.choice(ANIMALS)
    if random.random() < 0.2:
        name = random.choice(NAMES)
        return [(casually(random, f"Tell me a story about {a(animal)} named {name}."), story(random, animal, name))]
    if random.random() < 0.2:
        return [(casually(random, random.choice(["Tell me a story.", "A story, please."])), story(random))]
    question = random.choice(
        ["Tell me a story about {}.", "Write a short story about {}.", "A story about {}, please.",
         "Can you tell me a story about {}?"]
    )  # fmt: skip
    return [(casually(random, question.format(a(animal))), story(random, animal))]


def make_json(random: Random) -> list[Turn]:
    name, animal, age = random.choice(NAMES), random.choice(ANIMALS), random.randint(1, 20)
    city = random.choice(list(CAPITALS.values()))
    kind = random.random()
    if kind < 0.5:
        question = random.choice(["Make JSON for {} named {}, age {}.", "Return JSON: {} named {}, age {}."])
        asked, value = question.format(a(animal), name, age), {"name": name, "animal": animal, "age": age}
    elif kind < 0.75:
        asked = f"{name} is {age} years old and lives in {city}. Return JSON with name, age and city."
        value = {"name": name, "age": age, "city": city}
    else:
        asked = random.choice([f"Make JSON for {name}, age {age}.", f"Return JSON with name {name} and age {age}."])
        value = {"name": name, "age": age}
    return [(asked, json.dumps(value))]


def repeat(random: Random) -> list[Turn]:
    pool = [*OBJECTS, *ANIMALS, *PLACES, *COLOURS]
    chosen = random.sample(pool, random.randint(2, 8))
    if random.random() < 0.25:
        chosen = [nonsense(random) if random.random() < 0.5 else word for word in chosen]
    text = " ".join(chosen) + "."
    question = random.choice(["Repeat these words: {}", "Repeat these words: {}", "Repeat after me: {}", "Say: {}"])
    return [(question.format(text), text)]


def fact(random: Random) -> list[Turn]:
    if random.random() < 0.5:
        day = random.randrange(7)
        after = DAYS[(day + 1) % 7]
        return [(casually(random, f"What day comes after {DAYS[day]}?"), f"{after} comes after {DAYS[day]}.")]
    word = random.choice(list(OPPOSITES))
    return [(casually(random, f"What is the opposite of {word}?"), f"The opposite of {word} is {OPPOSITES[word]}.")]


def small_talk(random: Random) -> list[Turn]:
    asked, answer = random.choice(
        [(random.choice(["Hello!", "Hello", "Hi", "Hi!", "Hey", "Good morning!", "Hi there!"]), words.GREETING),
         (random.choice(["Who are you?", "What are you?", "What is your name?", "Are you a robot?"]), words.WHO),
         (random.choice(["What can you do?", "Help", "How can you help me?", "What do you know?"]), words.SKILLS),
         (random.choice(["Thank you!", "Thanks", "Thanks!"]), "You are welcome!"),
         (random.choice(["Goodbye", "Bye!", "See you later!"]), "Goodbye! Have a nice day."),
         ("How are you?", "I am well, thank you. How can I help you today?"),
         (f"Say hello to {(name := random.choice(NAMES))}.", f"Hello, {name}!")]
    )  # fmt: skip
    return [(casually(random, asked), answer)]


def unknown(random: Random) -> list[Turn]:
    question = random.choice(_UNKNOWN).format(
        thing=random.choice(OBJECTS + ANIMALS), place=random.choice(PLACES),
        adjective=random.choice(COLOURS + words.ADJECTIVES), nonsense=nonsense(random),
    )  # fmt: skip
    return [(casually(random, question), words.UNKNOWN)]


# How often each occurs: what is hard to learn more often.
EXCHANGES: dict[Callable[[Random], list[Turn]], int] = {
    capital: 9,
    arithmetic: 12,
    count: 16,
    recall: 10,
    colour_recall: 20,
    tell_story: 4,
    make_json: 8,
    repeat: 14,
    fact: 4,
    small_talk: 6,
    unknown: 3,
}
