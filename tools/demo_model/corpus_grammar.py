"""The grammar of the demo corpus: turns become chats, tool calls and plain texts, rendered as the model reads them.

Nothing is quoted from anywhere: all text comes from `words`, `stories` and `turns`, so the weights are ours.
`render` writes what `chat_template.jinja` writes; a test holds them together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from tools.demo_model.corpus_dialogues import EXCHANGES, Turn, arithmetic, capital, casually, count, introduce
from tools.demo_model.stories import story
from tools.demo_model.words import CAPITALS, NAMES, WEATHERS

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_SYSTEMS = ["You are a helpful assistant."] * 4 + [
    "You are a tiny demo model.", "You are a friendly assistant. Answer briefly.", "Be helpful.",
    "You are a helpful assistant that answers questions.",
]  # fmt: skip

Message = dict[str, Any]


def render(messages: Sequence[Message], tools: Sequence[Message] = ()) -> str:
    """Write a chat as the template does: ChatML, tools in the system message, calls and results in their marks."""
    parts: list[str] = []
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tools:
        listed = "\n".join(json.dumps(tool) for tool in tools)
        head = f"{system}\n\n" if system else ""
        parts.append(
            f"{IM_START}system\n{head}# Tools\n\nYou can call these functions:\n<tools>\n{listed}\n</tools>\n\n"
            "To call one, answer with its name and arguments as JSON:\n"
            f'<tool_call>\n{{"name": ..., "arguments": {{...}}}}\n</tool_call>{IM_END}\n'
        )
    elif system:
        parts.append(f"{IM_START}system\n{system}{IM_END}\n")
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            parts.append(f"{IM_START}user\n<tool_response>\n{content}\n</tool_response>{IM_END}\n")
        elif role != "system":
            parts.append(f"{IM_START}{role}\n{content}{IM_END}\n")
    return "".join(parts)


def call(name: str, arguments: Message) -> str:
    """Write a tool call as the model answers it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def messages_of(turns: Sequence[Turn], system: str = "") -> list[Message]:
    """Turn (user, assistant) pairs into chat messages."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages


def exchange(random: Random) -> list[Turn]:
    """Draw one exchange by its weight."""
    return random.choices(list(EXCHANGES), weights=list(EXCHANGES.values()))[0](random)


def chat(random: Random) -> str:
    """Write a chat of a few exchanges, with or without a system prompt."""
    turns = [turn for _ in range(random.choice([1, 1, 1, 2, 3, 4])) for turn in exchange(random)]
    if random.random() < 0.02:
        turns = [("What is my name?", "You have not told me your name yet."), *turns]
    return render(messages_of(turns, random.choice(_SYSTEMS) if random.random() < 0.5 else ""))


def long_chat(random: Random) -> str:
    """Write a chat that tells facts first and asks for them after up to some 900 tokens of other turns."""
    told, recalls = introduce(random)
    turns = [told]
    target_chars = random.randint(200, 3200)
    while sum(len(user) + len(assistant) for user, assistant in turns) < target_chars:
        more = exchange(random)
        if not any("my name" in user.lower() or "favourite" in user.lower() for user, _ in more):
            turns += more
            if random.random() < 0.08:
                turns.append(random.choice(recalls))
    random.shuffle(recalls)
    return render(messages_of(turns + recalls, random.choice(_SYSTEMS) if random.random() < 0.5 else ""))


def persona_chat(random: Random) -> str:
    """Write a chat whose system prompt holds what the answers need."""
    name, city = random.choice(NAMES), random.choice(list(CAPITALS.values()))
    kind = random.randrange(3)
    if kind == 0:
        system, turns = (
            f"You are {name}, a helpful assistant.",
            [("Who are you?", f"I am {name}, a helpful assistant.")],
        )
    elif kind == 1:
        system, turns = f"The user is called {name}.", [("What is my name?", f"Your name is {name}.")]
    else:
        system, turns = f"The user lives in {city}.", [("Where do I live?", f"You live in {city}.")]
    turns = [(casually(random, turns[0][0]), turns[0][1])]
    before = capital(random) if random.random() < 0.3 else []
    after = arithmetic(random) if random.random() < 0.3 else []
    return render(messages_of([*before, *turns, *after], system))


def _tool(random: Random, name: str, description: str, properties: Message) -> Message:
    parameters: Message = {"type": "object", "properties": properties}
    if random.random() < 0.75:
        parameters["required"] = list(properties)
    function: Message = {"name": name, "description": description, "parameters": parameters}
    if random.random() < 0.15:
        del function["description"]
    return {"type": "function", "function": function}


def _weather(random: Random) -> tuple[Message, str, str, str, str]:
    name, key = random.choice(["get_weather", "get_current_weather"]), random.choice(["city", "location"])
    city = random.choice(list(CAPITALS.values()))
    question = random.choice(["What is the weather in {}?", "How is the weather in {}?", "Weather in {}?",
                              "What's the weather like in {}?", "Is it sunny in {}?"])  # fmt: skip
    degrees, sky = random.randint(0, 30), random.choice(WEATHERS)
    described = {"type": "string"} | ({"description": "City name"} if random.random() < 0.4 else {})
    tool = _tool(random, name, random.choice(["Get the weather in a city.", "Get current weather"]), {key: described})
    result = json.dumps({"temperature": degrees, "sky": sky})
    return tool, question.format(city), call(name, {key: city}), result, f"It is {sky} and {degrees} degrees in {city}."


def _add(random: Random) -> tuple[Message, str, str, str, str]:
    x, y = random.randint(0, 99), random.randint(0, 99)
    name, kind = random.choice(["add", "add_numbers", "sum"]), random.choice(["integer", "number"])
    first, second = random.choice([("a", "b"), ("x", "y")])
    tool = _tool(random, name, random.choice(["Add two numbers.", "Add numbers"]),
                 {first: {"type": kind}, second: {"type": kind}})  # fmt: skip
    question = random.choice(["What is {} + {}?", "Add {} and {}.", "What is {} plus {}?"]).format(x, y)
    return tool, question, call(name, {first: x, second: y}), str(x + y), f"{x} + {y} = {x + y}."


def _time(random: Random) -> tuple[Message, str, str, str, str]:
    name, key = random.choice(["get_time", "get_current_time"]), random.choice(["city", "location"])
    city, clock = random.choice(list(CAPITALS.values())), f"{random.randint(0, 23)}:{random.randint(10, 59)}"
    tool = _tool(random, name, "Get the time in a city.", {key: {"type": "string"}})
    question = random.choice(["What time is it in {}?", "What is the time in {}?", "Time in {}?"]).format(city)
    return tool, question, call(name, {key: city}), json.dumps({"time": clock}), f"It is {clock} in {city}."


def tool_chat(random: Random) -> str:
    """Write a chat with one to three tools: a call, usually its result, sometimes a question that needs none."""
    offers = [make(random) for make in random.sample([_weather, _add, _time], random.choice([1, 1, 2, 3]))]
    messages = messages_of([], random.choice(_SYSTEMS) if random.random() < 0.4 else "")
    for _ in range(random.choice([1, 1, 2])):
        if random.random() < 0.2:
            made = exchange(random)
            if made[0][0][:1].isalpha() and not any(mark in made[0][1] for mark in "+-"):
                messages += messages_of(made)
        _, question, answer, result, final = random.choice(offers)
        messages += messages_of([(casually(random, question) if random.random() < 0.5 else question, answer)])
        if random.random() < 0.7:
            messages += [{"role": "tool", "content": result}, {"role": "assistant", "content": final}]
    return render(messages, [offer[0] for offer in offers])


def plain_text(random: Random) -> str:
    """Write a text without chat marks, for completion: a story, capitals, or numbers in order."""
    kind = random.random()
    if kind < 0.25:
        return story(random)
    if kind < 0.9:
        countries = random.sample(list(CAPITALS), random.randint(1, 5))
        return " ".join(f"The capital of {country} is {CAPITALS[country]}." for country in countries)
    return count(random)[0][1]


_DOCUMENTS = {chat: 44, long_chat: 12, persona_chat: 12, tool_chat: 24, plain_text: 8}


def corpus(count: int, seed: int) -> Iterator[str]:
    """Yield `count` documents, the same ones for the same seed."""
    random = Random(seed)
    for _ in range(count):
        yield random.choices(list(_DOCUMENTS), weights=list(_DOCUMENTS.values()))[0](random)
