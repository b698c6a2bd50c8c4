"""Bytes of a step without data: what is counted, and that every family's model runs on fake weights."""

import itertools

import families_newer
import pytest
import torch
import transformers as T
from families import KINDS, build
from helpers import row, write_clip, write_image
from memory_plans import TEXT, TOTAL
from torch._subclasses.fake_tensor import FakeTensor
from trl.kernels import chunked_divergence, chunked_logprob

from trl_vpo import PreferenceCollator, VisualDPOConfig, VisualDPOTrainer
from trl_vpo.doctor.activation_estimate import TOKEN_CHUNK, Call, DryStep, FakeWeights, tower_features
from trl_vpo.doctor.live_bytes import LiveBytes
from trl_vpo.forward.scoring import VOCAB_CHUNK
from trl_vpo.models.model_size import empty_model

CALL = Call(rows=3, length=20, masked=False, scored=6)


def test_live_bytes_count_storages_until_they_are_freed():
    before = torch.zeros(10)
    live = LiveBytes([before, before.view(2, 5)])
    assert live.now == 40
    with live:
        a = torch.zeros(100)
        b = a.view(10, 10)[2:]
        c = a + 1
        del a, c
        assert live.now == 40 + 400  # the view keeps all of it
        del b
        assert (live.now, live.peak) == (40, 840)
        live.restart()
        torch.zeros(5)
    assert live.peak == 60


def test_live_bytes_are_those_of_the_allocator():
    """torch.profiler reports what the CPU's allocator gives and takes, inside of operations, too."""
    model = T.Qwen2ForCausalLM(T.Qwen2Config(**TEXT))
    ids = torch.zeros(4, 200, dtype=torch.long)
    with LiveBytes([*model.parameters(), *model.buffers(), ids]) as live:
        before = live.now
        model(ids).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(ids).logits.sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert live.peak - before == pytest.approx(max(itertools.accumulate(sizes)), rel=0.05)


def test_trl_kernels_have_the_chunks_that_are_counted():
    assert chunked_logprob.TOKEN_CHUNK_SIZE == chunked_divergence.TOKEN_CHUNK_SIZE == TOKEN_CHUNK
    assert chunked_divergence.VOCAB_CHUNK_SIZE == VOCAB_CHUNK  # we choose that of the log-probs


def test_nothing_is_computed_on_fake_weights():
    """Not by the decompositions of bfloat16 either, which allocate float32 in between."""
    fake = FakeWeights(allow_non_fake_inputs=True)
    weight, bias, states = (fake.empty(shape, torch.bfloat16) for shape in ((4, 3), (4,), (2, 5, 3)))
    with fake:
        assert isinstance(torch.nn.functional.linear(states, weight, bias), FakeTensor)
        assert not isinstance(torch.arange(3) + 1, FakeTensor)  # grids and masks are


def dry(layers=2, **options):
    model = empty_model(T.Qwen2Config(**TEXT | {"num_hidden_layers": layers}))
    return DryStep(model, weights=torch.float32, device="cpu", **options)


def test_a_checkpointed_layer_keeps_its_input():
    two, three = (dry(n).run(CALL) for n in (2, 3))
    assert three.kept - two.kept == 3 * 20 * 8 * 4  # (R, L, H) float32
    assert dry(checkpointing=False).run(CALL).kept > 5 * two.kept


def test_gradients_are_counted_once():
    grown, kept, dropped = (dry(gradients=how).run(CALL) for how in ("grown", "kept", "dropped"))
    assert kept.gradients == dropped.gradients == 0
    assert dropped.peak == pytest.approx(kept.peak, rel=0.05)  # both hold the gradient that is being made
    assert 0 < grown.gradients <= TOTAL * 4
    assert grown.peak - grown.gradients <= kept.peak + 32 * 8 * 4


def test_masks_take_memory():
    none, whole = (dry().run(Call(2, 64, masked, 6)).kept for masked in (False, True))
    assert whole - none == 2 * 64 * 64  # bool


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    return {"image": write_image(folder / "a.png"), "video": write_clip(folder / "a.mp4")}


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_every_family_runs_dry(family, kind, media, tmp_path):
    """The tower's bytes are those of the real one, trained or frozen; the language model's follow checkpointing."""
    model, processor = build(family)
    collator = VisualDPOTrainer.make_collator(processor, VisualDPOConfig(tmp_path, use_cpu=True, bf16=False))
    (trunk,) = collator.encode(row(kind, [media[kind]])).trunks
    model.config.architectures = [type(model).__name__]
    for trained, checkpointing in ((False, True), (True, True), (True, False)):
        empty = empty_model(model.config)
        for part in (model, empty):
            part.requires_grad_(trained)
        step = DryStep(empty, weights=torch.float32, checkpointing=checkpointing, device="cpu")
        real = real_tower(model, trunk.media, checkpointing, trained)
        assert step.run_tower(trunk.media).peak == pytest.approx(real, rel=0.05)
    call = Call(1, 39, False, scored=10, compared=4, features=16, trunks=[(20, [5, 5]), (5, [3])])
    options = {"weights": torch.bfloat16, "autocast": torch.bfloat16}
    lean, rich = (DryStep(empty, **options, checkpointing=on).run(call) for on in (True, False))
    assert 0 < lean.kept < rich.kept < rich.peak


def test_features_of_newer_towers(media):
    """Llama 4 projects later, Perception LM has one method for both kinds, Phi-4-multimodal none: not too little."""
    for family, kind in (("Llama 4", "image"), ("Perception LM", "video"), ("Phi-4-multimodal", "image")):
        model, processor = families_newer.build(family)
        (trunk,) = PreferenceCollator(processor).encode(row(kind, [media[kind]])).trunks
        if family == "Phi-4-multimodal":
            with pytest.raises(ValueError, match="Phi4MultimodalModel has no method of its own"):
                tower_features(model.base_model, trunk.media)
        else:
            assert tower_features(model.base_model, trunk.media)


def real_tower(model, media, checkpointing, trained):
    """The peak of the bytes that a real tower adds."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    with torch.set_grad_enabled(trained), LiveBytes([*model.parameters(), *model.buffers(), *media.values()]) as live:
        held = live.now
        features = tower_features(model.base_model, media)
        if trained:
            sum(x.sum() for x in features).backward()
    model.zero_grad(set_to_none=True)
    return live.peak - held
