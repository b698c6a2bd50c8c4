"""Rows of another layout name their importer; names that are nearly right are named."""

import pytest
from helpers import message, row

from trl_vpo.data.rows import read_row
from trl_vpo.errors import RowError

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
        "`question` are not read. .*import mmpr",
    ),
    ({"question": "What?", "chosen": "It is a", "rejected": "It is b"}, "has no `prompt`.* `question`"),
    ({"messages": [], "rejected_response": "A dog."}, "has no `chosen`.*import ms-swift"),
    ({"question": "?", "answer": "A", "pred": "B", "video": "a.mp4"}, "has no `chosen`.*`answer`, .*import rrpo"),
    ({"img_path": "a.png", "chosen": "A", "rejected": "B"}, "has no `prompt`.* `img_path` .*import lpoi"),
    ({"conversations": TURN, "image": "a.png"}, "has no `chosen`.*`conversations` are not read. Rename"),
    (
        {"conversations": TURN, "video": "a.mp4"},
        "has no `chosen`.*`trl-vpo generate` makes pairs.*import llava-video IN OUT` writes",
    ),
    ({"QA": [{}], "video": "a.mp4"}, "has no `chosen`.*`trl-vpo generate`.*import videochat2-it IN OUT`"),
    ({"QA": [{}], "QA_NEG": [{}], "video": "a.mp4"}, "has no `chosen`.*import videochat2 IN OUT` writes"),
    ({"question": "?", "answer": 1, "options": ["A", "B"], "video": "a.mp4"}, "has no `chosen`.*import questions IN"),
    ({"instruction": "What?", "chosen": "A", "rejected": "B"}, "has no `prompt`.*import llamafactory"),
    ({"instruction": "What?", "input": "", "output": ["A", "B"]}, "has no `chosen`.*`input`, `instruction`, `output`"),
    ({"text": "{}", "image": "a.png", "ds_name": "x"}, "has no `chosen`.*`ds_name`, `text` are not.*import rlhf-v"),
    ({"question": "What?", "chosen": "A", "rejected": "B", "image": "a.png", "ds_name": "x"}, "import rlaif-v IN"),
    (
        {"question": "?", "answer": "A", "videos": ["a.mp4"], "id": "1", "source": "llava-hound-qa"},
        "has no `chosen`.*`trl-vpo generate` makes pairs of such rows",
    ),
    ({"task": "yes_no", "question": "?", "answer": "yes", "image": "a.png"}, "held-out row: `trl-vpo evaluate --data"),
    (
        {"task": "yes_no", "contestant": "base", "id": "1", "question": "?", "answer": "yes"},
        "result of `trl-vpo evaluate`, and no row: results.json",
    ),
    ({"question_id": 1, "image": "a.png", "text": "?", "label": "yes"}, "It looks like pope's .*`trl-vpo evaluate`"),
    ({"id": 1, "image": "a.png", "query": "Is it?"}, "import amber IN OUT` writes rows for `trl-vpo evaluate`"),
    ({"id": 1, "image": "a.png", "query": "?", "chosen": "A"}, "has no `rejected`.*`query` are not read. Rename"),
    (
        {"set_id": 3, "figure_id": 1, "question_id": 0, "visual_input": 1, "question": "?", "gt_answer": 1},
        "import hallusionbench IN",
    ),
    ({"video": "a.mp4", "question": "?", "candidates": ["A", "B"], "answer": "A"}, "import tvbench IN"),
    ({"videoID": "a", "question": "?", "options": ["A. x", "B. y"], "answer": "A"}, "import video-mme IN"),
    ({"question": "?", "gt_answer": "A", "image_src": "a", "image_content": ["A"]}, "import mmhal-bench IN"),
    ({"id": "entire_1", "questions": [{}]}, "import eventhallusion IN"),
    (
        {"video": "a", "question": "?", "ref_answer": "Yes", "caption_type": "in_video"},
        "import elv-halluc IN",
    ),
    (
        {"prompt": "What?", "messages": [], "chosen": message("user", "What?"), "rejected": message("user", "What?")},
        "mixes strings and message lists.*leave `prompt` out",
    ),
]


@pytest.mark.parametrize(("example", "says"), LAYOUTS, ids=[" ".join(example) for example, _ in LAYOUTS])
def test_rows_of_another_layout_name_their_importer(example, says):
    with pytest.raises(RowError, match=says):
        read_row(example)


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
    "Weights": "weight",
    "chat-template-kwargs": "chat_template_kwargs",
}
FAR = """
ids sources image_id video_id video_path prompt_id score_chosen question chosen_model answer options split image_path
idx data_source rejected_score critical trust list height
"""


@pytest.mark.parametrize("name", NEAR)
def test_a_column_that_is_nearly_right_is_named(name):
    with pytest.raises(RowError, match=f"column `{name}`, which is not read. Did you mean `{NEAR[name]}`"):
        read_row(row(None) | {name: [1]})
    read_row(row(None) | {name: None})  # of other rows


def test_columns_that_are_near_nothing_are_left_alone():
    read_row(row(None) | dict.fromkeys(FAR.split(), "x"))
