"""Stand-ins of public datasets: the small world's clips and scenes in the files and fields that are published."""

import io
import json
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from trl_vpo.testbed import rows
from trl_vpo.testbed.language import PROMPTS


def _texts(row: dict) -> tuple[str, str]:
    return tuple(row[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))


def write_hound(folder: Path, count: int) -> None:
    """ShareGPTVideo: records with scores, and a folder of JPEG frames for each video."""
    _, pairs = rows.write_preferences("clip", count, 21, folder / "clips")
    records = []
    for number, row in enumerate(pairs):
        name, (chosen, rejected) = f"v_{number:04d}", _texts(row)
        frames = folder / "data/hound/frames" / name
        frames.mkdir(parents=True)
        with av.open(row["videos"][0]) as video:
            for at, frame in enumerate(video.decode(video=0), 1):
                frame.to_image().save(frames / f"c01_{at:04d}.jpeg", quality=95)
        prompt = f"{PROMPTS['clip']}\n<video>"
        record = {"id": name, "video": name, "prompt": prompt, "answer": chosen, "chosen": chosen}
        records.append(record | {"rejected": rejected, "chosen_score": 5, "rejected_score": 2})
    rows.write_jsonl(records, folder / "data/hound/video_instruction/train/dpo/sft_dpo_17k.jsonl")


def write_rlaif_v(folder: Path, count: int) -> None:
    """RLAIF-V: a parquet file with embedded pictures."""
    _, pairs = rows.write_preferences("scene", count, 22, folder / "scenes")
    records = []
    for number, row in enumerate(pairs):
        picture, (chosen, rejected) = io.BytesIO(), _texts(row)
        Image.open(row["images"][0]).save(picture, "JPEG", quality=95)
        record = {"ds_name": "RLAIF-V", "image": {"bytes": picture.getvalue(), "path": f"{number:06d}.jpg"}}
        record |= {
            "question": PROMPTS["scene"],
            "chosen": chosen,
            "rejected": rejected,
            "origin_dataset": "small world",
        }
        records.append(record | {"origin_split": "{}", "idx": str(number), "image_path": f"{number:06d}.jpg"})
    (folder / "data/rlaif-v").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records), folder / "data/rlaif-v/RLAIF-V-Dataset_000.parquet")


def write_rrpo(folder: Path, count: int) -> None:
    """RRPO's release: a JSON list of answers with marked phrases, and mp4 files."""
    _, pairs = rows.write_preferences("clip", count, 23, folder / "data/videos")
    records = []
    for number, row in enumerate(pairs):
        chosen, rejected = _texts(row)
        record = {"question": f"<image>\n{PROMPTS['clip']}", "answer": chosen, "pred": rejected}
        record |= {"answer_masked": _masked(chosen, rejected), "pred_masked": _masked(rejected, chosen)}
        record |= {"src": "small world", "sample_id": number}
        records.append(record | {"video": Path(row["videos"][0]).name})
    (folder / "data/self-alignment").mkdir(parents=True)
    (folder / "data/self-alignment/FILE.json").write_text(json.dumps(records), encoding="utf-8")


def _masked(text: str, other: str) -> str:
    """Mark the words that differ from those in the same place of another text."""
    pairs = zip(text.split(), other.split(), strict=True)
    return " ".join(word if word == another else f"<MASK> {word} </MASK>" for word, another in pairs)


WRITE = {"hound": write_hound, "rlaif-v": write_rlaif_v, "rrpo": write_rrpo}
