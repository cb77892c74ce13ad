"""Pages on runs: what they show, what becomes of damaged and hostile files, that they need nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrnode
from pyrnode import cli, pages
from pyrnode.errors import CheckpointError, ConfigError
from pyrnode.pages import curves, live, markup, reading
from pyrnode.particles import particle_paths, straightness
from pyrnode.runs import RunFolder, read_metrics
from tests.page_runs import HOSTILE, SCORE, Look, write_run

SHOWN_IN_WORDS = "This could not be shown"


def look(*runs: Path, out: Path) -> Look:
    found = Look(pages.report(*runs, out=out).read_text(encoding="utf-8"))
    assert found.problems == []
    assert SHOWN_IN_WORDS not in found.text
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pages") / "trained"
    settings = {"samples": 300, "hidden": [8], "max_steps": 6, "validate_every": 3, "batch_size": 64}
    pyrnode.train("8gaussians", out=out, **settings, progress=False)
    return out


# -- what it shows ---------------------------------------------------------------------------------------------------


def test_a_page_of_a_trained_run_has_its_numbers_pictures_and_paths(trained: Path, tmp_path: Path) -> None:
    page = look(trained, out=tmp_path / "page.html")
    records = [record for record in read_metrics(trained) if "loss" in record]
    (run,) = page.data["runs"]
    assert run["name"] == "trained"
    assert run["train"]["step"] == [1, 2, 3, 4, 5, 6]
    for key in curves.TRAIN:
        assert run["train"][key] == pytest.approx([record[key] for record in records], rel=1e-5)
    assert run["checked"]["step"] == [3, 6]
    score = json.loads((trained / "report.json").read_text())["score"]["nats"]
    assert markup.decimals(score) in page.text
    images = page.all("img")
    pictures = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images]
    assert pictures == [(trained / name).read_bytes() for name in ("density.png", "calibration.png", "solvers.png")]
    assert all(len(image["alt"]) > 20 for image in images)


def test_paths_are_those_of_the_flows_samples(trained: Path, tmp_path: Path) -> None:
    page = look(trained, out=tmp_path / "page.html")
    flow = pyrnode.load(trained)
    times, states = particle_paths(flow, flow.sample(150, seed=flow.config.seed), 33)
    (paths,) = page.data["paths"]
    assert paths["times"] == pytest.approx(times.tolist(), abs=1e-6)
    np.testing.assert_allclose(paths["z"], states.double().numpy(), atol=6e-4)
    assert markup.number(straightness(states)) in page.text
    (slider,) = [given for given in page.all("input") if given.get("id") == "time"]
    assert slider["type"] == "range"


def test_numbers_stand_on_one_line_and_sentences_that_begin_with_one_do_not() -> None:
    numbers = ["−2.087 ± 0.012", "-3.29", "17", "4 min 40 s (5 steps)"]
    texts = ["1228 weights against 8836; -3.2921 against -2.8298 nats", "–", "potential flow 1.002"]
    table = markup.table(["", *map(str, range(7))], [["a row", *numbers, *texts]], caption="caption")
    assert re.findall(r'<td class="figures">(.*?)</td>', table) == numbers
    assert re.findall(r"<td>(.*?)</td>", table) == texts


def test_a_comparison_has_what_differs_and_each_run_by_a_name_of_its_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{folder}/run", kinetic=value) for folder, value in (("a", 0.5), ("b", 0.25))]
    page = look(*runs, out=tmp_path / "page.html")
    assert [run["name"] for run in page.data["runs"]] == ["a/run", "b/run"]
    settings = page.text[page.text.index("Settings that differ") :]
    assert re.match(r"Settings that differ.* Setting a/run b/run penalties\.kinetic 0\.5 0\.25 All settings", settings)
    assert len([given for given in page.all("input") if given.get("type") == "checkbox"]) == 2


def test_a_folder_of_runs_stands_for_them_and_each_run_is_there_once(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "all" / "one"), write_run(tmp_path / "all" / "two")
    (tmp_path / "all" / "notes").mkdir()
    assert pages.found([tmp_path / "all", one, f"{two}/../two"]) == [one, two]


def test_scores_are_compared_only_on_the_same_data(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, **{"data.name": name}) for name in ("moons", "rings")]
    page = look(*runs, out=tmp_path / "page.html")
    assert "On moons" in page.text
    assert "On rings" in page.text
    assert "The best score" not in page.text


def test_a_number_stands_behind_every_curve(tmp_path: Path) -> None:
    page = look(write_run(tmp_path / "run", steps=40), out=tmp_path / "page.html")
    table = page.text[page.text.index("Kinetic energy E per dimension, at some steps") :]
    assert re.match(r".*? Step run 1 0\.1 ", table)
    tables = [given for given in page.all("details") if given.get("id", "").startswith("numbers-")]
    assert len(tables) == len(page.data["charts"])


# -- curves ----------------------------------------------------------------------------------------------------------


def test_thinned_curves_are_means_over_steps() -> None:
    steps = np.arange(1, 101, dtype=float)
    values = np.where(steps % 10 == 3, np.nan, steps**2)
    found = curves.thinned({"step": steps, "x": values}, 10)
    np.testing.assert_allclose(found["step"], [np.mean(steps[i : i + 10]) for i in range(0, 100, 10)])
    np.testing.assert_allclose(found["x"], [np.nanmean(values[i : i + 10]) for i in range(0, 100, 10)])


def test_runs_of_other_lengths_have_points_at_the_same_steps(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps=steps) for name, steps in (("long", 3000), ("short", 1500))]
    stories = [reading.read(run) for run in runs]
    found, width = curves.of_runs(stories)
    assert width == 3
    long, short = (table["train"]["step"] for table in found)
    assert len(long) == 1000
    np.testing.assert_array_equal(long[:500], short)


def test_many_long_runs_make_a_page_that_is_light(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{i:02d}", steps=2000, every=500, seed=i) for i in range(30)]
    path = pages.report(*runs, out=tmp_path / "page.html")
    assert path.stat().st_size < 3_000_000
    page = Look(path.read_text(encoding="utf-8"))
    assert page.problems == []
    assert sum(len(run["train"]["step"]) for run in page.data["runs"]) <= curves._POINTS


# -- files that cannot be trusted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / name, **{"data.name": f"{name}.csv"})
    report = SCORE | {"notes": [name], "solver": name, "baselines": {name: SCORE["score"]}}
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    (run / "versions.json").write_text(json.dumps({"engine": name, name: name, "command": [name]}), encoding="utf-8")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 40, "event": "restart", "cause": name}) + "\n{}\n")
    other = write_run(tmp_path / "other")
    for runs in ([run], [run, other]):
        page = look(*runs, out=tmp_path / "page.html")
        assert page.data["runs"][0]["name"] == markup.plain(name)
        assert markup.plain(name) in page.text
        assert {given.get("src", "data:")[:5] for given in page.all("img")} <= {"data:"}
        assert [key for _, given in page.tags for key in given if key.startswith("on")] == []
        expected = ["data"] + [""] * len(markup.SCRIPTS)
        assert [given.get("id", "") for given, _ in page.scripts] == expected


def test_what_is_invisible_is_shown_as_an_escape() -> None:
    assert markup.text("a\x00b\u202ec\ud800<") == "a\\x00b\\x202ec\\ud800&lt;"
    assert markup.text(markup.Html("<b>")) == "<b>"
    assert len(markup.plain("x" * 10**6)) < 2100


def test_json_in_a_script_never_ends_it() -> None:
    value = {"</script><!--": "<script>\u2028&"}
    written = markup.embedded(value)
    assert not set("<>&\u2028") & set(written)
    assert json.loads(written) == value


DAMAGE: dict[str, tuple[str, bytes, str]] = {
    "settings": ("config.toml", b"a = [", "config.toml is damaged"),
    "settings of another version": ("config.toml", b"[new]\nthing = 3\n", "not those of this version"),
    "a score that is none": ("report.json", b'{"score": 3, "baselines": [1], "notes": 4, "E": "x"}', "–"),
    "a score of half a file": ("report.json", b'{"score": {"na', "report.json is damaged"),
    "a score that is a list": ("report.json", b"[]", "it holds a list"),
    "a score beyond all range": (
        "report.json",
        b'{"score": {"nats": 1e308, "nats_error": 1e308}, "baselines": {"a": {"nats": -1e308}}}',
        "Scores",
    ),
    "a score of too many digits": (
        "report.json",
        b'{"score": {"nats": ' + b"9" * 5000 + b"}}",
        "report.json is damaged",
    ),
    "too deep": ("versions.json", b"[" * 100_000, "versions.json is damaged"),
    "versions that are none": ("versions.json", b'{"packages": 3, "command": "x", "engine": null}', "Versions"),
    "no text": ("config.toml", b"\xff\xfe\x00", "config.toml is damaged"),
    "no picture": ("samples.png", b"<svg onload=alert(1)>", "samples.png is no PNG"),
    "a line in the middle": (
        "metrics.jsonl",
        b'{"step": 1, "loss": 1, "nll": 2}\nx\n{"step": 2}\n',
        "line 2 cannot be read",
    ),
    "a line that is being written": (
        "metrics.jsonl",
        b'{"step": 1, "loss": 1, "nll": 2}\n{"step": 2, "lo',
        "step 1 of 40",
    ),
    "numbers that are none": ("metrics.jsonl", b'{"step": 1, "loss": NaN, "nll": Infinity}\n', "step 1 of 40"),
    "nothing": ("metrics.jsonl", b"", "step 0 of 40"),
    "a model that is none": ("model.safetensors", b"x" * 100, "could not be followed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_and_the_rest_is_shown(kind: str, tmp_path: Path) -> None:
    file, content, said = DAMAGE[kind]
    run = write_run(tmp_path / "run")
    (run / file).write_bytes(content)
    for runs in ([run], [run, write_run(tmp_path / "whole")]):
        found = Look(pages.report(*runs, out=tmp_path / "page.html").read_text(encoding="utf-8"))
        assert found.problems == []
        assert said in found.text
        assert found.data["charts"]
        assert (SHOWN_IN_WORDS in found.text) == (kind == "a score beyond all range")


def test_a_file_that_would_block_or_is_too_large_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    for file in ("samples.png", "report.json", ".lock"):
        (run / file).unlink(missing_ok=True)
        os.mkfifo(run / file)
    monkeypatch.setitem(reading._MOST, "metrics.jsonl", 10)
    page = look(run, out=tmp_path / "page.html")
    assert "samples.png cannot be read (it is no regular file)" in page.text
    assert "report.json cannot be read (it is no regular file)" in page.text
    assert "no more than 10 are read" in page.text


def test_a_run_that_goes_on_is_known_by_its_process(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert RunFolder(run).owner() is None
    with RunFolder(run).locked():
        assert RunFolder(run).owner() == os.getpid()
        assert reading.read(run).state == "running, step 40 of 40"
    (run / ".lock").write_text("999999999")
    assert RunFolder(run).owner() is None
    for nonsense in ("0", "-1", "x", "9" * 30, ""):
        (run / ".lock").write_text(nonsense)
        assert RunFolder(run).owner() is None


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "out", "error", "said"),
    [
        ([], None, ConfigError, "no run is named"),
        (["run"], "page.txt", ConfigError, r"end the page's name in \.html"),
        (["nowhere"], None, CheckpointError, "does not exist: expected the folder of a run"),
        (["run/config.toml"], None, CheckpointError, "is a file: expected the folder"),
        (["empty"], None, CheckpointError, "holds no run"),
        (["run"], "own.html", CheckpointError, "is no page of pyrnode's, and stays"),
        (["run"], "no/folder/page.html", CheckpointError, "cannot write"),
        (["a\x00b"], None, ConfigError, "expected the folder of a run"),
        ([3], None, ConfigError, "expected the folder of a run"),
    ],
)
def test_what_cannot_be_shown_is_an_error(
    runs: list[Any], out: str | None, error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.html").write_text("<p>mine</p>")
    with pytest.raises(error, match=said):
        pages.report(*runs, out=out)
    assert (tmp_path / "own.html").read_text() == "<p>mine</p>"
    assert not (tmp_path / "run" / "report.html").exists()


def test_more_runs_than_a_page_shows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST", 1)
    with pytest.raises(ConfigError, match="2 runs are more than a page shows"):
        pages.report(write_run(tmp_path / "a"), write_run(tmp_path / "b"))


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_page_needs_nothing_from_elsewhere_and_runs_only_what_is_ours(trained: Path, tmp_path: Path) -> None:
    path = pages.report(trained, out=tmp_path / "page.html")
    page = Look(path.read_text(encoding="utf-8"))
    for _, given in page.tags:
        assert not {"srcset", "action", "style"} & given.keys()
        assert given.get("href", "#").startswith("#")
        assert given.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    (policy,) = [given["content"] for given in page.all("meta") if given.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "connect-src 'none'" in policy
    codes = [text for given, text in page.scripts if not given]
    digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in codes]
    assert re.search("script-src ([^;]*)", policy)[1].split() == [f"'sha256-{digest}'" for digest in digests]  # type: ignore[index]
    assert codes == [markup.asset(file) for file in markup.SCRIPTS]


def test_headings_labels_and_targets_are_in_order(trained: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    for runs in ([trained], [trained, other]):
        page = look(*runs, out=tmp_path / "page.html")
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
        targets = {given["href"][1:] for given in page.all("a")}
        targets |= {
            given[key]
            for _, given in page.tags
            for key in ("for", "aria-labelledby", "aria-describedby")
            if key in given
        }
        assert targets <= page.ids
        named = {given["for"] for given in page.all("label") if "for" in given}
        names = [i for i, (tag, given) in enumerate(page.tags) if tag in ("input", "select")]
        for i in names:  # a label around it, or one that names it
            assert page.tags[i][1]["id"] in named or page.tags[i - 1][0] == "label"
        assert page.tags[0] == ("html", {"lang": "en"})


def test_a_page_of_ours_is_renewed_and_the_run_is_not_touched(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert pyrnode.report(run) == run / "report.html"
    assert pyrnode.report(run).read_bytes() == (run / "report.html").read_bytes()
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert after.pop("report.html")
    assert after == before


def test_the_library_is_the_one_that_is_named() -> None:
    said = dict(re.findall(r"\| `(uplot[\w.]+)` \| `([0-9a-f]{64})` \|", markup.asset("README.md")))
    assert said.keys() == {"uplot.min.js", "uplot.min.css"}
    for file, digest in said.items():
        assert hashlib.sha256(markup.asset(file).encode()).hexdigest() == digest
    assert "(v1.6.32)" in markup.asset("uplot.min.js")[:80]
    assert markup.asset("uplot.LICENSE").startswith("The MIT License")


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run = write_run(tmp_path / "run")
    assert cli.main(["report", str(run), "--open"]) == 0
    assert capsys.readouterr().out == f"written to {run}/report.html\n"
    assert opened == [(run / "report.html").as_uri()]
    assert cli.main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": f"{run}/report.html"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--live", "--out", "x.html"], "--live serves the page"), (["--port", "80"], "--port is for --live")],
)
def test_arguments_that_contradict_are_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(write_run(tmp_path / "run")), *arguments]) == 1
    assert said in capsys.readouterr().err


# -- following a run -------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[live.Server]:
    with live.Server([write_run(tmp_path / "run", steps=20)]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: live.Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_news_follow_the_files_which_nobody_changes(server: live.Server) -> None:
    (run,) = server.folders
    before = sorted((path.name, path.read_bytes()) for path in run.iterdir())
    status, _, page = ask(server, f"/{server.secret}/")
    assert status == 200
    found = Look(page.decode())
    assert found.problems == []
    assert "connect-src 'self'" in next(g["content"] for g in found.all("meta") if "http-equiv" in g)
    status, headers, first = ask(server, f"/{server.secret}/news")
    assert (status, json.loads(first)["ended"]) == (200, True)
    places = {given["data-part"] for _, given in found.tags if "data-part" in given}
    assert places | {"runs"} == json.loads(first)["parts"].keys()
    assert ask(server, f"/{server.secret}/news", **{"If-None-Match": headers["ETag"]})[0] == 304
    assert sorted((path.name, path.read_bytes()) for path in run.iterdir()) == before
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "loss": 1.0, "nll": 7.5, "seconds": 3}\n')
    with RunFolder(run).locked():
        status, _, second = ask(server, f"/{server.secret}/news", **{"If-None-Match": headers["ETag"]})
    news = json.loads(second)
    assert status == 200
    assert news["data"]["runs"][0]["train"]["nll"][-1] == 7.5
    assert (news["said"], news["ended"]) == ("run: running, step 21", False)


def test_the_server_answers_nobody_else_and_serves_nothing_else(server: live.Server) -> None:
    own = f"/{server.secret}/"
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}{own}"
    for path in ("/", "/news", f"{own}config.toml", f"{own}../config.toml", f"/x{own[1:]}"):
        assert ask(server, path)[0] == 404
    assert ask(server, own, Host="evil.example")[0] == 404
    assert ask(server, own, method="POST")[0] == 501


def test_a_folder_that_goes_is_said(server: live.Server) -> None:
    (run,) = server.folders
    for path in run.iterdir():
        path.unlink()
    assert ask(server, f"/{server.secret}/news")[0] == 410


@pytest.mark.parametrize("port", [-1, 70000])
def test_a_port_that_is_none_is_an_error(port: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"port = {port}: cannot listen there"):
        live.Server([write_run(tmp_path / "run")], port=port)
