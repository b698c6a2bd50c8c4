"""Noun phrases of captions, questions and answers."""

import pytest

from trl_vpo.generate.objects.nouns import Candidate, candidates, noun_phrases, split_first_sentence

CAPTIONS = {  # text: its phrases
    # the small world and short answers
    "a red square and a blue circle.": "red square, blue circle",
    "a red square moves left.": "red square",
    "dog.": "dog",
    # descriptions
    "The image features a brown dog sitting on a wooden bench in a park.": "brown dog, wooden bench, park",
    "A man rides a brown horse along the beach while a woman watches him.": "man, brown horse, beach, woman",
    "In the image, a group of people are gathered around a dining table with plates of food and wine glasses.":
        "person, dining table, plate, food, wine glasses",
    "The man is wearing a white shirt, black pants, and a pair of sunglasses.":
        "man, white shirt, black pants, sunglasses",
    "A black and white cat is lying on top of a laptop keyboard.": "black and white cat, laptop keyboard",
    "A large, brown teddy bear sits on a child's bed.": "large brown teddy bear, child, bed",
    "Three zebras graze in a lush, green field with tall trees in the background.":
        "zebra, lush green field, tall tree",
    "A bus stop sign is visible on the left side of the street, next to a parked silver car.":
        "bus stop sign, street, parked silver car",
    "The bathroom is clean and bright, featuring a large mirror above the sink and a white toilet.":
        "bathroom, large mirror, sink, white toilet",
    "There are three men; one holds a bat, another watches, and two are sitting on the grass.": "man, bat, grass",
    "A dog that stands on its hind legs catches a light blue frisbee.": "dog, hind leg, light blue frisbee",
    "A traffic light hangs above the intersection, showing a red light.": "traffic light, intersection, red light",
    "The giraffe's head is reaching over the fence to eat leaves from a tree.": "giraffe, head, fence, leaf, tree",
    "Two young boys are playing soccer on a grassy field while their parents watch from the sidelines.":
        "young boy, soccer, grassy field, parent, sideline",
    "The pizza is topped with tomatoes, olives, and cheese, and sits on a wooden cutting board.":
        "pizza, tomato, olive, cheese, wooden cutting board",
    "The living room features a gray couch, a coffee table, and a flat screen TV mounted on the wall.":
        "living room, gray couch, coffee table, flat screen tv, wall",
    "The dining room table is set with plates, forks, knives, and wine glasses.":
        "dining room table, plate, fork, knife, wine glasses",
    "The presence of multiple surfboards suggests that the beach is a popular destination for surfing.":
        "surfboard, beach",
    "There is snow on the ground and a skier in a red jacket going down the slope.":
        "snow, ground, skier, red jacket, slope",
    "A close-up view of a smartphone and a pair of scissors on a table.": "smartphone, scissors, table",
    "No, the man isn't wearing a hat; he is holding a tennis racket.": "man, hat, tennis racket",
    "In addition to the main dish, there are a few cars parked along the side of the road.": "dish, car, road",
    "A very large double-decker old red bus": "double-decker old red bus",  # the last words count
    "He is eating an orange next to an orange cat.": "orange, orange cat",
    "The train, which is yellow and green, is pulling into the station.": "train, station",
    # questions
    "<image>\nIs there a traffic light in the image?": "traffic light",
    "What color is the bus on the right?": "bus",
    "What is the man holding in his hand?": "man, hand",
    "Please provide a short description for this region: the cat on the sofa.": "cat, sofa",
    # nothing to point at
    "Describe this image in detail.": "",
    "Overall, the scene conveys a sense of relaxation and enjoyment.": "",
    "It is asleep.": "",
    "She is very happy and calm.": "",
    "The bananas are green and unripe.": "banana",
    "": "",
    "图中有一只狗。": "",
    "12 / 5 ... !?": "",
}  # fmt: skip


@pytest.mark.parametrize("text", CAPTIONS, ids=lambda text: text[:40] or "empty")
def test_phrases(text):
    assert ", ".join(noun_phrases(text)) == CAPTIONS[text]


@pytest.mark.parametrize(
    "verb", ["sits", "stands", "rides", "walks", "wears", "carries", "catches", "flies", "plays", "shows", "lies"]
)
def test_verbs_are_left_out(verb):
    assert noun_phrases(f"A tall man {verb} near the old car.") == ["tall man", "old car"]
    assert noun_phrases(f"It {verb} the ball.") == ["ball"]


@pytest.mark.parametrize("head", ["image", "picture", "photo", "video", "scene", "background", "question", "thing"])
def test_heads_that_are_no_object_are_left_out(head):
    assert noun_phrases(f"A {head} with a red kite.") == noun_phrases(f"The red kite in the {head}.") == ["red kite"]


@pytest.mark.parametrize("side", ["left", "right", "top", "middle", "left side", "bottom right corner"])
def test_places_are_left_out(side):
    assert noun_phrases(f"The kite on the {side}") == ["kite"]


@pytest.mark.parametrize(
    ("text", "first", "rest"),
    [
        ("A dog. A cat.", "A dog.", "A cat."),
        ("Mr. Smith waves. He smiles.", "Mr. Smith waves.", "He smiles."),
        ("It costs 3.50 dollars. Cheap!", "It costs 3.50 dollars.", "Cheap!"),
        ('The sign says "Stop." A car waits.', 'The sign says "Stop."', "A car waits."),
        ("No. There is a cat.", "No.", "There is a cat."),
        ("Objects:\n1. a dog\n2. a cat", "Objects:\n", "1. a dog\n2. a cat"),
        ("no end", "no end", ""),
        ("  ", "", ""),
    ],
)
def test_first_sentence(text, first, rest):
    assert split_first_sentence(text) == (first, rest)


def test_candidates_come_in_the_methods_order_and_once():
    found = candidates(
        "What is the dog next to the bench doing?",
        "The dog chases a red ball. A child watches the dog from a bench, near a tree.",
    )
    assert found == [
        Candidate("dog", "first sentence"),
        Candidate("red ball", "first sentence"),
        Candidate("bench", "question"),
        Candidate("child", "rest"),
        Candidate("tree", "rest"),
    ]


@pytest.mark.parametrize(
    "question, response, found",
    [
        ("Is there a dog in the image?", "No.", []),
        ("Is there a dog in the image?", "No, there is no dog.", []),
        ("Is there a dog in the image?", "There is no dog, but there is a cat.", ["cat"]),
        ("Is there a dog in the image?", "Yes.", ["dog"]),
        ("What is on the table?", "It isn't a cup, it is a plate without a spoon.", ["plate", "table"]),
    ],
)
def test_what_the_response_denies_is_no_candidate(question, response, found):
    assert [candidate.text for candidate in candidates(question, response)] == found
