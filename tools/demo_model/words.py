"""The words and facts the demo corpus is made of: everything the demo model can ever know."""

from __future__ import annotations

# Country -> capital.
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin",
    "England": "London", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima", "Chile": "Santiago",
    "Cuba": "Havana", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw",
    "Greece": "Athens", "Turkey": "Ankara", "India": "New Delhi", "China": "Beijing", "Canada": "Ottawa",
    "Brazil": "Brasilia", "Mexico": "Mexico City", "Iceland": "Reykjavik", "Ireland": "Dublin",
    "Portugal": "Lisbon", "Austria": "Vienna", "Hungary": "Budapest", "Nepal": "Kathmandu",
    "Mongolia": "Ulaanbaatar", "Ghana": "Accra", "Senegal": "Dakar", "Denmark": "Copenhagen",
    "Russia": "Moscow", "Australia": "Canberra", "Belgium": "Brussels", "Switzerland": "Bern",
    "Argentina": "Buenos Aires", "Colombia": "Bogota", "Morocco": "Rabat", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Ukraine": "Kyiv", "South Korea": "Seoul", "the Netherlands": "Amsterdam",
    "the United States": "Washington", "Indonesia": "Jakarta",
}  # fmt: skip

NAMES = "Ada Tom Mia Leo Zoe Max Ivy Sam Eva Ben Lily Finn Nora Hugo Ruth Otis".split()
ANIMALS = "fox cat dog owl bear frog hen mouse rabbit turtle".split()
ADJECTIVES = "little old brave shy happy clever sleepy curious kind quiet".split()
PLACES = "forest garden river hill village beach cave bridge meadow market".split()
OBJECTS = "lantern map key kite drum boat apple shell book ladder".split()
COLOURS = "red blue green yellow white black orange purple".split()
WEATHERS = "sunny rainy cloudy windy snowy foggy".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "fast": "slow", "old": "new", "happy": "sad",
    "open": "closed", "early": "late", "full": "empty", "light": "dark", "wet": "dry",
}  # fmt: skip

# Syllables of words that mean nothing, so that copying is learned as copying.
SYLLABLES = "ba do ki lu mo ne pa ri so ta vu ze".split()

GREETING = "Hello! How can I help you today?"
WHO = "I am the trio-llm demo model, a very small language model."
SKILLS = (
    "I can name capitals, do small sums, count, repeat words, make JSON, call tools, remember what you tell me "
    "and tell short stories."
)
UNKNOWN = "I do not know that. I am only a small demo model: ask me for a capital, a small sum or a story."


def a(word: str) -> str:
    """Put the indefinite article before `word`."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
