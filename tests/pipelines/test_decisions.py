"""The log of decisions: what counts, and what is derived from it, in a store in a file."""

import dataclasses
import json
import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegan.config import RegisterConfig
from pipelines import cli, register
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.registry import champions, decisions, mlflow_store, tracking
from pipelines.registry.decision_log import Decision, fold, succession
from pipelines.serving import served
from tests import deciding
from tests.trained import ROOT, write_project

VERSIONS = st.sampled_from(["1", "2", "3"])
WORDS = {"by": "me", "reasons": (), "reference": "", "time": 0.0, "counts": False}
ENTRIES = st.lists(
    st.builds(
        Decision,
        number=st.integers(1, 100),
        kind=st.sampled_from(["promotion", "refusal", "rollback"]),
        start=st.none() | VERSIONS,
        to=VERSIONS,
        run_id=st.sampled_from(["a", "b"]),  # of a model that was made again
        **{name: st.just(value) for name, value in WORDS.items()},  # type: ignore[arg-type]
    ),
    unique_by=lambda entry: entry.number,
    max_size=20,
)


@given(ENTRIES, st.randoms())
def test_the_champions_are_one_chain_whatever_the_order_in_which_entries_are_read(
    entries: list[Decision], random: Any
) -> None:
    folded = fold(entries)
    assert [entry.number for entry in folded] == sorted(entry.number for entry in entries)
    champion = None
    for entry in folded:
        if entry.counts:
            assert entry.start == (champion.to if champion else None)
        if entry.changes_champion:
            assert not champion or entry.version != champion.version
            champion = entry
    line = succession(folded)
    assert (line[-1] if line else None) == champion
    random.shuffle(entries)
    assert fold(entries) == folded


@given(ENTRIES)
def test_a_later_entry_never_changes_what_counted_before(entries: list[Decision]) -> None:
    folded = fold(entries)
    for length in range(len(folded)):
        assert fold(folded[:length]) == folded[:length]


@given(ENTRIES)
def test_whatever_is_sent_twice_counts_once(entries: list[Decision]) -> None:
    twice = [
        dataclasses.replace(entry, number=2 * entry.number + again)
        for entry in entries
        for again in (0, 1)
    ]
    counted = [entry.number // 2 for entry in fold(twice) if entry.counts]
    assert counted == [entry.number for entry in fold(entries) if entry.counts]


@given(ENTRIES)
def test_only_the_champion_of_the_time_can_be_replaced(entries: list[Decision]) -> None:
    for entry in (folded := fold(entries)):
        before = [one for one in folded if one.number < entry.number and one.changes_champion]
        if entry.kind != "refusal" and (not before or entry.version != before[-1].version):
            assert entry.counts == (entry.start == (before[-1].to if before else None))


def test_rollbacks_go_back_one_by_one() -> None:
    made = [("promotion", None, "1"), ("promotion", "1", "2"), ("promotion", "2", "3")]
    made += [("rollback", "3", "2"), ("rollback", "2", "1")]
    entries = [
        Decision(number=number, kind=kind, start=start, to=to, run_id=to, **WORDS)  # type: ignore[arg-type]
        for number, (kind, start, to) in enumerate(made, start=1)
    ]
    lines = [[one.to for one in succession(fold(entries[:end]))] for end in range(1, 6)]
    assert lines == [["1"], ["1", "2"], ["1", "2", "3"], ["1", "2"], ["1"]]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three versions of `aegan`; tests copy it."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        deciding.make_versions(mlflow_store.open_store().MlflowClient(), 3)
    return folder / "mlflow.db"


@pytest.fixture
def client(stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a copy of that store, whose folder is entered."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("AEGAN_BY", "me@here")
    monkeypatch.chdir(tmp_path)
    Path("mlflow.db").write_bytes(stores.read_bytes())
    Path("mlflow.db").chmod(0o600)
    return mlflow_store.open_store().MlflowClient()


def promote(start: str | None, to: str, **options: Any) -> Decision:
    return decisions.decide("aegan", kind="promotion", start=start, to=to, reasons=["x"], **options)


def test_a_server_that_is_told_no_model_serves_the_champion_else_the_last_registered(
    client: Any,
) -> None:
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    address, why = served.registered_model()
    assert address == "models:/aegan@candidate"
    assert "there is no champion yet" in why
    promote(None, "2")
    assert served.registered_model() == ("models:/aegan@champion", "the champion")


def test_commands_say_who_is_champion_as_json(
    client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*words: str, expected: int = 0) -> Any:
        monkeypatch.setattr("sys.argv", ["aegan", *words, "--json"])
        with pytest.raises(SystemExit) as ended:
            cli._main()
        assert (ended.value.code or 0) == expected
        return json.loads(capsys.readouterr().out)

    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    for champion in ("1", "3"):
        facts = answer("promote", champion, "--force", "--reason", "x")
        assert (facts["model"], facts["champion"]) == ("aegan", champion)
    fresh, unseen = answer("health", expected=2)
    assert (fresh["name"], fresh["ok"], fresh["unit"]) == ("champion", True, "days")
    assert 0 <= fresh["age"] < 1 < fresh["at_most"]
    assert (unseen["name"], unseen["ok"], unseen["age"]) == ("look", False, None)


def aliases(client: Any, model_name: str = "aegan") -> dict[str, str]:
    found = client.get_registered_model(model_name).aliases
    return {alias: str(number) for alias, number in found.items()}


def test_a_decision_is_a_version_of_the_log_with_its_tags_and_its_files(
    client: Any, tmp_path: Path
) -> None:
    page = tmp_path / "comparison.html"
    page.write_text("<html>")
    promote(None, "1")
    refused = decisions.decide(
        "aegan",
        kind="refusal",
        start="1",
        to="2",
        reasons=["worse by .3", 'a "quote"'],
        reference="abc",
        files=[page],
    )
    assert (refused.number, refused.by, refused.counts) == (2, "me@here", True)
    assert decisions.history("aegan")[1] == refused
    entry = client.get_model_version("aegan.decisions", "2")
    assert json.loads(entry.tags["reasons"]) == ["worse by .3", 'a "quote"']
    assert {name: entry.tags[name] for name in ("kind", "from", "to", "by", "reference")} == {
        "kind": "refusal",
        "from": "1",
        "to": "2",
        "by": "me@here",
        "reference": "abc",
    }
    run_id = client.get_model_version("aegan", "2").run_id
    [folder] = client.list_artifacts(run_id, "decisions")
    assert [file.path for file in client.list_artifacts(run_id, folder.path)] == [
        f"{folder.path}/comparison.html"
    ]
    assert decisions.champion("aegan") == "1"


def test_a_decision_sent_again_is_not_doubled_and_one_that_comes_late_names_who_was_first(
    client: Any,
) -> None:
    first = promote(None, "1")
    assert promote(None, "1") == first
    with pytest.raises(decisions.Outrun, match=r"the champion is version 1 by now: promotion of "):
        promote(None, "2", by="you@there")
    with pytest.raises(UserError, match="is the champion already"):
        promote("1", "1")
    with pytest.raises(UserError, match="has no version 9"):
        promote("1", "9")
    assert [entry.to for entry in decisions.history("aegan")] == ["1"]
    assert promote("1", "2").number == 2


def test_descriptions_say_who_is_champion_since_when_and_why_below_what_others_wrote(
    client: Any,
) -> None:
    client.update_model_version("aegan", "1", "My first model.")
    promote(None, "1")
    assert client.get_model_version("aegan", "1").description.startswith("My first model.\n\n**Dec")
    promote("1", "2")
    said = [client.get_model_version("aegan", number).description for number in "12"]
    assert "Champion since" in said[0]
    assert "followed by version 2." in said[0]
    assert "promotion of version 2 in place of version 1 by me@here" in said[1]
    assert "until" not in said[1]
    assert "promotion of version 2" in client.get_registered_model("aegan").description
    client.update_model_version("aegan", "2", "x" * 4900)  # no room for ours
    decisions.history("aegan")
    assert client.get_model_version("aegan", "2").description == "x" * 4900


@pytest.mark.fault("registry")
def test_an_alias_moved_by_hand_is_put_right_and_said_in_one_line(
    client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    promote(None, "1")
    promote("1", "2")
    client.set_registered_model_alias("aegan", "champion", "3")
    with caplog.at_level(logging.WARNING):
        assert tracking.pinned("models:/aegan@champion") == "models:/aegan/2"
    assert caplog.messages == [
        "the alias champion of aegan was at version 3: put right, it is version 2, by decision 2 "
        "of me@here"
    ]
    assert aliases(client) == {"champion": "2", "previous": "1"}
    client.delete_registered_model_alias("aegan", "previous")
    assert tracking.pinned("models:/aegan@previous") == "models:/aegan/1"
    assert aliases(client) == {"champion": "2", "previous": "1"}


@pytest.mark.fault("registry")
def test_aliases_from_before_the_first_decision_stay(client: Any) -> None:
    client.set_registered_model_alias("aegan", "champion", "3")
    assert decisions.champion("aegan") is None
    assert tracking.pinned("models:/aegan@champion") == "models:/aegan/3"


@pytest.mark.fault("registry")
def test_a_champion_that_was_deleted_is_one_line_that_offers_the_next(client: Any) -> None:
    promote(None, "1")
    promote("1", "2")
    promote("2", "3")
    client.delete_model_version("aegan", "2")
    assert decisions.aliased("aegan", "previous") == "1"
    client.delete_model_version("aegan", "3")
    with pytest.raises(UserError, match=r"deleted in MLflow; `aegan rollback` takes version 1$"):
        tracking.pinned("models:/aegan@champion")
    assert aliases(client) == {"previous": "1"}
    client.delete_registered_model("aegan")
    deciding.make_versions(client, 3)  # others of these numbers, which nobody has decided on
    with pytest.raises(UserError, match="deleted in MLflow; promote another"):
        decisions.champion("aegan")
    assert aliases(client) == {}


@pytest.mark.fault("registry")
def test_what_has_the_number_of_a_deleted_champion_can_be_promoted(client: Any) -> None:
    promote(None, "3")
    client.delete_registered_model("aegan")
    deciding.make_versions(client, 3)
    with pytest.raises(UserError, match="version 3 is not there any more"):
        champions.rollback("aegan", to="3")
    made = promote("3", "3")
    assert decisions.champion("aegan") == "3"
    assert aliases(client) == {"champion": "3"}
    assert "Champion since" in client.get_model_version("aegan", "3").description
    with pytest.raises(UserError, match="version 3 is the champion already"):
        promote("3", "3", by="another")
    assert [entry.number for entry in decisions.history("aegan") if entry.counts][-1] == made.number


@pytest.mark.fault("registry")
def test_who_is_champion_is_asked_of_no_clock(client: Any) -> None:
    promote(None, "1")
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute("UPDATE model_versions SET creation_time = creation_time + 90000")
        database.execute(
            "UPDATE model_versions SET creation_time = 0 WHERE name = 'aegan.decisions'"
        )
    assert decisions.champion("aegan") == "1"
    promote("1", "2")
    assert aliases(client) == {"champion": "2", "previous": "1"}


@pytest.mark.fault("registry")
def test_entries_that_are_none_of_ours_or_were_deleted_are_said_and_passed_over(
    client: Any, caplog: pytest.LogCaptureFixture, record_property: Any
) -> None:
    promote(None, "1")
    for tags in ({}, {"kind": "coup", "reasons": "[]"}, {"kind": "promotion", "reasons": "{"}):
        client.create_model_version("aegan.decisions", "models:/aegan/2", tags=tags)
    promote("1", "2")
    client.delete_model_version("aegan.decisions", "2")
    caplog.clear()
    assert [entry.to for entry in decisions.history("aegan")] == ["1", "2"]
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "version 3 is no decision of ours: passed over",
        "version 4 is no decision of ours: passed over",
        "somebody deleted 2 from the log: what it says may be wrong",
    ]
    record_property("faults", 4)


@pytest.mark.fault("names from outside")
def test_the_log_of_a_model_with_quotes_is_found_again(client: Any, record_property: Any) -> None:
    names = ("a'b", 'a"b', "a`b %_", "x' OR name != 'y", "-- a; b")
    for name in names:
        deciding.make_versions(client, 2, model_name=name)
        for start, to in ((None, "1"), ("1", "2")):
            decisions.decide(name, kind="promotion", start=start, to=to, reasons=[name])
        assert [entry.counts for entry in decisions.history(name)] == [True, True]
        assert aliases(client, name) == {"champion": "2", "previous": "1"}
    record_property("faults", len(names))


@pytest.mark.fault("killed processes")
def test_a_promotion_into_a_file_killed_early_half_way_or_late_is_whole_or_absent_once_it_ran_again(
    client: Any, record_property: Any
) -> None:
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{Path.cwd() / 'mlflow.db'}", "AEGAN_BY": "me"}
    call: dict[str, Any] = {"kind": "promotion", "start": None, "to": "1", "reasons": ["x"]}
    [whole] = deciding.decide(call, environment=store)
    assert whole.code == 0, whole.error
    points = [whole.writes // 4, whole.writes // 2, whole.writes - 1]
    champion, other = "1", "2"
    for point in points:
        call |= {"start": champion, "to": other}
        [killed] = deciding.decide(call, environment=store, kill_at=point)
        assert killed.code in (-9, 0)
        entries = decisions.history("aegan")  # which puts right what there is
        assert aliases(client)["champion"] == succession(entries)[-1].to
        [again] = deciding.decide(call, environment=store)
        assert again.code == 0, again.error
        champion, other = other, champion
        assert aliases(client) == {"champion": champion, "previous": other}
    assert [entry.counts for entry in decisions.history("aegan")] == [True] * (1 + len(points))
    record_property("faults", len(points))


@pytest.mark.fault("registry")
def test_of_four_who_promote_at_once_in_a_file_one_does_and_the_others_are_told_who(
    client: Any, record_property: Any
) -> None:
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{Path.cwd() / 'mlflow.db'}"}
    calls = [
        {"kind": "promotion", "start": None, "to": to, "reasons": [], "by": f"number {who}"}
        for who, to in enumerate(["1", "2", "3", "1"])
    ]
    outcomes = deciding.decide(*calls, environment=store)
    check_one_won(outcomes, decisions.history("aegan"))
    assert aliases(client) == {"champion": decisions.champion("aegan")}
    record_property("faults", 4)


def check_one_won(outcomes: list[deciding.Outcome], entries: list[Decision]) -> None:
    """One of these decisions counts, and each of the others was told whose."""
    [winner] = [entry for entry in entries if entry.counts]
    assert sorted(outcome.code for outcome in outcomes) == [0] + [1] * (len(outcomes) - 1)
    for outcome in outcomes:
        assert outcome.code == 0 or f"version {winner.to} by {winner.by}" in outcome.error


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A project with three registered versions whose files are there."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(write_project(tmp_path / "project"))
    for value in (1.0, 2.0, 3.0):
        scores = json.dumps({"frechet_distance": {"ema": value}})
        Path("artifacts/evaluate/metrics.json").write_text(scores)
        register.register(params.load(RegisterConfig))
    return mlflow_store.open_store().MlflowClient()


def test_a_person_promotes_and_rolls_back_what_is_whole(
    project: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert "promotion of version 1" in champions.promote("aegan", "1", force=False, reason="")
    with pytest.raises(champions.Refused, match="the gate has not seen it; run `aegan gate 2`"):
        champions.promote("aegan", "2", force=False, reason="better")
    with pytest.raises(UserError, match="say why with --reason"):
        champions.promote("aegan", "2", force=True, reason=" ")
    project.set_model_version_tag("aegan", "2", "gate", "passed")
    project.set_model_version_tag("aegan", "2", "gate_reference", "abc")
    project.set_model_version_tag("aegan", "2", "gate_champion", "3")
    with pytest.raises(champions.Refused, match="has passed it, but not against version 1, the ch"):
        champions.promote("aegan", "2", force=False, reason="")
    project.set_model_version_tag("aegan", "2", "gate_champion", "1")
    champions.promote("aegan", "2", force=False, reason="")
    assert decisions.history("aegan")[-1].reference == "abc"
    champions.promote("aegan", "3", force=True, reason="looks better")
    assert "already" in champions.promote("aegan", "3", force=False, reason="")
    shown = champions.table_of_models(champions.models("aegan")).splitlines()
    assert [line.split()[1] for line in shown[1:]] == ["-", "previous", "candidate,"]
    assert shown[3].split()[2] == "champion"

    [weights] = Path("mlruns").glob(f"1/models/{model_id(project, '2')}/**/ema.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"`aegan rollback --to 1` is whole"):
        champions.rollback("aegan", to="2")
    assert "rollback to version 1 from version 3" in champions.rollback("aegan", reason="dull")
    assert any("not those that were registered" in line for line in caplog.messages)
    with pytest.raises(UserError, match="no former champion is there"):
        champions.rollback("aegan")
    assert "rollback to version 3 from version 1" in champions.rollback("aegan", to="3")
    with pytest.raises(UserError, match="never was champion"):
        champions.rollback("aegan", to="7")
    rows = champions.table_of_decisions(decisions.history("aegan")).splitlines()
    assert [row.split()[0] for row in rows] == ["no.", "1", "2", "3", "4", "5"]
    assert rows[3].endswith("forced past the gate; looks better")


def test_a_former_champion_without_files_is_passed_over_by_a_line_that_names_it(
    project: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for version in ("1", "2", "3"):
        champions.promote("aegan", version, force=True, reason="as it comes")
    [config] = Path("mlruns").glob(f"1/models/{model_id(project, '2')}/**/config.json")
    config.unlink()
    assert "rollback to version 1 from version 3" in champions.rollback("aegan")
    [said] = [line for line in caplog.messages if "config.json" in line]
    assert re.fullmatch(r"models:/aegan/2: its file config\.json is not .*; .*", said)


def model_id(client: Any, version: str) -> str:
    found: str = client.get_model_version("aegan", version).source.removeprefix("models:/")
    return found


@pytest.mark.parametrize("alias", ["champion", "Previous"])
def test_register_points_no_alias_that_is_decided(alias: str, tmp_path: Path) -> None:
    settings = (ROOT / "params.yaml").read_text().replace("alias: candidate", f"alias: {alias}")
    (tmp_path / "params.yaml").write_text(settings)
    with pytest.raises(UserError, match="which `aegan promote` decides"):
        params.load(RegisterConfig, tmp_path / "params.yaml")


def test_who_decides_is_user_and_host_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEGAN_BY", "ci")
    assert decisions.this_person() == "ci"
    monkeypatch.delenv("AEGAN_BY")
    assert decisions.this_person().endswith(f"@{os.uname().nodename}")
