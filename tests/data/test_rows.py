"""The row contract: what is accepted in which shapes, and what every broken row is told."""

from datetime import datetime

import numpy as np
import pytest
from helpers import message, row

from trl_vpo.data.rows import place_media, read_row, response_text, row_name
from trl_vpo.errors import RowError


def kinds(messages):
    return [[part["type"] for part in m["content"]] for m in messages]


def test_names_tell_position_id_and_source():
    assert row_name({"_row_index": 7, "id": "a1", "source": "webvid"}) == "row 7 (id 'a1', source 'webvid')"
    assert row_name({"id": None}, 3) == "row 3"


def test_media_go_before_the_first_user_message_of_plain_strings():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    placed = place_media(prompt, images=2, videos=1)
    assert kinds(placed) == [["text"], ["image", "image", "video", "text"]]
    assert placed[1]["content"][3] == {"type": "text", "text": "What is it?"}
    assert prompt[1]["content"] == "What is it?"  # the caller's row is untouched


def test_markers_become_placeholders_where_they_stand():
    prompt = [{"role": "user", "content": "Compare <image>\nwith <image> please."}]
    content = place_media(prompt, images=2, videos=0)[0]["content"]
    assert [p.get("text", p["type"]) for p in content] == ["Compare ", "image", "with ", "image", " please."]


def test_the_order_of_placeholders_of_both_kinds_is_kept():
    prompt = [{"role": "user", "content": "<video>\nand <image>"}]
    assert kinds(place_media(prompt, images=1, videos=1)) == [["video", "text", "image"]]


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
    made = read_row(example)
    assert made.prompt == turn and response_text(made.chosen) == "A cat."


def test_singular_columns_and_strings():
    made = read_row({"prompt": "<image> What?", "chosen": "A", "rejected": "B", "image": "a.png", "video": None})
    assert made.images == ["a.png"] and made.videos == [] and made.prompt == "<image> What?"


def test_phrases_come_from_offsets_tags_or_the_diff():
    made = read_row(row(None, chosen="a <MASK>red</MASK> car", rejected="a <MASK>blue</MASK> car"), phrases=True)
    assert response_text(made.chosen) == "a red car" and made.chosen_phrases == [(2, 5)]
    made = read_row(row(None, chosen="a red car", rejected="a blue car", chosen_phrases=[[6, 9]]), phrases=True)
    assert made.chosen_phrases == [(6, 9)]
    made = read_row(row(None, chosen="a red car", rejected="a blue car"), phrases=True)
    assert (made.chosen_phrases, made.rejected_phrases) == ([(2, 5)], [(2, 6)])


def test_an_image_list_brings_its_first_image():
    made = read_row(
        row("image", [], image_list=["a.png", "b.png"]) | {"prompt": message("user", "<image>", "What?")},
        image_list=True,
    )
    assert made.images == ["a.png"] and made.image_list == ["a.png", "b.png"]


def test_nulls_that_a_tools_call_gives_are_kept():
    """Arrow stores what a call leaves out as null, too; the tool's description tells which is which."""
    about = {"city": {"type": "string"}, "unit": {"type": ["string", "null"]}, "day": {"type": "string"}, "sum": None}
    tools = [{"function": {"name": "weather", "parameters": {"properties": about, "required": ["city"]}}}]
    arguments = {"city": None, "unit": None, "day": None, "sum": None}
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}]
    made = read_row(row(None) | {"rejected": call, "tools": tools})
    assert made.rejected[0]["tool_calls"][0]["function"]["arguments"] == {"city": None, "unit": None}
    assert "sum" not in made.template_kwargs["tools"][0]["function"]["parameters"]["properties"]
    made = read_row(row(None) | {"rejected": call})
    assert made.rejected[0]["tool_calls"][0]["function"]["arguments"] == {}


def test_markers_are_plain_text_where_there_are_no_media():
    prompt = message("user", "What does the <video> tag of HTML do?")
    assert read_row(row(None) | {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("phrases", [False, True])
def test_tags_are_taken_out_of_responses_whoever_reads_them(phrases):
    tagged = {"chosen": "a <MASK> red </MASK> car", "rejected": "a <MASK> blue </MASK> car"}
    made = read_row(row(None, **tagged), phrases=phrases)
    assert (response_text(made.chosen), response_text(made.rejected)) == ("a red car", "a blue car")
    made = read_row({"prompt": "What?", **tagged}, phrases=phrases)
    assert (made.chosen, made.rejected) == ("a red car", "a blue car")


def test_tags_are_taken_out_of_every_message_of_a_response():
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    answer = message("assistant", "It is <MASK>red</MASK>.")
    made = read_row(row(None) | {"chosen": [call, {"role": "tool", "content": "a <MASK>red</MASK> car"}, *answer]})
    assert response_text(made.chosen) == "a red carIt is red." and made.chosen[0]["tool_calls"]


def asking(part):
    """A row whose prompt has this part."""
    return row(None) | {"prompt": [{"role": "user", "content": [part]}]}


TWO = message("user", "<video>", "<video>", "Compare.")
BROKEN = [
    (row("video", ["a.mp4"]) | {"prompt": TWO}, {}, r"2 video placeholder\(s\), but the row has 1 video"),
    (
        row("video", ["a.mp4"]) | {"prompt": message("user", "What?")},
        {},
        r"0 video placeholder\(s\), but the row has 1",
    ),
    (row(None) | {"prompt": message("user", "<image>", "What?")}, {}, r"1 image placeholder\(s\), but the row has 0"),
    (row(None, rejected="a red square moves left."), {}, "chosen and rejected are identical"),
    (row(None, chosen=" "), {}, "the chosen response is empty"),
    (row(None, rejected=""), {}, "the rejected response is empty"),
    (row(None) | {"prompt": []}, {}, "has an empty prompt"),
    (
        row(None) | {"prompt": [{"role": "user", "content": None}]},
        {},
        "has an empty prompt: the last message .user. says",
    ),
    (
        row(None) | {"prompt": [{"role": "user", "content": []}]},
        {},
        "has an empty prompt: the last message .user. says",
    ),
    (
        row(None) | {"prompt": message("system", "Be brief.") + message("user", " ")},
        {},
        "has an empty prompt: the last",
    ),
    (row(None) | {"rejected": None}, {}, "has no `rejected`"),
    (row(None) | {"prompt": "What?"}, {}, "mixes strings and message lists"),
    (row(None) | {"chosen": message("user", "hm")}, {}, "a message that is not the assistant's"),
    (row("image", ["a.png"]) | {"image": "b.png"}, {}, "both `images` and `image`"),
    (row("image", ["a.png"]) | {"images": "a.png"}, {}, "`images` must be a list, got str"),
    (row("image", ["a.png"]) | {"images": ["a.png", None]}, {}, r"nothing at position \[1\]"),
    (
        row(None) | {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        {},
        "carries media inside its message",
    ),
    (asking({"type": "text", "value": "What?"}), {}, "a text part of a message has no `text`"),
    (asking({"type": "text", "text": 7}), {}, "a text part of a message has no `text`"),
    (asking({"type": "input_text", "text": "What?"}), {}, "needs a `type` of text, image or video"),
    (asking({"type": "image_url", "image_url": {"url": "a.png"}}), {}, "needs a `type` of text, image or video"),
    (
        row(None) | {"chosen": [{"role": "assistant", "content": [{"type": "text", "content": "a car"}]}]},
        {"phrases": True},
        "a text part of a message has no `text`",
    ),
    (row(None) | {"rejected": message("assistant", "<image>", "a car")}, {}, "the rejected response holds media"),
    (
        row("image", ["a.png"]) | {"prompt": message("user", "<image>", "<image>\nWhat?")},
        {},
        "text part of the prompt says `<image>`",
    ),
    (
        row("video", ["a.mp4"]) | {"prompt": message("user", "<video>", "What is in the <image>?")},
        {},
        "text part of the prompt says `<image>`",
    ),
    (row(None, chosen="a <MASK>red</MASK> car", rejected="a red car"), {}, "chosen and rejected are identical"),
    (row(None, chosen="<MASK></MASK>"), {}, "the chosen response is empty"),
    (row(None, chosen_phrases=[[0, 99]]), {"phrases": True}, "phrase"),
    (row(None, chosen_phrases=[[0, 3], [2, 5]]), {"phrases": True}, "overlap"),
    (row(None, chosen_phrases=[], rejected_phrases=[]), {"phrases": True}, "phrase"),
    (row(None, chosen="a red car", rejected="a  red car"), {"phrases": True}, "phrase"),
    (row("image", ["a.png"]), {"image_list": True}, "needs a `critical_box`"),
    (
        row("image", ["a.png"], image_list=["a.png"]),
        {"image_list": True},
        r"1 image\(s\); a ranking needs at least two",
    ),
    (row("video", ["a.mp4"], critical_box=[0, 0, 1, 1]), {"image_list": True}, "LPOI ranks images"),
    (row("image", ["a.png", "b.png"], critical_box=[0, 0, 1, 1]), {"image_list": True}, "exactly one image"),
]


@pytest.mark.parametrize(("example", "needs", "says"), BROKEN, ids=[says[:40] for *_, says in BROKEN])
def test_a_broken_row_is_refused_by_name(example, needs, says):
    with pytest.raises(RowError, match=says) as caught:
        read_row(example | {"_row_index": 3, "id": "x9"}, **needs)
    assert str(caught.value).startswith("row 3 (id 'x9'): ")


# --- layouts of others, names that are nearly right, values of other types -----------------------------------------

TURN = [{"from": "human", "value": "<image>What is it?"}]
SAID = {"from": "gpt", "value": "A cat."}
LAYOUTS = [
    (
        {"conversations": TURN, "chosen": SAID, "rejected": SAID | {"value": "A dog."}},
        "`chosen` .*import llamafactory",
    ),
    ({"messages": TURN, "chosen": "A", "rejected": "B"}, "has no `prompt`.* `messages` are.*import llamafactory"),
    (
        {"question": "What?", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png"},
        "`question` are not read. Rename",
    ),
    ({"question": "What?", "chosen": "It is a", "rejected": "It is b"}, "has no `prompt`.* `question`"),
    ({"messages": [], "rejected_response": "A dog."}, "has no `chosen`.*import ms-swift"),
    ({"question": "?", "answer": "A", "pred": "B", "video": "a.mp4"}, "has no `chosen`.*`answer`, .*import rrpo"),
    ({"img_path": "a.png", "chosen": "A", "rejected": "B"}, "has no `prompt`.* `img_path` .*import lpoi"),
    ({"conversations": TURN, "image": "a.png"}, "has no `chosen`.*`conversations` are not read. Rename"),
    ({"instruction": "What?", "input": "", "output": ["A", "B"]}, "has no `chosen`.*`input`, `instruction`, `output`"),
    ({"text": "{}", "image": "a.png", "ds_name": "x"}, "has no `chosen`.*`ds_name`, `text` are not read"),
    (
        {"prompt": "What?", "messages": [], "chosen": message("user", "What?"), "rejected": message("user", "What?")},
        "mixes strings and message lists.*leave `prompt` out",
    ),
]


@pytest.mark.parametrize(("example", "says"), LAYOUTS, ids=[" ".join(example) for example, _ in LAYOUTS])
def test_rows_of_another_layout_name_their_importer(example, says):
    with pytest.raises(RowError, match=says):
        read_row(example)


def test_an_implicit_prompt_beside_columns_of_scores():
    turn = message("user", "What is it?")
    example = {"chosen": turn + message("assistant", "A cat."), "rejected": turn + message("assistant", "A dog.")}
    assert (
        read_row(example | {"score_chosen": 8.0, "score_rejected": 2.0, "messages": turn, "prompt": None}).prompt
        == turn
    )


NEAR = {
    "chosen_phrase": "chosen_phrases",
    "rejected_phrasees": "rejected_phrases",
    "image_lists": "image_list",
    "critical_boxes": "critical_box",
    "critical_bbox": "critical_box",
    "imageList": "image_list",
    "Images": "images",
    "vidoes": "videos",
    "promt": "prompt",
    "tool": "tools",
    "chat-template-kwargs": "chat_template_kwargs",
}
FAR = ["ids", "sources", "image_id", "video_id", "video_path", "prompt_id", "score_chosen", "question", "chosen_model"]
FAR += [
    "answer",
    "options",
    "split",
    "image_path",
    "idx",
    "data_source",
    "rejected_score",
    "critical",
    "trust",
    "list",
]


@pytest.mark.parametrize("name", NEAR)
def test_a_column_that_is_nearly_right_is_named(name):
    with pytest.raises(RowError, match=f"column `{name}`, which is not read. Did you mean `{NEAR[name]}`"):
        read_row(row(None) | {name: [1]})
    read_row(row(None) | {name: None})  # of other rows


def test_columns_that_are_near_nothing_are_left_alone():
    read_row(row(None) | dict.fromkeys(FAR, "x"))


def ranked(**more):
    return row("image", ["a.png"]) | more


WRONG = [
    (row(None, chosen_phrases=3), {"phrases": True}, "`chosen_phrases` must be a list, got int"),
    (ranked(critical_box=5), {"image_list": True}, "`critical_box` must be a list, got int"),
    (ranked(critical_box="0,0,5,5"), {"image_list": True}, "`critical_box` must be a list, got str"),
    (ranked(image_list=3), {}, "`image_list` must be a list, got int"),
    (ranked(image_list="a.png"), {"image_list": True}, "`image_list` must be a list, got str"),
    (ranked(image_list=["a.png", None]), {"image_list": True}, r"`image_list` has nothing at position \[1\]"),
    (ranked(image_list=["b.png", "c.png"]), {"image_list": True}, "an image beside its `image_list`"),
    (row(None, tools="[{"), {}, "`tools` is not JSON"),
    (row(None, tools='{"a": 1}'), {}, "`tools` must be a list"),
    (row(None, chat_template_kwargs=[1]), {}, "`chat_template_kwargs` must be a dictionary"),
    (row(None) | {"chosen": datetime(2024, 1, 5)}, {}, r"`chosen` is neither .* took a text for a time"),
    (row(None) | {"prompt": 5}, {}, "`prompt` is neither a string nor a list of messages"),
    (row(None) | {"prompt": [{"role": "user", "content": 5}]}, {}, "a `content` of the type int"),
    (row(None) | {"prompt": [{"role": None, "content": "x"}]}, {}, "`prompt` is neither"),
    (
        row(None, rejected="\u200b\u2060\ufeff\u3164 "),
        {},
        "rejected response is empty, of characters that show nothing",
    ),
    ({"prompt": "\u200b", "chosen": "a", "rejected": "b"}, {}, "has an empty prompt"),
    ({"prompt": "x", "chosen": "\ud83d", "rejected": "b"}, {}, "half a surrogate pair"),
    ({"chosen": "", "rejected": "b"}, {}, "has no `prompt` and an empty response"),
]


@pytest.mark.parametrize(("example", "needs", "says"), WRONG, ids=[says[:40] for *_, says in WRONG])
def test_values_of_a_wrong_type_are_refused(example, needs, says):
    with pytest.raises(RowError, match=rf"row 3: .*{says}"):
        read_row(example | {"_row_index": 3}, **needs)


def test_an_image_beside_its_list_may_be_its_first():
    example = row("image", ["a.png"], image_list=["a.png", "b.png"])
    assert read_row(example, image_list=True).image_list == ["a.png", "b.png"]
    example = row("image", [{"path": "a.png", "bytes": None}], image_list=[{"path": "a.png"}, {"path": "b.png"}])
    assert len(read_row(example, image_list=True).image_list) == 2


def test_columns_of_numpy():
    made = read_row(row(None, chosen="a red car", chosen_phrases=np.array([[2, 5]])), phrases=True)
    assert made.chosen_phrases == [(2, 5)]
    assert read_row(ranked(critical_box=np.array([1, 2, 3, 4])), image_list=True).critical_box == [1, 2, 3, 4]
