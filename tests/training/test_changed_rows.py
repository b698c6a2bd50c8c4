"""Rows may change between two parts of a run, if they were not reached; the order of the rest stays."""

from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import BatchSampler, RandomSampler
from transformers import TrainingArguments

from trl_vpo.data.json_files import stream_json
from trl_vpo.training.changed_rows import RemainingRows, Rows, compare_rows, trained_rows
from trl_vpo.training.stream_rows import describe_stream, text_digests

DIGESTS = np.arange(100, 112, dtype=np.uint64)


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), per_device_train_batch_size=2, data_seed=5, use_cpu=True, report_to="none")


def order(args, rows=12):
    """Of the first epoch, as accelerate prepares `Trainer`'s sampler."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    loader = DataLoader(range(rows), sampler=RandomSampler(range(rows)), batch_size=1)
    return [int(i) for i in prepare_data_loader(loader, use_seedable_sampler=True, data_seed=args.data_seed)]


def without(*positions):
    return np.delete(DIGESTS, positions)


def test_the_rows_that_were_trained_on_are_known(args):
    assert trained_rows(args, Rows(DIGESTS), 6) == order(args)[:6]
    assert trained_rows(args, Rows(DIGESTS), 12) == list(range(12))
    args.train_sampling_strategy = "sequential"
    assert trained_rows(args, Rows(DIGESTS), 4) == [0, 1, 2, 3]


def test_a_row_that_was_not_reached_may_go(args):
    """The others keep the order of the whole, and what is left of it is remembered."""
    shuffled = order(args)
    out = shuffled[8]
    rows, refused, note = compare_rows(Rows(DIGESTS), without(out), trained_rows(args, Rows(DIGESTS), 6))
    assert refused is None and f"1 of 12 rows were taken out (counted from 0: {out})" in note
    sampler = RemainingRows(args, rows)
    left = rows.left()
    assert [left[i] for i in sampler] == [i for i in shuffled if i != out]
    assert len(sampler) == 11 and len(BatchSampler(sampler, 2, False)) == 6
    again = Rows(rows.digests, rows.removed)
    assert compare_rows(again, without(out), trained_rows(args, again, 10))[1:] == (None, None)
    later = trained_rows(args, again, 10)
    assert later == [i for i in shuffled if i != out][:10]
    assert "trained on before" in compare_rows(again, without(out, later[9]), later)[1]
    assert compare_rows(again, without(out, shuffled[11]), later)[0].removed == sorted([out, shuffled[11]])
    assert compare_rows(again, DIGESTS, later)[1].startswith("rows: 11 when it was saved, 12 now")  # not back again


def test_what_was_trained_on_may_not_change(args):
    trained = trained_rows(args, Rows(DIGESTS), 6)
    for now in (without(trained[0]), np.where(np.arange(12) == trained[5], 7, DIGESTS).astype(np.uint64)):
        assert "were trained on before" in compare_rows(Rows(DIGESTS), now, trained)[1]
    assert "and more has changed than that" in compare_rows(Rows(DIGESTS), without(0)[::-1], trained)[1]
    assert "and more has changed than that" in compare_rows(Rows(DIGESTS), np.append(DIGESTS, DIGESTS[:1]), [])[1]


def test_a_row_that_was_not_reached_may_be_mended(args):
    trained = trained_rows(args, Rows(DIGESTS), 6)
    mended = order(args)[11]
    now = np.where(np.arange(12) == mended, 7, DIGESTS).astype(np.uint64)
    rows, refused, note = compare_rows(Rows(DIGESTS), now, trained)
    assert refused is None and rows.digests.tolist() == now.tolist() and f"changed (counted from 0: {mended})" in note


@pytest.mark.parametrize(("names", "workers", "trained"), [("a", 2, 3), ("ab", 1, 3), ("ab", 2, 6)])
def test_a_stream_comes_in_the_order_of_its_files(args, tmp_path, names, workers, trained):
    """Workers that share several files may have been on any of their rows."""
    files = [tmp_path / f"{name}.jsonl" for name in names]
    for file in files:
        file.write_text("".join(f'{{"id": "{file.stem}{i}"}}\n' for i in range(6 // len(files))))
    args.dataloader_num_workers = workers
    trainer = SimpleNamespace(args=args, train_dataset=stream_json(files))
    digests = text_digests(files)
    assert len(set(digests)) == 6
    assert trained_rows(args, Rows(digests), 3, describe_stream(trainer, files)) == list(range(trained))
