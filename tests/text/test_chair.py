"""Objects found in responses, and those of them that are not there."""

import pytest

from trl_vpo.errors import UserError
from trl_vpo.text.chair import Mention, ObjectTable, read_response, read_synonyms

ALONE = (
    "hot dog",
    "bear",
    "bird",
    "mouse",
    "sheep",
    "bus",
    "potato",
    "wine glass",
    "cup",
    "train",
    "toilet",
    "scissors",
)
SYNONYMS = dict.fromkeys(ALONE, ()) | {
    "person": ["man", "woman", "child", "baby", "passenger", "people"],
    "dog": ["puppy"],
    "teddy bear": ["stuffed teddy bear"],
    "knife": ["pocketknife"],
    "chair": ["seat"],
    "skis": ["ski"],
    "tie": ["bow tie"],
}


@pytest.fixture(scope="module")
def table():
    return ObjectTable(SYNONYMS)


@pytest.mark.parametrize(
    ("response", "objects"),
    [
        ("A man eats a hot dog.", ["person", "hot dog"]),
        ("Two hot dogs and a dog", ["hot dog", "dog"]),
        ("It is hot. Dogs sleep; puppies too.", ["dog", "dog"]),
        ("a hot-dog stand, a man-made hill", ["hot dog"]),
        ("A stuffed teddy bear, teddy-bears, a bear and BEARS!", ["teddy bear", "teddy bear", "bear", "bear"]),
        ("people, children, women and passengers", ["person"] * 4),
        ("knives, pocketknives, mice, sheep, buses, potatoes", ["knife", "knife", "mouse", "sheep", "bus", "potato"]),
        ("wine glasses and cups, a glass of wine", ["wine glass", "cup"]),
        ("the dog's bowl, the dogs' bowls, the puppy’s", ["dog", "dog", "dog"]),
        ("skis, a ski, scissors", ["skis", "skis", "scissors"]),
        ("a hotdog, doggedly, a cupboard, mankind, a birdcage", []),
        ("a baby bird, baby birds and a baby", ["bird", "bird", "person"]),
        ("a baby animal on home plate", []),
        ("a passenger train by the train tracks", ["train"]),
        ("the toilet seat, the seat of the toilet, a seat", ["toilet", "toilet", "chair"]),
        ("**dog** _dog_ \u201cdog\u201d (dog)", ["dog"] * 4),
        ("", []),
    ],
)
def test_mentions(table, response, objects):
    assert [mention.object for mention in table.mentions(response)] == objects


def test_a_mention_holds_the_words_of_the_table(table):
    assert table.mentions("PUPPIES beside bow ties") == [Mention("puppy", "dog"), Mention("bow tie", "tie")]


def test_a_phrase_of_the_table_wins_over_the_published_list():
    assert ObjectTable({"track": ["train track"]}).mentions("train tracks") == [Mention("train track", "track")]
    plain = ObjectTable({"person": ["baby"], "bird": []}, reads_as={})
    assert plain.mentions("baby bird") == [Mention("baby", "person"), Mention("bird", "bird")]


def test_every_mention_counts(table):
    response = "A man, a man and a woman watch a dog, a dog and a puppy."
    row = read_response(response, ["person"], table)
    assert len(row.mentioned) == 6 and row.covered == row.truth == {"person"}
    assert [mention.words for mention in row.hallucinated] == ["dog", "dog", "puppy"]


def test_truth_may_be_named_by_synonyms_and_be_empty(table):
    row = read_response("a dog", ["puppies", "DOG", "Teddy Bear"], table)
    assert row.truth == {"dog", "teddy bear"} and row.covered == {"dog"} and not row.hallucinated
    assert len(read_response("a dog", [], table).hallucinated) == 1


def test_errors_name_the_word(table):
    with pytest.raises(UserError, match="object 'unicorn' is not in the table"):
        read_response("b", ["unicorn"], table)
    with pytest.raises(UserError, match="'turkey' is listed for both 'bird' and 'food'"):
        ObjectTable({"bird": ["turkey"], "food": ["turkey"]})
    with pytest.raises(UserError, match="object 'dog' has an empty word"):
        ObjectTable({"dog": [" "]})
    with pytest.raises(UserError, match="home plate"):
        table.name("home plate")


def test_read_synonyms(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("\ufeffperson, man,  woman, man \n\nhot dog\ndog, puppy,\n", encoding="utf-8")
    synonyms = read_synonyms(path)
    assert synonyms == {"person": ["man", "woman", "man"], "hot dog": [], "dog": ["puppy"]}
    assert [m.object for m in ObjectTable(synonyms).mentions("men, hot dogs, puppies")] == ["person", "hot dog", "dog"]
    path.write_text("dog, puppy\ndog, hound\n")
    with pytest.raises(UserError, match=r"synonyms\.txt, line 2: 'dog' begins a second line"):
        read_synonyms(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="lists no object"):
        read_synonyms(path)
