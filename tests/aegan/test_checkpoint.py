import json

import pytest
import torch

from aegan import checkpoint


def save(folder, step, value=1.0):
    return checkpoint.save(
        folder, step, {"w": torch.full((3,), value)}, {"config": {"a": {"b": 1}}}
    )


def test_what_is_saved_is_loaded_exactly(tmp_path):
    tensors = {"a": torch.randn(4, 3), "b": torch.arange(5)}
    path = checkpoint.save(tmp_path, 7, tensors, {"note": "x"})
    loaded, state = checkpoint.load(path)
    assert state["step"] == 7
    assert state["note"] == "x"
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_the_latest_is_the_highest_step_and_half_written_ones_do_not_count(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (20, 100, 3):
        save(tmp_path, step)
    (tmp_path / ".step-00000200.tmp").mkdir()  # what a killed writer leaves behind
    assert checkpoint.latest(tmp_path) == checkpoint.path_of(tmp_path, 100)
    assert checkpoint.steps(tmp_path) == [3, 20, 100]


def test_a_leftover_of_a_killed_writer_does_not_disturb_the_next_one(tmp_path):
    leftover = tmp_path / ".step-00000005.tmp"
    leftover.mkdir()
    (leftover / "state.safetensors").write_bytes(b"half")
    save(tmp_path, 5)
    assert not leftover.exists()
    checkpoint.load(checkpoint.path_of(tmp_path, 5))


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("damage", [b"", b"\x00garbage", None])
def test_a_damaged_checkpoint_is_named_and_never_loaded(tmp_path, file, damage):
    path = save(tmp_path, 5)
    if damage is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(damage)
    with pytest.raises(checkpoint.CheckpointError, match="step-00000005 is damaged"):
        checkpoint.load(path)


def test_one_changed_byte_is_noticed(tmp_path):
    path = save(tmp_path, 5)
    content = bytearray((path / checkpoint.TENSORS).read_bytes())
    content[-1] ^= 1
    (path / checkpoint.TENSORS).write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="hash"):
        checkpoint.load(path)


def test_no_file_of_a_checkpoint_holds_a_pickle(tmp_path):
    path = save(tmp_path, 1)
    assert {file.name for file in path.iterdir()} == {"state.safetensors", "state.json"}
    json.loads((path / "state.json").read_text())
    header = (path / "state.safetensors").read_bytes()
    assert header[8:9] == b"{"  # safetensors: a length, then JSON


def test_the_best_is_the_lowest_score_and_the_first_of_equals(tmp_path):
    assert checkpoint.best(tmp_path) is None
    for step, score in ((1, 3.0), (2, 2.0), (3, 2.0), (4, 5.0)):
        checkpoint.record_score(tmp_path, step, score)
    assert checkpoint.best(tmp_path) == (2, 2.0)


def test_going_back_forgets_what_lies_ahead(tmp_path):
    for step, score in ((1, 3.0), (2, 2.0), (3, 1.0)):
        save(tmp_path, step)
        checkpoint.record_score(tmp_path, step, score)
    checkpoint.forget_after(tmp_path, 2)
    assert checkpoint.best(tmp_path) == (2, 2.0)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_damaged_scores_are_named(tmp_path):
    (tmp_path / checkpoint.SCORES).write_text("")
    with pytest.raises(checkpoint.CheckpointError, match=r"scores.json is damaged .* delete it"):
        checkpoint.best(tmp_path)


def test_pruning_keeps_the_best_the_newest_and_the_newest_regular_ones(tmp_path):
    for step in (0, 10, 20, 30, 40, 43, 47):  # the last two from early stops
        save(tmp_path, step)
    checkpoint.record_score(tmp_path, 10, 1.0)
    checkpoint.prune(tmp_path, kept=2, interval=10)
    assert checkpoint.steps(tmp_path) == [10, 30, 40, 47]


def test_a_changed_configuration_is_refused_with_every_difference_listed():
    saved = {"training": {"learning_rate": 1e-3, "seed": 0}, "loss": {"gamma": 0.0}}
    checkpoint.check_config(saved, saved)
    current = {"training": {"learning_rate": 2e-3, "seed": 0}, "loss": {"gamma": 1.0, "new": 1}}
    with pytest.raises(checkpoint.ConfigChangedError) as error:
        checkpoint.check_config(saved, current)
    message = str(error.value)
    assert "training.learning_rate: 0.001 in the checkpoint, 0.002 now" in message
    assert "loss.gamma: 0.0 in the checkpoint, 1.0 now" in message
    assert "loss.new: None in the checkpoint, 1 now" in message
    assert "seed" not in message
