"""Which checkpoints exist, whatever a crash or a stranger left in the directory; and which may be deleted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint import layout
from trainer.checkpoint.retention import to_delete

pytestmark = pytest.mark.fast

DIGEST = "0123456789abcdef"


def manifest_of(step: object, **changes: Any) -> dict[str, Any]:
    files = {
        "weights-00000.safetensors": {"bytes": 5, "xxh3_64": DIGEST},
        "state.json": {"bytes": 2, "xxh3_64": DIGEST},
    }
    return {"format": layout.FORMAT, "version": 1, "step": step, "files": files, "tensors": {}, "state": {}, **changes}


def commit(run: Path, step: int, **changes: Any) -> Path:
    directory = layout.step_directory(run, step)
    directory.mkdir(parents=True)
    (directory / "weights-00000.safetensors").write_bytes(b"12345")
    (directory / "state.json").write_bytes(b"{}")
    layout.manifest_path(directory).write_text(json.dumps(manifest_of(step, **changes)))
    return directory


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path: Path) -> None:
    directory = commit(tmp_path, 50)
    path, fields = layout.manifest_path(directory), manifest_of(50)
    path.write_text(layout.manifest_text(fields))
    content = path.read_bytes()
    assert layout.read_manifest(directory) == fields
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 7]) + content[place + 1 :])
        found = layout.read_manifest(directory)
        # A flip in the name of the hash leaves everything else as it was.
        assert found is None or {name: found[name] for name in fields} == fields, place
    assert layout.read_manifest(directory) is None  # the flip in the last byte


def test_an_edited_manifest_is_taken_as_it_is(tmp_path: Path) -> None:
    directory = commit(tmp_path, 50)
    path = layout.manifest_path(directory)
    fields = json.loads(layout.manifest_text(manifest_of(50)))
    path.write_text(json.dumps(fields | {"version": 7}))
    assert layout.read_manifest(directory) == manifest_of(50, version=7)
    path.write_text(layout.manifest_text(fields | {"version": 7}))
    assert layout.read_manifest(directory) == manifest_of(50, version=7)


def test_names(tmp_path: Path) -> None:
    assert layout.step_directory(tmp_path, 50) == tmp_path / "checkpoints/step-00000050"
    assert layout.temporary_directory(tmp_path, 50, "0001").name == ".step-00000050.tmp-0001"
    assert layout.pointer_path(tmp_path) == tmp_path / "checkpoints/latest"


@given(st.integers(0, 10**12))
def test_step_names_round_trip(step: int) -> None:
    assert layout.parse_step_name(layout.step_name(step)) == step


@given(st.text())
def test_no_other_name_is_a_step(name: str) -> None:
    step = layout.parse_step_name(name)
    assert step is None or layout.step_name(step) == name


@pytest.mark.parametrize(
    "name", ["step-50", "step-00000050\n", "step-000000050", "step-0000005٠", "step--0000050", "../step-00000050", ""]
)
def test_near_misses_are_no_steps(name: str) -> None:
    assert layout.parse_step_name(name) is None


def test_nothing_there(tmp_path: Path) -> None:
    assert layout.step_directories(tmp_path) == []
    assert layout.newest(tmp_path) is None
    assert layout.read_pointer(tmp_path) is None
    assert layout.temporary_directories(tmp_path) == []


def test_committed_checkpoints_in_order(tmp_path: Path) -> None:
    for step in (100, 50, 123_456_789):
        commit(tmp_path, step)
    assert [step for step, _ in layout.step_directories(tmp_path)] == [50, 100, 123_456_789]
    assert layout.newest(tmp_path) == (123_456_789, layout.step_directory(tmp_path, 123_456_789))
    assert all(layout.is_complete(path) for _, path in layout.step_directories(tmp_path))


def test_temporary_directories_are_found_and_are_no_checkpoints(tmp_path: Path) -> None:
    done = commit(tmp_path, 50)
    unfinished = layout.temporary_directory(tmp_path, 60, "0001-abc")
    shutil.copytree(done, unfinished)
    assert layout.temporary_directories(tmp_path) == [unfinished]
    assert [step for step, _ in layout.step_directories(tmp_path)] == [50]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"step": 50}', b'{"format": "other", "step": 50}',
     json.dumps(manifest_of(51)).encode(), json.dumps(manifest_of("50")).encode(),
     json.dumps(manifest_of(True)).encode(), json.dumps(manifest_of(50.0)).encode()],
)  # fmt: skip
def test_a_manifest_that_is_not_ours_makes_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    commit(tmp_path, 40)
    directory = commit(tmp_path, 50)
    layout.manifest_path(directory).write_bytes(content)
    assert layout.read_manifest(directory) is None
    assert not layout.is_complete(directory)
    assert [step for step, _ in layout.step_directories(tmp_path)] == [40]
    assert layout.newest(tmp_path) == (40, layout.step_directory(tmp_path, 40))


@pytest.mark.parametrize(
    "files",
    [None, [], {}, {"a": None}, {"a": {}}, {"a": {"bytes": "5", "xxh3_64": DIGEST}},
     {"a": {"bytes": -1, "xxh3_64": DIGEST}}, {"a": {"bytes": True, "xxh3_64": DIGEST}}, {"a": {"bytes": 5}},
     {"a": {"bytes": 5, "xxh3_64": "xyz"}}, {"a": {"bytes": 4, "xxh3_64": DIGEST}}],
)  # fmt: skip
def test_a_file_list_that_is_wrong_makes_it_incomplete(tmp_path: Path, files: Any) -> None:
    directory = commit(tmp_path, 50, files=files)
    (directory / "a").write_bytes(b"12345")
    assert not layout.is_complete(directory)
    assert len(layout.find_problems(directory)) == 1
    assert layout.newest(tmp_path) is None


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/hostname", "a/b", ".hidden", "..", ".", "", "a\n", "a\0b", "a b", "é", "a" * 300,
     "manifest.json", "-rf", "C:\\x"],
)  # fmt: skip
def test_hostile_file_names_are_refused(tmp_path: Path, name: str) -> None:
    assert not layout.is_file_name(name)
    directory = commit(tmp_path, 50, files={name: {"bytes": 5, "xxh3_64": DIGEST}})
    (directory.parent / "secret").write_bytes(b"12345")
    (directory / "a").mkdir()
    (directory / "a" / "b").write_bytes(b"12345")
    assert not layout.is_complete(directory)
    assert "no plain file name" in layout.find_problems(directory)[0]


def test_missing_cut_linked_or_irregular_files_make_it_incomplete(tmp_path: Path) -> None:
    def problem_after(change: Any) -> str:
        run = tmp_path / change.__name__
        directory = commit(run, 50)
        assert layout.is_complete(directory)
        change(directory / "weights-00000.safetensors")
        (problem,) = layout.find_problems(directory)
        return problem

    def link(path: Path) -> None:
        shutil.move(path, path.parent.parent / "elsewhere")
        path.symlink_to(path.parent.parent / "elsewhere")

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def cut(path: Path) -> None:
        os.truncate(path, 3)

    def remove(path: Path) -> None:
        path.unlink()

    assert "not a regular file" in problem_after(link)
    assert "not a regular file" in problem_after(folder)
    assert "3 bytes, the manifest says 5" in problem_after(cut)
    assert "No such file" in problem_after(remove)


def test_links_are_no_checkpoints(tmp_path: Path) -> None:
    outside = commit(tmp_path / "other", 60)
    inside = commit(tmp_path, 50)
    layout.step_directory(tmp_path, 60).symlink_to(outside)
    assert [step for step, _ in layout.step_directories(tmp_path)] == [50]
    assert not layout.is_complete(layout.step_directory(tmp_path, 60))
    manifest = layout.manifest_path(inside)
    shutil.move(manifest, tmp_path / "manifest.json")
    manifest.symlink_to(tmp_path / "manifest.json")
    assert layout.step_directories(tmp_path) == []


def test_a_checkpoint_of_a_newer_version_is_not_overlooked(tmp_path: Path) -> None:
    commit(tmp_path, 50)
    newer = commit(tmp_path, 60, version=99)
    assert layout.newest(tmp_path) == (60, newer)


@pytest.mark.parametrize("text", ["step-00000050", "step-00000050\n"])
def test_the_pointer_is_followed(tmp_path: Path, text: str) -> None:
    pointed = commit(tmp_path, 50)
    commit(tmp_path, 60)
    layout.pointer_path(tmp_path).write_text(text)
    assert layout.read_pointer(tmp_path) == (50, pointed)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\n", b"garbage", b"\xff\xfe\x00", b"step-00000070", b"../checkpoints/step-00000050",
     b"/step-00000050", b"step-00000050\nstep-00000060", b"x" * 100_000, b"global_step50"],
)  # fmt: skip
def test_a_bad_pointer_falls_back_to_the_newest(tmp_path: Path, content: bytes | None) -> None:
    commit(tmp_path, 50)
    newest = commit(tmp_path, 60)
    if content is not None:
        layout.pointer_path(tmp_path).write_bytes(content)
    assert layout.read_pointer(tmp_path) == (60, newest)


def test_a_pointer_to_a_damaged_checkpoint_falls_back(tmp_path: Path) -> None:
    good = commit(tmp_path, 50)
    damaged = commit(tmp_path, 60)
    layout.pointer_path(tmp_path).write_text("step-00000060\n")
    (damaged / "state.json").unlink()
    assert layout.read_pointer(tmp_path) == (50, good)


def test_a_pointer_that_is_a_directory_falls_back(tmp_path: Path) -> None:
    good = commit(tmp_path, 50)
    layout.pointer_path(tmp_path).mkdir()
    assert layout.read_pointer(tmp_path) == (50, good)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "protected", "expected"),
    [
        (3, None, (), [50, 100, 150]),
        (1, None, (), [50, 100, 150, 200, 250]),
        (1, 100, (), [50, 150, 250]),
        (2, None, (50,), [100, 150, 200]),
        (9, None, (), []),
        (0, None, (), [50, 100, 150, 200, 250]),
    ],
)
def test_retention(keep_last: int, keep_every: int | None, protected: tuple[int, ...], expected: list[int]) -> None:
    assert to_delete([300, 50, 100, 150, 250, 200], keep_last, keep_every, protected) == expected


@given(st.sets(st.integers(1, 500)), st.integers(1, 5), st.none() | st.integers(1, 60), st.sets(st.integers(1, 500)))
def test_retention_keeps_what_it_must(
    steps: set[int], keep_last: int, keep_every: int | None, protected: set[int]
) -> None:
    deleted = to_delete(steps, keep_last, keep_every, protected)
    kept = steps - set(deleted)
    assert deleted == sorted(deleted)
    assert set(deleted) <= steps
    assert kept >= set(sorted(steps)[-keep_last:]) | (steps & protected)
    for step in deleted:
        assert keep_every is None or step % keep_every
    # Deleting again changes nothing.
    assert to_delete(kept, keep_last, keep_every, protected) == []
