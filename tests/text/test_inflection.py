"""English inflection: plurals and singulars of common nouns, forms of one word, articles."""

import subprocess
import sys

import pytest

from trl_vpo.text.inflection import plurals, singular, stem, with_article

COCO = """
    person people, bicycle bicycles, car cars, motorcycle motorcycles, airplane airplanes, bus buses, train trains,
    truck trucks, boat boats, light lights, hydrant hydrants, sign signs, meter meters, bench benches, bird birds,
    cat cats, dog dogs, horse horses, sheep sheep, cow cows, elephant elephants, bear bears, zebra zebras,
    giraffe giraffes, backpack backpacks, umbrella umbrellas, handbag handbags, tie ties, suitcase suitcases,
    frisbee frisbees, skis skis, snowboard snowboards, ball balls, kite kites, bat bats, glove gloves,
    skateboard skateboards, surfboard surfboards, racket rackets, bottle bottles, glass glasses, cup cups,
    fork forks, knife knives, spoon spoons, bowl bowls, banana bananas, apple apples, sandwich sandwiches,
    orange oranges, carrot carrots, pizza pizzas, donut donuts, cake cakes, chair chairs, couch couches,
    plant plants, bed beds, table tables, toilet toilets, tv tvs, laptop laptops, mouse mice, remote remotes,
    keyboard keyboards, phone phones, microwave microwaves, oven ovens, toaster toasters, sink sinks,
    refrigerator refrigerators, book books, clock clocks, vase vases, scissors scissors, drier driers,
    toothbrush toothbrushes
"""
OTHERS = """
    leaf leaves, child children, tomato tomatoes, fish fish, dress dresses, man men, box boxes, dish dishes,
    lady ladies, cookie cookies, shoe shoes, canvas canvases, octopus octopuses, axis axes, lens lenses, wolf wolves,
    shelf shelves, bookshelf bookshelves, calf calves, foot feet, tooth teeth, goose geese, ox oxen, cactus cacti,
    policewoman policewomen, grandchild grandchildren, pocketknife pocketknives, snowman snowmen, thief thieves,
    puppy puppies, donkey donkeys, photo photos, potato potatoes, movie movies, selfie selfies, hoodie hoodies,
    quiz quizzes, iris irises, mattress mattresses, pants pants, sunglasses sunglasses, grass grass, tennis tennis
"""
PAIRS = [tuple(pair.split()) for pair in (COCO + "," + OTHERS).split(",")]


def test_plurals_of_common_nouns():
    forms = {noun: plurals(noun) for noun, _ in PAIRS}
    missing = {noun: plural for noun, plural in PAIRS if noun != plural and plural not in forms[noun]}
    assert len(PAIRS) > 110 and not missing
    assert plurals("bus") == {"buses", "busses"} and plurals("scarf") == {"scarfs", "scarves"}
    assert plurals("human") == {"humans"} and plurals("broccoli") == {"broccolis"}


def test_singulars_of_common_nouns():
    stays = {"glasses", "axes"}  # worn on the nose; or the tools
    assert {plural: singular(plural) for _, plural in PAIRS if plural not in stays} == {
        plural: noun for noun, plural in PAIRS if plural not in stays
    }
    assert {noun: singular(noun) for noun, _ in PAIRS} == {noun: noun for noun, _ in PAIRS}
    others = ["glasses", "always", "this", "was", "has", "her", "red", "bass", "chess"]
    assert [singular(word) for word in others] == others


@pytest.mark.parametrize(
    "forms",
    [
        "square squares", "box boxes", "city cities", "move moves moved moving", "run runs running", "sit sits",
        "walk walks walked walking", "man men", "dog dog's dogs", "glass glasses", "bus buses", "contain contains",
    ],
)  # fmt: skip
def test_forms_of_a_word_share_their_stem(forms):
    assert len({stem(word) for word in forms.split()}) == 1


@pytest.mark.parametrize(
    "pair", ["red bed", "left lift", "string strong", "this that", "bring brown", "is it", "talking walking"]
)
def test_different_words_stay_apart(pair):
    first, second = pair.split()
    assert stem(first) != stem(second)


def test_articles():
    names = ("dog", "umbrella", "scissors", "wine glass")
    assert list(map(with_article, names)) == ["a dog", "an umbrella", "scissors", "a wine glass"]


def test_the_dictionary_is_loaded_at_the_first_word():
    code = "import sys, trl_vpo.text.chair, trl_vpo.text.choices; print('lemminflect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
