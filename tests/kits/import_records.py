"""One literal record of each format that `trl-vpo import` reads, and its rows, one by one."""

from collections.abc import Callable, Iterator
from pathlib import Path

from trl_vpo.data.importers import import_files, read_rows
from trl_vpo.errors import ImportFormatError

RRPO = {  # the example of the project's docs/DATA.md, made whole
    "question": "<image>\nThis is a sample question.",
    "answer": "This is a correct or preferred answer.",
    "pred": "This is an incorrect or non-preferred answer.",
    "answer_masked": "This is a <MASK> correct </MASK> or <MASK> preferred </MASK> answer.",
    "pred_masked": "This is an <MASK> incorrect </MASK> or <MASK> non-preferred </MASK> answer.",
    "src": "data-source",
    "sample_id": 0,
    "video": "video.mp4",
}
LPOI = {"img_path": "data/images/1.jpg", "prompt": "What is it?", "chosen": "A dog.", "rejected": "A cat."}
SWIFT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What is in the image, <video>What is in the video?"},
        {"role": "assistant", "content": "An elephant and a lion."},
        {"role": "user", "content": "What does the lion do?"},
        {"role": "assistant", "content": "It runs."},
    ],
    "rejected_response": "It sleeps.",
    "images": ["x.jpg"],
    "videos": ["x.mp4"],
}
FACTORY = {
    "conversations": [{"from": "human", "value": "<image>\n<image>\nWhich is red?"}],
    "chosen": {"from": "gpt", "value": "The first."},
    "rejected": {"from": "gpt", "value": "The second."},
    "images": ["a.jpg", "b.jpg"],
}
HOUND = {
    "id": "v_1",
    "video": "webvid/123",
    "prompt": "What happens?\n<video>",
    "answer": "The ground truth.",
    "chosen": "A dog runs.",
    "rejected": "A cat runs.",
    "chosen_score": 5,
    "rejected_score": 2,
}
ALPACA = {  # the preference form of LLaMA-Factory's data/README.md, with an image and a turn before
    "instruction": "<image>Which is red?",
    "input": "Name the one.",
    "chosen": "The first.",
    "rejected": "The second.",
    "history": [["Look.", "I look."]],
    "system": "Be brief.",
    "images": ["a.jpg"],
}
VIDEOCHAT2 = {  # as `RRPODataset` of pritamqu/RRPO reads it
    "video": "k710/1.mp4",
    "QA": [{"i": "Watch the video.", "q": "What moves?", "a": "A red square."}],
    "QA_NEG": [{"i": "Watch the video.", "q": "What moves?", "a": "A blue square."}],
    "sample_id": 12,
}
RLHF_V = {  # the columns of openbmb/RLHF-V-Dataset; its parquet files hold {"bytes", "path"} in `image`
    "ds_name": "RLHF-V",
    "image": "1.jpg",
    "text": '{"question": "What is it?", "chosen": "A dog.", "rejected": "A cat."}',
    "origin_dataset": "LLaVA-Instruct",
    "origin_split": '{"model": "x"}',
    "idx": 3,
    "image_path": "images/1.jpg",
}
RLAIF_V = {  # the columns of openbmb/RLAIF-V-Dataset
    "ds_name": "RLAIF-V",
    "image": "1.jpg",
    "question": "What is it?",
    "chosen": "A dog.",
    "rejected": "A cat.",
    "origin_dataset": "COCO",
    "origin_split": "{}",
    "idx": "4",
    "image_path": "images/1.jpg",
}
MMPR = {"image": "1.png", "question": "<image>\nWhat is it?", "chosen": "A dog.", "rejected": "A cat.", "id": 5}
ELV_HALLUC_DPO = {  # no record of the authors' file was at hand: what their paper says a pair is
    "video": "videos/1.mp4",
    "prompt": "Describe 00:10-00:20.",
    "chosen": "A man holds a cup.",
    "rejected": "A man holds a flag.",
}
SYMMPO = {  # the columns of Liuwq-bit/SymMPO
    "image_1": "1.jpg",
    "image_2": "2.jpg",
    "question": "What is it?",
    "resp_1_w": "A dog.",
    "resp_1_l": "A cat.",
    "resp_2_w": "A fox.",
    "resp_2_l": "A hen.",
}
PAIRS = {
    "rrpo": RRPO,
    "lpoi": LPOI,
    "ms-swift": SWIFT,
    "llamafactory": FACTORY,
    "llava-hound": HOUND,
    "videochat2": VIDEOCHAT2,
    "rlhf-v": RLHF_V,
    "rlaif-v": RLAIF_V,
    "mmpr": MMPR,
    "elv-halluc-dpo": ELV_HALLUC_DPO,
    "symmpo": SYMMPO,
}

HOUND_QA = {
    "id": "v_1_0",
    "video": "webvid/123",
    "conversations": [
        {"from": "human", "value": "<video>\nWhat moves?"},
        {"from": "gpt", "value": "A red square moves."},
    ],
}
LLAVA_VIDEO = {
    "id": "101",
    "data_source": "0_30_s_academic_v0_1",
    "video": "academic_source/101.mp4",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat moves?\nA. A square\nB. A circle\nAnswer with the letter."},
        {"from": "gpt", "value": "A."},
        {"from": "human", "value": "Where does it go?"},
        {"from": "gpt", "value": "It goes to the right."},
    ],
}
VIDEOCHAT2_IT = {
    "video": "tgif/1.gif",
    "QA": [{"i": "Choose.", "q": "What moves?\nOptions:\n(A) a square\n(B) a circle", "a": "Answer: (A) a square"}],
}
NEXT_QA = {"video": "1.mp4", "question": "What moves", "a0": "a square", "a1": "a circle", "answer": 1, "qid": "7"}
QUESTIONS = {
    "llava-hound-qa": HOUND_QA,
    "llava-video": LLAVA_VIDEO,
    "videochat2-it": VIDEOCHAT2_IT,
    "questions": NEXT_QA,
}
RECORDS = PAIRS | QUESTIONS


def import_rows(
    fmt: str, path, *, media_root=None, media_folder=None, on_reject: Callable[[ImportFormatError], None] | None = None
) -> Iterator[dict]:
    """Give the rows that `convert` writes. `on_reject` takes the errors of bad records; else the first is raised."""
    files = import_files(fmt, Path(path), media_root)
    for _, rows in read_rows(fmt, files, media_folder or Path(path).parent / "pictures"):
        if isinstance(rows, list):
            yield from rows
        elif on_reject is None:
            raise rows
        else:
            on_reject(rows)
