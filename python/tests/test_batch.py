"""Recorded frames through Ray Data, on the built-in example."""

import csv
import json
import pathlib
import shutil

import pytest

ray = pytest.importorskip("ray.data", reason="openvla-gguf[fleet]: Ray Data is not installed")

import ray
from openvla_gguf import InputError, OpenVLAError, batch

EXAMPLE = pathlib.Path(__file__).parents[2] / "example"
TASK = "put eggplant into pot"
TOKENS = [799, 545, 545, 799, 799, 799, 544]
ACTION = [-0.05, 0.05, 0.05, 0.0, 0.0, 0.0, 1.0]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path):
    for n in range(4):
        shutil.copy(EXAMPLE / "tabletop.png", tmp_path / f"{n}.png")
    rows = [{"image": f"{n}.png", "instruction": TASK, "action": ACTION} for n in range(4)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_frame_has_a_line_and_a_run_goes_on(folder, tmp_path):
    (folder / "2.png").write_bytes(b"no picture")
    output = tmp_path / "results.jsonl"
    run = lambda: batch.evaluate(batch.frames(folder), EXAMPLE / "tabletop.gguf", output, device="cpu")
    summary = run()
    assert (summary["frames"], summary["failed"], summary["all_actions"]) == (4, 1, 1.0)
    about, *rows = lines(output)
    assert about["model"].endswith("tabletop.gguf")
    by_frame = {row["frame"]: row for row in rows}
    assert sorted(by_frame) == ["0.png", "1.png", "2.png", "3.png"]
    assert by_frame["0.png"]["tokens"] == TOKENS
    assert by_frame["0.png"]["error"] == pytest.approx([p - a for p, a in zip(by_frame["0.png"]["predicted"], ACTION)])
    assert "format" in by_frame["2.png"]["failure"] and by_frame["2.png"]["predicted"] is None
    # Broken off in the middle of a line, it computes the missing frames and no others.
    text = output.read_text().splitlines(keepends=True)
    output.write_text("".join(text[:3]) + text[3][:20])
    kept = text[1:3]
    assert run() == summary
    assert output.read_text().splitlines(keepends=True)[1:3] == kept
    assert len(lines(output)) == 5
    with pytest.raises(OpenVLAError, match="name another output"):
        batch.evaluate(batch.frames(folder), EXAMPLE / "example.gguf", output, device="cpu")


def test_openvla_oft_is_given_its_cameras_and_state(folder, tmp_path):
    state = json.loads((EXAMPLE / "tabletop-state.json").read_text())
    shutil.copy(EXAMPLE / "tabletop-wrist.png", folder / "wrist.png")
    row = {"image": "0.png", "wrist_image": "wrist.png", "state": state, "instruction": TASK, "action": ACTION}
    (folder / "steps.jsonl").write_text(json.dumps(row))
    summary = batch.evaluate(batch.frames(folder), EXAMPLE / "tabletop-oft.gguf", tmp_path / "out.jsonl", device="cpu")
    assert (summary["frames"], summary["failed"]) == (1, 0)


def test_a_csv_is_an_index_too(folder):
    (folder / "steps.jsonl").unlink()
    with (folder / "actions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "instruction", "action"])
        writer.writeheader()
        writer.writerow({"image": "0.png", "instruction": TASK, "action": json.dumps(ACTION)})
    (row,) = batch.frames(folder).take_all()
    assert (row["frame"], row["instruction"], list(row["action"])) == ("0.png", TASK, ACTION)


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 1"),
        ("[]", "no image and no instruction and no action"),
        ('{"image": "0.png", "instruction": "x"}', "no action"),
        ('{"image": "0.png", "instruction": "x", "action": [NaN]}', "finite"),
        ('{"image": "0.png", "instruction": "x", "action": "left"}', "the action is left"),
        ("", "no frames"),
    ],
)
def test_a_wrong_index_is_named(folder, line, said):
    (folder / "steps.jsonl").write_text(line)
    with pytest.raises(InputError, match=said):
        batch.frames(folder)


def test_what_else_is_wrong_is_said_at_once(folder, tmp_path):
    (folder / "actions.csv").write_text("")
    with pytest.raises(InputError, match="steps.jsonl and actions.csv"):
        batch.frames(folder)
    with pytest.raises(InputError, match="has none of"):
        batch.frames(EXAMPLE / "src")
    with pytest.raises(InputError, match="no column frame and no action"):
        dataset = ray.data.from_items([{"image": "x", "instruction": TASK}])
        batch.evaluate(dataset, EXAMPLE / "tabletop.gguf", tmp_path / "out.jsonl")
