"""Stories for the demo corpus: three plots, in the corpus's vocabulary."""

from __future__ import annotations

from random import Random

import attrs

from tools.demo_model.words import ADJECTIVES, ANIMALS, COLOURS, NAMES, OBJECTS, PLACES, a


@attrs.frozen
class _Cast:
    """A hero of some kind, a friend of another, and where the hero lives."""

    hero: str
    kind: str
    friend: str
    other: str
    home: str


def story(random: Random, animal: str | None = None, name: str | None = None) -> str:
    """Tell a story of seven or eight sentences about `animal` called `name` (drawn where None)."""
    hero = name or random.choice(NAMES)
    kind = animal or random.choice(ANIMALS)
    friend = random.choice([other for other in NAMES if other != hero])
    other = random.choice([candidate for candidate in ANIMALS if candidate != kind])
    cast = _Cast(hero, kind, friend, other, random.choice(PLACES))
    opening = f"Once upon a time there was {a(random.choice(ADJECTIVES))} {kind} named {hero}. " + random.choice(
        [f"{hero} lived near the {cast.home}.", f"{hero} lived by the {cast.home} and loved the morning sun."]
    )
    plot = random.choice([_lost_thing, _storm, _race])
    return " ".join([opening, *plot(random, cast)])


def _elsewhere(random: Random, home: str) -> str:
    return random.choice([place for place in PLACES if place != home])


def _lost_thing(random: Random, cast: _Cast) -> list[str]:
    hero, friend, home = cast.hero, cast.friend, cast.home
    place, thing, colour = _elsewhere(random, home), random.choice(OBJECTS), random.choice(COLOURS)
    return [
        random.choice(
            [
                f"One day {hero} found {a(colour)} {thing} by the {place}.",
                f"One day {hero} walked to the {place} and saw {a(colour)} {thing}.",
            ]
        ),
        random.choice([f'"Whose {thing} is this?" asked {hero}.', f'"What a lovely {thing}!" said {hero}.']),
        f"{a(cast.other).capitalize()} named {friend} came along and looked at the {thing}.",
        random.choice(
            [
                f'"That is my {thing}," said {friend}. "I lost it near the {home}."',
                f'"I have been looking for that {colour} {thing}," said {friend}.',
            ]
        ),
        random.choice([f"{hero} gave the {thing} back to {friend}.", f"{hero} smiled and gave {friend} the {thing}."]),
        f"From that day on, {hero} and {friend} were good friends.",
    ]


def _storm(random: Random, cast: _Cast) -> list[str]:
    hero, friend = cast.hero, cast.friend
    place, thing = _elsewhere(random, cast.home), random.choice(OBJECTS)
    return [
        f"One evening a storm came over the {cast.home}, and the rain fell hard.",
        f"{hero} ran to the {place} and saw a light.",
        f'"Come in, little {cast.kind}!" called {a(cast.other)} named {friend}.',
        f"{friend} had a warm fire, and they ate soup until the storm was over.",
        f"In the morning {hero} gave {friend} {a(thing)} to say thank you.",
        f"The {cast.kind} and the {cast.other} were friends ever after.",
    ]


def _race(random: Random, cast: _Cast) -> list[str]:
    hero, friend = cast.hero, cast.friend
    place, thing, colour = _elsewhere(random, cast.home), random.choice(OBJECTS), random.choice(COLOURS)
    return [
        f'One day {a(cast.other)} named {friend} said, "I can run to the {place} faster than you!"',
        f'"Then let us race," said {hero}.',
        f"They ran and ran, but near the {place} {friend} fell over {a(thing)}.",
        f"{hero} stopped at once and helped {friend} to stand up.",
        f"They walked to the {place} together and shared {a(colour)} apple.",
        f'"You are a good friend, {hero}," said {friend}.',
    ]
