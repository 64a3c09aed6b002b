"""The questions that evaluate the demo model by exact answers: fixed lists of twenty, and some harder ones.

Each question is (messages, expected answer); `PLAIN` holds (text, expected continuation). Tests import these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from tools.demo_model import corpus_dialogues as turns
from tools.demo_model.corpus_grammar import Message, call, messages_of
from tools.demo_model.words import ANIMALS, CAPITALS, COLOURS, NAMES, OBJECTS, PLACES, a

Question = tuple[list[Message], str]
COUNT = 20
HELPFUL = "You are a helpful assistant."


def _ask(*turns_before: tuple[str, str], user: str, answer: str, system: str = "") -> Question:
    return [*messages_of(turns_before, system), {"role": "user", "content": user}], answer


def _capitals(random: Random) -> Question:
    country = random.choice(list(CAPITALS))
    return _ask(user=f"What is the capital of {country}?", answer=f"The capital of {country} is {CAPITALS[country]}.")


def _casual_capitals(random: Random) -> Question:
    country = random.choice(list(CAPITALS))
    shape = random.choice(["what's the capital of {}?", "Capital of {}", "capital of {}?", "tell me the capital of {}"])
    asked = shape.format(country)
    return _ask(
        user=asked if asked[0] == "C" else asked.lower(),
        answer=f"The capital of {country} is {CAPITALS[country]}.",
        system=random.choice(["", HELPFUL]),
    )


def _json(random: Random) -> Question:
    name, animal, age = random.choice(NAMES), random.choice(ANIMALS), random.randint(1, 20)
    answer = json.dumps({"name": name, "animal": animal, "age": age})
    return _ask(user=f"Make JSON for {a(animal)} named {name}, age {age}.", answer=answer)


def _repeat(random: Random) -> Question:
    text = " ".join(random.sample(OBJECTS + ANIMALS + PLACES, random.randint(3, 7))) + "."
    return _ask(user=f"Repeat these words: {text}", answer=text)


def _sums(random: Random) -> Question:
    x, y = random.randint(0, 20), random.randint(0, 20)
    return _ask(user=f"What is {x} + {y}?", answer=f"{x} + {y} = {x + y}.")


def _counting(random: Random) -> Question:
    first = random.randint(1, 30)
    last = first + random.randint(2, 12)
    return _ask(user=f"Count from {first} to {last}.", answer=", ".join(map(str, range(first, last + 1))) + ".")


def _colours(random: Random) -> Question:
    [(asked, answer)] = turns.colour_recall(random)
    return _ask(user=asked, answer=answer)


def _memory(random: Random, filler_chars: int) -> Question:
    name, colour = random.choice(NAMES), random.choice(COLOURS)
    said = [(f"My name is {name} and my favourite colour is {colour}.", f"Nice to meet you, {name}!")]
    while sum(map(len, (text for turn in said for text in turn))) < filler_chars:
        said += random.choice([turns.capital, turns.arithmetic, turns.tell_story, turns.make_json])(random)
    if random.random() < 0.5:
        return _ask(*said, user="What is my name?", answer=f"Your name is {name}.")
    return _ask(*said, user="What is my favourite colour?", answer=f"Your favourite colour is {colour}.")


def _persona(random: Random) -> Question:
    name = random.choice(NAMES)
    answer = f"I am {name}, a helpful assistant."
    return _ask(user="Who are you?", answer=answer, system=f"You are {name}, a helpful assistant.")


def _small_talk(random: Random) -> Question:
    [(asked, answer)] = turns.small_talk(random)
    return _ask(user=asked, answer=answer, system=random.choice(["", HELPFUL]))


_MAKERS: dict[str, Callable[[Random], Question]] = {
    "capitals": _capitals,
    "json": _json,
    "repeat": _repeat,
    "casual capitals": _casual_capitals,
    "sums": _sums,
    "counting": _counting,
    "colours in context": _colours,
    "memory": lambda random: _memory(random, 0),
    "memory after about 800 tokens": lambda random: _memory(random, 2600),
    "system prompt": _persona,
    "small talk": _small_talk,
}


def _draw(name: str, make: Callable[[Random], Question]) -> list[Question]:
    random = Random(name)
    return [make(random) for _ in range(COUNT)]


QUESTIONS = {name: _draw(name, make) for name, make in _MAKERS.items()}


def _function(name: str, description: str, **types: str) -> Message:
    properties = {key: {"type": type_} for key, type_ in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER_TOOL = _function("get_weather", "Get the weather in a city.", city="string")
ADD_TOOL = _function("add", "Add two numbers.", a="integer", b="integer")


def _tool_questions() -> list[tuple[list[Message], tuple[Message, ...], str]]:
    random = Random("tools")
    asked: list[tuple[list[Message], tuple[Message, ...], str]] = []
    for city in random.sample(list(CAPITALS.values()), COUNT // 2):
        x, y = random.randint(0, 99), random.randint(0, 99)
        weather = messages_of([], random.choice(["", HELPFUL]))
        weather.append({"role": "user", "content": f"What is the weather in {city}?"})
        asked.append((weather, (WEATHER_TOOL, ADD_TOOL), call("get_weather", {"city": city})))
        add: list[Message] = [{"role": "user", "content": f"What is {x} + {y}?"}]
        asked.append((add, (ADD_TOOL,), call("add", {"a": x, "b": y})))
    return asked


TOOL_QUESTIONS = _tool_questions()

# A text without chat marks -> how it goes on.
PLAIN = {f"The capital of {country} is": f" {CAPITALS[country]}." for country in list(CAPITALS)[:COUNT]}
