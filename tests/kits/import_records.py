"""One literal record of each format that `trl-vpo import` reads."""

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
RECORDS = {"rrpo": RRPO, "lpoi": LPOI, "ms-swift": SWIFT, "llamafactory": FACTORY, "llava-hound": HOUND}
