"""The row contract: which shapes are accepted, and how every broken row is refused."""

from datetime import datetime

import numpy as np
import pytest
from helpers import message, row
from PIL import Image

from trl_vpo.data.messages import place_media, typed_content
from trl_vpo.data.rows import read_row, response_text, row_name
from trl_vpo.errors import RowError


def kinds(messages):
    return [[part["type"] for part in m["content"]] for m in messages]


def test_names_tell_position_id_and_source():
    assert row_name({"_row_index": 7, "id": "a1", "source": "webvid"}) == "row 7 (id 'a1', source 'webvid')"
    assert row_name({"id": None}, 3) == "row 3"


def test_markers_become_placeholders_in_their_order():
    prompt = [{"role": "user", "content": "Compare <image>\nwith <image> please."}]
    content = place_media(prompt, images=2, videos=0)[0]["content"]
    assert [p.get("text", p["type"]) for p in content] == ["Compare ", "image", "\nwith ", "image", " please."]
    prompt = [{"role": "user", "content": "<video>\nand <image>"}]
    assert kinds(place_media(prompt, images=1, videos=1)) == [["video", "text", "image"]]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("<image>\nWhat?", ["image", "What?"]),
        ("\n<image> <image>\n\nWhat?", ["image", "image", "\nWhat?"]),
        ("What?\n\n<image>\n<image>\n", ["What?\n", "image", "image"]),
        ("Image-1: <image>\nImage-2: <image>\nWhat?", ["Image-1: ", "image", "\nImage-2: ", "image", "\nWhat?"]),
        ("Compare:\n<image>\n<image>\n\nWhich?", ["Compare:\n", "image", "\n", "image", "\n\nWhich?"]),
        ("<image>\n\n", ["image"]),
    ],
)
def test_line_breaks_in_the_middle_stay(content, parts):
    typed = typed_content(content, "user")
    assert [part.get("text", part["type"]) for part in typed] == parts


def test_without_markers_media_go_before_the_first_user_turn():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    placed = place_media(prompt, images=2, videos=1)
    assert kinds(placed) == [["text"], ["image", "image", "video", "text"]]
    assert placed[1]["content"][3] == {"type": "text", "text": "What is it?"}
    assert prompt[1]["content"] == "What is it?"  # the caller's row is untouched


def test_none_keys_that_arrow_adds_are_dropped():
    example = row("image", ["a.png"])
    example["prompt"][0]["content"][0]["text"] = None
    example["prompt"][0]["content"][1]["image"] = None
    example["prompt"][0]["tool_calls"] = None
    prompt = read_row(example).prompt
    assert prompt == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}
    ]


def test_an_implicit_prompt_is_found():
    turn = message("user", "What is it?")
    example = {"chosen": turn + message("assistant", "A cat."), "rejected": turn + message("assistant", "A dog.")}
    read = read_row(example | {"score_chosen": 8.0, "score_rejected": 2.0, "messages": turn, "prompt": None})
    assert read.prompt == turn and response_text(read.chosen) == "A cat."


def test_singular_columns_and_strings():
    read = read_row({"prompt": "<image> What?", "chosen": "A", "rejected": "B", "image": "a.png", "video": None})
    assert read.images == ["a.png"] and read.videos == [] and read.prompt == "<image> What?"


def test_phrases_come_from_offsets_tags_or_the_diff():
    read = read_row(row(None, chosen="a <MASK>red</MASK> car", rejected="a <MASK>blue</MASK> car"), phrases=True)
    assert response_text(read.chosen) == "a red car" and read.chosen_phrases == [(2, 5)]
    read = read_row(row(None, chosen="a red car", rejected="a blue car", chosen_phrases=[[6, 9]]), phrases=True)
    assert read.chosen_phrases == [(6, 9)]
    read = read_row(row(None, chosen="a red car", rejected="a blue car"), phrases=True)
    assert (read.chosen_phrases, read.rejected_phrases) == ([(2, 5)], [(2, 6)])


def test_an_image_list_brings_or_repeats_its_first_image():
    asked = {"prompt": message("user", "<image>", "What?")}
    read = read_row(row("image", [], image_list=["a.png", "b.png"]) | asked, media_form="ranking")
    assert read.images == ["a.png"] and read.media_list == [(["a.png"], []), (["b.png"], [])]
    assert len(read_row(row("image", ["a.png"], image_list=["a.png", "b.png"]), media_form="ranking").media_list) == 2
    listed = [{"path": "a.png"}, {"path": "b.png"}]
    example = row("image", [{"path": "a.png", "bytes": None}], image_list=listed)
    assert read_row(example, media_form="ranking").media_list == [([item], []) for item in listed]


def test_reading_a_row_reads_no_pixels(tmp_path):
    """A cut file is the media check's to report, which names it."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "a.bmp").read_bytes()[:2000])
    listed = [Image.open(tmp_path / name) for name in ("cut.bmp", "a.bmp")]
    read = read_row(row("image", listed[:1], image_list=listed), media_form="ranking")
    assert [item for (item,), _ in read.media_list] == listed


def test_nulls_that_a_tools_call_gives_are_kept():
    """Arrow stores what a call leaves out as null, too; the tool's description tells which is which."""
    about = {"city": {"type": "string"}, "unit": {"type": ["string", "null"]}, "day": {"type": "string"}, "sum": None}
    tools = [{"function": {"name": "weather", "parameters": {"properties": about, "required": ["city"]}}}]
    arguments = {"city": None, "unit": None, "day": None, "sum": None}
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}]
    read = read_row(row(None) | {"rejected": call, "tools": tools})
    assert read.rejected[0]["tool_calls"][0]["function"]["arguments"] == {"city": None, "unit": None}
    assert "sum" not in read.template_kwargs["tools"][0]["function"]["parameters"]["properties"]
    read = read_row(row(None) | {"rejected": call})
    assert read.rejected[0]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("phrases", [False, True])
def test_tags_are_taken_out_of_responses_whoever_reads_them(phrases):
    tagged = {"chosen": "a <MASK> red </MASK> car", "rejected": "a <MASK> blue </MASK> car"}
    read = read_row(row(None, **tagged), phrases=phrases)
    assert (response_text(read.chosen), response_text(read.rejected)) == ("a red car", "a blue car")
    read = read_row({"prompt": "What?", **tagged}, phrases=phrases)
    assert (read.chosen, read.rejected) == ("a red car", "a blue car")


def test_tags_are_taken_out_of_every_message_of_a_response():
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    answer = message("assistant", "It is <MASK>red</MASK>.")
    read = read_row(row(None) | {"chosen": [call, {"role": "tool", "content": "a <MASK>red</MASK> car"}, *answer]})
    assert response_text(read.chosen) == "a red carIt is red." and read.chosen[0]["tool_calls"]
    # a lone tag is a word
    assert response_text(read_row(row(None, chosen="BERT fills <MASK> in.")).chosen) == "BERT fills <MASK> in."


def test_columns_of_numpy():
    read = read_row(row(None, chosen="a red car", chosen_phrases=np.array([[2, 5]])), phrases=True)
    assert read.chosen_phrases == [(2, 5)]
    example = row("image", ["a.png"], critical_box=np.array([1, 2, 3, 4]))
    assert read_row(example, media_form="ranking").critical_box == [1, 2, 3, 4]


def ask(content, role="user"):
    """A row whose prompt is one message with this content."""
    return row(None) | {"prompt": [{"role": role, "content": content}]}


def image(prompt=None, **more):
    """A row with an image."""
    return row("image", ["a.png"]) | more | ({"prompt": prompt} if prompt else {})


TWO, QUESTION = message("user", "<video>", "<video>", "Compare."), message("user", "What?")
BRIEF = message("system", "Be brief.") + message("user", " ")
A, B = message("user", "A") + message("assistant", "a"), message("user", "B") + message("assistant", "b")
UNLIKE = "has no `prompt`, and the turns of `chosen` and `rejected` differ before the response: .*'A'.* and .*'B'"
PART = {"role": "assistant", "content": [{"type": "text", "content": "a car"}]}
SAID_BY_NOBODY = "rejected response is empty, of characters that show nothing"
ANYBODY = [  # a row that no method takes, and what it is refused for
    (row("video", ["a.mp4"]) | {"prompt": TWO}, r"2 video placeholder\(s\), but the row has 1 video"),
    (row("video", ["a.mp4"]) | {"prompt": QUESTION}, r"0 video placeholder\(s\), but the row has 1"),
    (ask([{"type": "image"}]), r"1 image placeholder\(s\), but the row has 0"),
    (row(None, rejected="a red square moves left."), "chosen and rejected are identical"),
    (row(None, chosen=" "), "the chosen response is empty"),
    (row(None, rejected=""), "the rejected response is empty"),
    (row(None, rejected="\u200b\u2060\ufeff\u3164 "), SAID_BY_NOBODY),
    (row(None) | {"prompt": []}, "has an empty prompt"),
    ({"prompt": "\u200b", "chosen": "a", "rejected": "b"}, "has an empty prompt"),
    (ask(None), "has an empty prompt: the last message .user. says"),
    (ask([]), "has an empty prompt: the last message .user. says"),
    (row(None) | {"prompt": BRIEF}, "has an empty prompt: the last"),
    (row(None) | {"rejected": None}, "has no `rejected`"),
    ({"chosen": A, "rejected": B}, UNLIKE),
    ({"chosen": BRIEF[:1] + A, "rejected": BRIEF[:1] + B}, UNLIKE),
    ({"chosen": A[1:], "rejected": B[1:]}, "has no `prompt`. Rename columns"),
    ({"chosen": "", "rejected": "b"}, "has no `prompt` and an empty response"),
    (row(None) | {"prompt": "What?"}, "mixes strings and message lists"),
    (row(None) | {"chosen": message("user", "hm")}, "a message that is not the assistant's"),
    (row(None) | {"chosen": datetime(2024, 1, 5)}, r"`chosen` is neither .* took a text for a time"),
    (row(None) | {"prompt": 5}, "`prompt` is neither a string nor a list of messages"),
    (ask("x", role=None), "`prompt` is neither"),
    (ask(5), "a `content` of the type int"),
    ({"prompt": "x", "chosen": "\ud83d", "rejected": "b"}, "half a surrogate pair"),
    (image(image="b.png"), "both `images` and `image`"),
    (image(images="a.png"), "`images` must be a list, got str"),
    (image(images=["a.png", None]), r"nothing at position \[1\]"),
    (row(None, weight=-0.5), r"`weight` is -0.5, but .* at least 0"),
    (row(None, weight=float("nan")), r"`weight` is nan, but .* at least 0"),
    (row(None, weight="2"), r"`weight` is '2', but .* at least 0"),
    (row(None, weight=True), r"`weight` is True, but .* at least 0"),
    (image(image_list=3), "`image_list` must be a list, got int"),
    (ask([{"type": "image", "image": "a.png"}]), "carries media inside its message"),
    (ask([{"type": "text", "value": "What?"}]), "a text part of a message has no `text`"),
    (ask([{"type": "text", "text": 7}]), "a text part of a message has no `text`"),
    (ask([{"type": "input_text", "text": "What?"}]), "needs a `type` of text, image or video"),
    (ask([{"type": "image_url", "image_url": {"url": "a.png"}}]), "needs a `type` of text, image or video"),
    (row(None) | {"chosen": [PART]}, "a text part of a message has no `text`"),
    (row(None) | {"rejected": message("assistant", "<image>", "a car")}, "the rejected response holds media"),
    (image(message("user", "<image>", "<image>\nWhat?")), "text part of the prompt says `<image>`"),
    (image(message("user", "<image>", "What is in the <video>?")), "text part of the prompt says `<video>`"),
    (row(None, chosen="a <MASK>red</MASK> car", rejected="a red car"), "chosen and rejected are identical"),
    (row(None, chosen="<MASK></MASK>"), "the chosen response is empty"),
    (row(None, rejected="a <MASK>blue</MASK> <MASK> car"), "the rejected response: .*never closed"),
    (row(None, rejected="a blue</MASK> car"), "the rejected response: .*no tag is open"),
    (row(None, chosen="a <MASK>red</MASK> car", rejected="a <MASK>blue car"), "rejected response: .*never closed"),
    (row(None, tools="[{"), "`tools` is not JSON"),
    (row(None, tools='{"a": 1}'), "`tools` must be a list"),
    (row(None, chat_template_kwargs=[1]), "`chat_template_kwargs` must be a dictionary"),
]
RRPO = [
    (row(None, chosen_phrases=[[0, 99]]), "phrase"),
    (row(None, chosen_phrases=[[0, 3], [2, 5]]), "overlap"),
    (row(None, chosen_phrases=[], rejected_phrases=[]), "phrase"),
    (row(None, chosen="a red car", rejected="a  red car"), "phrase"),
    (row(None, chosen_phrases=3), "`chosen_phrases` must be a list, got int"),
]
LPOI = [
    (image(), "needs a `critical_box`"),
    (image(image_list=["a.png"]), r"1 image\(s\); a ranking needs at least two"),
    (row("video", ["a.mp4"]), "needs a `critical_box`"),
    (row("image", ["a.png", "b.png"], critical_box=[0, 0, 1, 1]), "exactly one image"),
    (image(critical_box=5), "`critical_box` must be a list, got int"),
    (image(critical_box="0,0,5,5"), "`critical_box` must be a list, got str"),
    (image(image_list="a.png"), "`image_list` must be a list, got str"),
    (image(image_list=["a.png", None]), r"`image_list` has nothing at position \[1\]"),
    (image(image_list=["b.png", "c.png"]), "beside its `image_list`"),
]
BROKEN = [({}, *case) for case in ANYBODY] + [({"phrases": True}, *case) for case in RRPO]
BROKEN += [({"media_form": "ranking"}, *case) for case in LPOI]


@pytest.mark.parametrize(("needs", "example", "says"), BROKEN, ids=[says[:40] for *_, says in BROKEN])
def test_a_broken_row_is_refused_by_name(needs, example, says):
    with pytest.raises(RowError, match=says) as caught:
        read_row(example | {"_row_index": 3, "id": "x9"}, **needs)
    assert str(caught.value).startswith("row 3 (id 'x9'): ")
