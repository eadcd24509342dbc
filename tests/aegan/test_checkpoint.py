import json
from pathlib import Path

import pytest
import torch

from aegan.training import checkpoint
from aegan.training.run_folder import step_name


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


@pytest.mark.fault("killed processes")
def test_the_latest_is_the_highest_step_and_half_written_ones_do_not_count(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (20, 100, 3):
        save(tmp_path, step)
    (tmp_path / ".step-00000200.tmp").mkdir()  # what a killed writer leaves behind
    assert checkpoint.latest(tmp_path) == tmp_path / step_name(100)
    assert checkpoint.steps(tmp_path) == [3, 20, 100]


@pytest.mark.fault("killed processes")
def test_a_leftover_of_a_killed_writer_does_not_disturb_the_next_one(tmp_path):
    leftover = tmp_path / ".step-00000005.tmp"
    leftover.mkdir()
    (leftover / "state.safetensors").write_bytes(b"half")
    save(tmp_path, 5)
    assert not leftover.exists()
    checkpoint.load(tmp_path / step_name(5))


@pytest.mark.fault("killed processes")
def test_wherever_a_replacement_is_cut_off_one_of_both_checkpoints_is_there(tmp_path, monkeypatch):
    class CutOff(BaseException):
        """A power cut."""

    rename = Path.rename
    for moment in range(3):
        folder = tmp_path / str(moment)
        save(folder, 4)
        save(folder, 5)
        left = iter(range(moment))

        def cut(path: Path, target: Path, left=left) -> Path:
            if next(left, None) is None:
                raise CutOff
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", cut)
            if moment < 2:
                with pytest.raises(CutOff):
                    save(folder, 5)
            else:
                save(folder, 5)
        assert checkpoint.latest(folder) == folder / step_name(5)
        save(folder, 5)
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.fault("damaged files")
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


@pytest.mark.fault("damaged files")
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


def test_going_back_forgets_what_lies_ahead_and_what_was_half_written(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / ".step-00000002.tmp").mkdir()
    checkpoint.forget_after(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_pruning_keeps_the_best_the_newest_and_the_newest_regular_ones(tmp_path):
    for step in (0, 10, 20, 30, 40, 43, 47):  # the last two from early stops
        save(tmp_path, step)
    checkpoint.prune(tmp_path, kept=2, interval=10, best=10)
    assert checkpoint.steps(tmp_path) == [10, 30, 40, 47]


@pytest.mark.fault("damaged files")
def test_to_resume_the_newest_sound_checkpoint_is_taken_and_damaged_ones_passed_over(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / step_name(3) / checkpoint.TENSORS).write_bytes(b"")
    assert checkpoint.latest(tmp_path) == tmp_path / step_name(2)
    state = tmp_path / step_name(2) / checkpoint.STATE
    state.write_text(state.read_text().replace('"b": 1', '"b": 2'))  # sound JSON, but not ours
    assert checkpoint.latest(tmp_path) == tmp_path / step_name(1)
    (tmp_path / step_name(1) / checkpoint.STATE).unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint in .* delete .* anew"):
        checkpoint.latest(tmp_path)
    assert checkpoint.steps(tmp_path) == [1, 2, 3]  # nothing is deleted


@pytest.mark.fault("damaged files")
def test_to_resume_stray_files_among_the_checkpoints_do_not_count(tmp_path):
    save(tmp_path, 5)
    for name in ("step-00000009", "step-00000007.zip", "notes.txt", ".DS_Store"):
        (tmp_path / name).write_text("x")
    assert checkpoint.steps(tmp_path) == [5]
    save(tmp_path, 9)
    assert checkpoint.steps(tmp_path) == [5, 9]


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("content", ["null", "[]", "{}", "5", '{"state_sha256": 1}', "[" * 99_999])
def test_a_state_of_another_kind_is_a_damaged_one_when_a_run_resumes(tmp_path, content):
    path = save(tmp_path, 5)
    (path / checkpoint.STATE).write_text(content)
    with pytest.raises(checkpoint.CheckpointError, match="step-00000005 is damaged"):
        checkpoint.load(path)


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
