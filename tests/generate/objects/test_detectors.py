"""Zero-shot detectors: the real classes at tiny size, loaded by name, against their own post-processing."""

import contextlib
import json

import numpy as np
import pytest
import torch
import transformers
from detector_models import save
from PIL import Image

from trl_vpo.errors import GenerateError
from trl_vpo.generate.objects.boxes import clip_box
from trl_vpo.generate.objects.detectors import Detector
from trl_vpo.generate.objects.segment import Segmenter

KINDS = ("grounding-dino", "mm-grounding-dino", "owlv2")
LOW = {"grounding-dino": 0.4, "mm-grounding-dino": 0.005, "owlv2": 0.3}  # scores that random weights reach


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def detectors(folders):
    return {kind: Detector(folders[kind], device="cpu", threshold=LOW[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    shapes = [(56, 112), (80, 60), (56, 112)]
    return [Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)) for shape in shapes]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_boxes_and_names_are_those_of_the_processor(kind, detectors, images):
    """Names of one letter are one token, and Grounding DINO's processor then tells which of them a box reaches."""
    detector, image, names = detectors[kind], images[1], ["a", "b", "c"]
    owl = kind == "owlv2"
    text = [["a photo of an a", "a photo of a b", "a photo of a c"]] if owl else "a. b. c."
    inputs = detector.processor(images=[image], text=text, return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    how = {"text_labels": [names]} if owl else {"text_threshold": LOW[kind]}
    (theirs,) = detector.processor.post_process_grounded_object_detection(
        outputs, threshold=LOW[kind] if owl else 0.0, target_sizes=[(image.height, image.width)], **how
    )
    expected = {}  # box: (score, names)
    for box, score, label in zip(theirs["boxes"], theirs["scores"], theirs["text_labels"]):
        if reached := set(label.replace(".", " ").split()) & set(names):
            expected[clip_box(box.tolist(), image.size)] = (score.item(), reached)
    ours = {}
    for d in detector.detect([image], [names])[0]:  # best first
        _, reached = ours.setdefault(d.box, (d.score, set()))
        if not (owl and reached):  # its processor gives the best name only
            reached.add(d.label)
    assert len(expected) > 3 and len({frozenset(reached) for _, reached in expected.values()}) > 1
    assert {box: reached for box, (_, reached) in ours.items()} == {box: names for box, (_, names) in expected.items()}
    equal = [ours[box][0] == pytest.approx(score, abs=1e-5) for box, (score, _) in expected.items()]
    if owl:
        assert all(equal)
    else:  # the full stops can only add to theirs
        assert sum(equal) > 3 and all(ours[box][0] < score + 1e-5 for box, (score, _) in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_in_the_batch_change_nothing(kind, detectors, images):
    names = [["red square", "dog", "a very long name of a thing"], ["tree"], ["cat"]]
    together = detectors[kind].detect(images, names)
    for at in range(3):
        (alone,) = detectors[kind].detect([images[at]], [names[at]])
        assert [(d.label, d.box) for d in alone] == [(d.label, d.box) for d in together[at]]
        assert [d.score for d in alone] == pytest.approx([d.score for d in together[at]], abs=1e-5)


def test_more_names_than_one_text_holds(folders, images):
    detector = Detector(folders["grounding-dino"], device="cpu", threshold=0.0)
    names = [f"{a}bcde{b}" for a in "abcd" for b in "wxyz"]  # 16 names of 7 tokens with the full stop; 64 fit
    assert {d.label for d in detector.detect([images[0]], [names])[0]} == set(names)
    with pytest.raises(GenerateError, match="80 tokens"):
        detector.detect([images[0]], [["x" * 79]])


def test_full_stops_and_capitals_in_names(folders, images):
    detector = Detector(folders["grounding-dino"], device="cpu", threshold=0.0)
    (odd,) = detector.detect([images[0]], [["Mr. Dog?", "cat"]])
    (plain,) = detector.detect([images[0]], [["mr dog", "cat"]])
    assert {d.label for d in odd} == {"Mr. Dog?", "cat"}
    assert [(d.box, d.score) for d in odd if d.label != "cat"] == [(d.box, d.score) for d in plain if d.label != "cat"]


@pytest.mark.parametrize(("kind", "threshold"), [*zip(KINDS, (0.35, 0.35, 0.2))])
def test_no_names_no_detections(kind, threshold, folders, detectors, images):
    nothing, dogs = detectors[kind].detect(images[:2], [[], ["dog"]])
    assert nothing == [] and dogs and detectors[kind].detect([], []) == []
    assert Detector(folders[kind], device="cpu").threshold == threshold


def test_detectors_that_cannot_be_used(folders, images, tmp_path):
    with pytest.raises(GenerateError, match="nowhere cannot be loaded"):
        Detector(str(tmp_path / "nowhere"))
    transformers.SwinConfig().save_pretrained(tmp_path / "swin")
    for loader, kind in ((Detector, "grounding-dino"), (Segmenter, "sam2")):
        with pytest.raises(GenerateError, match=f"of type 'swin'; it must be one of {kind}"):
            loader(str(tmp_path / "swin"))
    broken = Detector(folders["owlv2"], device="cpu")
    with torch.no_grad():
        broken.model.class_head.dense0.weight.fill_(float("nan"))
    with pytest.raises(GenerateError, match="are nan"):
        broken.detect([images[0]], [["dog"]])


@pytest.mark.parametrize("kind, loader", [("grounding-dino", Detector), ("owlv2", Detector), ("sam2", Segmenter)])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "processor_config.json"])
def test_code_beside_the_weights_is_never_run(kind, loader, file, tmp_path, monkeypatch):
    """Neither is a question about it asked, which `yes |` would answer."""
    save(kind, tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w'); raise SystemExit")
    path = tmp_path / file
    config = json.loads(path.read_text()) if path.exists() else {}
    autos = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoModelForZeroShotObjectDetection")
    config = {"auto_map": dict.fromkeys(autos, "evil.Evil")} | config
    if file == "config.json":
        config |= {"model_type": "evil"}
    path.write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(GenerateError):  # a known class is loaded all the same
        loader(str(tmp_path), device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind, loader", [("owlv2", Detector), ("sam2", Segmenter)])
def test_damaged_weights_are_an_error_with_their_path(kind, loader, tmp_path):
    save(kind, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(GenerateError, match=f"{tmp_path} cannot be loaded"):
        loader(str(tmp_path), device="cpu")
