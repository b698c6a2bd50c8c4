"""What the model is asked: questions of many topics, neutral prompts, and questions whose answers a rule writes."""

from __future__ import annotations

import re

SHORT = "Answer in two short sentences."
HELD_OUT_EVERY = 5  # of the topics of each kind, one in so many is held out

QUESTIONS = {
    "animals": ("What does a {} eat?", "Where does a {} live?", "How does a {} protect itself?", "Describe a {}."),
    "things": ("What is a {} used for?", "What is a {} made of?", "Who needs a {}?", "How do you clean a {}?"),
    "people": ("What does a {} do?", "Where does a {} work?", "What must a {} know?", "Why do we need a {}?"),
    "nature": ("What causes a {}?", "What does a {} look like?", "Where can you see a {}?", "How long is a {}?"),
    "food": ("How is {} made?", "What does {} taste like?", "When do people eat {}?", "Is {} healthy?"),
}
TOPICS = {
    "animals": "tiger penguin horse spider dolphin rabbit snake whale parrot wolf camel frog shark owl goat turtle "
    "bee fox monkey crocodile",
    "things": "hammer bicycle kettle umbrella telescope ladder pillow candle mirror bucket needle piano tent camera "
    "clock fridge helmet pencil rope lamp",
    "people": "baker doctor teacher pilot farmer plumber judge librarian sailor painter nurse carpenter tailor "
    "gardener chef firefighter dentist musician journalist miner",
    "nature": "volcano rainbow river desert storm glacier earthquake forest tide sunset flood canyon waterfall cloud "
    "comet island lake winter cave beach",
    "food": "bread cheese chocolate soup rice honey pasta yogurt butter salad pizza jam coffee ice-cream tofu popcorn "
    "pancakes sushi curry porridge",
}
NEUTRAL = (
    "Hello! How are you today?",
    "Write one sentence that begins with 'Yesterday'.",
    "Give me a name for a small sailing boat.",
    "Translate 'good morning' into French.",
    "Name three colours.",
    "Write the first line of a story about a lost key.",
    "How do I say no politely?",
    "What is the capital of Japan?",
    "Suggest a title for a blog about running.",
    "Write a short thank-you note to a neighbour.",
    "Explain what a variable is in a computer program.",
    "What should I wear when it rains?",
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
LETTERS = ["A", "B", "C", "D", "E", "F", "G", "H"]


def questions() -> list[dict[str, str]]:
    """All questions with their topic and split; topics that are held out are not trained on in any question."""
    found = []
    for kind, topics in TOPICS.items():
        for place, topic in enumerate(topics.split()):
            split = "held-out" if place % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"
            name = topic.replace("-", " ")
            for question in QUESTIONS[kind]:
                asked = re.sub(r"\ba(?= [aeiou])", "an", question.format(name))
                found.append({"topic": topic, "split": split, "prompt": f"{asked} {SHORT}"})
    return found


def rule_rows() -> list[dict[str, str]]:
    """Questions whose right answer a rule knows, and the same sentence with a wrong end; nothing of it is trained."""
    rows = []
    for kind, order in (("day", DAYS), ("month", MONTHS), ("number", NUMBERS), ("letter", LETTERS)):
        for place in range(6):
            first, right, wrong = order[place], order[place + 1], order[(place + 4) % len(order)]
            sentence = f"The {kind} after {first} is "
            sides = {"right": f"{sentence}{right}.", "wrong": f"{sentence}{wrong}."}
            rows.append({"prompt": f"Which {kind} comes after {first}?", **sides})
    return rows
